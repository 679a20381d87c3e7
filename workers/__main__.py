"""`python -m workers recipe.json --out DIR`: one training run, by hand or under a supervisor.

`python -m workers describe [NAME ...]` lists the methods and metrics, or the settings of those named.

Exit status: 0 with a product, 1 failed, 75 stopped because it was asked to.
"""

from __future__ import annotations

import os
import signal
import sys

from workers.errors import ExplainedError
from workers.one_job import (
    EXIT_FAILED,
    Control,
    Terminal,
    die_with_parent,
    dump_stacks_when_asked,
    event_writer,
    parse,
    quiet_environment,
    run,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and gives its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["describe"]:
        return _describe(given[1:])
    if given[:1] == ["--resident"]:
        quiet_environment()
        from workers.resident import serve

        return serve(given[1:])
    options = parse(arguments)
    control = Control()
    if options.supervised:
        die_with_parent()
        dump_stacks_when_asked()
        control.watch(sys.stdin.buffer)
    report = event_writer(options.events) if options.events is not None else Terminal(sys.stdout)
    if options.events is not None:
        # Libraries print what they like; it belongs into the supervisor's log, with the errors.
        sys.stdout = sys.stderr
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: control.ask("checkpoint")),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: control.interrupt()),
    }
    try:
        return run(options, report, control)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(names: list[str]) -> int:
    from workers.describing import describe

    try:
        print(describe(names))
    except ExplainedError as error:
        print(f"{error.message} {error.next_step}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    status = main()
    # Threads of libraries must not hold up the end, nor the listener that waits for the supervisor.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

"""`python -m tests.planted`: makes adapters with planted faults through the browser and prints what the studio says.

    python -m tests.planted                           (both sets of five, on a base of two layers)
    python -m tests.planted --set 2 --out FOLDER      (the second; the planted truth, files and pictures stay there)

It starts a studio of its own: Postgres, Redis, web server, workers and Chromium. Exit status 1 when anything that a
page says is not what was planted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# Before Django reads its settings: it starts the servers and names them in the environment.
import tests.servers  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__.split("\n\n")[0])
    parser.add_argument("--set", type=int, choices=(1, 2), action="append", dest="sets", help="both by default")
    parser.add_argument("--out", type=Path, help="keeps the truth, the uploaded files and pictures of the pages here")
    options = parser.parse_args()
    os.environ["DJANGO_SETTINGS_MODULE"] = "studio.settings"
    # Playwright keeps an event loop running in this thread, which is not one that Django's queries could block.
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)
    with tempfile.TemporaryDirectory() as temporary:
        return run(options, Path(temporary))


def run(options: argparse.Namespace, temporary: Path) -> int:
    from django.conf import settings

    from studio.accounts.models import Role, Team
    from tests.conftest import make_member
    from tests.end_to_end.site import running_site
    from tests.planted.running import WARM, register_base, run_set, take_pictures
    from tests.planted.telling import table, wrongs

    team = Team.objects.create(name="Support", slug="support")
    trainer, lead = make_member("tom", team, Role.TRAINER), make_member("lena", team, Role.LEAD)
    register_base(Path(settings.DATA_DIR) / "base_models" / "taught")
    wrong = []
    with running_site(temporary, worker=WARM) as root:
        for number in options.sets or (1, 2):
            started = time.monotonic()
            folder = (options.out or temporary) / f"set-{number}"
            made = run_set(number, root, folder, trainer=trainer, lead=lead)
            print(f"set {number}, {time.monotonic() - started:.0f} s\n\n{table(made)}\n", flush=True)
            wrong += [sentence for one in made for sentence in wrongs(one)]
            if options.out:
                take_pictures(made, root, folder, lead=lead)
    for sentence in wrong:
        print(f"WRONG: {sentence}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

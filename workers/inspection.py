"""Inspects a dataset file in a process of its own: `python -m workers.inspection rows|tokens FILE ...`.

What people upload is read here, not in the web or queue process: with a limit on memory, no database and no
network of its own. It writes one JSON object per line to standard output and ends with "done" or "refused".
"""

from __future__ import annotations

import argparse
import heapq
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.carriers import jsonl_row, sniff
from workers.errors import DatasetError
from workers.examples import (
    AnyExample,
    Example,
    Message,
    PreferenceExample,
    Problem,
    TextExample,
    UnpairedExample,
)
from workers.formats import get_format
from workers.limited import PROGRESS_SECONDS, add_file, emit, limited, refusals_emitted
from workers.quality import PrintOf, fingerprint, print_of_texts
from workers.reading import SURE, column_names, read_head, read_row, read_rows, recognise_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from workers.plain_rows import PlainRows

MAX_PROBLEMS = 10_000
MAX_TURNS = 20
MAX_COMPARED_ROWS = 1_000_000
"""Different rows that are remembered, in about 100 MB, to find those that come again."""
FAST_FORMATS = frozenset({"messages", "sharegpt"})
FAST_FROM_BYTES = 2 * 1024**2
"""Formats whose ordinary rows `workers/fast_rows.py` counts, in files from this size on."""
MIN_USABLE = 10
MIN_PAIRS, MUCH = 20, 0.9
"""Pairs from which a share of longer chosen answers says something, and the share that is remarked on."""
CUTS = (512, 1024, 2048)
NUM_LONGEST = 100
"""Rows that are listed with their lengths: those that a maximum length cuts first."""
TOKEN_BINS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768, 65536)
CHARACTER_BINS = (100, 200, 400, 600, 800, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 16000, 32000, 64000, 128_000)


class Histogram:
    """Counts by upper bound; what exceeds the last bound falls into a bin that ends at the longest."""

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.num = self.total = self.longest = 0

    def add_all(self, values: NDArray[np.int64]) -> None:
        if not len(values):
            return
        import numpy as np

        for place, num in enumerate(np.bincount(np.searchsorted(self._bounds, values)).tolist()):
            self._counts[place] += num
        self.num += len(values)
        self.total += int(values.sum())
        self.longest = max(self.longest, int(values.max()))

    def add(self, value: int, num: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += num
        self.num += num
        self.total += num * value
        self.longest = max(self.longest, value)

    def to_dict(self) -> dict[str, Any]:
        """{num_rows, total, longest, histogram: [[upper bound, rows], ...]} from the first to the last filled bin."""
        bins = list(zip((*self._bounds, max(self.longest, self._bounds[-1] + 1)), self._counts, strict=True))
        filled = [index for index, (_, count) in enumerate(bins) if count]
        shown = bins[filled[0] : filled[-1] + 1] if filled else []
        return {
            "num_rows": self.num,
            "total": self.total,
            "longest": self.longest,
            "histogram": [list(one) for one in shown],
        }


def inspect_rows(path: Path, format_name: str, columns: dict[str, str]) -> None:
    """Recognise the format unless it is given, then read every row: counts, problems and statistics."""
    head = read_head(path)
    guess = recognise_rows(head)
    sure = bool(format_name) or (guess is not None and guess.confidence >= SURE)
    if not format_name and guess is not None:
        format_name, columns = guess.format, guess.columns
    emit(
        "recognised",
        carrier=sniff(path),
        format=format_name,
        columns=columns,
        confidence=guess.confidence if guess else 0.0,
        column_names=column_names(head)[:200],
        is_sure=sure,
    )
    if sure:
        _read_all(path, format_name, columns)
    elif not head:
        # Not one row could be read: their problems say why.
        _read_all(path, "mapped", {})
    else:
        emit("done", needs_mapping=True)


def _read_all(path: Path, format_name: str, columns: dict[str, str]) -> None:
    is_large = path.stat().st_size >= FAST_FROM_BYTES
    if is_large and format_name in FAST_FORMATS and sniff(path).partition(".")[0] == "jsonl":
        _read_lines(path, format_name, columns)
        return
    tally = Tally()
    for example, problems in read_rows(path, format_name, columns, remark=True):
        tally.add(example, problems)
    tally.finish()


def _read_lines(path: Path, format_name: str, columns: dict[str, str]) -> None:
    """JSON Lines of conversations; numpy takes longer to load than small files to read."""
    from workers.fast_rows import counted_rows, spelling_of

    way = spelling_of(path, format_name)
    tally = Tally(way.print_of if way is not None else print_of_texts)
    plugin = get_format(format_name)
    for number, offset, raw in counted_rows(path, format_name, way, tally):
        item = jsonl_row(number, offset, raw)
        if item is not None:
            tally.add(*read_row(item, plugin, columns, remark=True))
    tally.finish()


class Tally:
    """Counts what an inspection reads, and emits its problems as they come.

    Rows that say the same are found by their prints, of conversations in the plain order by `print_of`.
    """

    def __init__(self, print_of: PrintOf = print_of_texts) -> None:
        self._print_of = print_of
        self.num_usable = self.num_quarantined = 0
        self._num_problems = 0
        self._counts: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()
        self._roles: Counter[str] = Counter()
        self._characters = Histogram(CHARACTER_BINS)
        self._answers = Histogram(CHARACTER_BINS)
        self._answer_lengths: Counter[int] = Counter()
        self._first_lines: dict[int, int] = {}
        self._num_longer_chosen = self._num_pairs = 0
        self._labels: Counter[bool] = Counter()
        self._shown_at = time.monotonic()

    @property
    def num_rows(self) -> int:
        return self.num_usable + self.num_quarantined

    def add(self, example: AnyExample | None, problems: Sequence[Problem]) -> None:
        """One row: its example, or None where it is set aside, and its problems."""
        if example is not None:
            size = len(example.text) if isinstance(example, TextExample) else _num_characters(example.messages)
            self.add_usable(
                example.line, [message.role for message in example.messages], size,
                fingerprint(example, self._print_of),
                [len(message.content) for message in example.messages if message.role == "assistant"],
            )  # fmt: skip
            if isinstance(example, PreferenceExample):
                self._num_pairs += 1
                self._num_longer_chosen += _num_characters(example.chosen) > _num_characters(example.rejected)
            elif isinstance(example, UnpairedExample):
                self._labels[example.label] += 1
        elif any(problem.level == "error" for problem in problems):
            self.num_quarantined += 1
            if not self.num_quarantined & 255:
                self._show()
        for problem in problems:
            self.say(problem)

    def add_usable(
        self, line: int, roles: Sequence[str], num_characters: int, print_of_row: int, answers: Sequence[int]
    ) -> None:
        """One usable row: who speaks in its turns, its characters and those of each answer; equal rows have equal
        prints."""
        self.num_usable += 1
        num_turns = len(roles)
        self._roles.update(roles)
        self._answer_lengths.update(answers)
        self._turns[num_turns] += 1
        self._characters.add(num_characters)
        self.compare(line, (print_of_row,))
        if not self.num_usable & 255:
            self._show()

    def add_plain(self, rows: PlainRows) -> None:
        """Usable rows of many lines, but for their prints."""
        num_systems, num_answers = int((rows.turns % 2).sum()), len(rows.answers)
        self.num_usable += len(rows.turns)
        for role, num in (("system", num_systems), ("user", num_answers), ("assistant", num_answers)):
            if num:
                self._roles[role] += num
        self._turns.update(rows.turns.tolist())
        self._characters.add_all(rows.characters)
        self._answers.add_all(rows.answers)
        self._show()

    def compare(self, line: int, prints: Sequence[int]) -> None:
        """The prints of usable rows that follow one another, from a line on: equal rows have equal prints."""
        num_known = len(self._first_lines)
        lines = range(line, line + len(prints))
        if num_known + len(prints) > MAX_COMPARED_ROWS:
            firsts = [self._first_line(one, print_of_row) for one, print_of_row in zip(lines, prints, strict=True)]
        else:
            firsts = list(map(self._first_lines.setdefault, prints, lines))
            if len(self._first_lines) == num_known + len(prints):
                return
        for one, first in zip(lines, firsts, strict=True):
            if first != one:
                self._say_repeated(one, first)

    def _first_line(self, line: int, print_of_row: int) -> int:
        if len(self._first_lines) < MAX_COMPARED_ROWS:
            return self._first_lines.setdefault(print_of_row, line)
        return self._first_lines.get(print_of_row, line)

    def _say_repeated(self, line: int, first: int) -> None:
        self.say(
            Problem(
                "Q501",
                f"Line {line} says the same as line {first}.",
                "Keep one of them, or make a corrected version: rows that are there twice are learned twice.",
                line=line,
                level="warning",
            )
        )

    def say(self, problem: Problem) -> None:
        """Count a problem, and emit it while there are not too many."""
        self._counts[problem.rule] += 1
        self._num_problems += 1
        if self._num_problems <= MAX_PROBLEMS:
            emit("problem", **asdict(problem))

    def _show(self) -> None:
        if time.monotonic() - self._shown_at > PROGRESS_SECONDS:
            self._shown_at = time.monotonic()
            emit("progress", stage="rows", num_rows=self.num_rows)

    def finish(self) -> None:
        """Say what concerns the whole file, and emit the counts. Raises DatasetError when there was no row."""
        if self.num_rows == 0:
            raise no_rows()
        self._say_of_file()
        for length, num in self._answer_lengths.items():
            self._answers.add(length, num)
        emit(
            "done",
            needs_mapping=False,
            num_rows=self.num_rows,
            num_usable=self.num_usable,
            num_quarantined=self.num_quarantined,
            problem_counts=dict(self._counts),
            statistics={
                "turns": self._numbers_of_turns(),
                "roles": dict(sorted(self._roles.items())),
                "characters": self._characters.to_dict(),
                "answers": self._answers.to_dict(),
                "compared_rows": min(self.num_usable, MAX_COMPARED_ROWS),
            },
        )

    def _numbers_of_turns(self) -> list[list[int]]:
        found: Counter[int] = Counter()
        for num, num_rows in self._turns.items():
            found[min(num, MAX_TURNS)] += num_rows
        return [[num, num_rows] for num, num_rows in sorted(found.items()) if num]

    def _say_of_file(self) -> None:
        def warning(rule: str, message: str, fix: str) -> None:
            self.say(Problem(rule, message, fix, level="warning"))

        if self._num_pairs >= MIN_PAIRS and self._num_longer_chosen >= MUCH * self._num_pairs:
            warning(
                "P204",
                f"In {self._num_longer_chosen:,} of {self._num_pairs:,} pairs the chosen answer is the longer one, so "
                "length is what would be learned.",
                "Add pairs in which the shorter answer is the better one.",
            )
        if len(self._labels) == 1 and sum(self._labels.values()) >= MIN_USABLE:
            (label,) = self._labels
            warning(
                "K302",
                f"Every verdict is {str(label).lower()}, so there is nothing to tell apart.",
                "Add answers with the other verdict.",
            )
        if 0 < self.num_usable < MIN_USABLE:
            warning(
                "S601",
                f"{self.num_usable} usable row{'s are' if self.num_usable > 1 else ' is'} too few to train and to "
                f"measure: at least {MIN_USABLE} are needed.",
                "Add rows, or correct those that are set aside.",
            )


def _num_characters(messages: Sequence[Message]) -> int:
    return sum([len(message.content) for message in messages])


def no_rows() -> DatasetError:
    """The refusal of a file without a single row."""
    error = DatasetError("The file has no rows.", next_step="Check that the export finished, and upload it again.")
    error.code = "no_rows"
    return error


def count_tokens(path: Path, format_name: str, columns: dict[str, str], folder: Path, seconds: float) -> None:
    """Lengths of the usable rows in tokens of one base model, until the time is over."""
    from workers.rendering import Renderer, RenderingError

    renderer = Renderer(folder, max_length=2**31, loss_on="assistant")
    lengths = Histogram(TOKEN_BINS)
    longest: list[tuple[int, int]] = []
    cut: Counter[int] = Counter()
    refused: Counter[str] = Counter()
    end = time.monotonic() + seconds
    shown_at = time.monotonic()
    is_whole = True
    for example in _examples(path, format_name, columns):
        try:
            num = len(renderer.render(example).ids)
        except RenderingError as error:
            refused[error.rule] += 1
            continue
        lengths.add(num)
        cut.update(bound for bound in CUTS if num > bound)
        # The line negated: of two rows as long, the first is kept.
        (heapq.heappush if len(longest) < NUM_LONGEST else heapq.heappushpop)(longest, (num, -example.line))
        now = time.monotonic()
        if now - shown_at > PROGRESS_SECONDS:
            shown_at = now
            emit("progress", stage="tokens", num_rows=lengths.num)
        if now > end:
            is_whole = False
            break
    emit(
        "done",
        tokens={
            **lengths.to_dict(),
            "cut": {str(bound): cut[bound] for bound in CUTS},
            "longest_rows": [[-line, num] for num, line in sorted(longest, reverse=True)],
            "refused": dict(refused),
            "is_whole": is_whole,
        },
    )


def _examples(path: Path, format_name: str, columns: dict[str, str]) -> Iterator[Example]:
    for example, _problems in read_rows(path, format_name, columns):
        if example is not None:
            yield from example.conversations()


def first_examples(path: Path, format_name: str, columns: dict[str, str], num: int, *, within: int) -> list[AnyExample]:
    """The first usable rows among the first `within` rows."""
    rows = islice(read_rows(path, format_name, columns), within)
    return list(islice((example for example, _ in rows if example is not None), num))


def main(arguments: list[str] | None = None) -> int:
    """0 after "done" or "refused"; anything else is a fault of ours, or a limit that struck."""
    parser = argparse.ArgumentParser(prog="python -m workers.inspection")
    parser.add_argument("what", choices=["rows", "tokens"])
    add_file(parser, needs_format=False)
    parser.add_argument("--base-model-folder", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0, help="time for counting tokens")
    chosen = limited(parser, arguments)
    with refusals_emitted():
        if chosen.what == "rows":
            inspect_rows(chosen.file, chosen.format, chosen.columns)
        else:
            count_tokens(chosen.file, chosen.format, chosen.columns, chosen.base_model_folder, chosen.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The rows of everything that a recipe trains on, one dataset after the other, each row at a place of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workers.digests import file_sha256
from workers.errors import DatasetError
from workers.examples import Example, Problem
from workers.mixing import MANY_PASSES, Portion, line_at, often_sentence, place_of, row_at, source_at, told_lines
from workers.overlap import MAX_PAIRS
from workers.reading import read_examples
from workers.recipe import DatasetRef
from workers.results import OverlapRecord


@dataclass(frozen=True)
class Source:
    """A dataset of the recipe and its file; `number` 0 is the main one. `sha256` is that of the file as it is.

    `split` is the file of its frozen split, where the recipe names one.
    """

    number: int
    ref: DatasetRef
    file: Path
    sha256: str
    split: Path | None = None

    @property
    def field(self) -> str:
        """The recipe's field that names it."""
        return field_of(self.number)


def field_of(number: int) -> str:
    """The recipe's field that names a source."""
    return "dataset" if number == 0 else f"mix.{number - 1}"


def open_sources(refs: Sequence[DatasetRef], files: Sequence[Path], splits: Sequence[Path | None]) -> list[Source]:
    """The recipe's datasets with their files, and those of their splits, in their order.

    Raises:
        DatasetError: a file cannot be read, or is not the one that the recipe names.
    """
    found = []
    for number, (ref, file, split) in enumerate(zip(refs, files, splits, strict=True)):
        source = Source(number, ref, file, _file_sha256(file), split)
        if ref.sha256 and ref.sha256 != source.sha256:
            what = "The dataset file" if number == 0 else f"The file of {ref.name}"
            raise DatasetError(
                f"{what} is not the one that the recipe names: its sha256 begins with {source.sha256[:12]}, expected "
                f"{ref.sha256[:12]}.",
                next_step="Use the file that the recipe was made for, or start a new job with this one.",
                field=f"{source.field}.sha256",
            )
        found.append(source)
    return found


def read_sources(sources: Iterable[Source]) -> Iterator[Example | Problem]:
    """Every row of every source as `read_examples` gives it, with its place for a line."""
    for source in sources:
        for row in read_examples(source.file, source.ref.format, source.ref.columns):
            yield (
                row if source.number == 0 or row.line is None else replace(row, line=place_of(source.number, row.line))
            )


def lines_by_source(places: Iterable[int], num_sources: int) -> list[list[int]]:
    """The lines of each source's own file, in the order given."""
    found: list[list[int]] = [[] for _ in range(num_sources)]
    for place in places:
        source, line = row_at(place)
        found[source].append(line)
    return found


def of_source(error: DatasetError, number: int, name: str) -> DatasetError:
    """The error, saying which dataset it is about, unless that is the main one."""
    if number == 0:
        return error
    told = DatasetError(f"{name}: {error.message}", next_step=error.next_step, field=field_of(number))
    told.code = error.code
    return told


def left_out_sentence(problems: Sequence[Problem], names: Sequence[str]) -> str:
    """How many rows cannot be used, and why the first one cannot."""
    num = len({problem.line for problem in problems})
    first = problems[0]
    where = f"Line {told_lines([first.line], names)}" if first.line is not None else "First"
    return f"{num} {'row is' if num == 1 else 'rows are'} left out. {where}: {first.message}"


def portion_sentences(sources: Sequence[Source], portions: Sequence[Portion], epochs: float) -> list[tuple[str, bool]]:
    """What an epoch takes of each source, and which are repeated often, which is a warning."""
    total = sum(one.per_epoch for one in portions)
    told = [
        f"{one.per_epoch:,} rows of {source.ref.name} ({one.per_epoch / total:.0%})"
        for source, one in zip(sources, portions, strict=True)
    ]
    found = [(f"An epoch takes {', '.join(told)}.", False)]
    for source, one in zip(sources, portions, strict=True):
        if source.number and one.passes(epochs) > MANY_PASSES:
            found.append((often_sentence(source.ref.name, one, epochs), True))
    return found


def by_lines(found: OverlapRecord) -> OverlapRecord:
    """An overlap between places as one between lines, with the sources of both rows."""
    return found.model_copy(
        update={
            "pairs": tuple((line_at(one), line_at(other), share) for one, other, share in found.pairs[:MAX_PAIRS]),
            "pair_sources": tuple((source_at(one), source_at(other)) for one, other, _ in found.pairs[:MAX_PAIRS]),
            "num_between": sum(source_at(one) != source_at(other) for one, other, _ in found.pairs),
        }
    )


def count_by_source(places: Iterable[int], num_sources: int) -> list[int]:
    """How many of the places each source has."""
    counts = Counter(map(source_at, places))
    return [counts[number] for number in range(num_sources)]


def _file_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise DatasetError(f"The dataset file {path.name} cannot be read: {error.strerror}.") from error

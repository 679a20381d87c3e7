"""What a finished training gives: scores, samples and provenance, as `result.json` in the adapter's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workers.errors import ExplainedError

RESULT_FILE = "result.json"
ROWS_FILE = "eval/rows.jsonl"
ROW_COUNTS_FILE = "eval/row_counts.json"


class ResultError(ExplainedError):
    """A result.json is missing or does not hold a result."""

    code = "unreadable_result"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _of_main(source: int) -> bool:
    return source == 0


def _is_empty(value: tuple[object, ...]) -> bool:
    return not value


class ScoreRecord(_Part):
    """One evaluation of the adapter beside the untouched base on the same held-out rows.

    `low` and `high` bound the 95 % interval of `value`; `difference*` is adapter minus base, paired by row.
    """

    evaluation: str
    label: str
    unit: str = ""
    higher_is_better: bool
    num_rows: int
    value: float
    low: float
    high: float
    base_value: float
    base_low: float
    base_high: float
    difference: float
    difference_low: float
    difference_high: float
    interval_method: str
    p_value: float | None = Field(None, description="Of the paired test; None in results of older versions.")
    smallest_effect: float | None = Field(None, description="The smallest difference worth telling, in its units.")
    rows_needed: int | None = Field(None, description="With fewer rows, no difference of that size would show.")
    rows_recommended: int | None = Field(None, description="As many rows would surely do.")


class SampleRecord(_Part):
    """A held-out row as the base and the adapter answered it. `line` counts from 1 in the dataset file."""

    line: int
    prompt: str
    reference: str
    base_answer: str
    adapter_answer: str
    source: int = Field(0, exclude_if=_of_main, description="Which of the recipe's datasets; 0 is the main one.")


class HeldOutRecord(_Part):
    """A held-out row's summed cross-entropy in nats over its loss-carrying tokens, by the base and by the adapter.

    With these anyone can score the same rows again and compare.
    """

    line: int
    num_tokens: int
    base_loss_sum: float
    adapter_loss_sum: float
    source: int = Field(0, exclude_if=_of_main, description="Which of the recipe's datasets; 0 is the main one.")


class RunRowRecord(_Part):
    """A row of a test set beside both models' answers; None where no answer was asked for.

    `figures` has, by evaluation, the figure of the row alone of the base and of the adapter, None where the row has no
    part in it, and `left_out` says why. `line` counts from 1 in the dataset file, or among the rows of a `task`.
    """

    line: int
    task: str = ""
    prompt: str
    reference: str
    base_answer: str | None
    adapter_answer: str | None
    figures: dict[str, tuple[float | None, float | None]] = {}
    left_out: dict[str, str] = {}


class OverlapRecord(_Part):
    """Held-out rows that the model was trained on, or nearly so. Lines count from 1 in the dataset file."""

    num_held_out_rows: int
    num_exact: int = Field(description="Held-out rows whose text is that of a training row, spaces and case aside.")
    num_near: int = Field(description="Further ones that are nearly a training row.")
    pairs: tuple[tuple[int, int, float], ...] = Field(
        (), description="(line of the held-out row, line of the training row, similarity), the most alike first."
    )
    pair_sources: tuple[tuple[int, int], ...] = Field(
        (),
        exclude_if=_is_empty,
        description="Of a recipe of several datasets: which of them both rows of each pair are of; 0 is the main one.",
    )
    num_between: int = Field(
        0, exclude_if=_of_main, description="Those of all found whose training row is of another dataset."
    )

    def sentence(self) -> str:
        """What was found, for people."""
        if not self.num_exact + self.num_near:
            return f"None of the {self.num_held_out_rows:,} held-out rows is among the training rows."
        parts = []
        if self.num_exact:
            parts.append(f"{self.num_exact:,} {'is' if self.num_exact == 1 else 'are'} a training row word for word")
        if self.num_near:
            other = "one" if parts else "a training row"
            parts.append(f"{self.num_near:,} {'is' if self.num_near == 1 else 'are'} nearly the same as {other}")
        is_all = self.num_between == self.num_exact + self.num_near
        which = "of another dataset" if is_all else f"{self.num_between:,} of them of another dataset"
        between = f" ({which})" if self.num_between else ""
        return f"Of the {self.num_held_out_rows:,} held-out rows {' and '.join(parts)}{between}."


class SuspiciousRecord(_Part):
    """A training row that may be wrong, with the reason in a sentence. Losses in nats per token."""

    line: int
    reason: str
    score: float = Field(description="The higher, the more suspicious.")
    loss: float
    base_loss: float | None = None
    other_lines: tuple[int, ...] = Field((), description="Rows that it contradicts.")
    source: int = Field(0, exclude_if=_of_main, description="Which of the recipe's datasets; 0 is the main one.")
    other_sources: tuple[int, ...] = Field(
        (), exclude_if=_is_empty, description="Which dataset each of these is of; empty: the main one."
    )


class RowCountsRecord(_Part):
    """What each scored row adds to each figure's sums (`Evaluation.row_counts`), for the base and for the adapter.

    A row that a figure cannot use has None there. With these two adapters are compared row by row, without a GPU.
    `lines` of a recipe's further datasets are places (`workers.mixing.place_of`), so that each row has its own number.
    """

    lines: tuple[int, ...] = ()
    base: dict[str, tuple[tuple[float, ...] | None, ...]] = {}
    adapter: dict[str, tuple[tuple[float, ...] | None, ...]] = {}


class Provenance(_Part):
    """Where, with what and at what cost an adapter was made. Times in seconds, memory in bytes, losses in nats."""

    versions: dict[str, str] = Field(default_factory=dict, description="Package name to version.")
    device: str = ""
    num_threads: int | None = None
    wall_seconds: float = 0.0
    train_seconds: float = 0.0
    num_tokens: int = Field(0, description="Tokens that went through training steps, padding not counted.")
    num_loss_tokens: int = 0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    num_steps: int = 0
    epochs: float = 0.0
    num_train_rows: int = 0
    num_suspicious_rows: int | None = Field(
        None, description="Training rows that may be wrong, of which a result lists the first."
    )
    num_held_out_rows: int = Field(0, description="Held-out rows that the scores are from.")
    num_validation_rows: int = Field(
        0, description="Further held-out rows, on which early stopping and the best step were chosen."
    )
    best_by: str = Field("", description="What chose: the name of an evaluation; empty when nothing was chosen.")
    best_value: float | None = Field(None, description="Its value on the validation rows at the best step.")
    adapter_step: int | None = Field(None, description="Step whose weights the adapter has, when not the last.")
    early_stopped_at_step: int | None = Field(None, description="Step after which early stopping ended training.")
    dataset_sha256: str = ""
    base_revision: str = ""
    recipe_sha256: str = ""
    num_adapter_bytes: int = 0
    verified: bool | None = Field(
        None, description="The saved folder was reloaded without the studio's code and compared."
    )
    max_logit_difference: float | None = Field(
        None, description="Largest absolute difference of logits between training and the reloaded folder."
    )


class SourceRecord(_Part):
    """One of the datasets that an adapter was trained on together: its part in training, and its own scores.

    `scores` are over its own held-out rows alone, by the same measures as those of all.
    """

    name: str
    sha256: str = ""
    weight: float = Field(1.0, description="Rows of it for each row of the main dataset.")
    num_train_rows: int
    num_held_out_rows: int = Field(description="Held-out rows that the scores are from.")
    num_skipped_rows: int = Field(0, description="Rows that could not be used.")
    rows_per_epoch: int
    num_rows_seen: int = Field(description="Rows that training steps took of it, each as often as it was seen.")
    passes: float = Field(description="How often training went through its training rows.")
    scores: tuple[ScoreRecord, ...] = ()


class Result(_Part):
    """Everything that registering an adapter needs besides its files."""

    result_version: Literal[1] = 1
    scores: tuple[ScoreRecord, ...] = ()
    samples: tuple[SampleRecord, ...] = ()
    num_rows_to_score: int = Field(0, description="Held-out rows that were to be scored; fewer scores are incomplete.")
    num_rows_scored: int = 0
    test_set_sha256: str = ""
    settings_sha256: str = ""
    general: tuple[ScoreRecord, ...] = Field((), description="Scores on the general set: what was forgotten.")
    overlap: OverlapRecord | None = None
    suspicious: tuple[SuspiciousRecord, ...] = ()
    held_out: tuple[HeldOutRecord, ...] = Field((), exclude=True, description="Kept in eval/held_out.jsonl.")
    rows: tuple[RunRowRecord, ...] = Field((), exclude=True, description="Of a run on a suite; in eval/rows.jsonl.")
    counts: RowCountsRecord = Field(RowCountsRecord(), exclude=True, description="Kept in eval/row_counts.json.")
    sources: tuple[SourceRecord, ...] = Field(
        (), exclude_if=_is_empty, description="Of a recipe of several datasets: each of them, the main one first."
    )
    provenance: Provenance = Provenance()
    num_trainable: int = 0
    stopped_at_step: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> Result:
        """The result in an adapter's folder; raises ResultError."""
        try:
            found = cls.model_validate_json((folder / RESULT_FILE).read_bytes())
            kept: dict[str, object] = {}
            # Results of older versions, and those without anything scored, have neither file.
            if (counts := folder / ROW_COUNTS_FILE).exists():
                kept["counts"] = RowCountsRecord.model_validate_json(counts.read_bytes())
            if (rows := folder / ROWS_FILE).exists():
                with rows.open("rb") as lines:
                    kept["rows"] = tuple(RunRowRecord.model_validate_json(line) for line in lines)
            return found.model_copy(update=kept)
        except (OSError, ValidationError) as error:
            raise ResultError(f"{RESULT_FILE} of the adapter cannot be read: {error}.") from error

    def write(self, folder: Path) -> Path:
        """Writes `result.json`, and what is kept beside it, into `folder` and gives its path."""
        if self.counts.lines:
            (folder / ROW_COUNTS_FILE).parent.mkdir(exist_ok=True)
            (folder / ROW_COUNTS_FILE).write_text(self.counts.model_dump_json() + "\n", "utf-8")
        if self.rows:
            (folder / ROWS_FILE).parent.mkdir(exist_ok=True)
            lines = "".join(one.model_dump_json() + "\n" for one in self.rows)
            (folder / ROWS_FILE).write_text(lines, "utf-8", errors="replace")
        path = folder / RESULT_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n", "utf-8")
        return path

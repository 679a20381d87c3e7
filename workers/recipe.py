"""The recipe: what was asked for, as one frozen object that travels unchanged from form to model card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator

from workers.errors import RecipeError, RecipeProblems
from workers.texts import find_unstorable

Auto = Literal["auto"]
Precision = Literal["float32", "bfloat16", "nf4", "int8"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class BaseModelRef(_Part):
    """The frozen model that the adapter belongs to."""

    name: str = Field(max_length=200, title="Base model")
    revision: str = Field("", description="sha256 over the file list of the base model's folder.")
    path: str | None = Field(None, description="Folder, relative to the recipe file, when run by hand.")


class SplitRef(_Part):
    """A frozen split of a dataset version (workers/splits): which rows are trained on, chosen on and scored."""

    name: str = Field("", max_length=80, title="Split")
    sha256: str = Field(min_length=64, max_length=64, description="sha256 of the split's file.")
    num_train: int = Field(ge=2)
    num_validation: int = Field(0, ge=0)
    num_test: int = Field(ge=2)
    path: str | None = Field(None, description="File, relative to the recipe file, when run by hand.")


class DatasetRef(_Part):
    """The dataset version that is trained on."""

    name: str = Field(max_length=200, title="Dataset")
    sha256: str = Field("", description="sha256 of the uploaded file.")
    format: str = Field(description="Name of the format plug-in that reads the file.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="The format's field names mapped to the file's column names."
    )
    path: str | None = Field(None, description="File, relative to the recipe file, when run by hand.")
    # Not written where there is none: recipes of before keep their bytes and their digests.
    split: SplitRef | None = Field(
        None,
        exclude_if=lambda split: split is None,
        description="The rows of each part; null for the held-out share of the recipe's `split` settings.",
    )


MAX_MIXED = 8
"""Further datasets of a recipe."""


class MixSettings(_Part):
    """How much of a further dataset is trained on."""

    weight: float = Field(
        1.0,
        gt=0,
        le=100,
        title="Weight",
        description="Rows of it for each row of the main dataset, in every epoch: 0.25 takes one for four. Too low: "
        "little is learned from it. Too high: a small dataset is repeated until its rows are known by heart.",
        json_schema_extra={
            "unit": "rows per row of the main dataset",
            "source": "sampling proportions: Raffel et al. 2020 (T5), section 3.5.2",
        },
    )


class MixedDataset(DatasetRef, MixSettings):
    """A further dataset version that is trained on together with the main one (workers/mixing.py)."""


class SplitSettings(_Part):
    """Which rows are held out. The same seed and dataset always hold out the same rows."""

    held_out_share: float = Field(
        0.1,
        gt=0,
        lt=1,
        title="Held-out share",
        description="Part of the rows kept from training. Too low: wide intervals around every score. Too high: rows "
        "to learn from are missing.",
        json_schema_extra={"source": "usual practice: a tenth for measuring"},
    )
    max_held_out: int = Field(
        200,
        ge=2,
        le=100_000,
        title="Held-out rows at most",
        description="Of each dataset. Every held-out row is read by base and adapter. Too few: wide intervals. Too "
        "many: scoring takes longer than training.",
        json_schema_extra={
            "unit": "rows",
            "source": "arithmetic: the 95 % interval of a share measured on 200 rows is at most 0.07 to either side",
        },
    )
    validation_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        title="Validation share",
        description="Part of the held-out rows that early stopping and keeping the best step choose on; the final "
        "scores use the rest, because the rows that chose would flatter. Counts only with one of the two. Too low: "
        "the choice is noise. Too high: wide intervals around the final scores.",
        json_schema_extra={"source": "even halves: neither the choice nor the scores come first"},
    )
    seed: int = Field(
        17,
        ge=0,
        le=2**31 - 1,
        title="Split seed",
        description="Another number holds out other rows. Keep it to compare runs on the same rows.",
        json_schema_extra={"source": "any number; fixed, so that runs share their held-out rows"},
    )
    keep_equal_together: bool = Field(
        True,
        title="Equal rows together",
        description="Rows that are the same, spaces and case aside, are all trained on or all held out. Off, a row may "
        "be scored that was trained on, and the scores flatter; earlier versions of the studio split so.",
        json_schema_extra={"source": "Lee et al. 2022: rows in both parts inflate what is measured"},
    )


CHECKPOINTS_PER_RUN = 10
MAX_STEPS_BETWEEN_CHECKPOINTS = 200


class TrainingSettings(_Part):
    """How the objective is minimised. "auto" is resolved when the job is queued and then shown."""

    # Bounds belong to the number: on the union they would be applied to the word "auto" as well.
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Auto = Field(
        "auto",
        title="Learning rate",
        description="Size of a step. Too high: the loss jumps or diverges. Too low: little is learned.",
        json_schema_extra={"source": "the method's own default"},
    )
    epochs: float = Field(
        1.0,
        gt=0,
        le=100,
        title="Epochs",
        description="Passes over the training rows, of several datasets over those of the first. Too low: little is "
        "learned. Too high: rows are memorised, often from the fourth pass on, and the held-out loss rises.",
        json_schema_extra={
            "unit": "passes",
            "source": "InstructGPT (Ouyang et al. 2022), section 3.5: overfit after 1",
        },
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        title="Stop after",
        description="Optimizer steps at most; empty for as many as the epochs need. The schedule ends with them.",
        json_schema_extra={"unit": "steps", "source": "empty: the epochs decide"},
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=4096,
        title="Batch size",
        description="Rows per optimizer step, whatever fits in memory at once. Too low: noisy steps. Too high: few "
        "steps, so a small dataset is hardly learned.",
        json_schema_extra={
            "unit": "rows",
            "source": "small datasets need many steps; QLoRA (2023), appendix B, uses 16",
        },
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto = Field(
        "auto",
        title="Micro-batch",
        description="Rows in memory at once. Changes memory and speed, not what is learned. Too high: memory runs "
        "out. Too low: the device waits.",
        json_schema_extra={
            "unit": "rows",
            "source": "the largest that the memory estimate allows; where rows have no padding, a run splits them "
            "further by their tokens",
        },
    )
    max_length: int = Field(
        1024,
        ge=16,
        le=1_048_576,
        title="Maximum length",
        description="Longer rows are cut at this many tokens; the dataset page counts how many. Too low: answers lose "
        "their ends. Too high: one long row takes all the memory.",
        json_schema_extra={"unit": "tokens", "source": "rows of instruction datasets are rarely longer"},
    )
    long_rows: Literal["cut", "leave_out"] = Field(
        "cut",
        title="Longer rows",
        description="What becomes of rows over the maximum length: cut there, or left out as a whole, of training and "
        "of the held-out rows. Cut answers have no end, so many of them teach not to stop; left out, the longest "
        "questions are never learned.",
        json_schema_extra={"source": "our own choice: no row is lost unless somebody asks for it"},
    )
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = Field(
        "cosine",
        title="Schedule",
        description="How the learning rate goes on after the warm-up: down along half a cosine, down in a line, never "
        "down, or, with warmup stable decay, level until a line down at the very end. Falling rates settle better; "
        "a level one leaves room to train on.",
        json_schema_extra={"source": "Loshchilov and Hutter 2017 (SGDR); Hu et al. 2024 (MiniCPM) for the last"},
    )
    warmup_share: float = Field(
        0.03,
        ge=0,
        le=0.5,
        title="Warm-up",
        description="Share of the steps over which the learning rate rises from 0. Too low: the first steps may "
        "diverge. Too high: steps are wasted at a low rate.",
        json_schema_extra={"unit": "share of steps", "source": "QLoRA (Dettmers et al. 2023), appendix B"},
    )
    decay_share: float = Field(
        0.1,
        gt=0,
        le=1,
        title="Decay",
        description="Share of the steps at the end over which warmup stable decay lets the learning rate fall. Too "
        "low: the loss stays high. Too high: it becomes the linear schedule.",
        json_schema_extra={
            "unit": "share of steps",
            "source": "Hu et al. 2024 (MiniCPM), section 4: a tenth is enough, a fortieth is not",
        },
    )
    min_learning_rate_share: float = Field(
        0.0,
        ge=0,
        le=1,
        title="Lowest learning rate",
        description="Share of the learning rate at which falling schedules end. 0 lets the last steps settle. Too "
        "high: the loss keeps jittering; 1 is a constant rate.",
        json_schema_extra={
            "unit": "share of the peak",
            "source": "Loshchilov and Hutter 2017 (SGDR): a lowest rate of 0",
        },
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1,
        title="Weight decay",
        description="Share of each trained weight, times the learning rate, that every step takes away. Too high: the "
        "adapter is pulled back to nothing. 0 is usual for adapters.",
        json_schema_extra={"source": "QLoRA (Dettmers et al. 2023), the authors' scripts: 0"},
    )
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        le=1000,
        title="Gradient clipping",
        description="Largest norm of a step's gradient; larger ones are scaled down. Too low: every step is cut short. "
        "Too high: one odd batch can ruin the adapter. QLoRA's authors use 0.3.",
        json_schema_extra={"source": "Touvron et al. 2023 (LLaMA), section 2.3"},
    )
    adam_beta1: float = Field(
        0.9,
        ge=0,
        lt=1,
        title="AdamW beta 1",
        description="How much of the average gradient the next step keeps. Too low: noisy steps. Too high: the "
        "direction lags behind.",
        json_schema_extra={"source": "Kingma and Ba 2015 (Adam), algorithm 1"},
    )
    adam_beta2: float = Field(
        0.999,
        ge=0,
        lt=1,
        title="AdamW beta 2",
        description="How much of the average squared gradient the next step keeps. Too low: the step size jumps. Too "
        "high: it adapts late; long runs of large batches use 0.95.",
        json_schema_extra={"source": "Kingma and Ba 2015 (Adam), algorithm 1; QLoRA (2023), appendix B"},
    )
    adam_epsilon: float = Field(
        1e-8,
        gt=0,
        le=1,
        title="AdamW epsilon",
        description="Added to the root of the average squared gradient before dividing by it. Too low: division by "
        "nearly nothing. Too high: small gradients stop counting.",
        json_schema_extra={"source": "Kingma and Ba 2015 (Adam), algorithm 1"},
    )
    neftune_alpha: float = Field(
        0.0,
        ge=0,
        le=100,
        title="Embedding noise (NEFTune)",
        description="Strength of the random noise on the input embeddings while training; 0 is off. It keeps answers "
        "from copying the training rows. Too high: rows become unreadable; the paper tries 5, 10 and 15.",
        json_schema_extra={"source": "off: a plain run first; Jain et al. 2023 (NEFTune) for 5 to 15"},
    )
    packing: bool | Auto = Field(
        "auto",
        title="Packing",
        description="Several rows share one sequence without seeing each other: less padding.",
        json_schema_extra={"source": "on for rows of uneven length on a GPU; a CPU is faster without"},
    )
    gradient_checkpointing: bool | Auto = Field(
        "auto",
        title="Gradient checkpointing",
        description="Recompute activations instead of keeping them: less memory, about a third slower.",
        json_schema_extra={
            "source": "on only when the memory estimate needs it; off where a run chooses by itself, by the memory "
            "there is, what it recomputes; Chen et al. 2016"
        },
    )
    loss_on: Literal["assistant", "all"] = Field(
        "assistant",
        title="Loss on",
        description="Learn only the assistant's turns, or every token. All tokens also teach how people ask, which a "
        "chat rarely needs.",
        json_schema_extra={"source": "QLoRA (Dettmers et al. 2023), appendix B: targets alone score higher"},
    )
    validate_every_steps: Annotated[int, Field(ge=0, le=1_000_000)] | Auto = Field(
        "auto",
        title="Validate every",
        description="Steps between two looks at the held-out rows; 0 looks only after training. Too low: looking takes "
        "longer than training. Too high: the best step goes by unseen.",
        json_schema_extra={
            "unit": "steps",
            "source": "auto: at most 3 looks within a tenth of the training time; 10 looks when they choose",
        },
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        le=1000,
        title="Early stopping",
        description="Validations in a row without improvement after which training ends; empty for never. Too low: "
        "one unlucky validation ends it. Too high: steps are wasted. Some held-out rows are set aside for it.",
        json_schema_extra={"unit": "validations", "source": "empty: the planned steps are taken"},
    )
    early_stopping_threshold: float = Field(
        0.0,
        ge=0,
        le=100,
        title="Least improvement",
        description="What a validation must improve by to count for early stopping, in nats per token, or in the unit "
        "of the score that chooses. Too high: slow progress counts as none.",
        json_schema_extra={"unit": "nats/token", "source": "any improvement counts"},
    )
    keep_best: Literal["last", "best"] = Field(
        "last",
        title="Adapter of",
        description="The last step, or the best validated one. The best helps when the held-out loss rises again; some "
        "held-out rows are set aside to find it.",
        json_schema_extra={"source": "last: nothing chooses, so every held-out row can score"},
    )
    best_by: str = Field(
        "loss",
        max_length=64,
        title="Best by",
        description="What early stopping and the best step are judged by: the held-out loss, or another measure. "
        "Measures of answers need many rows and much time to tell steps apart.",
        json_schema_extra={"source": "the loss uses every token, so it tells steps apart with the fewest rows"},
    )
    num_validated_answers: int = Field(
        8,
        ge=1,
        le=1000,
        title="Answers per validation",
        description="Validation rows that the model answers each time when a measure of answers chooses. Too few: the "
        "choice is noise. Too many: validations take longer than training.",
        json_schema_extra={"unit": "rows", "source": "a batch of answers, which costs about one long answer's time"},
    )
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        "auto",
        title="Checkpoint every",
        description="Steps between two states on disk that a run can go on from. Too low: time goes into writing. Too "
        "high: an interruption costs many steps.",
        json_schema_extra={"unit": "steps", "source": "a tenth of the run, 200 steps at most"},
    )
    seed: int = Field(
        17,
        ge=0,
        le=2**31 - 1,
        title="Seed",
        description="Decides the adapter's first values, the order of rows, dropout and noise. The same seed on the "
        "same device gives the same adapter.",
        json_schema_extra={"source": "any number; fixed, so that runs can be repeated"},
    )

    @property
    def chooses_on_validation(self) -> bool:
        """Whether validations decide when training ends or which step becomes the adapter."""
        return self.early_stopping_patience is not None or self.keep_best == "best"

    def steps_between_checkpoints(self, num_steps: int) -> int:
        """In a run of that many steps; what "auto" means, too."""
        if self.checkpoint_every_steps != "auto":
            return self.checkpoint_every_steps
        return min(MAX_STEPS_BETWEEN_CHECKPOINTS, max(1, num_steps // CHECKPOINTS_PER_RUN))


class MetricChoice(_Part):
    """A figure of merit with settings of its own."""

    name: str = Field(max_length=64, description="Name of the evaluation plug-in.")
    settings: dict[str, Any] = Field(default_factory=dict, description="The evaluation's own settings.")


_BY_NAME, _WITH_SETTINGS = "metric-name", "metric-with-settings"


def _kind_of_metric(value: object) -> str:
    return _WITH_SETTINGS if isinstance(value, (dict, MetricChoice)) else _BY_NAME


Metric = Annotated[
    Annotated[str, Tag(_BY_NAME)] | Annotated[MetricChoice, Tag(_WITH_SETTINGS)], Discriminator(_kind_of_metric)
]
"""A figure of merit as a recipe names it: alone, or with its settings."""


MAX_SHOWN_TOKENS = 64
"""Of an answer that is written while training: enough to see where it goes."""


class EvaluationSettings(_Part):
    """What is measured on the held-out rows, for the untouched base and for the adapter alike."""

    metrics: tuple[Metric, ...] = Field(
        ("loss", "token_f1"),
        title="Metrics",
        description="Figures of merit, each with its interval for base and adapter.",
        json_schema_extra={"source": "the loss for every row, and words in common for the answers"},
    )
    num_generated: int = Field(
        32,
        ge=0,
        le=10_000,
        title="Answers to generate",
        description="Held-out rows of each dataset that both models answer; metrics on answers use these. Too few: "
        "wide intervals. Too many: writing takes longer than training.",
        json_schema_extra={"unit": "rows", "source": "two batches of answers on a GPU"},
    )
    max_new_tokens: int = Field(
        128,
        ge=1,
        le=8192,
        title="Answer length",
        description="Tokens after which an answer is cut off. Too low: right answers lose their ends. Too high: a "
        "model that never stops takes long.",
        json_schema_extra={"unit": "tokens", "source": "about a hundred words; raise it for longer answers"},
    )
    num_samples_shown: int = Field(
        3,
        ge=0,
        le=16,
        title="Answers while training",
        description="Held-out prompts, always the same ones, that are answered at every checkpoint and shown on the "
        "job's page beside the base's answers; 0 turns it off. Too few: one odd answer looks like a trend. Too many: "
        "writing delays the steps.",
        json_schema_extra={"unit": "prompts", "source": "as many as are read at a glance; one small batch each time"},
    )
    general: bool = Field(
        True,
        title="General set",
        description="Score both models on the studio's general questions and texts as well, which shows what was "
        "forgotten. Off, forgetting goes unseen; it takes as long as a few dozen held-out rows.",
        json_schema_extra={"source": "on: what an adapter has forgotten, its own held-out rows do not show"},
    )

    @property
    def num_shown_tokens(self) -> int:
        """Tokens of an answer that is written while training, at most."""
        return min(self.max_new_tokens, MAX_SHOWN_TOKENS)

    @field_validator("metrics")
    @classmethod
    def _name_alone_without_settings(cls, metrics: tuple[str | MetricChoice, ...]) -> tuple[str | MetricChoice, ...]:
        """One way to write a recipe: settings that are empty are none."""
        return tuple(one.name if isinstance(one, MetricChoice) and not one.settings else one for one in metrics)


_LATER: dict[str, dict[str, Any]] = {"evaluation": {"num_samples_shown": 3}, "training": {"long_rows": "cut"}}
"""Settings that came when there were recipes already, with their defaults: these are left out of the digest."""


class Recipe(_Part):
    """Everything that makes an adapter: run again with the same files, it makes the same one."""

    recipe_version: Literal[1] = 1
    name: str = Field(min_length=1, max_length=120, title="Name")
    base_model: BaseModelRef
    dataset: DatasetRef
    # Left out where there is none: a recipe of one dataset is written, and digested, as it always was.
    mix: tuple[MixedDataset, ...] = Field(
        (),
        max_length=MAX_MIXED,
        title="Further datasets",
        description="Trained on together with the main dataset, each with a weight.",
        exclude_if=lambda mix: not mix,
    )
    method: str = Field("lora", title="Method")
    settings: dict[str, Any] = Field(default_factory=dict, description="The method's own settings.")
    precision: Precision | Auto = Field(
        "auto",
        title="Precision of the base",
        description="How the frozen base is held in memory while training.",
        json_schema_extra={"source": "the method's first on a GPU; on a CPU what it computes in hardware"},
    )
    objective: str = Field("sft", title="Objective")
    training: TrainingSettings = TrainingSettings()
    split: SplitSettings = SplitSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @field_validator("mix")
    @classmethod
    def _no_file_twice(cls, mix: tuple[MixedDataset, ...], info: ValidationInfo) -> tuple[MixedDataset, ...]:
        """The same rows in two sources would be counted twice, and held out of one be trained on in the other."""
        main = info.data.get("dataset")
        names = {main.sha256: main.name} if main is not None else {}
        for one in mix:
            if one.sha256 and one.sha256 in names:
                other = names[one.sha256]
                what = "is chosen twice" if other == one.name else f"has the same file as {other}"
                raise ValueError(f"{one.name} {what}. Leave one of them out and change the other's weight")
            names[one.sha256] = one.name
        return mix

    @property
    def sources(self) -> tuple[DatasetRef, ...]:
        """Everything that is trained on, the main dataset first."""
        return (self.dataset, *self.mix)

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """The recipe in plain JSON types.

        Raises:
            RecipeError: a field is unknown, missing, of the wrong type or out of its range; names all of them.
        """
        if (found := find_unstorable(value)) is not None:
            raise RecipeError(found.sentence(), next_step="Remove it.", field=found.field)
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise recipe_error(error) from error

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """The recipe in a JSON file; raises RecipeError."""
        try:
            value = json.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecipeError(f"{path.name} cannot be read as a recipe: {error}.") from error
        return cls.from_dict(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same recipe back."""
        return self.model_dump(mode="json")

    def sha256(self) -> str:
        """Digest of the recipe's canonical JSON: equal recipes have equal digests, whichever version wrote them."""
        values = self.to_dict()
        for group, defaults in _LATER.items():
            for name, default in defaults.items():
                if values[group][name] == default:
                    del values[group][name]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def problems_by_field(error: ValidationError, *, prefix: str = "") -> dict[str, str]:
    """pydantic's errors as sentences by dotted field name."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        # A field of type `float | "auto"` reports one error per branch, named after the branch: keep the first.
        path = [
            str(part)
            for part in one["loc"]
            if not str(part).startswith(("literal[", "constrained-")) and part not in (_BY_NAME, _WITH_SETTINGS)
        ]
        while path and path[-1] in {"float", "int", "bool", "str"}:
            path.pop()
        name = ".".join([prefix, *path] if prefix else path)
        message = one["msg"][0].upper() + one["msg"][1:]
        if one["type"] == "extra_forbidden":
            message = "There is no such field"
        elif one["type"] == "value_error":
            message = str(one["ctx"]["error"])  # a sentence of our own
        found.setdefault(name, f"{message}.")
    return found


def recipe_error(error: ValidationError, *, prefix: str = "") -> RecipeProblems:
    """A pydantic error as one RecipeError that names every field."""
    found = problems_by_field(error, prefix=prefix)
    sentence = " ".join(f"{name}: {message}" for name, message in found.items())
    return RecipeProblems(found, message=sentence)

"""The recipe: what was asked for, as one frozen object that travels unchanged from form to model card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workers.errors import RecipeError

Auto = Literal["auto"]
Precision = Literal["float32", "bfloat16", "nf4", "int8"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class BaseModelRef(_Part):
    """The frozen model that the adapter belongs to."""

    name: str = Field(max_length=200, title="Base model")
    revision: str = Field("", description="sha256 over the file list of the base model's folder.")
    path: str | None = Field(None, description="Folder, relative to the recipe file, when run by hand.")


class DatasetRef(_Part):
    """The dataset version that is trained on."""

    name: str = Field(max_length=200, title="Dataset")
    sha256: str = Field("", description="sha256 of the uploaded file.")
    format: str = Field(description="Name of the format plug-in that reads the file.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="The format's field names mapped to the file's column names."
    )
    path: str | None = Field(None, description="File, relative to the recipe file, when run by hand.")


class SplitSettings(_Part):
    """Which rows are held out. The same seed and dataset always hold out the same rows."""

    held_out_share: float = Field(
        0.1, gt=0, lt=1, title="Held-out share", description="Part of the rows kept from training."
    )
    max_held_out: int = Field(200, ge=2, le=100_000, title="Held-out rows at most", json_schema_extra={"unit": "rows"})
    seed: int = Field(17, ge=0, le=2**31 - 1, title="Split seed")


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
        1.0, gt=0, le=100, title="Epochs", description="Passes over the training rows. More than 3 often memorises."
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        le=10_000_000,
        title="Stop after",
        description="Optimizer steps at most; empty for as many as the epochs need.",
        json_schema_extra={"unit": "steps"},
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=4096,
        title="Batch size",
        description="Rows per optimizer step, whatever fits in memory at once.",
        json_schema_extra={"unit": "rows"},
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto = Field(
        "auto",
        title="Micro-batch",
        description="Rows in memory at once. Changes memory and speed, not what is learned.",
        json_schema_extra={"unit": "rows"},
    )
    max_length: int = Field(
        1024,
        ge=16,
        le=1_048_576,
        title="Maximum length",
        description="Longer rows are cut at this many tokens; the dataset page counts how many.",
        json_schema_extra={"unit": "tokens"},
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", title="Schedule", description="How the learning rate falls after the warm-up."
    )
    warmup_share: float = Field(
        0.03,
        ge=0,
        le=0.5,
        title="Warm-up",
        description="Share of the steps over which the learning rate rises from 0.",
        json_schema_extra={"source": "QLoRA (Dettmers et al. 2023), appendix B"},
    )
    weight_decay: float = Field(0.0, ge=0, le=1, title="Weight decay")
    max_grad_norm: float = Field(
        1.0, gt=0, le=1000, title="Gradient clipping", description="Largest norm of a step's gradient."
    )
    packing: bool | Auto = Field(
        "auto", title="Packing", description="Several rows share one sequence without seeing each other: less padding."
    )
    gradient_checkpointing: bool | Auto = Field(
        "auto",
        title="Gradient checkpointing",
        description="Recompute activations instead of keeping them: less memory, slower.",
    )
    loss_on: Literal["assistant", "all"] = Field(
        "assistant", title="Loss on", description="Learn only the assistant's turns, or every token."
    )
    checkpoint_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | Auto = Field(
        "auto", title="Checkpoint every", json_schema_extra={"unit": "steps"}
    )
    seed: int = Field(17, ge=0, le=2**31 - 1, title="Seed")


class EvaluationSettings(_Part):
    """What is measured on the held-out rows, for the untouched base and for the adapter alike."""

    metrics: tuple[str, ...] = Field(("loss", "token_f1"), title="Metrics")
    num_generated: int = Field(
        32,
        ge=0,
        le=10_000,
        title="Answers to generate",
        description="Held-out rows that both models answer; metrics on answers use these.",
        json_schema_extra={"unit": "rows"},
    )
    max_new_tokens: int = Field(128, ge=1, le=8192, title="Answer length", json_schema_extra={"unit": "tokens"})


class Recipe(_Part):
    """Everything that makes an adapter: run again with the same files, it makes the same one."""

    recipe_version: Literal[1] = 1
    name: str = Field(min_length=1, max_length=120, title="Name")
    base_model: BaseModelRef
    dataset: DatasetRef
    method: str = Field("lora", title="Method")
    settings: dict[str, Any] = Field(default_factory=dict, description="The method's own settings.")
    precision: Precision | Auto = Field(
        "auto", title="Precision of the base", description="How the frozen base is held in memory while training."
    )
    objective: str = Field("sft", title="Objective")
    training: TrainingSettings = TrainingSettings()
    split: SplitSettings = SplitSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @classmethod
    def from_dict(cls, value: object) -> Self:
        """The recipe in plain JSON types.

        Raises:
            RecipeError: a field is unknown, missing, of the wrong type or out of its range; names all of them.
        """
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
        """Digest of the recipe's canonical JSON: equal recipes have equal digests."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def problems_by_field(error: ValidationError, *, prefix: str = "") -> dict[str, str]:
    """pydantic's errors as sentences by dotted field name."""
    found: dict[str, str] = {}
    for one in error.errors(include_url=False):
        # A field of type `float | "auto"` reports one error per branch, named after the branch: keep the first.
        path = [str(part) for part in one["loc"] if not str(part).startswith(("literal[", "constrained-"))]
        while path and path[-1] in {"float", "int", "bool", "str"}:
            path.pop()
        name = ".".join([prefix, *path] if prefix else path)
        message = one["msg"][0].upper() + one["msg"][1:]
        if one["type"] == "extra_forbidden":
            message = "There is no such field"
        found.setdefault(name, f"{message}.")
    return found


def recipe_error(error: ValidationError, *, prefix: str = "") -> RecipeError:
    """A pydantic error as one RecipeError that names every field."""
    found = problems_by_field(error, prefix=prefix)
    sentence = " ".join(f"{name}: {message}" for name, message in found.items())
    return RecipeError(sentence, field=next(iter(found), None))

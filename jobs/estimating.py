"""Facts for an estimate, from rows: the dataset as it was counted and the device of the workers that are alive."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from django.conf import settings

from jobs.models import Worker
from jobs.scheduling import live_workers
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from workers.memory import DatasetFacts, DeviceFacts, Estimate, estimate
from workers.methods import get_method
from workers.recipe import Recipe, SplitSettings
from workers.resolving import Alternative, alternatives, resolve
from workers.shapes import ModelShape
from workers.splitting import check_validation, count_parts, num_validation_rows, split_lines

CHARACTERS_PER_TOKEN = 4
"""English text in the vocabularies of today's models; used only until a dataset's tokens are counted."""
ROWS_SPLIT_FOR_REAL = 5_000


@dataclass(frozen=True)
class Device:
    """What a job would run on. `is_live` is False when no worker has been heard of lately."""

    facts: DeviceFacts
    is_live: bool


@dataclass(frozen=True)
class Plan:
    """A recipe with every auto resolved, and what it will need."""

    recipe: Recipe
    estimate: Estimate
    device: Device
    num_train_rows: int
    num_held_out_rows: int
    num_cut_rows: int
    num_tokens: int
    """Tokens of the training rows over all epochs, after cutting."""
    is_counted: bool
    """Whether the dataset was counted in this base model's tokens; else they are guessed from characters."""
    instead: Alternative | None = None
    """The first of the cheaper methods that the recipe's own names, on the same rows."""

    @property
    def product_bytes(self) -> int:
        """Size of what the run leaves: the trained weights and, in a whole model, those that were not trained."""
        is_whole = get_method(self.recipe.method).product.is_whole_model
        return self.estimate.adapter_bytes + (self.estimate.weights_bytes if is_whole else 0)

    @property
    def cut_share(self) -> float:
        """Share of the dataset's usable rows that are longer than the maximum length."""
        total = self.num_train_rows + self.num_held_out_rows
        return self.num_cut_rows / total if total else 0.0


def live_devices() -> list[Worker]:
    """Live workers that take jobs, the largest device first."""
    found = (worker for worker in live_workers() if not worker.is_draining)
    return sorted(found, key=lambda worker: (worker.device_kind == "cuda", worker.memory_bytes), reverse=True)


def choose_device() -> Device:
    """The largest device among live workers, else that of the worker last seen, else this machine's CPU."""
    live = live_devices()
    worker = live[0] if live else Worker.objects.order_by("-last_seen").first()
    if worker is not None:
        return Device(facts_of(worker), is_live=bool(live))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(DeviceFacts("cpu", "CPU of this machine", memory_bytes, os.cpu_count() or 1), is_live=False)


def facts_of(worker: Worker) -> DeviceFacts:
    """A worker's device as the estimate needs it."""
    num_threads = settings.TRAINER_THREADS or os.cpu_count() or 1
    return DeviceFacts(
        "cuda" if worker.device_kind == "cuda" else "cpu", worker.device, worker.memory_bytes, num_threads
    )


def dataset_facts(version: DatasetVersion, base_model: BaseModel) -> tuple[DatasetFacts, bool]:
    """A version's rows in tokens of a base model, and whether they were counted or guessed from characters."""
    counted = version.tokens_of(base_model.revision) or {}
    if "total" in counted:
        return DatasetFacts(
            num_rows=version.num_usable,
            total_tokens=counted["total"],
            longest=counted["longest"],
            lengths=dict(counted.get("histogram", ())),
        ), True
    characters: Mapping[str, Any] = version.statistics.get("characters", {})
    lengths: dict[int, int] = {}
    for bound, rows in characters.get("histogram", ()):
        tokens = _tokens(bound)
        lengths[tokens] = lengths.get(tokens, 0) + rows
    return DatasetFacts(
        num_rows=version.num_usable,
        total_tokens=_tokens(characters.get("total", 0)),
        longest=_tokens(characters.get("longest", 0)),
        lengths=lengths,
    ), False


def _tokens(num_characters: int) -> int:
    return math.ceil(num_characters / CHARACTERS_PER_TOKEN)


def count_split(num_rows: int, settings: SplitSettings) -> tuple[int, int]:
    """How many of the usable rows are trained on and how many held out; raises DatasetError when too few."""
    num_held_out = min(round(num_rows * settings.held_out_share), settings.max_held_out)
    if num_rows > ROWS_SPLIT_FOR_REAL and num_held_out > 1 and num_rows - num_held_out > 1:
        # Choosing the very rows digests each of them; for a large dataset their number is enough.
        return num_rows - num_held_out, num_held_out
    split = split_lines(range(1, num_rows + 1), settings)
    return len(split.train), len(split.held_out)


def make_plan(recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: Device, *, is_counted: bool) -> Plan:
    """What a recipe comes to on a device.

    Raises:
        RecipeError: the recipe cannot work, with the field it belongs to.
        DatasetError: the dataset is too small to split, or its split lacks validation rows.
    """
    if recipe.dataset.split is not None:
        check_validation(recipe)
        parts = count_parts(dataset.num_rows, recipe)
        num_train, num_held_out = parts.num_train, parts.num_held_out
    else:
        num_train, num_held_out = count_split(dataset.num_rows, recipe.split)
        if recipe.training.chooses_on_validation:
            num_validation_rows(num_held_out, recipe.split)
    resolved = resolve(recipe, shape, dataset, device.facts)
    needed = estimate(resolved, shape, dataset, device.facts)
    training = resolved.training
    rows_seen = min(needed.num_steps * training.batch_size, training.epochs * num_train)
    return Plan(
        recipe=resolved,
        estimate=needed,
        device=device,
        num_train_rows=num_train,
        num_held_out_rows=num_held_out,
        num_cut_rows=sum(rows for bound, rows in dataset.lengths.items() if bound > training.max_length),
        num_tokens=round(dataset.mean_after_cut(training.max_length) * rows_seen),
        is_counted=is_counted,
        instead=next(iter(alternatives(recipe, shape, dataset, device.facts)), None),
    )


def plan_for(recipe: Recipe, base_model: BaseModel, version: DatasetVersion) -> Plan:
    """`make_plan` from rows; raises what it raises."""
    facts, is_counted = dataset_facts(version, base_model)
    return make_plan(recipe, base_model.model_shape(), facts, choose_device(), is_counted=is_counted)


def estimate_values(plan: Plan) -> dict[str, Any]:
    """A plan's estimate as JSON types, for the job's row and the API."""
    values = {**asdict(plan.estimate), "device": plan.device.facts.name, "num_tokens": plan.num_tokens}
    if plan.instead is not None:
        other = plan.instead.estimate
        values["instead"] = {
            "method": plan.instead.method.name,
            "total_bytes": other.total_bytes,
            "num_trainable": other.num_trainable,
        }
    return values

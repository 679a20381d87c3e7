"""Facts for an estimate, from rows: the dataset as it was counted and the device of the workers that are alive."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

from django.conf import settings

from jobs.durations import ExpectedTime
from jobs.experience import Experience, quota_and_experience
from jobs.finished import Features
from jobs.models import Worker
from jobs.prices import Price, price_of
from jobs.scheduling import live_workers
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from workers.errors import DatasetError, RecipeError
from workers.facts import DatasetFacts, DeviceFacts, Part, mixed
from workers.fitting import Suggestion, suggestions
from workers.memory import Estimate, estimate
from workers.methods import get_method
from workers.mixing import MANY_PASSES, Portion, often_sentence, portions
from workers.recipe import Recipe, SplitSettings
from workers.resolving import Alternative, alternatives, resolve
from workers.shapes import ModelShape
from workers.sources import of_source
from workers.splitting import Parts, check_validation, count_parts, num_validation_rows, split_lines

CHARACTERS_PER_TOKEN = 4
"""English text in the vocabularies of today's models; used only until a dataset's tokens are counted."""
ROWS_SPLIT_FOR_REAL = 5_000


@dataclass(frozen=True)
class Device:
    """What a job would run on. `is_live` is False when no worker has been heard of lately.

    `free_bytes` is the most memory that a job could have on any live device now, beside what others hold there; None
    where nobody has said.
    """

    facts: DeviceFacts
    is_live: bool
    free_bytes: int | None = None


@dataclass(frozen=True)
class PlannedSource:
    """One of several datasets in a plan."""

    name: str
    weight: float
    portion: Portion
    share: float
    """Part of an epoch's rows, from 0 to 1."""
    passes: float
    """How often the whole run goes through its training rows."""

    @property
    def percent(self) -> str:
        """The share in per cent."""
        return f"{100 * self.share:.3g}"

    @property
    def times(self) -> str:
        """The passes, as people write them."""
        return f"{self.passes:.3g}"

    @property
    def is_often(self) -> bool:
        """Whether its rows are seen so often that they are rather learned by heart."""
        return self.passes > MANY_PASSES


@dataclass(frozen=True)
class Plan:
    """A recipe with every auto resolved, and what it will need."""

    recipe: Recipe
    estimate: Estimate
    device: Device
    num_train_rows: int
    num_held_out_rows: int
    num_usable_rows: int
    """Of all its datasets, those too that a frozen split has in no part."""
    num_cut_rows: int
    """Usable rows over the maximum length: cut, or left out when the recipe says so. Nobody has counted which parts of
    a frozen split they are in."""
    num_tokens: int
    """Tokens of the training rows over all epochs, after cutting."""
    is_counted: bool
    """Whether the dataset was counted in this base model's tokens; else they are guessed from characters."""
    instead: Alternative | None = None
    """The first of the cheaper methods that the recipe's own names, on the same rows."""
    suggestions: tuple[Suggestion, ...] = ()
    """What would make it fit, where it does not."""
    time: ExpectedTime | None = None
    """The engine's time as finished jobs correct it."""
    price: Price | None = None
    """What the team pays for the device; None where it has set no price."""
    sources: tuple[PlannedSource, ...] = ()
    """Of a recipe of several datasets: each of them, the main one first."""

    @property
    def warnings(self) -> list[str]:
        """What is to be said about datasets that are repeated often."""
        return [
            often_sentence(one.name, one.portion, one.passes * one.portion.num_rows / one.portion.per_epoch)
            for one in self.sources[1:]
            if one.is_often
        ]

    @property
    def product_bytes(self) -> int:
        """Size of what the run leaves: the trained weights and, in a whole model, those that were not trained."""
        is_whole = get_method(self.recipe.method).product.is_whole_model
        return self.estimate.adapter_bytes + (self.estimate.weights_bytes if is_whole else 0)

    @property
    def waits_for_memory(self) -> bool:
        """Whether it fits the device, and not beside what others hold on each of them now."""
        free = self.device.free_bytes
        return self.estimate.verdict != "too_large" and free is not None and self.estimate.starting_bytes > free

    @property
    def cost_range(self) -> tuple[Decimal, Decimal] | None:
        """What it will cost, from the shortest to the longest expected time; None without a price."""
        if self.price is None or self.time is None:
            return None
        low, high = (Decimal(seconds / 3600) * self.price.amount for seconds in (self.time.low, self.time.high))
        return low, high

    @property
    def cut_share(self) -> float:
        """Share of the usable rows that are longer than the maximum length."""
        return self.num_cut_rows / self.num_usable_rows if self.num_usable_rows else 0.0


def live_devices() -> list[Worker]:
    """Live workers that take jobs, the largest device first."""
    found = (worker for worker in live_workers() if not worker.is_draining)
    return sorted(found, key=lambda worker: (worker.device_kind == "cuda", worker.memory_bytes), reverse=True)


def choose_device() -> Device:
    """The largest device among live workers, else that of the worker last seen, else this machine's CPU."""
    live = live_devices()
    worker = live[0] if live else Worker.objects.order_by("-last_seen").first()
    if worker is not None:
        free = [one.memory_bytes if one.free_memory_bytes is None else one.free_memory_bytes for one in live]
        # A worker of an older version may not have said how much memory its device has.
        return Device(facts_of(worker), is_live=bool(live), free_bytes=max(free) or None if free else None)
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


def make_plan(
    recipe: Recipe,
    shape: ModelShape,
    dataset: DatasetFacts,
    device: Device,
    *,
    is_counted: bool,
    mixed_facts: Sequence[DatasetFacts] = (),
) -> Plan:
    """What a recipe comes to on a device. `mixed_facts` are those of its further datasets.

    Raises:
        RecipeError: the recipe cannot work, with the field it belongs to.
        DatasetError: a dataset is too small to split, or its split lacks validation rows.
    """
    every = [dataset, *mixed_facts]
    num_longer = sum(one.num_longer(recipe.training.max_length) for one in every)
    num_usable = sum(one.num_rows for one in every)
    dataset, sources = _mixture_of(recipe, every)
    splits, parts = [one.own for one in sources], [one.portion for one in sources]
    resolved = resolve(recipe, shape, dataset, device.facts)
    needed = estimate(resolved, shape, dataset, device.facts)
    target = device.facts
    if needed.verdict != "too_large" and device.free_bytes is not None:
        target = replace(target, memory_bytes=min(target.memory_bytes, device.free_bytes))
    fits = needed.verdict == "fits" and needed.starting_bytes <= target.memory_bytes
    training = resolved.training
    rows_per_epoch = sum(one.per_epoch for one in parts)
    rows_seen = min(needed.num_steps * training.batch_size, training.epochs * rows_per_epoch)
    return Plan(
        recipe=resolved,
        estimate=needed,
        device=device,
        num_train_rows=sum(one.num_train for one in splits),
        num_held_out_rows=sum(one.num_held_out for one in splits),
        num_usable_rows=num_usable,
        num_cut_rows=num_longer,
        num_tokens=round(dataset.mean_after_cut(training.max_length) * rows_seen),
        is_counted=is_counted,
        instead=next(iter(alternatives(recipe, shape, dataset, device.facts)), None),
        suggestions=() if fits else tuple(suggestions(recipe, shape, dataset, target)),
        sources=_planned_sources(resolved, parts, rows_seen / rows_per_epoch) if mixed_facts else (),
    )


@dataclass(frozen=True)
class _Source:
    """One of a recipe's datasets: how many of its rows come into each part, and what an epoch takes of them."""

    own: Parts
    portion: Portion


def _mixture_of(recipe: Recipe, every: Sequence[DatasetFacts]) -> tuple[DatasetFacts, list[_Source]]:
    """The facts of what an epoch takes of all datasets, and the part of each; raises DatasetError."""
    if recipe.training.long_rows == "leave_out":
        every = [_without_long_rows(recipe, one) for one in every]
    splits = [_parts_of(recipe, number, one) for number, one in enumerate(every)]
    found = portions([one.num_train for one in splits], [one.weight for one in recipe.mix])
    sources = [_Source(own, portion) for own, portion in zip(splits, found, strict=True)]
    if len(every) == 1:
        return every[0], sources
    facts = mixed([Part(one, source.portion.per_epoch, source.own) for one, source in zip(every, sources, strict=True)])
    return facts, sources


def _parts_of(recipe: Recipe, number: int, dataset: DatasetFacts) -> Parts:
    """How many rows of one of the recipe's datasets come into each part; what is raised says which dataset it is."""
    ref = recipe.sources[number]
    try:
        if ref.split is not None:
            check_validation(recipe, ref)
            return count_parts(dataset.num_rows, recipe, ref)
        num_train, num_held_out = count_split(dataset.num_rows, recipe.split)
        if recipe.training.chooses_on_validation:
            num_validation_rows(num_held_out, recipe.split)
    except DatasetError as error:
        raise of_source(error, number, ref.name) from error
    return Parts(num_train, 0, num_held_out)


def _planned_sources(recipe: Recipe, parts: Sequence[Portion], epochs: float) -> tuple[PlannedSource, ...]:
    """The recipe's datasets in a run of so many epochs."""
    total = sum(one.per_epoch for one in parts)
    weights = [1.0, *(one.weight for one in recipe.mix)]
    return tuple(
        PlannedSource(ref.name, weight, portion, portion.per_epoch / total, portion.passes(epochs))
        for ref, weight, portion in zip(recipe.sources, weights, parts, strict=True)
    )


def _without_long_rows(recipe: Recipe, dataset: DatasetFacts) -> DatasetFacts:
    kept = dataset.without_longer(recipe.training.max_length)
    if dataset.num_rows and not kept.num_rows:
        raise RecipeError(
            f"Every row is longer than {recipe.training.max_length:,} tokens, and longer rows are left out.",
            next_step=f"Raise the maximum length (the longest row has {dataset.longest:,}), or let rows be cut.",
            field="training.max_length",
        )
    return kept


def plan_for(
    recipe: Recipe, base_model: BaseModel, version: DatasetVersion, mixed_versions: Sequence[DatasetVersion] = ()
) -> Plan:
    """`make_plan` from rows, with time and memory as finished jobs correct them, and the team's price; raises what it
    raises."""
    found = [dataset_facts(one, base_model) for one in (version, *mixed_versions)]
    facts = [one for one, _ in found]
    quota, experience = quota_and_experience(version)
    device = _with_experience(choose_device(), experience)
    plan = make_plan(
        recipe, base_model.model_shape(), facts[0], device,
        is_counted=all(is_counted for _, is_counted in found), mixed_facts=facts[1:],
    )  # fmt: skip
    needed, name = plan.estimate, device.facts.name
    features = Features(
        (needed.seconds_low + needed.seconds_high) / 2,
        max(1, plan.num_tokens),
        plan.recipe.method,
        base_model.name,
        name,
    )
    return replace(
        plan,
        time=experience.prediction.time_of(features, needed.seconds_low, needed.seconds_high),
        price=price_of(quota, name),
    )


def suggestions_for(
    recipe: Recipe, base_model: BaseModel, version: DatasetVersion, mixed_versions: Sequence[DatasetVersion] = ()
) -> list[Suggestion]:
    """What would make a recipe fit that its method refuses because it does not; nothing for one that cannot work."""
    every = [dataset_facts(one, base_model)[0] for one in (version, *mixed_versions)]
    _, experience = quota_and_experience(version)
    device = _with_experience(choose_device(), experience)
    facts, _ = _mixture_of(recipe, every)
    return suggestions(recipe, base_model.model_shape(), facts, device.facts)


def _with_experience(device: Device, experience: Experience) -> Device:
    return replace(device, facts=replace(device.facts, measured=experience.memory_on(device.facts.name)))


def estimate_values(plan: Plan) -> dict[str, Any]:
    """A plan's estimate as JSON types, for the job's row and the API. Its seconds are the engine's own, which later
    jobs learn from."""
    values = {**asdict(plan.estimate), "device": plan.device.facts.name, "num_tokens": plan.num_tokens}
    if plan.instead is not None:
        other = plan.instead.estimate
        values["instead"] = {
            "method": plan.instead.method.name,
            "total_bytes": other.total_bytes,
            "num_trainable": other.num_trainable,
        }
    if plan.sources:
        values["sources"] = [
            {
                "name": one.name, "weight": one.weight, "share": one.share, "passes": one.passes,
                "num_train_rows": one.portion.num_rows, "rows_per_epoch": one.portion.per_epoch,
            }
            for one in plan.sources
        ]  # fmt: skip
    return values

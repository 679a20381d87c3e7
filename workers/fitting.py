"""What would fit where a recipe does not, or a run did not: the memory estimate of each change, and its price in time.

`suggestions` is for a recipe that has not run yet, `remedies` for a run that ran out of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from workers.errors import RecipeProblems
from workers.facts import DatasetFacts, DeviceFacts
from workers.memory import GIB, TIGHT_SHARE, Estimate, estimate
from workers.methods import get_method
from workers.recipe import Recipe
from workers.resolving import resolve
from workers.shapes import ModelShape

MIN_LENGTH = 64
"""Tokens below which cutting rows is no advice any more."""
MIN_RANK = 4
"""Below it an adapter has little left to save, and little to learn with."""
MAX_SUGGESTIONS = 5
LENGTH_STEP = 64
"""Lengths that are suggested are multiples of it."""


@dataclass(frozen=True)
class Suggestion:
    """A change to a recipe with which it fits: `words` follow "Use", and `cost` says what is given up beside time.

    `asked` is the recipe as it would be asked for, its autos left to decide; `recipe` what they come to. `slowdown` is
    how many times as long the run takes by the arithmetic, below 1 where it is faster.
    """

    words: str
    cost: str
    asked: Recipe
    recipe: Recipe
    num_bytes: int
    slowdown: float


def suggestions(asked: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts) -> list[Suggestion]:
    """Changes with which a recipe fits a device, those first that change the least of what is learned.

    Each is resolved and estimated like any recipe; what does not fit is not said. A change that does not suffice alone
    is tried again with the rows at once and the checkpointing left to the studio, and where no change suffices, the
    base in 4 bits and shorter rows are tried together. Empty: nothing that keeps the base model fits.
    """
    now = _now(asked, shape, dataset, device)
    if now is None:
        return []
    trial = _Trial(shape, dataset, device, now[1])
    loose = _eased(asked)
    found = [one for change in _harmless_changes(asked, trial) if (one := trial.of(*change))]
    if not found and (one := trial.of("gradient checkpointing, and as many rows at once as fit", SAME_RESULT, loose)):
        found.append(one)
    for words, cost, changed in _other_changes(asked, now[0], trial):
        one = trial.of(words, cost, changed)
        if one is None and (eased := _eased(changed)) != changed:
            one = trial.of(f"{words}, and as many rows at once as then fit", cost, eased)
        found += [one] if one is not None else []
    small = in_4_bits(loose)
    if not found and small is not None and (length := trial.longest_fitting(small)) is not None:
        words, cost = _shorter_words(length, dataset, small)
        one = trial.of(f"{_small_words(small)} and {words}", cost, _with_training(small, max_length=length))
        found += [one] if one is not None else []
    return found[:MAX_SUGGESTIONS]


SAME_RESULT = "what is learned stays the same"


@dataclass(frozen=True)
class _Trial:
    """Resolves and estimates changes on one device."""

    shape: ModelShape
    dataset: DatasetFacts
    device: DeviceFacts
    now: Estimate

    def estimate(self, asked: Recipe) -> tuple[Recipe, Estimate] | None:
        """The recipe resolved and what it needs; None where it cannot work."""
        try:
            recipe = resolve(asked, self.shape, self.dataset, self.device)
        except RecipeProblems:
            return None
        return recipe, estimate(recipe, self.shape, self.dataset, self.device)

    def of(self, words: str, cost: str, asked: Recipe) -> Suggestion | None:
        """The change as a suggestion; None where it does not fit."""
        found = self.estimate(asked)
        if found is None or found[1].verdict != "fits":
            return None
        recipe, needed = found
        slowdown = needed.seconds_low / self.now.seconds_low
        return Suggestion(words, cost, asked, recipe, needed.total_bytes, slowdown)

    def fits(self, asked: Recipe) -> bool:
        found = self.estimate(asked)
        return found is not None and found[1].verdict == "fits"

    def longest_fitting(self, asked: Recipe) -> int | None:
        """The largest multiple of LENGTH_STEP below the longest row at which the recipe fits; None where none does."""
        longest = self.dataset.longest_after_cut(asked.training.max_length)
        low, high = MIN_LENGTH // LENGTH_STEP, (longest - 1) // LENGTH_STEP
        if high < low or not self.fits(_with_training(asked, max_length=low * LENGTH_STEP)):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(_with_training(asked, max_length=middle * LENGTH_STEP)):
                low = middle
            else:
                high = middle - 1
        return low * LENGTH_STEP


def _now(
    asked: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts
) -> tuple[Recipe, Estimate] | None:
    """The recipe as it stands and its estimate, also where its method refuses the device; None if it cannot work."""
    try:
        recipe = resolve(asked, shape, dataset, device)
    except RecipeProblems:
        try:
            # Of a device of unknown size nothing is refused for its size.
            recipe = resolve(asked, shape, dataset, replace(device, memory_bytes=0))
        except RecipeProblems:
            return None
    return recipe, estimate(recipe, shape, dataset, device)


def _harmless_changes(asked: Recipe, trial: _Trial) -> Iterator[tuple[str, str, Recipe]]:
    """(words, cost, recipe) of changes that leave what is learned as it is."""
    training = asked.training
    if isinstance(training.micro_batch_size, int):
        for size in _halves_below(min(training.micro_batch_size, training.batch_size)):
            smaller = _with_training(asked, micro_batch_size=size)
            if trial.fits(smaller):
                yield f"a micro-batch of {size} row{'s' if size > 1 else ''}", SAME_RESULT, smaller
                break
    if training.gradient_checkpointing is False and get_method(asked.method).can_checkpoint_activations:
        yield "gradient checkpointing", SAME_RESULT, _with_training(asked, gradient_checkpointing=True)


def _other_changes(asked: Recipe, now: Recipe, trial: _Trial) -> Iterator[tuple[str, str, Recipe]]:
    """(words, cost, recipe) of the other single changes, those first that change the least of what is learned."""
    method = get_method(asked.method)
    small = in_4_bits(asked) if now.precision != "nf4" else None
    if small is not None:
        yield _small_words(small), "the base is held a little less exactly", small
    rank = now.settings.get("rank")
    if isinstance(rank, int):
        for lower in _halves_below(rank):
            changed = _with_rank(asked, now, lower)
            if lower >= MIN_RANK and trial.fits(changed):
                yield f"a rank of {lower}", f"{rank / lower:.2g} times fewer weights learn", changed
                break
    if (length := trial.longest_fitting(asked)) is not None:
        yield *_shorter_words(length, trial.dataset, asked), _with_training(asked, max_length=length)
    for name in method.cheaper:
        if small is None or name != small.method:
            other = _with_training(asked, learning_rate="auto").model_copy(
                update={"method": name, "settings": {}, "precision": "auto"}
            )
            yield get_method(name).label, "another method, at its own defaults", other


def _eased(asked: Recipe) -> Recipe:
    """The recipe with the rows at once and the checkpointing left to the studio."""
    return _with_training(asked, micro_batch_size="auto", gradient_checkpointing="auto")


def _halves_below(number: int) -> list[int]:
    """12: 6, 3, 1."""
    found = []
    while number > 1:
        number //= 2
        found.append(number)
    return found


def _with_rank(asked: Recipe, now: Recipe, rank: int) -> Recipe:
    """The recipe at a lower rank. The adapter's factor, alpha / rank, stays what it was; rank-stabilised LoRA keeps
    alpha, because its factor is made for that."""
    settings: dict[str, Any] = {**asked.settings, "rank": rank}
    alpha = now.settings.get("alpha")
    if isinstance(alpha, int | float) and asked.method != "rslora":
        settings["alpha"] = alpha * rank / now.settings["rank"]
    return asked.model_copy(update={"settings": settings})


def _shorter_words(length: int, dataset: DatasetFacts, recipe: Recipe) -> tuple[str, str]:
    """A maximum length in words, and which share of the rows it cuts or leaves out."""
    words = f"rows of at most {length:,} tokens"
    fate = "are left out" if recipe.training.long_rows == "leave_out" else "lose their ends"
    if not dataset.lengths:
        return words, f"longer rows {fate}"
    cut = sum(rows for bound, rows in dataset.lengths.items() if bound > length)
    # To two digits, and 100 rather than 1e+02.
    percent = float(f"{100 * cut / max(1, sum(dataset.lengths.values())):.2g}")
    return words, f"up to {percent:g} % of the rows {fate}" if cut else "no row is that long"


def _small_words(recipe: Recipe) -> str:
    return "QLoRA, a base in 4 bits" if recipe.method == "qlora" else "a base in 4 bits"


@dataclass(frozen=True)
class Remedy:
    """A change to a recipe, in words, and the bytes that the run would then need."""

    words: str
    recipe: Recipe
    num_bytes: int


def remedies(
    recipe: Recipe,
    shape: ModelShape,
    dataset: DatasetFacts,
    device: DeviceFacts,
    *,
    micro_batch_size: int,
    peak_memory_bytes: int,
) -> list[Remedy]:
    """Changes that make a run fit its device which ran out of memory, the least intrusive first; all that fit.

    Args:
        recipe: without any "auto".
        micro_batch_size: rows in memory at once when memory ran out.
        peak_memory_bytes: what the run held by then. Where that is more than the estimate, the estimates of the
            changes are raised by the same factor: what the arithmetic missed once, it misses again.
    """
    now = _with_training(recipe, micro_batch_size=micro_batch_size)
    factor = max(1.0, peak_memory_bytes / estimate(now, shape, dataset, device).total_bytes)
    return [
        Remedy(words, changed, num_bytes)
        for words, changed in _changes(now, shape, dataset, device)
        if (num_bytes := round(factor * estimate(changed, shape, dataset, device).total_bytes))
        < TIGHT_SHARE * device.memory_bytes
    ]


def advice(found: list[Remedy], recipe: Recipe, device: DeviceFacts) -> str:
    """The remedies as a sentence with what each would need."""
    if not found:
        where = "this card" if device.kind == "cuda" else "this machine"
        return (
            f"Nothing that leaves the base model and {recipe.training.max_length} tokens alone fits {where}: choose a "
            f"smaller base model or a device with more memory."
        )
    listed = "; ".join(f"{one.words}, about {one.num_bytes / GIB:.1f} GiB" for one in found)
    return f"This would fit: {listed}."


def in_4_bits(recipe: Recipe) -> Recipe | None:
    """The recipe on a base in 4 bits, its settings kept as far as they mean the same; None where there is no such."""
    method = get_method(recipe.method)
    if "nf4" in method.precisions:
        return recipe.model_copy(update={"precision": "nf4"}) if recipe.precision != "nf4" else None
    if recipe.method != "lora":
        return None
    known = get_method("qlora").Settings.model_fields
    settings = {name: value for name, value in recipe.settings.items() if name in known}
    return recipe.model_copy(update={"method": "qlora", "settings": settings, "precision": "nf4"})


def _changes(
    recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts
) -> Iterator[tuple[str, Recipe]]:
    """Every change that is tried, in words, the least intrusive first."""
    training = recipe.training
    assert training.micro_batch_size != "auto"
    if training.micro_batch_size > 1:
        half = training.micro_batch_size // 2
        yield f"a micro-batch of {half}", _with_training(recipe, micro_batch_size=half)
    single = _with_training(recipe, micro_batch_size=1)
    can_checkpoint = get_method(recipe.method).can_checkpoint_activations
    checkpointed = _with_training(single, gradient_checkpointing=True)
    if can_checkpoint and training.gradient_checkpointing is not True:
        yield "gradient checkpointing with a micro-batch of 1", checkpointed
    small = in_4_bits(checkpointed if can_checkpoint else single)
    if small is not None and _is_possible(small, shape, dataset, device):
        name = "QLoRA" if small.method == "qlora" else "a base in 4 bits"
        yield f"{name} with a micro-batch of 1", small
    yield from _shorter(checkpointed if can_checkpoint else single, dataset)


def _shorter(recipe: Recipe, dataset: DatasetFacts) -> Iterator[tuple[str, Recipe]]:
    """Half the longest row, in tokens: a power of two, so that the number is one that people choose."""
    longest = dataset.longest_after_cut(recipe.training.max_length)
    half = 2 ** ((longest - 1).bit_length() - 1)
    if half >= MIN_LENGTH:
        yield (
            f"rows of at most {half} tokens{_beside(recipe)}",
            _with_training(recipe, max_length=half),
        )


def _beside(recipe: Recipe) -> str:
    return " with gradient checkpointing" if recipe.training.gradient_checkpointing is True else ""


def _is_possible(recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts) -> bool:
    try:
        resolve(recipe, shape, dataset, device)
    except RecipeProblems:
        return False
    return True


def _with_training(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})

"""Training, from a recipe and three folders to a scored adapter: `train` reads as its own table of contents."""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError

from workers import adapters, checkpoints, devices, fixed_prompts, scoring
from workers.base_folders import BaseFolder
from workers.base_scores import BaseScores, scores_key
from workers.bases import Bases, free
from workers.batching import Batch, Plan, TokenBudget, TokenRows, collate, split_step
from workers.blocks.choosing import hand_written
from workers.blocks.engine import Engine
from workers.blocks.keeping import HOST_SHARE
from workers.blocks.launching import LayerTime
from workers.blocks.planning import MemoryPlan, StepTokens, choose_plan, plan_memory
from workers.blocks.recording import Recorder, can_be_recorded
from workers.checkpoints import Checkpoint, Position
from workers.device_errors import is_gpu_failure, is_out_of_memory
from workers.errors import BaseModelError, DatasetError, DivergedError, GpuError, OutOfMemoryError
from workers.evaluations import ScoredRow, choose_evaluations
from workers.events import (
    CheckpointEvent,
    DivergedEvent,
    MessageEvent,
    PhaseEvent,
    PlanEvent,
    Report,
    ResultEvent,
    ShouldStop,
    StepEvent,
    StopMode,
    StoppedEvent,
)
from workers.examples import Example, Problem
from workers.facts import DatasetFacts, DeviceFacts, Part, mixed
from workers.failpoints import failpoint
from workers.fitting import advice, remedies
from workers.fixed_prompts import FixedPrompts
from workers.forgetting import general_scores, score_general
from workers.general import MAX_LENGTH, general_rows
from workers.gpus import gpu_named
from workers.hand_written import is_hand_written
from workers.layers.neftune import EmbeddingNoise
from workers.lm_eval_layout import write_run
from workers.losses import head_is_plain
from workers.memory import GIB
from workers.meter import Meter, Reading
from workers.methods import get_method
from workers.mixing import Portion, dealt, line_at, place_of, portions, source_at, told_lines
from workers.objectives import Objective, get_objective
from workers.overlap import MAX_PAIRS, find_overlap, row_key
from workers.recipe import Recipe
from workers.rendering import Renderer
from workers.resolving import resolve
from workers.results import OverlapRecord, Provenance, Result, ScoreRecord, SourceRecord, SuspiciousRecord
from workers.schedule import learning_rate
from workers.sources import (
    Source,
    by_lines,
    count_by_source,
    left_out_sentence,
    lines_by_source,
    of_source,
    open_sources,
    portion_sentences,
    read_sources,
)
from workers.splits.asked import MIN_PART, PARTS
from workers.splits.frozen import FrozenSplit
from workers.splitting import Parts, check_validation, split_lines, validation_lines
from workers.stopping import is_out_of_patience, step_of_adapter
from workers.suspicion import MAX_ROWS, Visits, suspects
from workers.test_sets import rows_sha256, settings_sha256
from workers.validating import Validator, validation_event

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes", "numpy", "peft-studio")


@dataclass(frozen=True)
class Folders:
    """Where things lie: the base model's folder, the dataset file, and the folder that takes what is made.

    `mix` are the files of the recipe's further datasets, in their order. `split` is the file of the frozen split that
    the recipe names, where it names one, and `mix_splits` are those of its further datasets.
    """

    base_model: Path
    dataset: Path
    out: Path
    mix: tuple[Path, ...] = ()
    split: Path | None = None
    mix_splits: tuple[Path | None, ...] = ()


@dataclass(frozen=True)
class Data:
    """The dataset as training needs it, or several. `train` indexes `tokens`; the others are whole examples.

    Rows of a further dataset have their places for lines (`workers.mixing`). `portions` has an entry for each of
    `sources`, in whose order `train` is. `held_out` are the rows of the scores. `validation` are those looked at during
    training: the same, unless they choose something, which would flatter the scores, or a frozen split says otherwise;
    then they are other rows that are not trained on. `overlap` says which of the scored rows are among the training
    rows, too.
    """

    tokens: TokenRows
    train: list[int]
    held_out: list[Example]
    validation: list[Example]
    num_skipped: int
    num_cut: int
    sha256: str
    overlap: OverlapRecord
    sources: list[Source]
    portions: tuple[Portion, ...]
    skipped_places: frozenset[int]

    @property
    def names(self) -> list[str]:
        """The names of the sources."""
        return [one.ref.name for one in self.sources]

    @property
    def validates_what_is_scored(self) -> bool:
        """Whether validations look at the rows of the scores, in whatever order."""
        return {row.line for row in self.validation} == {row.line for row in self.held_out}

    @property
    def is_mixed(self) -> bool:
        """Whether there are several sources."""
        return len(self.sources) > 1


@dataclass
class Run:
    """What one attempt carries from phase to phase.

    `max_micro_batch_size` bounds the rows in memory at once when that is not None; `step` is the one being taken, None
    outside the loop, and `micro_batch_size` the rows that it has in memory at once. `budget` bounds the tokens of a
    micro-batch, where hand-written blocks take it without padding. `plans_by_memory` says that they chose what they
    keep by the memory that is free: once it ran out, the next attempt plans with half of it.
    """

    recipe: Recipe
    folders: Folders
    attempt: int
    device: torch.device
    base: BaseFolder
    renderer: Renderer
    data: Data
    dataset_facts: DatasetFacts
    device_facts: DeviceFacts
    report: Report
    should_stop: ShouldStop
    base_scores: BaseScores
    max_micro_batch_size: int | None = None
    step: int | None = None
    micro_batch_size: int = 1
    bases: Bases = field(default_factory=Bases)
    visits: Visits = field(default_factory=lambda: Visits(0))
    engine: Engine | None = None
    budget: TokenBudget | None = None
    recorder: Recorder | None = None
    plans_by_memory: bool = False

    def say(self, text: str, *, is_warning: bool = False) -> None:
        """A sentence for the job's event list."""
        self.report(MessageEvent(level="warning" if is_warning else "info", text=text))

    def must_end(self) -> StopMode | None:
        """The stop that was asked for, unless it wants the adapter finished first."""
        mode = self.should_stop()
        return mode if mode in ("now", "checkpoint") else None


class _Stopped(Exception):  # noqa: N818 - an outcome, not an error
    """Training ends without a product because it was asked to."""

    def __init__(self, mode: StopMode, step: int) -> None:
        super().__init__(mode)
        self.mode: StopMode = mode
        self.step = step


def train(
    recipe: Recipe,
    folders: Folders,
    *,
    report: Report,
    should_stop: ShouldStop,
    attempt: int = 1,
    micro_batch_size: int | None = None,
    bases: Bases | None = None,
    base_scores: BaseScores | None = None,
) -> Path | None:
    """Trains an adapter and gives the folder of the finished product; None when it was stopped without one.

    A run that was interrupted goes on from its newest checkpoint in `folders.out`, whichever attempt made it. With
    `micro_batch_size` it has at most that many rows in memory at once, whatever the recipe says; the batch stays.
    `bases` gives it the base model; without, the folder is read and loaded anew. `base_scores` keeps what the base
    was measured at for later runs; without, only a later attempt of this one finds it.

    Raises:
        ExplainedError: what a person can mend: the recipe, the dataset, the base model, memory, disk space.
    """
    started = time.monotonic()
    device = devices.choose_device()
    run: Run | None = None
    try:
        run = prepare(
            recipe, folders, report=report, should_stop=should_stop, attempt=attempt, device=device, bases=bases,
        )  # fmt: skip
        run.max_micro_batch_size = micro_batch_size
        run.base_scores = base_scores or run.base_scores
        model = load_base(run)
        base_rows = score_base(run, model)
        base_general = score_base_on_general(run, model)
        answer_with_base(run, model)
        model = attach(run, model)
        with computed_by_hand(run, model):
            position, stopped_at = optimise(run, model)
        adapter_rows = score_adapter(run, model, position)
        general = tuple(general_scores(base_general, score_on_general(run, model, "evaluating", position.step)))
        suspicious = suspicious_rows(run, model)
        product = package(run, model, base_rows, adapter_rows, general, suspicious, position, stopped_at, started)
    except _Stopped as stop:
        report(StoppedEvent(mode=stop.mode, step=stop.step))
        return None
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise _out_of_memory(run, device) from error
        if is_gpu_failure(error):
            raise _gpu_failure(error, device) from error
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        if is_out_of_memory(error):
            raise _out_of_memory(run, device) from error
        raise checkpoints.disk_error(error, "the run's files") from error
    failpoint("training.packaged")
    report(ResultEvent(folder=str(product), stopped_at_step=stopped_at))
    failpoint("training.before_exit")
    return product


# --- preparing -------------------------------------------------------------------------------------------------------


def prepare(
    recipe: Recipe,
    folders: Folders,
    *,
    report: Report,
    should_stop: ShouldStop,
    attempt: int,
    device: torch.device,
    bases: Bases | None = None,
) -> Run:
    """Reads and renders the data, splits it, and settles every "auto" of the recipe."""
    bases = bases or Bases()
    report(PhaseEvent(phase="preparing"))
    folders.out.mkdir(parents=True, exist_ok=True)
    base = bases.read(folders.base_model)
    check_revision(recipe, base)
    max_length = recipe.training.max_length
    renderer = Renderer(folders.base_model, max_length=max_length, loss_on=recipe.training.loss_on)
    data = read_data(recipe, folders, renderer, report)
    # Held-out rows too: facts are of the whole dataset, as in the form, and are split where they are used.
    facts = facts_of_data(data)
    device_facts = facts_of_device(device)
    resolved = resolve(recipe, base.shape, facts, device_facts)
    return Run(
        resolved, folders, attempt, device, base, renderer, data, facts, device_facts, report, should_stop,
        BaseScores(folders.out / "base_scores"), bases=bases, visits=Visits(len(data.tokens)),
    )  # fmt: skip


def check_revision(recipe: Recipe, base: BaseFolder) -> None:
    """Raises BaseModelError when the recipe was made for another revision of the base model."""
    if recipe.base_model.revision and recipe.base_model.revision != base.revision:
        raise BaseModelError(
            f"The base model's folder has changed: its revision is {base.revision[:12]}, the recipe was made for "
            f"{recipe.base_model.revision[:12]}.",
            next_step="Register the folder again and start a new job.",
            field="base_model.revision",
        )


def dataset_facts(lengths: Sequence[int]) -> DatasetFacts:
    """The rows' lengths in tokens as an estimate needs them."""
    histogram: dict[int, int] = {}
    for length in lengths:
        upper = 2 ** math.ceil(math.log2(max(length, 16)))
        histogram[upper] = histogram.get(upper, 0) + 1
    return DatasetFacts(num_rows=len(lengths), total_tokens=sum(lengths), longest=max(lengths), lengths=histogram)


def facts_of_data(data: Data) -> DatasetFacts:
    """What was read as an estimate needs it; of several datasets, as much of each as an epoch takes."""
    lengths: list[list[int]] = [[] for _ in data.sources]
    for row, place in enumerate(data.tokens.lines):
        lengths[source_at(place)].append(data.tokens.length(row))
    if not data.is_mixed:
        return dataset_facts(lengths[0])
    return mixed(
        [
            Part(dataset_facts(own), portion.per_epoch, Parts(portion.num_rows, 0, len(own) - portion.num_rows))
            for own, portion in zip(lengths, data.portions, strict=True)
        ]
    )


def facts_of_device(device: torch.device) -> DeviceFacts:
    """The device as an estimate needs it."""
    return DeviceFacts(
        kind="cuda" if device.type == "cuda" else "cpu",
        name=devices.device_name(device),
        memory_bytes=devices.memory_bytes(device),
        num_threads=torch.get_num_threads(),
        has_fast_bfloat16=devices.supports_bfloat16(device),
    )


def read_data(recipe: Recipe, folders: Folders, renderer: Renderer, report: Report) -> Data:
    """The usable rows as tokens, split; says how many rows are left out and why the first one is.

    Of several datasets each is split by itself: what is held out of one is the same whatever it is mixed with.
    """
    splits = [folders.split, *(folders.mix_splits or (None,) * len(folders.mix))]
    sources = open_sources(recipe.sources, [folders.dataset, *folders.mix], splits)
    names = [source.ref.name for source in sources]
    keys: dict[int, bytes] = {}

    def keyed_rows() -> Iterator[Example | Problem]:
        for row in read_sources(sources):
            if isinstance(row, Example):
                keys[row.line] = row_key(row)
            yield row

    tokens, problems, num_cut = TokenRows.render(
        keyed_rows(), renderer, folders.out, leaves_out_long=recipe.training.long_rows == "leave_out"
    )
    if problems:
        report(MessageEvent(level="warning", text=left_out_sentence(problems, names)))
    train: list[list[int]] = []
    held_out: set[int] = set()
    choosing: set[int] = set()
    validated: set[int] = set()
    for source, lines in zip(sources, lines_by_source(tokens.lines, len(sources)), strict=True):
        trained, own_held_out, own_choosing = _split_source(recipe, source, lines, keys, report)
        train.append([place_of(source.number, line) for line in trained])
        held_out |= {place_of(source.number, line) for line in own_held_out}
        choosing |= {place_of(source.number, line) for line in own_choosing}
        validated |= {place_of(source.number, line) for line in own_choosing or own_held_out}
    if choosing and recipe.training.chooses_on_validation:
        text = (
            f"{len(choosing)} of the {len(held_out)} held-out rows choose the step; the other "
            f"{len(held_out) - len(choosing)} give the scores."
        )
        report(MessageEvent(text=text))
    parts = portions([len(places) for places in train], [one.weight for one in recipe.mix])
    if recipe.mix:
        for text, is_warning in portion_sentences(sources, parts, recipe.training.epochs):
            report(MessageEvent(level="warning" if is_warning else "info", text=text))
    index_of = {place: index for index, place in enumerate(tokens.lines)}
    examples = [row for row in read_sources(sources) if isinstance(row, Example) and row.line in held_out]
    scored = [row for row in examples if row.line not in choosing]
    looked_at = [row for row in examples if row.line in validated]
    if recipe.mix:
        # Whoever takes the first few of them, for answers, takes some of each dataset.
        looked_at = dealt(looked_at, [source_at(row.line) for row in looked_at])
    trained_on = {place for places in train for place in places}
    overlap = find_overlap(
        scored,
        lambda: (row for row in read_sources(sources) if isinstance(row, Example) and row.line in trained_on),
        num_training=len(trained_on),
        max_pairs=len(scored) if recipe.mix else MAX_PAIRS,
    )
    overlap = by_lines(overlap) if recipe.mix else overlap
    if overlap.num_exact + overlap.num_near:
        report(MessageEvent(level="warning", text=overlap.sentence()))
    skipped = frozenset(problem.line for problem in problems if problem.line is not None)
    return Data(
        tokens=tokens,
        train=[index_of[place] for places in train for place in places],
        held_out=scored,
        validation=looked_at,
        num_skipped=len({problem.line for problem in problems}),
        num_cut=num_cut,
        sha256=sources[0].sha256,
        overlap=overlap,
        sources=sources,
        portions=parts,
        skipped_places=skipped,
    )


def _split_source(
    recipe: Recipe, source: Source, lines: list[int], keys: Mapping[int, bytes], report: Report
) -> tuple[Sequence[int], set[int], set[int]]:
    """Lines of one source to train on, those held out, and those of them that choose and are not scored."""
    try:
        if source.ref.split is not None:
            return _frozen_parts(recipe, source, lines, report)
        own = {line: keys[place_of(source.number, line)] for line in lines}
        split = split_lines(lines, recipe.split, own)
        chooses = recipe.training.chooses_on_validation
        choosing = validation_lines(split.held_out, recipe.split, own) if chooses else ()
    except DatasetError as error:
        raise of_source(error, source.number, source.ref.name) from error
    return split.train, set(split.held_out), set(choosing)


def _frozen_parts(
    recipe: Recipe, source: Source, lines: list[int], report: Report
) -> tuple[Sequence[int], set[int], set[int]]:
    """As `_split_source`, by the frozen split that the recipe names; without rows that cannot be learned or scored.

    Raises:
        DatasetError: the split is not the one that the recipe names, or too few of its rows can be used.
    """
    frozen = source.ref.split
    assert frozen is not None
    assert source.split is not None
    check_validation(recipe, source.ref)
    split = FrozenSplit.read(source.split, sha256=frozen.sha256, dataset_sha256=source.sha256)
    usable = set(lines)
    kept = {part: [line for line in split.part(part) if line in usable] for part in PARTS}
    whose = f" of {source.ref.name}" if source.number else ""
    for part, found in kept.items():
        asked = len(split.part(part))
        if len(found) < asked:
            text = f"{asked - len(found):,} of the {asked:,} {part} rows of the split{whose} are left out with these."
            report(MessageEvent(level="warning", text=text))
        if asked and len(found) < MIN_PART:
            raise DatasetError(
                f"Of the {asked:,} {part} rows of the split {len(found)} can be used; {MIN_PART} are the least.",
                next_step="Raise the maximum length, or choose another split.", field="dataset.split",
            )  # fmt: skip
    return kept["train"], {*kept["validation"], *kept["test"]}, set(kept["validation"])


# --- loading and the base's scores -----------------------------------------------------------------------------------


def load_base(run: Run) -> Any:
    """The frozen base at the recipe's precision."""
    _end_if_asked(run, step=0)
    run.report(PhaseEvent(phase="loading"))
    assert run.recipe.precision != "auto"
    # Trained weights lie as the optimizer wants them; frozen ones may have adapters' columns beside them.
    is_wide = run.device.type == "cuda" and run.recipe.precision == "bfloat16"
    is_wide = is_wide and not get_method(run.recipe.method).product.is_whole_model
    return run.bases.load(run.base, run.recipe.precision, run.device, say=run.say, is_wide=is_wide)


def score_base(run: Run, model: Any) -> list[ScoredRow]:
    """The untouched base on the held-out rows, measured once for all runs that score it on the same rows."""
    facts = base_facts(run.base.revision, run.recipe, run.renderer, run.data.held_out, run.device)
    return _kept_rows(run, facts, lambda: _score(run, model, "scoring_base", step=0))


def score_base_on_general(run: Run, model: Any) -> list[ScoredRow]:
    """The untouched base on the general set, like `score_base`; nothing when the recipe does not want it."""
    if not run.recipe.evaluation.general:
        return []
    facts = base_facts(run.base.revision, run.recipe, _general_renderer(run), general_rows(), run.device)
    return _kept_rows(run, facts, lambda: score_on_general(run, model, "scoring_base", 0))


def score_on_general(run: Run, model: Any, phase: Any, step: int) -> list[ScoredRow]:
    """A model on the general set, by the same code as its other scores; nothing when the recipe does not want it."""
    if not run.recipe.evaluation.general:
        return []
    rows = score_general(model, _general_renderer(run), report=run.report, phase=phase, should_stop=run.must_end)
    _end_if_asked(run, step=step)
    return rows


def answer_with_base(run: Run, model: Any) -> None:
    """Reports the fixed prompts and the untouched base's answers as those of step 0; written once, like its scores."""
    examples = fixed_prompts.fixed_examples(run.recipe, run.data.validation)
    if not examples:
        return
    recipe = fixed_prompts.answering(run.recipe)

    def measure() -> list[ScoredRow]:
        rows = scoring.score_test_set(model, run.renderer, examples, recipe.evaluation, should_stop=run.must_end)
        _end_if_asked(run, step=0)
        return rows

    rows = _kept_rows(run, base_facts(run.base.revision, recipe, run.renderer, examples, run.device), measure)
    run.report(fixed_prompts.prompts_event(run.renderer, examples))
    run.report(fixed_prompts.answers_event(0, [row.answer for row in rows]))


def _general_renderer(run: Run) -> Renderer:
    # Always on the answers and at one length, whatever the recipe trains: the set means the same for everybody.
    return Renderer(run.folders.base_model, max_length=MAX_LENGTH, loss_on="assistant")


def _kept_rows(run: Run, facts: dict[str, Any], measure: Callable[[], list[ScoredRow]]) -> list[ScoredRow]:
    """What was measured on the base by whatever run before, or now."""
    key = scores_key(facts)
    if (kept := run.base_scores.get(key)) is not None:
        return kept
    rows = measure()
    try:
        run.base_scores.put(key, rows)
    except OSError as error:
        run.say(f"The base model's scores could not be kept for later runs: {error.strerror}.", is_warning=True)
    return rows


def base_facts(
    revision: str, recipe: Recipe, renderer: Renderer, examples: Sequence[Example], device: torch.device
) -> dict[str, Any]:
    """What decides the rows of an untouched base, for `scores_key`."""
    return {
        "revision": revision,
        "precision": recipe.precision,
        "device": devices.device_name(device),
        "versions": {name: version for name, version in versions().items() if name in ("torch", "transformers")},
        "rows": rows_sha256(examples),
        "lines": [example.line for example in examples],
        "settings": settings_sha256(recipe.evaluation, renderer),
    }


def attach(run: Run, model: Any) -> Any:
    """The model with a fresh adapter, seeded, in training mode."""
    method = get_method(run.recipe.method)
    devices.seed_everything(run.recipe.training.seed)
    adapted = method.attach(model, method.read_settings(run.recipe.settings))
    if run.recipe.training.gradient_checkpointing is True:
        _checkpoint_blocks(adapted)
    head_is_plain(adapted)
    return adapted


def _score(run: Run, model: Any, phase: Any, *, step: int) -> list[ScoredRow]:
    run.report(PhaseEvent(phase=phase, done=0))
    rows = scoring.score_test_set(
        model, run.renderer, run.data.held_out, run.recipe.evaluation,
        report=run.report, phase=phase, should_stop=run.must_end,
    )  # fmt: skip
    _end_if_asked(run, step=step)
    return rows


# --- the loop --------------------------------------------------------------------------------------------------------


SAMPLE_TOKENS = 160
"""Of each of the rows on which hand-written blocks are tried: longer than a kernel's tile, and not for long."""


@contextmanager
def computed_by_hand(run: Run, model: Any) -> Iterator[None]:
    """Inside, training steps take hand-written blocks where the model and its adapter have them (`workers.blocks`)."""
    tokens, rows = run.data.tokens, run.data.train
    by_length = sorted(rows, key=tokens.length)
    middle, size = len(by_length) // 2, run.recipe.training.batch_size
    usual = by_length[max(0, middle - 1) : middle + 1]
    sample = collate(usual, tokens, packing=True, pad_id=0, most=SAMPLE_TOKENS).to(run.device)
    objective = get_objective(run.recipe.objective)
    # One from each part of the rows by their lengths, as many as a step has.
    step = by_length[len(by_length) // (2 * size) :: max(1, len(by_length) // size)]
    run.engine = hand_written(
        model,
        sample,
        lambda *given: objective.loss(*given)[0],
        [tokens.length(row) for row in step],
        is_lean=run.recipe.training.gradient_checkpointing is True,
        say=run.say,
        warn=lambda text: run.say(text, is_warning=True),
    )
    try:
        if run.engine is not None:
            _settle(run, model, run.engine, by_length)
        else:
            _save_memory(run, model)
        yield
    finally:
        if run.engine is not None:
            run.engine.remove()
            run.engine = run.recorder = run.budget = None


def _settle(run: Run, model: Any, engine: Engine, by_length: Sequence[int]) -> None:
    """What blocks keep, how many tokens they take at once, and whether their launches are recorded; `by_length` are the
    rows, the longest last."""
    training, tokens = run.recipe.training, run.data.tokens
    assert training.micro_batch_size != "auto"
    size = min(training.micro_batch_size, training.batch_size, run.max_micro_batch_size or training.batch_size)
    is_lean = training.gradient_checkpointing is True
    room = _room(run, model)
    run.plans_by_memory = room is not None
    if room is None:
        if is_lean:
            engine.follow(MemoryPlan(is_lean))
        return
    step = StepTokens(
        mean=training.batch_size * sum(map(tokens.length, by_length)) / len(by_length),
        most=sum(tokens.length(row) for row in by_length[-training.batch_size :]),
        longest=tokens.length(by_length[-1]),
        num_rows=training.batch_size,
        rows_at_once=size,
    ).lengthened(engine.num_virtual_tokens)
    host = int(devices.free_host_bytes() * HOST_SHARE)
    records = can_be_recorded(engine) and not training.neftune_alpha
    time = LayerTime(engine.layer_work, gpu_named(run.device_facts.name).flops)
    plan = choose_plan(engine.costs, step, engine.memory(room, host), time, is_lean=is_lean, records=records)
    left = room + engine.follow(plan)
    assert plan.budget is not None
    run.budget = TokenBudget(plan.budget, engine.num_virtual_tokens)

    def settle_anew() -> None:
        """Without recordings: micro-batches stay as they are, but may keep more, or offload."""
        # Amid a step weights stay where they are: copies of branches around them are made before it.
        memory = replace(engine.memory(left, host), copy_bytes=0)
        engine.follow(plan_memory(engine.costs, step, memory, time, is_lean=is_lean))

    if plan.is_recorded:
        run.recorder = Recorder(
            engine,
            model,
            get_objective(run.recipe.objective),
            longest=step.longest,
            settle_anew=settle_anew,
            warn=lambda text: run.say(text, is_warning=True),
        )


def _save_memory(run: Run, model: Any) -> None:
    """Has the model's own blocks keep their inputs alone where memory ran out with a plan made for hand-written ones:
    these would have chosen by themselves what they compute again, so the plan left that off."""
    recipe = run.recipe
    assert recipe.precision != "auto"
    if run.max_micro_batch_size is None or recipe.training.gradient_checkpointing is True:
        return
    if is_hand_written(get_method(recipe.method), recipe.precision, run.base.shape, run.device.type):
        _checkpoint_blocks(model)
        run.say("Memory ran out before, so each block is computed once more on the way back instead of being kept.")


def _checkpoint_blocks(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _room(run: Run, model: Any) -> int | None:
    """Bytes of a GPU's memory that are free for what blocks keep and work with, and the loss; None of a CPU's, which
    has no bound that could be measured."""
    if run.device.type != "cuda":
        return None
    free(run.device)
    # Gradients and both moments come with the first step.
    num_trained = sum(one.numel() for one in checkpoints.trainable_parameters(model).values())
    room = devices.free_memory_bytes(run.device) - 12 * num_trained
    # Memory ran out before: the plan was too tight, whatever it was that it did not know of.
    return room if run.max_micro_batch_size is None else room // 2


def optimise(run: Run, model: Any) -> tuple[Position, int | None]:
    """Takes every step that is left. Gives where it ended, and the step when it was asked to end early and keep."""
    recipe, settings, data = run.recipe, run.recipe.training, run.data
    assert settings.learning_rate != "auto"
    assert settings.micro_batch_size != "auto"
    assert settings.checkpoint_every_steps != "auto"
    objective = get_objective(recipe.objective)
    plan = _plan(run)
    parameters = list(checkpoints.trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(
        parameter_groups(recipe, model),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    position = Position(0, 0, 0, 0, min(settings.micro_batch_size, settings.batch_size), 0.0, None, None)
    checkpoint = checkpoints.find(
        run.folders.out / "checkpoints",
        recipe_sha256=recipe.sha256(),
        tell=lambda sentence: run.say(sentence[0].upper() + sentence[1:], is_warning=True),
        keys_of=lambda: {name: one.shape for name, one in checkpoints.trainable_parameters(model).items()},
    )
    validator = Validator(
        recipe,
        num_steps=plan.num_steps,
        renderer=run.renderer,
        examples=data.validation,
        report=run.report,
        must_end=run.must_end,
    )
    prompts = FixedPrompts(
        recipe,
        num_steps=plan.num_steps,
        renderer=run.renderer,
        validation=data.validation,
        report=run.report,
        must_end=run.must_end,
    )
    if checkpoint is not None:
        checkpoints.restore(checkpoint, model=model, optimizer=optimizer)
        validator.best_weights = checkpoints.best_weights(checkpoint)
        prompts.restore(checkpoints.answers(checkpoint))
        run.visits.restore(checkpoints.visits(checkpoint) or run.visits.arrays())
        position = checkpoint.position
        run.say(f"Resumed at step {position.step}.")
    if run.max_micro_batch_size is not None:
        position = replace(position, micro_batch_size=min(position.micro_batch_size, run.max_micro_batch_size))
    position = _with_budget(run, position)
    run.report(_plan_event(run, plan, parameters, position))
    run.report(PhaseEvent(phase="training", done=position.step, total=plan.num_steps))

    model.train()
    # An earlier attempt may have ended before it could do either.
    position = validator.validate(model, position)
    if prompts.is_due(position.step) or (position.step > 0 and validator.is_over(position)):
        prompts.answer(model, position.step)
    meter = Meter(run.device, plan.num_steps)
    asked: _Asked | None = None

    def rate_of(step: int) -> float:
        assert settings.learning_rate != "auto"
        return learning_rate(
            step,
            num_steps=plan.num_steps,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup_share=settings.warmup_share,
            decay_share=settings.decay_share,
            min_share=settings.min_learning_rate_share,
        )

    while not validator.is_over(position):
        mode = run.should_stop()
        if mode is not None and asked is not None:
            position, asked = _report_step(run, plan, meter, asked, position), None
        if mode in ("keep", "checkpoint") and position.step > 0:
            # Of a step that was not read nobody knows yet. Whoever goes on after a crash while scoring keeps this step,
            # and not an older one.
            _check_weights(run, parameters, position, rate_of(position.step))
            _save_checkpoint(run, model, optimizer, position, validator.best_weights, prompts.kept)
        if mode == "keep" and position.step > 0:
            validator.take_best(model, position)
            return position, position.step
        run.step, run.micro_batch_size = position.step + 1, position.micro_batch_size
        # Before the first step there is nothing to keep: one is taken.
        if mode in ("now", "checkpoint"):
            raise _Stopped(mode, position.step)

        failpoint("training.step")
        step = position.step + 1
        rate = rate_of(step)
        is_checkpoint = step % settings.checkpoint_every_steps == 0 or step == plan.num_steps
        # Whoever looks at what a step left behind waits for it. Else it is read once the next one is queued, so that
        # the device never has nothing to do.
        waits = is_checkpoint or validator.is_due(step) or not meter.gets_ahead
        rows = [data.train[row] for row in plan.rows(position.step)]
        took = _forward_backward(run, model, objective, rows, position.micro_batch_size, position)
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        if asked is not None:
            position, asked = _report_step(run, plan, meter, asked, position), None
        meter.note(took.loss_sum, norm, took.num_tokens)
        if waits or meter.is_due(step):
            run.visits.send()
            reading = meter.ask(took.loss_sum / took.loss_weight)
            # Of the steps since the last reading any may have been not finite: only a lone one's rows are to blame.
            blamed = rows if reading.num_steps == 1 else []
            asked = _Asked(position, reading, rate, position.num_tokens + took.num_tokens, blamed)
        if asked is not None and waits:
            position, asked = _report_step(run, plan, meter, asked, position), None
        for group in optimizer.param_groups:
            group["lr"] = rate * group["learning_rate_factor"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=run.recorder is None)
        position = replace(
            position,
            step=step,
            row=position.row + len(rows),
            num_tokens=position.num_tokens + took.num_tokens,
            num_loss_tokens=position.num_loss_tokens + took.num_loss_tokens,
            train_seconds=position.train_seconds + meter.lap(),
        )
        # Validation first: a checkpoint holds what it showed, and a run resumed from there decides the same.
        position = validator.validate(model, position)
        if is_checkpoint or validator.is_over(position):
            _check_weights(run, parameters, position, rate)
            prompts.answer(model, step)
            _save_checkpoint(run, model, optimizer, position, validator.best_weights, prompts.kept)
        meter.skip()
    failpoint("training.last_step")
    run.step = None
    validator.take_best(model, position)
    return position, None


@dataclass(frozen=True)
class _Asked:
    """A step whose loss and gradient norm are on their way from the device.

    `before` is the position before it, `num_tokens` are those of the run until its end, and `rows` its own where they
    alone are to blame for what comes.
    """

    before: Position
    reading: Reading
    learning_rate: float
    num_tokens: int
    rows: list[int]


def _report_step(run: Run, plan: Plan, meter: Meter, asked: _Asked, position: Position) -> Position:
    """Waits for a step's loss and reports it; `position` with the loss, wherever it has got to meanwhile.

    Raises:
        DivergedError: a step since the last one that was read was not finite.
    """
    loss, norm = meter.read(asked.reading)
    run.visits.take()
    if not _is_alive(loss, norm):
        _diverged(run, asked.before, (loss, norm), asked.learning_rate, asked.rows)
    step = asked.before.step + 1
    run.report(
        StepEvent(
            step=step,
            num_steps=plan.num_steps,
            epoch=plan.epoch(step),
            loss=loss,
            learning_rate=asked.learning_rate,
            grad_norm=norm,
            num_tokens=asked.num_tokens,
            tokens_per_second=meter.tokens_per_second,
            seconds_left=meter.seconds_left(step),
            peak_memory_bytes=devices.peak_memory_bytes(run.device),
        )
    )
    return replace(position, first_loss=loss if position.first_loss is None else position.first_loss, last_loss=loss)


def parameter_groups(recipe: Recipe, model: Any) -> list[dict[str, Any]]:
    """The trainable parameters by the share of the learning rate that the method gives them, for the optimizer.

    Their order follows from the recipe alone: a checkpoint keeps the optimizer's state by place, not by name.
    """
    method = get_method(recipe.method)
    settings = method.read_settings(recipe.settings)
    by_factor: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in checkpoints.trainable_parameters(model).items():
        by_factor.setdefault(method.learning_rate_factor(name, settings), []).append(parameter)
    return [{"params": parameters, "learning_rate_factor": factor} for factor, parameters in by_factor.items()]


def _with_budget(run: Run, position: Position) -> Position:
    """The position with the budget of tokens that is in force: that of the attempt before, so that the same
    micro-batches are added up, or a smaller one where memory ran out with it."""
    if run.budget is None:
        return replace(position, micro_batch_tokens=None)
    before = position.micro_batch_tokens
    if before is not None and (run.max_micro_batch_size is None or before < run.budget.tokens):
        run.budget = replace(run.budget, tokens=before)
    return replace(position, micro_batch_tokens=run.budget.tokens)


@dataclass(frozen=True)
class _Accumulated:
    """What the micro-batches of a step gave. `loss_sum` is on the device, in nats; `loss_weight` is its divisor."""

    loss_sum: torch.Tensor
    loss_weight: float
    num_loss_tokens: int
    num_tokens: int


def _forward_backward(
    run: Run, model: Any, objective: Objective, rows: list[int], micro_batch_size: int, position: Position
) -> _Accumulated:
    """Gradients of a step's mean loss per token: the same ones in whatever micro-batches the rows are taken."""
    groups = split_step(rows, run.data.tokens, micro_batch_size, run.budget)
    step_batches = list(_step_batches(run, groups))
    run.micro_batch_size = max(len(batch.lengths) for batch in step_batches)
    # Count before dividing: micro-batches differ in tokens, so a mean of their means would weigh tokens unequally.
    loss_weight = sum(batch.loss_weight for batch in step_batches)
    loss_sum = torch.zeros((), dtype=torch.float32, device=run.device)
    settings = run.recipe.training
    noise = EmbeddingNoise(settings.neftune_alpha, seed=settings.seed, step=position.step, device=run.device)
    row_sums: list[torch.Tensor] = []
    if run.recorder is not None:
        run.recorder.refresh()
    elif run.engine is not None:
        run.engine.refresh()
    for batch in step_batches:
        if run.should_stop() == "now":
            raise _Stopped("now", position.step)
        if run.recorder is not None:
            batch_sum, of_rows = run.recorder.run(batch, loss_weight)
            loss_sum += batch_sum
            row_sums.append(of_rows)
            continue
        on_device = batch.to(run.device)
        by_hand = nullcontext() if run.engine is None else run.engine.rows(on_device)
        with noise.added_to(model, on_device), by_hand:
            batch_sum, _ = objective.loss(model, on_device, note=row_sums.append)
            # In a thread of its own each block's way back would wait for the interpreter.
            with torch.autograd.set_multithreading_enabled(False):
                (batch_sum / loss_weight).backward()
        loss_sum += batch_sum.detach()
    in_order = [row for group in groups for row in group]
    run.visits.note(in_order, [_num_loss_tokens(run.data, row) for row in in_order], row_sums)
    return _Accumulated(
        loss_sum=loss_sum,
        loss_weight=loss_weight,
        num_loss_tokens=sum(batch.num_loss_tokens for batch in step_batches),
        num_tokens=sum(batch.num_tokens for batch in step_batches),
    )


def _step_batches(run: Run, groups: list[list[int]]) -> Iterator[Batch]:
    # Hand-written blocks take rows without padding; what is learned is the same.
    packing = run.recipe.training.packing is True or run.engine is not None
    return (collate(group, run.data.tokens, packing=packing, pad_id=0) for group in groups)


def _num_loss_tokens(data: Data, row: int) -> int:
    return int(data.tokens.trained(row)[1:].sum())


def _plan(run: Run) -> Plan:
    training, parts = run.recipe.training, run.data.portions
    return Plan(
        sum(one.per_epoch for one in parts), training.batch_size, training.epochs, training.seed, training.max_steps,
        parts if run.data.is_mixed else (),
    )  # fmt: skip


def _plan_event(run: Run, plan: Plan, parameters: list[torch.nn.Parameter], position: Position) -> PlanEvent:
    data = run.data
    rows = [data.train[row] for row in plan.rows(0)]
    micro_batches = split_step(rows, data.tokens, position.micro_batch_size, run.budget)
    return PlanEvent(
        device=devices.device_name(run.device),
        num_steps=plan.num_steps,
        num_train_rows=len(data.train),
        num_held_out_rows=len(data.held_out),
        num_skipped_rows=data.num_skipped,
        num_cut_rows=data.num_cut,
        num_train_tokens=sum(data.tokens.length(row) for row in data.train),
        num_trainable=sum(parameter.numel() for parameter in parameters),
        num_parameters=run.base.shape.num_parameters,
        resumed_from_step=position.step,
        micro_batch_size=max(map(len, micro_batches)),
        accumulation=len(micro_batches),
        micro_batch_tokens=position.micro_batch_tokens,
    )


def _save_checkpoint(
    run: Run,
    model: Any,
    optimizer: torch.optim.Optimizer,
    position: Position,
    best_weights: dict[str, torch.Tensor] | None,
    answers: dict[int, fixed_prompts.Answers],
) -> Checkpoint:
    saved = checkpoints.save(
        run.folders.out / "checkpoints",
        attempt=run.attempt,
        position=position,
        recipe_sha256=run.recipe.sha256(),
        versions=versions(),
        model=model,
        optimizer=optimizer,
        best_weights=best_weights,
        visits=run.visits.arrays(),
        answers=answers,
    )
    num_bytes = sum(path.stat().st_size for path in saved.folder.iterdir())
    run.report(CheckpointEvent(step=position.step, folder=str(saved.folder), num_bytes=num_bytes))
    return saved


DEAD_LOSS = 0.01
"""Nats per token above which a gradient of exactly 0 is no sign of rows known by heart."""


def _is_alive(loss: float, norm: float) -> bool:
    """Whether a step can be taken: its loss and gradient are numbers, and the gradient is not lost on the way.

    Weights that have grown huge overflow inside the model, and its norms make zeros of that: the loss is finite then,
    that of a guess, and the gradient exactly 0 for ever.
    """
    return math.isfinite(loss) and math.isfinite(norm) and not (norm == 0 and loss > DEAD_LOSS)


def _check_weights(run: Run, parameters: list[torch.nn.Parameter], position: Position, rate: float) -> None:
    """Raises DivergedError when a step with a finite loss has led to weights that are no numbers: none is kept."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        _diverged(run, replace(position, step=position.step - 1), (math.nan, math.nan), rate, [], what="A weight")


def _diverged(
    run: Run, position: Position, values: tuple[float, float], rate: float, rows: list[int], what: str = ""
) -> NoReturn:
    """Ends a run whose step after `position` was not finite; `rows` are that step's, where they are to blame."""
    loss, norm = values
    step, training = position.step + 1, run.recipe.training
    run.report(DivergedEvent(step=step, learning_rate=rate, loss=_finite(loss), grad_norm=_finite(norm)))
    if norm == 0:
        found = f"The gradient was exactly 0 at step {step} while the loss was {loss:.4g}: nothing is learned any more."
    else:
        what = what or ("The loss" if not math.isfinite(loss) else "The gradient")
        figures = f" (loss {loss:.4g}, gradient norm {norm:.4g})" if what != "A weight" else ""
        found = f"{what} was not a finite number at step {step}{figures}."
    kept = checkpoints.newest_step(run.folders.out / "checkpoints")
    assert training.learning_rate != "auto"
    changes = [f"Lower the learning rate from {training.learning_rate:.2g} to {training.learning_rate / 10:.2g}"]
    if training.max_grad_norm > 1:
        changes.append(f"clip gradients at 1 instead of {training.max_grad_norm:g}")
    if run.recipe.precision == "bfloat16":
        changes.append("train on a float32 base")
    lines = sorted(line for row in rows if (line := run.data.tokens.lines[row]) is not None)
    listed = told_lines(lines, run.data.names)
    suspects = f" If it comes back at this step, look at the rows in it: lines {listed}." if lines else ""
    raise DivergedError(
        found + (f" The checkpoint of step {kept}, the last before it, is kept." if kept else ""),
        next_step=f"{', or '.join(changes)}.{suspects}",
        field="training.learning_rate",
        details={"step": step, "learning_rate": rate},
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- the adapter's scores and the product ----------------------------------------------------------------------------


def score_adapter(run: Run, model: Any, position: Position) -> list[ScoredRow]:
    """The adapter on the rows that the base was scored on."""
    rows = _score(run, model, "evaluating", step=position.step)
    if run.data.validates_what_is_scored:  # else the curve is of other rows
        run.report(validation_event(position.step, rows))
    return rows


@dataclass(frozen=True)
class Suspicious:
    """Training rows that may be wrong: how many there are, and the most suspicious of them."""

    num_rows: int
    worst: tuple[SuspiciousRecord, ...] = ()


def suspicious_rows(run: Run, model: Any) -> Suspicious:
    """The training rows that may be wrong, the worst with their losses by the adapter and by the base."""
    data, recipe = run.data, run.recipe
    trained_on = {data.tokens.lines[row] for row in data.train}

    def examples() -> Iterator[Example]:
        for row in read_sources(data.sources):
            if isinstance(row, Example) and row.line in trained_on:
                yield row

    num_tokens = [_num_loss_tokens(data, row) for row in range(len(data.tokens))]
    all_found = suspects(examples(), data.tokens.lines, num_tokens, run.visits, data.names)
    if not all_found:
        return Suspicious(0)
    found = all_found[:MAX_ROWS]
    lines = {one.line for one in found}
    rows = [row for row in examples() if row.line in lines]

    def losses() -> dict[int, float]:
        scored = scoring.score_rows(model, run.renderer, rows, generate_lines=(), max_new_tokens=1)
        return {row.line: row.loss_sum / row.num_tokens for row in scored if row.num_tokens}

    of_adapter = losses()
    of_base: dict[int, float] = {}
    if not get_method(recipe.method).product.is_whole_model:  # then the base's own weights are gone
        with model.disable_adapter():
            of_base = losses()
    worst = tuple(
        SuspiciousRecord(
            line=line_at(one.line),
            reason=one.reason,
            score=one.score,
            loss=of_adapter[one.line],
            base_loss=of_base.get(one.line),
            other_lines=tuple(map(line_at, one.other_lines)),
            source=source_at(one.line),
            other_sources=tuple(map(source_at, one.other_lines)) if data.is_mixed else (),
        )
        for one in found
        if one.line in of_adapter
    )
    return Suspicious(len(all_found), worst)


def package(
    run: Run,
    model: Any,
    base_rows: list[ScoredRow],
    adapter_rows: list[ScoredRow],
    general: tuple[ScoreRecord, ...],
    suspicious: Suspicious,
    position: Position,
    stopped_at: int | None,
    started: float,
) -> Path:
    """The finished product in `attempts/<n>/adapter`: complete, or not there."""
    run.report(PhaseEvent(phase="packaging"))
    for message in scoring.left_out_messages(adapter_rows, run.recipe.evaluation.metrics, run.data.names):
        run.report(message)
    parameters = checkpoints.trainable_parameters(model).values()
    plan = _plan(run)
    seconds = position.train_seconds
    result = Result(
        scores=tuple(scoring.compare_rows(base_rows, adapter_rows, run.recipe.evaluation.metrics)),
        samples=tuple(scoring.samples(base_rows, adapter_rows)),
        held_out=tuple(scoring.held_out(base_rows, adapter_rows)),
        counts=scoring.row_counts(base_rows, adapter_rows, run.recipe.evaluation.metrics),
        num_rows_to_score=len(run.data.held_out),
        num_rows_scored=len(adapter_rows),
        test_set_sha256=rows_sha256(run.data.held_out),
        settings_sha256=settings_sha256(run.recipe.evaluation, run.renderer),
        general=general,
        overlap=run.data.overlap,
        suspicious=suspicious.worst,
        sources=_sources(run, plan, position, base_rows, adapter_rows) if run.data.is_mixed else (),
        provenance=Provenance(
            versions=versions(),
            device=devices.device_name(run.device),
            num_threads=torch.get_num_threads(),
            wall_seconds=time.monotonic() - started,
            train_seconds=seconds,
            num_tokens=position.num_tokens,
            num_loss_tokens=position.num_loss_tokens,
            tokens_per_second=position.num_tokens / seconds if seconds else 0.0,
            peak_memory_bytes=devices.peak_memory_bytes(run.device),
            first_loss=position.first_loss,
            last_loss=position.last_loss,
            num_steps=position.step,
            epochs=position.row / plan.num_rows,
            num_train_rows=len(run.data.train),
            num_suspicious_rows=suspicious.num_rows,
            num_held_out_rows=len(run.data.held_out),
            **_choice(run, position),
            dataset_sha256=run.data.sha256,
            base_revision=run.base.revision,
            recipe_sha256=run.recipe.sha256(),
        ),
        num_trainable=sum(parameter.numel() for parameter in parameters),
        stopped_at_step=stopped_at,
    )
    failpoint("training.before_package")
    folder = run.folders.out / "attempts" / str(run.attempt) / "adapter"
    aside = folder.with_name(".tmp-adapter")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_harness_layout(run, aside / "eval" / "lm_eval", result, base_rows, adapter_rows)
        adapters.finish(
            model,
            aside,
            recipe=run.recipe,
            result=result,
            base_model_folder=run.folders.base_model,
            template=run.renderer.template,
            hub_id=run.base.hub_id,
            licence=run.base.licence,
            probe_ids=[run.renderer.prompt_ids(example) for example in run.data.held_out[:2]],
        )
    except BaseException as error:
        # Each retry writes into a folder of its own: what was begun would eat the space that the next one needs.
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise checkpoints.explain_write_error(error, "the adapter") from error
        raise
    if folder.exists():
        shutil.rmtree(folder)
    aside.replace(folder)
    return folder


def _sources(
    run: Run, plan: Plan, position: Position, base_rows: list[ScoredRow], adapter_rows: list[ScoredRow]
) -> tuple[SourceRecord, ...]:
    """Each dataset's part in training, and the scores on its own held-out rows."""
    data, found = run.data, []
    seen = plan.num_rows_of(position.row)
    num_skipped = count_by_source(data.skipped_places, len(data.sources))
    for source, portion in zip(data.sources, data.portions, strict=True):
        number = source.number
        base, adapter = ([row for row in rows if source_at(row.line) == number] for rows in (base_rows, adapter_rows))
        found.append(
            SourceRecord(
                name=source.ref.name,
                sha256=source.sha256,
                weight=run.recipe.mix[number - 1].weight if number else 1.0,
                num_train_rows=portion.num_rows,
                num_held_out_rows=len(adapter),
                num_skipped_rows=num_skipped[number],
                rows_per_epoch=portion.per_epoch,
                num_rows_seen=seen[number],
                passes=seen[number] / portion.num_rows,
                scores=tuple(scoring.compare_rows(base, adapter, run.recipe.evaluation.metrics)),
            )
        )
    return tuple(found)


def _write_harness_layout(
    run: Run, folder: Path, result: Result, base_rows: list[ScoredRow], adapter_rows: list[ScoredRow]
) -> None:
    """The held-out run of base and adapter as the evaluation harness would leave it, each in a folder of its own."""
    recipe, when = run.recipe, datetime.now(UTC)
    base = run.base.hub_id or recipe.base_model.name
    for name, rows in (("base", base_rows), ("adapter", adapter_rows)):
        write_run(
            folder / name,
            task=f"{' + '.join(run.data.names)} (held-out)",
            scores=result.scores,
            rows=rows,
            evaluations=choose_evaluations(recipe.evaluation.metrics),
            model_name=base if name == "base" else recipe.name,
            config={
                "model": "peft-studio",
                "model_args": {"pretrained": base, "dtype": recipe.precision},
                "device": str(run.device),
                "random_seed": recipe.training.seed,
                "dataset_sha256": run.data.sha256,
                "recipe_sha256": recipe.sha256(),
            },
            max_new_tokens=recipe.evaluation.max_new_tokens,
            chat_template=run.renderer.template,
            when=when,
            of_base=name == "base",
        )


def _choice(run: Run, position: Position) -> dict[str, Any]:
    """What was chosen on validation rows, as fields of the provenance; none when nothing was."""
    training, watch = run.recipe.training, position.watch
    if not training.chooses_on_validation:
        return {}
    step = step_of_adapter(watch, training)
    is_early = is_out_of_patience(watch, training) and position.step < _plan(run).num_steps
    return {
        "num_validation_rows": len(run.data.validation),
        "best_by": training.best_by,
        "best_value": watch.best_value,
        "adapter_step": None if step == position.step else step,
        "early_stopped_at_step": position.step if is_early else None,
    }


# --- small things ----------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what computes, by package name."""
    found = {"python": platform.python_version()}
    for package_name in PACKAGES:
        try:
            found[package_name] = metadata.version(package_name)
        except metadata.PackageNotFoundError:
            continue  # bitsandbytes is not on every platform, and a checkout need not be installed
    return found


def _out_of_memory(run: Run | None, device: torch.device) -> OutOfMemoryError:
    """What was used when memory ran out, what the device has, and what would fit."""
    peak, has = devices.peak_memory_bytes(device), devices.memory_bytes(device)
    name = "the card" if device.type == "cuda" else "this machine"
    details: dict[str, Any] = {"peak_memory_bytes": peak, "device_memory_bytes": has}
    where, next_step = "", "Choose a smaller base model or a device with more memory."
    if run is not None:
        if run.step is not None:
            at_once = "1 row" if run.micro_batch_size == 1 else f"{run.micro_batch_size} rows"
            where = f" at step {run.step} with {at_once} at once"
            details |= {"step": run.step, "micro_batch_size": run.micro_batch_size}
        if run.plans_by_memory and run.max_micro_batch_size is None:
            details["plans_with_less"] = True
        found = remedies(
            run.recipe,
            run.base.shape,
            run.dataset_facts,
            run.device_facts,
            micro_batch_size=run.micro_batch_size,
            peak_memory_bytes=peak,
        )
        next_step = advice(found, run.recipe, run.device_facts)
    return OutOfMemoryError(
        f"Training ran out of memory{where}: it held {peak / GIB:.1f} GiB when it asked for more, and {name} has "
        f"{has / GIB:.1f} GiB.",
        next_step=next_step,
        field="training.micro_batch_size",
        details=details,
    )


def _gpu_failure(error: Exception, device: torch.device) -> GpuError:
    first = " ".join(str(error).split("\n", 1)[0].split())[:200]
    return GpuError(
        f"The GPU failed: {first}.",
        next_step="The job goes on from its last checkpoint on another GPU.",
        details={"device": str(device)},
    )


def _end_if_asked(run: Run, *, step: int) -> None:
    mode = run.must_end()
    if mode is not None:
        raise _Stopped(mode, step)

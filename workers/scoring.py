"""Scores of a model on held-out rows: the same code for the untouched base and for the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from workers.batching import Batch
from workers.evaluations import Evaluation, Question, ScoredRow, choose_evaluations
from workers.events import MessageEvent, PhaseEvent, Report
from workers.examples import Example
from workers.generation import context_room, generate
from workers.losses import token_losses
from workers.mixing import line_at, source_at, told_lines
from workers.recipe import EvaluationSettings, MetricChoice
from workers.results import HeldOutRecord, RowCountsRecord, RunRowRecord, SampleRecord, ScoreRecord
from workers.statistics import compare_counts
from workers.verdicts import rows_needed, rows_recommended

if TYPE_CHECKING:
    from workers.rendering import Rendered, Renderer

# B rows, T tokens of the longest row, N loss-carrying tokens.


def score_rows(
    model: Any,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    generate_lines: Collection[int],
    max_new_tokens: int,
    batch_tokens: int = 4096,
    stop_ids: Collection[int] | None = None,
    evaluations: Sequence[Evaluation] = (),
    report: Report | None = None,
    phase: Any = "evaluating",
    should_stop: Callable[[], object] | None = None,
) -> list[ScoredRow]:
    """Every example's loss and, for the lines asked for, the model's greedy answer; in the order given.

    Args:
        generate_lines: lines of the dataset file whose last assistant turn the model writes itself.
        batch_tokens: tokens, padding included, in one forward pass at most.
        stop_ids: tokens that end an answer; those of the renderer when None.
        evaluations: those that need choices have every row's options scored.
        phase: the phase under which progress is reported, "scoring_base" or "evaluating".
        should_stop: asked between batches and tokens; anything but None ends early with the rows scored so far.

    The model is put into eval mode and back into the mode it was in. Rows with no loss-carrying token after
    cutting have num_tokens 0. Turns of weight 0 are not counted; other weights are for training only, so that a
    score means the same on every dataset.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return _score_rows(
                model, renderer, examples, generate_lines, max_new_tokens, batch_tokens, stop_ids, evaluations,
                report, phase, should_stop,
            )  # fmt: skip
    finally:
        model.train(was_training)


def write_answers(
    model: Any,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | None = None,
    batch_size: int | None = None,
    on_finished: Callable[[int], object] | None = None,
    should_stop: Callable[[], object] | None = None,
) -> list[str | None]:
    """The model's greedy answer to every example; None where the prompt fills the context.

    The other arguments are those of `workers.generation.generate`; answers end as the renderer says when `stop_ids` is
    None.
    """
    room = context_room(model)
    prompts = [renderer.prompt_ids(example) for example in examples]
    written = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=sorted(stop_ids) if stop_ids is not None else list(renderer.stop_ids),
        batch_size=batch_size,
        on_finished=on_finished,
        should_stop=should_stop,
    )
    return [
        renderer.decode(ids) if 0 < len(prompt) < room else None for prompt, ids in zip(prompts, written, strict=True)
    ]


def score_test_set(
    model: Any, renderer: Renderer, examples: Sequence[Example], evaluation: EvaluationSettings, **progress: Any
) -> list[ScoredRow]:
    """Every example as a recipe's evaluation has it scored: the first ones answered, the options of its metrics too.

    Of several datasets the first ones of each are answered, so that each has figures of answers of its own. `progress`
    as for `score_rows`.
    """
    lines: dict[int, list[int]] = {}
    for example in examples:
        lines.setdefault(source_at(example.line), []).append(example.line)
    return score_rows(
        model,
        renderer,
        examples,
        generate_lines=[line for own in lines.values() for line in own[: evaluation.num_generated]],
        max_new_tokens=evaluation.max_new_tokens,
        stop_ids=renderer.stop_ids,
        evaluations=choose_evaluations(evaluation.metrics),
        **progress,
    )


def _score_rows(
    model: Any,
    renderer: Renderer,
    examples: Sequence[Example],
    generate_lines: Collection[int],
    max_new_tokens: int,
    batch_tokens: int,
    stop_ids: Collection[int] | None,
    evaluations: Sequence[Evaluation],
    report: Report | None,
    phase: Any,
    should_stop: Callable[[], object] | None,
) -> list[ScoredRow]:
    rendered = [renderer.render(example) for example in examples]
    to_generate = [index for index, example in enumerate(examples) if example.line in set(generate_lines)]
    options = _options(renderer, examples, evaluations)
    asked = [(index, option) for index, found in enumerate(options) for option in _distinct(found)]
    total = len(examples) + len(asked) + len(to_generate)
    done = 0

    def advance(count: int) -> bool:
        nonlocal done
        done += count
        if report is not None:
            report(PhaseEvent(phase=phase, done=done, total=total))
        return should_stop is not None and should_stop() is not None

    losses: dict[int, tuple[float, int]] = {}
    order = sorted(range(len(rendered)), key=lambda index: len(rendered[index].ids), reverse=True)
    stopped = False
    for batch in _batches(order, [len(row.ids) for row in rendered], batch_tokens):
        rows = [(rendered[index].ids, rendered[index].trained) for index in batch]
        losses.update(zip(batch, row_losses(model, rows), strict=True))
        stopped = advance(len(batch))
        if stopped:
            break

    likelihoods: dict[tuple[int, str], float] = {}
    if asked and not stopped:
        room = context_room(model)
        with_ids = [(*pair, *renderer.option_ids(examples[pair[0]], pair[1])) for pair in asked]
        fitting = [one for one in with_ids if len(one[2]) <= room]
        order = sorted(range(len(fitting)), key=lambda at: len(fitting[at][2]), reverse=True)
        for batch in _batches(order, [len(one[2]) for one in fitting], batch_tokens):
            rows = [(fitting[at][2], [place >= fitting[at][3] for place in range(len(fitting[at][2]))]) for at in batch]
            for at, (loss_sum, _) in zip(batch, row_losses(model, rows), strict=True):
                likelihoods[fitting[at][0], fitting[at][1]] = -loss_sum
            stopped = advance(len(batch))
            if stopped:
                break

    answers: dict[int, str] = {}
    if to_generate and not stopped:
        # A row without an answer counts for the loss alone.
        written = write_answers(
            model,
            renderer,
            [examples[index] for index in to_generate],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            on_finished=advance,
            should_stop=should_stop,
        )
        answers = {index: text for index, text in zip(to_generate, written, strict=True) if text is not None}
    return [
        ScoredRow(
            line=example.line,
            prompt=prompt_text(example),
            reference=renderer.reference(example),
            answer=answers.get(index),
            loss_sum=losses[index][0],
            num_tokens=losses[index][1],
            num_bytes=_num_trained_bytes(renderer, rendered[index]),
            # A row whose options were not all scored has no part in the figure.
            options={
                key: {option: likelihoods[index, option] for option in found}
                for key, found in options[index].items()
                if found and all((index, option) in likelihoods for option in found)
            },
        )
        for index, example in enumerate(examples)
        if index in losses
    ]


def _options(
    renderer: Renderer, examples: Sequence[Example], evaluations: Sequence[Evaluation]
) -> list[dict[str, tuple[str, ...]]]:
    """Each example's options by the key of the evaluation that needs them."""
    questions = [Question(prompt_text(example), renderer.reference(example)) for example in examples]
    found: list[dict[str, tuple[str, ...]]] = [{} for _ in examples]
    for evaluation in evaluations:
        if evaluation.needs == "choices":
            for row, options in zip(found, evaluation.options(questions), strict=True):
                row[evaluation.key] = options
    return found


def _distinct(options: dict[str, tuple[str, ...]]) -> list[str]:
    """The options of several evaluations, each once."""
    return list(dict.fromkeys(option for one in options.values() for option in one))


def _num_trained_bytes(renderer: Renderer, row: Rendered) -> int:
    """Bytes of the text whose tokens carry loss: a token that ends a turn has none."""
    return len(
        renderer.decode([one for one, is_trained in zip(row.ids, row.trained, strict=True) if is_trained]).encode()
    )


def row_losses(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> list[tuple[float, int]]:
    """Summed cross-entropy in nats and its number of tokens, for each row of (ids, trained), in one forward pass.

    A token carries loss when its `trained` is true and a token stands before it.
    """
    device = next(model.parameters()).device
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    trained_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (ids, trained) in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        trained_BT[row, : len(ids)] = torch.tensor(trained)
    row_N, column_N = trained_BT[:, 1:].nonzero(as_tuple=True)
    if len(row_N) == 0:
        return [(0.0, 0) for _ in rows]
    batch = Batch(
        input_ids=ids_BT,
        position_ids=None,
        positions_N=row_N * width + column_N,
        targets_N=ids_BT[row_N, column_N + 1],
        rows_N=row_N,
        lengths=tuple(len(ids) for ids, _ in rows),
    ).to(device)
    losses_N = token_losses(model, batch).double()
    sums_B = torch.zeros(len(rows), dtype=torch.float64, device=device).index_add_(0, batch.rows_N, losses_N)
    return list(zip(sums_B.tolist(), trained_BT[:, 1:].sum(dim=1).tolist(), strict=True))


def compare_rows(
    base_rows: Sequence[ScoredRow], adapter_rows: Sequence[ScoredRow], metrics: Sequence[str | MetricChoice]
) -> list[ScoreRecord]:
    """One record per metric, over the rows that both models were scored on and that the metric can use.

    A metric without any usable row gives no record: there is nothing to say, and a made-up zero would be a lie.

    Raises:
        RecipeError: a metric is not installed, or its settings cannot be used.
    """
    base_by_line = {row.line: row for row in base_rows}
    pairs = [(base_by_line[row.line], row) for row in adapter_rows if row.line in base_by_line]
    records = []
    for evaluation in choose_evaluations(metrics):
        usable = [pair for pair in pairs if all(_is_usable(row, evaluation) for row in pair)]
        counts = [(evaluation.row_counts(base), evaluation.row_counts(adapter)) for base, adapter in usable]
        # A row without weight for either model has no part in the score, so it is no part of n.
        counts = [pair for pair in counts if any(one[-1] > 0 for one in pair)]
        if not all(any(pair[which][-1] > 0 for pair in counts) for which in (0, 1)):
            continue
        found = compare_counts(
            [base for base, _ in counts], [adapter for _, adapter in counts], figure=evaluation.figure,
            bounds=evaluation.bounds,
        )  # fmt: skip
        effect = evaluation.effect_at(found.base.value)
        records.append(
            ScoreRecord(
                evaluation=evaluation.key,
                label=evaluation.label,
                unit=evaluation.unit,
                higher_is_better=evaluation.higher_is_better,
                num_rows=found.num_rows,
                value=found.adapter.value,
                low=found.adapter.low,
                high=found.adapter.high,
                base_value=found.base.value,
                base_low=found.base.low,
                base_high=found.base.high,
                difference=found.difference.value,
                difference_low=found.difference.low,
                difference_high=found.difference.high,
                interval_method=found.interval_method,
                p_value=found.p_value,
                smallest_effect=effect,
                rows_needed=rows_needed(found, effect),
                rows_recommended=rows_recommended(found, effect),
            )
        )
    return records


def row_counts(
    base_rows: Sequence[ScoredRow], adapter_rows: Sequence[ScoredRow], metrics: Sequence[str | MetricChoice]
) -> RowCountsRecord:
    """What every row that both models were scored on adds to each metric's sums, in the order of the file."""
    base_by_line = {row.line: row for row in base_rows}
    pairs = [(base_by_line[row.line], row) for row in adapter_rows if row.line in base_by_line]
    pairs.sort(key=lambda pair: pair[1].line)
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for evaluation in choose_evaluations(metrics):
        for which in (0, 1):
            found[which][evaluation.key] = tuple(
                tuple(evaluation.row_counts(pair[which])) if _is_usable(pair[which], evaluation) else None
                for pair in pairs
            )
    return RowCountsRecord(lines=tuple(pair[1].line for pair in pairs), base=found[0], adapter=found[1])


def run_rows(
    base_rows: Sequence[ScoredRow],
    adapter_rows: Sequence[ScoredRow],
    metrics: Sequence[str | MetricChoice],
    *,
    is_base_alone: bool = False,
) -> list[RunRowRecord]:
    """Every row that both models were scored on with their answers, its own figures and why it has no part in others.

    With `is_base_alone` both are the base's rows, and there is no adapter to say anything of.
    """
    base_by_line = {row.line: row for row in base_rows}
    pairs = [(base_by_line[row.line], row) for row in adapter_rows if row.line in base_by_line]
    pairs.sort(key=lambda pair: pair[1].line)
    questions = [Question(row.prompt, row.reference) for _, row in pairs]
    chosen = choose_evaluations(metrics)
    why = {one.key: one.why_left_out(questions) for one in chosen}
    found = []
    for at, (base, row) in enumerate(pairs):
        figures = {
            one.key: (_row_figure(base, one), None if is_base_alone else _row_figure(row, one)) for one in chosen
        }
        left_out = {one.key: _why_left_out(row, one, why[one.key][at]) for one in chosen}
        found.append(
            RunRowRecord(
                line=row.line,
                prompt=row.prompt,
                reference=row.reference,
                base_answer=base.answer,
                adapter_answer=None if is_base_alone else row.answer,
                figures=figures,
                left_out={key: sentence for key, sentence in left_out.items() if sentence},
            )
        )
    return found


def _row_figure(row: ScoredRow, evaluation: Evaluation) -> float | None:
    """The figure of one row alone; None for a row that has no part in it, or for one that is not finite."""
    value = mean_value([row], evaluation)
    return value if value is not None and math.isfinite(value) else None


def _why_left_out(row: ScoredRow, evaluation: Evaluation, why: str) -> str:
    if evaluation.needs == "answer" and row.answer is None:
        return ""  # not asked for an answer: the suite says how many rows are
    if not why and evaluation.needs == "choices" and evaluation.key not in row.options:
        return "The question with its options does not fit into the model's context."
    return why


def left_out_messages(
    rows: Sequence[ScoredRow], metrics: Sequence[str | MetricChoice], names: Sequence[str] = ()
) -> list[MessageEvent]:
    """For each metric in which scored rows have no part, how many and why the first has none.

    `names` are those of the recipe's datasets, for lines that are not of the main one.
    """
    questions = [Question(row.prompt, row.reference) for row in rows]
    found = []
    for one in choose_evaluations(metrics):
        why = [_why_left_out(row, one, sentence)
               for row, sentence in zip(rows, one.why_left_out(questions), strict=True)]  # fmt: skip
        at = next((at for at, sentence in enumerate(why) if sentence), None)
        if at is None:
            continue
        num = sum(bool(sentence) for sentence in why)
        text = (
            f"{one.label}: {num:,} of {len(rows):,} rows {'has' if num == 1 else 'have'} no part in it. "
            f"Line {told_lines([rows[at].line], names)}: {why[at]}"
        )
        found.append(MessageEvent(level="warning", text=text))
    return found


def samples(base_rows: Sequence[ScoredRow], adapter_rows: Sequence[ScoredRow]) -> list[SampleRecord]:
    """The rows that both models answered, side by side, in the order of the file."""
    base_by_line = {row.line: row for row in base_rows}
    found = []
    for row in sorted(adapter_rows, key=lambda row: row.line):
        base = base_by_line.get(row.line)
        if base is not None and base.answer is not None and row.answer is not None:
            found.append(
                SampleRecord(
                    line=line_at(row.line),
                    prompt=row.prompt,
                    reference=row.reference,
                    base_answer=base.answer,
                    adapter_answer=row.answer,
                    source=source_at(row.line),
                )
            )
    return found


def held_out(base_rows: Sequence[ScoredRow], adapter_rows: Sequence[ScoredRow]) -> list[HeldOutRecord]:
    """The losses of the rows that both models were scored on, in the order of the file."""
    base_by_line = {row.line: row for row in base_rows}
    return [
        HeldOutRecord(
            line=line_at(row.line),
            num_tokens=row.num_tokens,
            base_loss_sum=base_by_line[row.line].loss_sum,
            adapter_loss_sum=row.loss_sum,
            source=source_at(row.line),
        )
        for row in sorted(adapter_rows, key=lambda row: row.line)
        if row.line in base_by_line
    ]


def prompt_text(example: Example) -> str:
    """What a person reads as the question: every turn before the last assistant turn, named when there are several."""
    last = max(index for index, message in enumerate(example.messages) if message.role == "assistant")
    before = example.messages[:last]
    if len(before) == 1:
        return before[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in before)


def mean_value(rows: Sequence[ScoredRow], evaluation: Evaluation) -> float | None:
    """What an evaluation gives for one model's rows; None when it can use none of them."""
    import numpy as np

    counts = np.array([evaluation.row_counts(row) for row in rows if _is_usable(row, evaluation)])
    if not counts.size or counts[:, -1].sum() <= 0:
        return None
    return float(evaluation.figure(counts.sum(axis=0)))


def _is_usable(row: ScoredRow, evaluation: Evaluation) -> bool:
    if evaluation.needs == "choices":
        return evaluation.key in row.options
    return row.num_tokens > 0 if evaluation.needs == "loss" else row.answer is not None


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows, longest first, in groups of at most `batch_tokens` tokens with padding; at least one row each."""
    group: list[int] = []
    for index in order:
        if group and lengths[group[0]] * (len(group) + 1) > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group

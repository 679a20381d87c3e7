"""Batched generation with a key-value cache: greedy by default, sampling on request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from workers.continuous import ContinuousBatch
from workers.slots import takes_slots

# B rows still being written, T prompt tokens of the longest row in a batch, V vocabulary.

DEFAULT_BATCH_SIZE = 16


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int],
    batch_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 17,
    use_cache: bool = True,
    on_finished: Callable[[int], object] | None = None,
    should_stop: Callable[[], object] | None = None,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, without the token that ended the answer.

    Where the model keeps nothing but keys and values, waiting prompts take the places of rows that end (see
    `workers.continuous`). For other models prompts are sorted by length and padded on the left within a batch; a row
    that has ended leaves it. An answer also ends where the model's context ends; a prompt that fills it gets an empty
    answer.

    Args:
        max_new_tokens: of every answer, or one number per prompt.
        batch_size: rows at once; when None, as many as pay and fit.
        temperature: 0 takes the most probable token; above, tokens are drawn from the sharpened or flattened
            distribution, with a generator of its own seeded by `seed`.
        top_p: draw from the smallest set of tokens that holds this much probability (Holtzman et al. 2020).
        use_cache: False recomputes the whole row for every token: slow, for checking only.
        on_finished: told how many rows were finished since the last call; a true answer ends generation early,
            and rows not finished come back empty.
        should_stop: asked before every token; a true answer does the same.
    """
    room = context_room(model)
    fitting = [index for index, prompt in enumerate(prompts) if 0 < len(prompt) < room]
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ValueError(f"{len(limits)} limits for {len(prompts)} prompts: give one number, or one for each prompt.")
    fitting = [index for index in fitting if limits[index] > 0]
    order = sorted(fitting, key=lambda index: len(prompts[index]), reverse=True)
    should_stop = should_stop or (lambda: False)
    generator: torch.Generator | None = None
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            device = next(model.parameters()).device
            if temperature > 0:
                generator = torch.Generator(device=device).manual_seed(seed)

            def choose(logits_BV: torch.Tensor) -> torch.Tensor:
                return _choose(logits_BV, temperature, top_p, generator)

            asked = [(index, prompts[index], min(limits[index], room - len(prompts[index]))) for index in order]
            if use_cache and takes_slots(model):
                batch = ContinuousBatch(
                    model, stop_ids, choose, num_slots=batch_size, on_finished=on_finished, should_stop=should_stop
                )
                answers = batch.write(asked)
            else:
                answers = _write_in_batches(
                    model, asked, frozenset(stop_ids), choose, batch_size or DEFAULT_BATCH_SIZE, use_cache, on_finished,
                    should_stop,
                )  # fmt: skip
    finally:
        model.train(was_training)
    return [answers.get(index, []) for index in range(len(prompts))]


def context_room(model: Any) -> int:
    """Tokens of prompt and answer together that the model can read, a trained prefix taken off."""
    config = model.config.get_text_config()
    total = int(getattr(config, "max_position_embeddings", None) or 2**31)
    adapter = getattr(model, "active_peft_config", None)
    return total - int(getattr(adapter, "num_virtual_tokens", None) or 0)


def _write_in_batches(
    model: Any,
    asked: Sequence[tuple[int, Sequence[int], int]],
    stop_ids: frozenset[int],
    choose: Callable[[torch.Tensor], torch.Tensor],
    size: int,
    use_cache: bool,
    on_finished: Callable[[int], object] | None,
    should_stop: Callable[[], object],
) -> dict[int, list[int]]:
    """The answers by index, of prompts given as (index, ids, most new tokens)."""
    answers: dict[int, list[int]] = {}
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        found = _generate_batch(
            model, [ids for _, ids, _ in batch], [limit for *_, limit in batch], stop_ids, choose, use_cache,
            should_stop,
        )  # fmt: skip
        if found is None:
            break
        answers |= {index: ids for (index, *_), ids in zip(batch, found, strict=True)}
        if on_finished is not None and on_finished(len(batch)):
            break
    return answers


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_ids: frozenset[int],
    choose: Callable[[torch.Tensor], torch.Tensor],
    use_cache: bool,
    should_stop: Callable[[], object],
) -> list[list[int]] | None:
    """The answers of one batch; None when it was ended before they were all written."""
    answers: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    alive = list(range(len(prompts)))
    cache: Any = None
    new_ids_BT, new_positions_BT = ids_BT, positions_BT
    while True:
        if should_stop():
            return None
        inputs = {"attention_mask": mask_BT}
        if use_cache:
            inputs |= {"input_ids": new_ids_BT, "position_ids": new_positions_BT, "past_key_values": cache}
        else:
            inputs |= {"input_ids": ids_BT, "position_ids": positions_BT}
        # Only the last position's logits: a prompt's would be B x T x V numbers for nothing.
        output = model(**inputs, use_cache=use_cache, logits_to_keep=1)
        cache = output.past_key_values if use_cache else None
        chosen_B = choose(output.logits[:, -1].float())
        going_on = []
        for row, token in enumerate(chosen_B.tolist()):
            if token in stop_ids:
                continue
            answers[alive[row]].append(token)
            index = alive[row]
            if len(answers[index]) < limits[index]:
                going_on.append(row)
        if not going_on:
            return answers
        if len(going_on) < len(alive):
            keep_B = torch.tensor(going_on, device=device)
            alive = [alive[row] for row in going_on]
            chosen_B, mask_BT, ids_BT = chosen_B[keep_B], mask_BT[keep_B], ids_BT[keep_B]
            positions_BT = positions_BT[keep_B]
            if use_cache:
                cache.batch_select_indices(keep_B)
        new_ids_BT = chosen_B[:, None]
        new_positions_BT = positions_BT[:, -1:] + 1
        ids_BT = torch.cat([ids_BT, new_ids_BT], dim=1)
        positions_BT = torch.cat([positions_BT, new_positions_BT], dim=1)
        mask_BT = torch.cat([mask_BT, torch.ones_like(new_ids_BT)], dim=1)


def _choose(
    logits_BV: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> torch.Tensor:
    """One token per row."""
    if temperature <= 0:
        return logits_BV.argmax(dim=-1)
    probabilities_BV = torch.softmax(logits_BV / temperature, dim=-1)
    if top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        # A token stays when the mass before it is still short of top_p, so at least one always stays.
        sorted_BV = sorted_BV.masked_fill(sorted_BV.cumsum(dim=-1) - sorted_BV >= top_p, 0.0)
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter_(-1, order_BV, sorted_BV)
    return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]

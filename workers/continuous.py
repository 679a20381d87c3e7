"""Continuous batching: as soon as rows end others take their places, so that every step writes for a full batch.

After Yu et al. 2022, "Orca: A distributed serving system for transformer-based generative models", section 3.2, with
rows joining in groups, since each group costs a pass over the weights. On a GPU a step is one recorded graph, and the
host reads the tokens of a step while the next one runs: a row that ended wrote one token too many, which is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from workers.layers.attention import grouped_attention
from workers.slots import SlotCache, bytes_per_column, masks
from workers.step_graphs import StepGraphs

# S slots, N slots in use, K rows that join, L tokens of the longest of them, V vocabulary.

SLOTS_ON_GPU, SLOTS_ON_CPU = 256, 32
PROMPT_TOKENS_ON_GPU, PROMPT_TOKENS_ON_CPU = 8192, 1024
"""Tokens of prompts that are read in one pass, padding counted in; one prompt may be longer."""
MOST_JOINING = 32
SHARE_OF_FREE_MEMORY = 0.6
WINDOW_STEP = 128
"""Columns read grow by this many: each number of them is a graph of its own."""


@dataclass(eq=False)
class _Row:
    """A prompt being answered. `num_launched` tokens are written or on their way, the answer holds those seen."""

    index: int
    prompt: Sequence[int]
    limit: int
    answer: list[int]
    num_launched: int = 0
    is_over: bool = False


class ContinuousBatch:
    """Answers to prompts by a model that takes slots (see `takes_slots`), in inference mode.

    Args:
        choose: one token per row from logits, (N, V) to (N,).
        num_slots: rows at once; None takes as many as fit.
        on_finished, should_stop: as `workers.generation.generate` has them.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Collection[int],
        choose: Callable[[Tensor], Tensor],
        *,
        num_slots: int | None = None,
        on_finished: Callable[[int], object] | None = None,
        should_stop: Callable[[], object] = lambda: False,
    ) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._is_gpu = self._device.type == "cuda"
        self._stop_ids = frozenset(stop_ids)
        self._choose = choose
        self._on_finished = on_finished
        self._should_stop = should_stop
        self._wanted_slots = num_slots or (SLOTS_ON_GPU if self._is_gpu else SLOTS_ON_CPU)
        self._prompt_tokens = PROMPT_TOKENS_ON_GPU if self._is_gpu else PROMPT_TOKENS_ON_CPU
        self._graphs = StepGraphs(self._device)
        self._slots: list[_Row | None] = []
        self._pending: deque[tuple[Tensor, Any, list[tuple[int, _Row]]]] = deque()
        self._num_finished = 0
        # Made when the first rows have joined, which says what the model keeps for a token.
        self._cache: SlotCache | None = None
        self._num_in_front = 0

    def write(self, prompts: Sequence[tuple[int, Sequence[int], int]]) -> dict[int, list[int]]:
        """The answers by index, of prompts given as (index, ids, most new tokens), the longest first.

        When it was ended before its end, rows that were not finished are left out.
        """
        waiting = deque(_Row(index, ids, limit, []) for index, ids, limit in prompts)
        self._wanted_slots = max(1, min(self._wanted_slots, len(waiting)))
        self._num_columns = _up(max((len(row.prompt) + row.limit for row in waiting), default=0) + 1)
        rows = list(waiting)
        with grouped_attention(self._model):
            while not self._should_stop():
                self._join(waiting)
                self._step()
                while len(self._pending) > self._lag():
                    self._settle()
                if self._has_told_to_end() or not (waiting or self._pending or any(self._slots)):
                    break
        return {row.index: row.answer for row in rows if row.is_over}

    def _lag(self) -> int:
        """Passes whose tokens may still be on their way while the next one is started."""
        return 1 if self._is_gpu and self._can_step() else 0

    def _has_told_to_end(self) -> bool:
        finished, self._num_finished = self._num_finished, 0
        return bool(finished and self._on_finished is not None and self._on_finished(finished))

    # --- rows that join and leave ---

    def _join(self, waiting: deque[_Row]) -> None:
        """Let waiting rows in, once there is room for a group of them."""
        while waiting:
            num_free = (len(self._slots) or self._wanted_slots) - sum(row is not None for row in self._slots)
            group = max(1, (len(self._slots) or self._wanted_slots) // 8)
            if num_free < min(group, len(waiting)):
                return
            longest = len(waiting[0].prompt)
            count = max(1, min(num_free, len(waiting), MOST_JOINING, self._prompt_tokens // longest))
            self._read([waiting.popleft() for _ in range(count)])

    def _read(self, rows: list[_Row]) -> None:
        """One pass over the prompts of rows, of falling length; each gets a slot and its first token."""
        lengths = [len(row.prompt) for row in rows]
        ids_KL = torch.zeros(len(rows), lengths[0], dtype=torch.long)
        for place, row in enumerate(rows):
            ids_KL[place, : lengths[place]] = torch.tensor(row.prompt)
        lasts = sorted({length - 1 for length in lengths})
        read = DynamicCache()
        # Padding on the right needs no mask: no token looks ahead, and the columns are written over.
        output = self._model(
            input_ids=ids_KL.to(self._device), use_cache=True, past_key_values=read,
            position_ids=torch.arange(lengths[0], device=self._device).expand(len(rows), -1),
            logits_to_keep=torch.tensor(lasts, device=self._device),
        )  # fmt: skip
        at_K = torch.tensor([lasts.index(length - 1) for length in lengths], device=self._device)
        chosen_K = self._choose(output.logits[torch.arange(len(rows), device=self._device), at_K].float())
        if self._cache is None:
            self._make_slots(read, lengths[0])
        assert self._cache is not None
        free = [slot for slot, row in enumerate(self._slots) if row is None][: len(rows)]
        slots_K = torch.tensor(free, device=self._device)
        self._cache.fill(slots_K, read)
        self._ids_S[slots_K] = chosen_K
        self._positions_S[slots_K] = torch.tensor(lengths, device=self._device)
        for slot, row in zip(free, rows, strict=True):
            self._slots[slot] = row
            row.num_launched = 1
        self._await(chosen_K, list(enumerate(rows)))

    def _make_slots(self, read: Any, longest: int) -> None:
        self._num_in_front = int(read.layers[0].keys.shape[2]) - longest
        self._num_columns += _up(self._num_in_front)
        size = self._wanted_slots
        if self._is_gpu:
            free = torch.cuda.mem_get_info(self._device)[0]
            free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            fitting = int(SHARE_OF_FREE_MEMORY * free) // (bytes_per_column(read) * self._num_columns)
            size = max(min(size, fitting), read.layers[0].keys.shape[0])
        self._cache = SlotCache(read, num_slots=size, num_columns=self._num_columns)
        self._slots = [None] * size
        self._ids_S = torch.zeros(size, dtype=torch.long, device=self._device)
        self._positions_S = torch.zeros(size, dtype=torch.long, device=self._device)
        self._rows_S = torch.arange(size, device=self._device)

    def _close_ranks(self) -> int:
        """Moves rows so that a step needs fewer slots, where that pays; gives how many it needs."""
        used = [slot for slot, row in enumerate(self._slots) if row is not None]
        width = self._width(len(used))
        if used[-1] < width:
            return self._width(used[-1] + 1)
        assert self._cache is not None
        far = [slot for slot in used if slot >= width]
        free = [slot for slot in range(width) if self._slots[slot] is None][: len(far)]
        from_K, to_K = (torch.tensor(one, device=self._device) for one in (far, free))
        self._cache.move(from_K, to_K, self._window())
        for kept_S in (self._ids_S, self._positions_S):
            kept_S[to_K] = kept_S[from_K]
        for source, target in zip(far, free, strict=True):
            self._slots[target], self._slots[source] = self._slots[source], None
        return width

    def _width(self, num_rows: int) -> int:
        """Slots of a step for so many rows. On a GPU few widths are used, for each is a graph of its own."""
        if not self._is_gpu:
            return num_rows
        width = 1
        while width < num_rows:
            width *= 2
        return min(width, len(self._slots))

    def _window(self) -> int:
        longest = max(len(row.prompt) + row.num_launched for row in self._slots if row is not None)
        return min(_up(longest + self._num_in_front), self._num_columns)

    # --- steps ---

    def _can_step(self) -> bool:
        return any(row is not None and row.num_launched < row.limit for row in self._slots)

    def _step(self) -> None:
        """Start writing the next token of every row."""
        if not self._can_step():
            return
        width, window = self._close_ranks(), self._window()
        logits_NV = self._graphs.run((width, window), lambda: self._pass(width, window))
        chosen_N = self._choose(logits_NV.float())
        self._ids_S[:width] = chosen_N
        # A slot whose row has ended goes on until it is taken: it must not leave the cache.
        self._positions_S[:width] = (self._positions_S[:width] + 1).clamp(max=self._last_position())
        going_on = [
            (slot, row)
            for slot, row in enumerate(self._slots[:width])
            if row is not None and row.num_launched < row.limit
        ]
        for _, row in going_on:
            row.num_launched += 1
        self._await(chosen_N, going_on)

    def _last_position(self) -> int:
        return self._num_columns - self._num_in_front - 1

    def _pass(self, width: int, window: int) -> Tensor:
        """Logits of the next token of the first slots, (N, V)."""
        assert self._cache is not None
        positions_N = self._positions_S[:width]
        columns_N = positions_N + self._num_in_front
        self._cache.aim(self._rows_S[:width], columns_N, window)
        output = self._model(
            input_ids=self._ids_S[:width, None], position_ids=positions_N[:, None], past_key_values=self._cache,
            attention_mask=masks(self._model, columns_N, window, self._num_columns), use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits_NV: Tensor = output.logits[:, -1]
        return logits_NV

    def _await(self, chosen: Tensor, rows: list[tuple[int, _Row]]) -> None:
        """Have tokens copied to the host, without waiting for them; `rows` says which of them are whose."""
        if not self._is_gpu:
            self._pending.append((chosen, None, rows))
            return
        copied = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
        copied.copy_(chosen, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        self._pending.append((copied, arrival, rows))

    def _settle(self) -> None:
        """Take the oldest tokens on their way into the answers."""
        copied, arrival, rows = self._pending.popleft()
        if arrival is not None:
            arrival.synchronize()
        tokens = copied.tolist()
        for place, row in rows:
            if row.is_over:
                continue
            token = tokens[place]
            if token not in self._stop_ids:
                row.answer.append(token)
                if len(row.answer) < row.limit:
                    continue
            row.is_over = True
            self._num_finished += 1
            self._slots[self._slots.index(row)] = None


def _up(columns: int) -> int:
    return -(-columns // WINDOW_STEP) * WINDOW_STEP

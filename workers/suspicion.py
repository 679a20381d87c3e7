"""Training rows that may be wrong: those that the model kept disagreeing with while it learned the others, and those
whose answer contradicts that of the same question elsewhere.

The loss after training says little, because a wrong answer is learned by heart like a right one. But it is learned
later: the model first learns what most rows have in common. So each row's loss is noted at every visit, which costs
nothing, since the step computes it anyway, and its mean over the visits is compared with that of the rows around it.
This is the idea of the area under the margin (Pleiss et al. 2020, "Identifying mislabeled data using the area under
the margin ranking") and of data maps (Swayamdipta et al. 2020, "Dataset cartography"), with the loss of an answer in
the place of a class's margin. That rows which agree in their question and not in their answer cannot all be right is
what confident learning (Northcutt et al. 2021) infers from predictions; here the rows say so themselves.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workers.examples import Example
from workers.mixing import source_at, told_lines
from workers.overlap import plain_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_ROWS = 100
"""Rows that a result lists."""
UNUSUAL = 2.0
"""Spreads above rows of like length from which a row's loss is unusual: 1 row in 44 where losses are normal. Hampel's
rule cuts at 3, to throw rows away; a list for people to look through, the worst first, may be longer."""
DISSENT, DISAGREEMENT = 3.0, 1.5
"""What a contradiction adds to the spreads: as much as an unusual loss where most rows say otherwise, and half of it
where one row stands against one."""
MIN_ROWS = 20
"""Fewer rows have no spread to speak of."""
WINDOW = 64
"""Visits whose median is what a row's loss is compared with: the loss falls while training goes on."""
MIN_SPREAD = 0.05
"""Nats per token: rows that are all learned alike differ by nothing that tells them apart."""


class Visits:
    """Each row's losses per token at its visits, in nats above the visits around them, summed. R rows, V visits."""

    def __init__(self, num_rows: int) -> None:
        import numpy as np

        self.num_R = np.zeros(num_rows, np.int32)
        self.excess_R = np.zeros(num_rows, np.float32)
        self.recent_V = np.zeros(0, np.float32)
        self._noted: list[tuple[Sequence[int], Sequence[int], Any]] = []
        self._sent: list[tuple[Sequence[int], Sequence[int], Any]] = []
        self._done: Any = None

    def note(self, rows: Sequence[int], num_tokens: Sequence[int], loss_sums: Any) -> None:
        """A step's rows, their loss-carrying tokens and summed losses: tensors on the device, one per micro-batch.

        Nothing is read before `settle`: the host does not wait for the device.
        """
        self._noted.append((rows, num_tokens, loss_sums))

    def send(self) -> None:
        """Begins to copy what was noted to the host; `take` reads it once the device has got there."""
        import torch

        if not self._noted:
            return
        # In one copy, however many steps it is.
        sums = torch.cat([part.float() for *_, parts in self._noted for part in parts])
        on_host = sums
        if sums.is_cuda:
            on_host = torch.empty(sums.shape, pin_memory=True)
            on_host.copy_(sums, non_blocking=True)
            self._done = torch.cuda.current_stream(sums.device).record_event()
        lengths = [len(rows) for rows, *_ in self._noted]
        for (rows, num_tokens, _), own in zip(self._noted, on_host.split(lengths), strict=True):
            self._sent.append((rows, num_tokens, own))
        self._noted.clear()

    def take(self) -> None:
        """Reads what was sent, step by step, in the order in which it was noted."""
        import numpy as np

        if self._done is not None:
            self._done.synchronize()
            self._done = None
        for rows, num_tokens, loss_sums in self._sent:
            losses = loss_sums.numpy() / np.maximum(np.asarray(num_tokens), 1)
            self.recent_V = np.concatenate([self.recent_V, losses.astype(np.float32)])[-max(WINDOW, len(losses)) :]
            np.add.at(self.excess_R, rows, losses - np.median(self.recent_V))
            np.add.at(self.num_R, rows, 1)
        self._sent.clear()

    def settle(self) -> None:
        """Reads all that was noted; waits for the device."""
        self.send()
        self.take()

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint keeps; `restore` takes it back."""
        self.settle()
        return {"num": self.num_R, "excess": self.excess_R, "recent": self.recent_V}

    def restore(self, arrays: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's arrays; others than this run's rows are left alone."""
        if len(arrays["num"]) == len(self.num_R):
            self.num_R, self.excess_R, self.recent_V = (arrays[name].copy() for name in ("num", "excess", "recent"))


@dataclass(frozen=True)
class Suspect:
    """A row that may be wrong. `spreads` says how far its loss stood out; `other_lines` are what it contradicts."""

    line: int
    score: float
    spreads: float
    reason: str
    other_lines: tuple[int, ...] = ()


def suspects(
    examples: Iterable[Example],
    lines: Sequence[int],
    num_tokens: Sequence[int],
    visits: Visits,
    names: Sequence[str] = (),
) -> list[Suspect]:
    """The training rows that may be wrong, the most suspicious first.

    Args:
        examples: the training rows.
        lines: the line of each row that `visits` counts, or its place (`workers.mixing`).
        num_tokens: how many of its tokens carry loss.
        names: those of the datasets that the rows are of.
    """
    visits.settle()
    sources = [source_at(line) for line in lines]
    spreads = dict(zip(lines, spreads_of(visits, num_tokens, sources).tolist(), strict=True))
    contradictions = find_contradictions(examples, spreads, names)
    found = []
    for line, spread in spreads.items():
        against = contradictions.get(line)
        if spread < UNUSUAL and against is None:
            continue
        reasons = []
        if against is not None:
            reasons.append(against.reason)
        if spread >= UNUSUAL:
            reasons.append(
                f"While rows around it were learned, its loss stayed {spread:.1f} times the usual spread above theirs."
            )
        added = 0.0 if against is None else DISSENT if against.is_outvoted else DISAGREEMENT
        score = max(spread, 0.0) + added
        others = against.other_lines if against else ()
        found.append(Suspect(line, round(score, 3), round(spread, 3), " ".join(reasons), others))
    return sorted(found, key=lambda one: (-one.score, one.line))


def spreads_of(visits: Visits, num_tokens: Sequence[int], sources: Sequence[int] | None = None) -> NDArray[np.float64]:
    """How far each row's mean loss stood above that of rows of like length, in robust standard deviations.

    The median and its absolute deviation (Hampel 1974), for wrong rows are outliers that would widen a variance. Short
    answers differ more from each other than long ones, so rows are compared within a factor of two in length, where
    there are enough, and only with those of their own dataset: one may be harder than another and no worse. Rows that
    were never visited have 0, and so have those of a dataset with too few.
    """
    import numpy as np

    tokens = np.asarray(num_tokens)
    seen = visits.num_R > 0
    found = np.zeros(len(tokens))
    mean = visits.excess_R / np.maximum(visits.num_R, 1)
    lengths = np.floor(np.log2(np.maximum(tokens, 1))).astype(int)
    source_R = np.zeros(len(tokens), int) if sources is None else np.asarray(sources)
    for source in np.unique(source_R):
        beside = seen & (source_R == source)
        if beside.sum() < MIN_ROWS:
            continue
        for length in np.unique(lengths[beside]):
            own = beside & (lengths == length)
            like = own if own.sum() >= MIN_ROWS else beside
            found[own] = _spreads(mean[own], mean[like])
    return found


def _spreads(values: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """How far values lie above the median of others, in robust standard deviations of these."""
    import numpy as np

    middle = np.median(like)
    spread = 1.4826 * np.median(np.abs(like - middle))
    found: NDArray[Any] = (values - middle) / max(float(spread), MIN_SPREAD)
    return found


@dataclass(frozen=True)
class Contradiction:
    """Why a row cannot be right together with others."""

    reason: str
    other_lines: tuple[int, ...]
    is_outvoted: bool


def find_contradictions(
    examples: Iterable[Example], spreads: Mapping[int, float], names: Sequence[str] = ()
) -> dict[int, Contradiction]:
    """Rows whose answer is not that of other rows with the same question, by line.

    Same: word for word with the turns before and the system prompt, case and punctuation aside. An answer that holds
    another's words, or is held by them, agrees with it. Where most rows agree, those that do not are named; where
    two stand against each other, the one that the model found harder to believe. A question to which each row has an
    answer of its own is open, and none of them is wrong.
    """
    groups: defaultdict[bytes, list[tuple[int, tuple[str, ...]]]] = defaultdict(list)
    for example in examples:
        last = max(index for index, message in enumerate(example.messages) if message.role == "assistant")
        question = "\n".join(f"{one.role} {' '.join(plain_words(one.content))}" for one in example.messages[:last])
        answer = tuple(plain_words(example.messages[last].content))
        key = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        groups[key].append((example.line, answer[:200]))
    found: dict[int, Contradiction] = {}
    for group in groups.values():
        counts = Counter(answer for _, answer in group)
        if len(counts) < 2:
            continue
        (common, num), (_, second) = counts.most_common(2)
        if num > second:
            others = tuple(line for line, answer in group if answer == common)
            for line, answer in group:
                if not _agree(answer, common):
                    reason = (
                        f"{len(others)} other rows ask the same and answer otherwise "
                        f"({_listed(others, names)}: “{_short(common)}”)."
                    )
                    found[line] = Contradiction(reason, others[:20], is_outvoted=True)
        elif len(counts) == 2 and not _agree(*counts):
            sides = [[line for line, answer in group if answer == one] for one in counts]
            sides.sort(key=lambda side: sum(spreads.get(line, 0.0) for line in side) / len(side))
            for line in sides[1]:
                reason = f"{_listed(sides[0], names)} asks the same and answers otherwise; one of them must be wrong."
                found[line] = Contradiction(reason, tuple(sides[0][:20]), is_outvoted=False)
    return found


def _agree(answer: Sequence[str], other: Sequence[str]) -> bool:
    short, long = sorted((Counter(answer), Counter(other)), key=lambda words: words.total())
    return bool(short) and short <= long


def _listed(lines: Sequence[int], names: Sequence[str], most: int = 5) -> str:
    return f"{'lines' if len(lines) > 1 else 'Line'} {told_lines(lines, names, most)}"


def _short(words: Sequence[str], most: int = 60) -> str:
    text = " ".join(words)
    return text if len(text) <= most else f"{text[:most]} …"

"""Rows of one set that another has too, word for word or nearly so: training rows among those that are to be scored.

Two rows are the same when their turns are, spaces and case aside. A row is nearly in another when most of its phrases
are: of a row's phrases of three words (shingles, Broder 1997, "On the resemblance and containment of documents") the
share that the other contains, each weighted by how rare it is among the training rows. What one row in twenty has is
a template and weighs nothing; system turns, which rows share by design, are left out. Asked of the whole row and of
its question alone, because a question that was trained on is no test either, whatever answer it had.

The sets to be scored are small, so their phrases fit into an index that every training row is held against: the
shares are exact, where MinHash (Broder 1997) estimates them and misses some.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from workers.examples import Example, Message
from workers.results import OverlapRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEAR = 0.8
"""Share of a row's phrases, by weight, from which it counts as nearly the other. Broder et al. 1997 ("Syntactic
clustering of the Web") and Lee et al. 2022 ("Deduplicating training data") cut in the same place; with three-word
phrases one changed word in fifteen stays above it."""
TEMPLATE_SHARE = 0.05
"""Phrases that one training row in twenty has are a template's."""
MIN_TEMPLATE_ROWS = 4
"""In few rows a share means little: what three of them have is no template yet."""
MIN_PHRASES = 3
"""Telling phrases that two rows must share: fewer are found together by chance."""
MAX_PAIRS = 100
MAX_WORDS = 4000
"""Words of a row that are looked at."""
SAMPLE_ROWS = 10_000
"""Training rows, evenly over the file, from which the weights of phrases are estimated."""
CHUNK_ROWS = 1000

# A letter of Chinese or Japanese is a word; operators tell 3 + 5 from 3 - 5; other punctuation is no difference.
_CHARACTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W{_CHARACTERS}]+|[-+*/=<>%^|~]")


def row_text(example: Example) -> str:
    """A row's turns without the system's, spaces and case aside: equal for rows that ask and answer the same."""
    return "\n".join(f"{one.role}: {_plain(one.content)}" for one in example.messages if one.role != "system")


def row_key(example: Example) -> bytes:
    """A digest of all turns, the system's too, spaces and case aside: equal for rows that teach the same."""
    text = "\n".join(f"{one.role}: {_plain(one.content)}" for one in example.messages)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def plain_words(text: str) -> list[str]:
    """The words and operators of a text, case and punctuation aside."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def find_overlap(
    scored: Sequence[Example],
    training: Callable[[], Iterable[Example]],
    *,
    num_training: int,
    max_pairs: int = MAX_PAIRS,
) -> OverlapRecord:
    """Which rows that are scored were trained on, or nearly so.

    Args:
        scored: the rows of a test set: held-out ones, or a suite's.
        training: the training rows, read from the beginning at each call; it is called twice.
        num_training: about how many these are.
        max_pairs: most pairs that are told; all are counted.
    """
    phrases = _Phrases(scored)
    phrases.weigh(islice(training(), 0, None, max(1, num_training // SAMPLE_ROWS)))
    by_text: dict[str, list[int]] = {}
    for index, example in enumerate(scored):
        by_text.setdefault(row_text(example), []).append(index)
    exact: dict[int, int] = {}
    best: dict[int, tuple[float, int]] = {}
    for rows in _chunks(training()):
        for example in rows:
            for index in by_text.get(row_text(example), ()):
                exact.setdefault(index, example.line)
        for place, index, share in phrases.shares_in(rows):
            if share > best.get(index, (0.0, 0))[0]:
                best[index] = (share, rows[place].line)
    near = {index: found for index, found in best.items() if index not in exact}
    same = sorted((scored[index].line, line, 1.0) for index, line in exact.items())
    alike = [(scored[index].line, line, round(share, 4)) for index, (share, line) in near.items()]
    return OverlapRecord(
        num_held_out_rows=len(scored),
        num_exact=len(exact),
        num_near=len(near),
        pairs=(*same, *sorted(alike, key=lambda pair: (-pair[2], pair[0])))[:max_pairs],
    )


class _Phrases:
    """The telling phrases of the rows to be scored, as an index. A unit is a row, or a row's question.

    Letters of shapes: W words of a chunk of rows, U units, C different phrases, E entries of the index.
    """

    def __init__(self, scored: Sequence[Example]) -> None:
        import numpy as np

        self._word_numbers: dict[str, int] = {}
        texts = []
        for example in scored:
            last = max(index for index, message in enumerate(example.messages) if message.role == "assistant")
            texts += [_words(example.messages), _words(example.messages[:last])]
        for words in texts:
            for word in words:
                self._word_numbers.setdefault(word, len(self._word_numbers) + 1)
        units, phrases = self._phrases_of(texts)
        found = np.unique(np.stack([phrases, units.astype(np.uint64)], axis=1), axis=0)
        self._phrases_C, self._first_C, num_C = np.unique(found[:, 0], return_index=True, return_counts=True)
        self._num_C = num_C
        self._units_E = found[:, 1].astype(np.int64)
        self._num_units = len(texts)
        self._weights_C = np.ones(len(self._phrases_C))

    def weigh(self, sample: Iterable[Example]) -> None:
        """Weighs each phrase by how rare it is among training rows; a template's weigh nothing."""
        import numpy as np

        num_rows = 0
        counts_C = np.zeros(len(self._phrases_C), np.int64)
        for rows in _chunks(sample):
            num_rows += len(rows)
            _, found = self._hits(rows)
            counts_C += np.bincount(found, minlength=len(counts_C))
        most = max(TEMPLATE_SHARE * num_rows, MIN_TEMPLATE_ROWS)
        weights_C = np.log(most / np.maximum(counts_C, 1)).clip(min=0)
        # A suite's own template may be rare in training. Each row has two units, so this counts some phrases twice.
        most_units = 2 * max(TEMPLATE_SHARE * self._num_units / 2, MIN_TEMPLATE_ROWS)
        self._weights_C = np.where(self._num_C < most_units, weights_C, 0.0)
        weights_E = np.repeat(self._weights_C, self._num_C)
        self._totals_U = np.bincount(self._units_E, weights_E, minlength=self._num_units)
        self._told_U = np.bincount(self._units_E, weights_E > 0, minlength=self._num_units)

    def shares_in(self, rows: Sequence[Example]) -> Iterator[tuple[int, int, float]]:
        """(place in `rows`, index of the scored row, share of its phrases) where that is at least NEAR."""
        import numpy as np

        places, phrases = self._hits(rows)
        is_telling = self._weights_C[phrases] > 0
        places, phrases = places[is_telling], phrases[is_telling]
        # Each hit stands for every unit that has the phrase: its entries lie side by side.
        num = self._num_C[phrases]
        first = np.repeat(self._first_C[phrases] - (np.cumsum(num) - num), num)
        entries = first + np.arange(int(num.sum()))
        pairs, owner = np.unique(np.repeat(places, num) * self._num_units + self._units_E[entries], return_inverse=True)
        weights = np.bincount(owner, np.repeat(self._weights_C[phrases], num), minlength=len(pairs))
        counts = np.bincount(owner, minlength=len(pairs))
        units = pairs % self._num_units
        shares = np.minimum(weights / np.maximum(self._totals_U[units], 1e-12), 1.0)
        is_near = (shares >= NEAR) & (counts >= MIN_PHRASES)
        for pair, share in zip(pairs[is_near].tolist(), shares[is_near].tolist(), strict=True):
            yield pair // self._num_units, pair % self._num_units // 2, share

    def _hits(self, rows: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each row's indexed phrases once: places in `rows`, and indices of phrases."""
        import numpy as np

        if not len(self._phrases_C):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        places, phrases = self._phrases_of([_words(example.messages) for example in rows])
        indices = np.searchsorted(self._phrases_C, phrases).clip(max=len(self._phrases_C) - 1)
        is_known = self._phrases_C[indices] == phrases
        found = np.unique(places[is_known] * len(self._phrases_C) + indices[is_known])
        return found // len(self._phrases_C), found % len(self._phrases_C)

    def _phrases_of(self, texts: Sequence[Sequence[str]]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Every three words in a row that all occur in scored rows: the text's index, and the phrase as a number."""
        import numpy as np

        number = self._word_numbers.get
        words_W = np.array([number(word, 0) for text in texts for word in text], np.uint64)
        texts_W = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        if len(words_W) < 3:
            return np.zeros(0, np.int64), np.zeros(0, np.uint64)
        one, two, three = words_W[:-2], words_W[1:-1], words_W[2:]
        is_phrase = (texts_W[:-2] == texts_W[2:]) & (one > 0) & (two > 0) & (three > 0)
        base = np.uint64(len(self._word_numbers) + 1)
        return texts_W[:-2][is_phrase], ((one * base + two) * base + three)[is_phrase]


def _words(messages: Iterable[Message]) -> list[str]:
    return plain_words(" ".join(one.content for one in messages if one.role != "system"))[:MAX_WORDS]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _chunks(rows: Iterable[Example]) -> Iterator[list[Example]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield chunk

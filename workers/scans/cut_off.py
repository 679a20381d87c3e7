"""Answers that stop in the middle, as a limit on tokens or characters leaves them.

An end of sentence is missing only where other answers have one: what a data set never writes says nothing. So the
answers are counted first, and those without an end are told of when most of the long ones end with one. The last word
is called cut when it stands nowhere else in the answers and others begin with it.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from workers.scans import Finding, Note, Rows, Scan
from workers.scans._texts import answers
from workers.strict_json import EXCERPT_CHARS, excerpt_of

MIN_WORDS = 12
"""Shorter answers (labels, titles, names) need no full stop."""
MOST_END = 0.9
"""Share of the long answers that must end with an end of sentence."""
MIN_LONG = 10
MAX_CANDIDATES = 200_000
MAX_VOCABULARY = 500_000
_FENCE = re.compile(r"^ {0,3}(```+|~~~+)", re.M)
_INLINE = re.compile(r"`[^`\n]*`|\"[^\"\n]*\"|'[^'\n]{1,3}'")
_NO_END = ",/&@#%\\\u3001\u060c\uff0c"
"""Punctuation (Unicode's category Po) that does not end a sentence: commas of several scripts, and signs in words."""
_SURE_END = ".!?\u3002\uff01\uff1f"
# Lists, tables, headings, addresses and formulas end as they like.
_FREE_LINE = re.compile(r"\s*(?:[-*+•|#>$\\]|\d+[.)]\s|\w\)\s)|.*(?:https?://\S+|[|$}\])>=]|\d%?|`)\s*$")
_WORD = re.compile(r"[^\W\d_]+")
_OPENS = {"(": ")", "[": "]", "{": "}"}


@dataclass
class _Seen:
    """What a first pass over the answers gathers."""

    num_long: int = 0
    num_ended: int = 0
    vocabulary: Counter[str] = field(default_factory=Counter)
    candidates: list[tuple[int, str, str]] = field(default_factory=list)
    """(line, last word, excerpt) of rows whose answer lacks an end of sentence."""
    num_candidates_left: int = 0


class CutOff(Scan):
    """One finding per row: the first reason that holds."""

    name = "cut_off"
    label = "Answers cut off"
    help = (
        "Answers that leave a code fence or a bracket open, stop in the middle of a word, or lack an end of sentence "
        f"where at least {MOST_END:.0%} of the answers of {MIN_WORDS} words or more have one."
    )
    example_types = ("chat", "preference", "unpaired")
    order = 60

    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """Open fences and brackets as they come; missing ends once it is known what the others do."""
        seen = _Seen()
        for example in rows:
            told = False
            for text in answers(example):
                reason = None if told else open_part(text)
                if reason is not None:
                    told = True
                    kind, message = reason
                    yield Finding(example.line, kind, message, _tail(text))
                elif _judge_end(text, example.line, seen, told=told):
                    told = True
        if seen.num_long >= MIN_LONG and seen.num_ended >= MOST_END * seen.num_long:
            yield from _missing_ends(seen)
            if seen.num_candidates_left:
                yield Note(f"{seen.num_candidates_left:,} later answers without an end of sentence are not listed.")


def open_part(text: str) -> tuple[str, str] | None:
    """(kind, message) of a fence or bracket that an answer leaves open; None when it leaves none."""
    opened = ""
    for fence in _FENCE.findall(text):
        if not opened:
            opened = fence
        elif fence[0] == opened[0] and len(fence) >= len(opened):
            opened = ""
    if opened:
        return "open code fence", f"A code block is opened with {opened} and not closed."
    # Outside of code, whose brackets may stand in strings.
    prose = _INLINE.sub("", re.sub(r"```.*?```|~~~.*?~~~", "", text, flags=re.S))
    if prose.rstrip()[-1:] in tuple(_SURE_END):
        return None
    waiting: list[str] = []
    for one in prose:
        if one in _OPENS:
            waiting.append(_OPENS[one])
        elif waiting and one == waiting[-1]:
            waiting.pop()
    if waiting:
        return "open bracket", f"A bracket is opened and its {waiting[-1]} does not come before the end."
    return None


def ends_sentence(line: str) -> bool:
    """Whether a line ends with a mark that closes a sentence, in any script, or with a picture; quotes aside."""
    line = line.rstrip().rstrip("\ufe0f")
    while line and (line[-1] in "\"'`*_~" or unicodedata.category(line[-1]) in {"Pe", "Pf", "Pi"}):
        line = line[:-1]
    kind = unicodedata.category(line[-1]) if line else ""
    return kind == "So" or (kind == "Po" and line[-1] not in _NO_END)


def _judge_end(text: str, line: int, seen: _Seen, *, told: bool) -> bool:
    """Count a long answer and note it when it lacks an end; whether it does."""
    words = _WORD.findall(text)
    if len(seen.vocabulary) < MAX_VOCABULARY:
        seen.vocabulary.update(words)
    else:
        seen.vocabulary.update(word for word in words if word in seen.vocabulary)
    if len(words) < MIN_WORDS:
        return False
    last_line = text.rstrip().rpartition("\n")[2]
    if ends_sentence(last_line):
        seen.num_long += 1
        seen.num_ended += 1
        return False
    if _FREE_LINE.match(last_line):
        return False
    seen.num_long += 1
    if not told:
        if len(seen.candidates) < MAX_CANDIDATES:
            last = words[-1] if text.rstrip().endswith(words[-1]) else ""
            seen.candidates.append((line, last, _tail(text)))
        else:
            seen.num_candidates_left += 1
    return True


def _missing_ends(seen: _Seen) -> Iterator[Finding]:
    known = sorted(word for word, times in seen.vocabulary.items() if times > 1)
    for line, last, excerpt in seen.candidates:
        place = bisect_right(known, last)
        is_cut = (
            last != "" and seen.vocabulary[last] <= 1 and place < len(known) and known[place].startswith(last)
        )  # fmt: skip
        if is_cut:
            yield Finding(
                line, "cut word", f"Stops in the middle of a word: “{last}”, as in “{known[place]}”.", excerpt
            )
        else:
            yield Finding(line, "no end of sentence", "Stops without an end of sentence.", excerpt)


def _tail(text: str) -> str:
    """The end of an answer, for people."""
    text = text.rstrip()
    return excerpt_of(text if len(text) < EXCERPT_CHARS else f"…{text[-EXCERPT_CHARS + 2 :]}")


PLUGIN = CutOff()

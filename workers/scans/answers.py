"""Answers that teach nothing, or the same again and again.

No library looks for these in prose: each is a count. What is counted as the same answer is word for word, spaces and
case aside, and has at least eight words, because short ones (the labels of a classification) are meant to come often.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from workers.overlap import plain_words
from workers.scans import Finding, Note, Rows, Scan
from workers.scans._texts import answers, digest_of_text
from workers.strict_json import excerpt_of

MIN_ROWS = 5
MIN_SAME_WORDS = 8
MAX_COUNTED = 5_000_000
"""Different answers that are counted, in about 700 MB."""
MIN_TIMES, MIN_SHARE = 4, 0.5
MIN_LOOP_WORDS = 24
MAX_PERIOD = 24
MAX_WORDS = 4000
_EMPTY = re.compile(
    r"[\s.\u2026_*\-\u2013\u2014]*|(?:n\.?/?a\.?|nan|null|undefined|todo|tbd|\[insert .*\]|lorem ipsum.*)\.?",
    re.I | re.S,
)
_SENTENCE = re.compile(r"[^.!?\u3002\uff01\uff1f\n]+")
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.S)


class Answers(Scan):
    """One finding per row and kind."""

    name = "answers"
    label = "Empty and repeated answers"
    help = (
        f"Answers that say nothing (“N/A”, “...”, “TODO”), the same answer of {MIN_SAME_WORDS} words or more in at "
        f"least {MIN_ROWS} rows, and answers in which one sentence or phrase comes over and over."
    )
    example_types = ("chat", "preference", "unpaired")
    order = 50
    num_passes = 2

    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """Counts the answers, and then tells of each row; system turns and questions are not looked at."""
        counts: Counter[int] = Counter()
        first_lines: dict[int, int] = {}
        num_not_counted = 0
        for example in rows:
            # The same answer in several turns of one row is that row's.
            for digest in {digest for digest, _ in _long(answers(example))}:
                if digest in counts or len(counts) < MAX_COUNTED:
                    counts[digest] += 1
                else:
                    num_not_counted += 1
        for example in rows:
            texts = list(answers(example))
            yield from _first_of(example.line, texts)
            for digest, text in _long(texts):
                if counts[digest] >= MIN_ROWS:
                    first = first_lines.setdefault(digest, example.line)
                    message = f"The same answer stands in {counts[digest]:,} rows, the first at line {first:,}."
                    other = first if first != example.line else None
                    yield Finding(example.line, "same answer", message, excerpt_of(text.strip()), other)
                    break
        if num_not_counted:
            yield Note(
                f"The first {MAX_COUNTED:,} different answers were counted; {num_not_counted:,} others were not."
            )


def _first_of(line: int, texts: list[str]) -> Iterator[Finding]:
    for text in texts:
        if _EMPTY.fullmatch(text):
            yield Finding(line, "empty", "The answer says nothing.", excerpt_of(text.strip() or repr(text)))
            break
    for text in texts:
        if again := repeats_itself(text):
            what, times = again
            yield Finding(line, "repeats itself", f"One passage comes {times} times in the answer.", excerpt_of(what))
            break


def _long(texts: Iterator[str] | list[str]) -> Iterator[tuple[int, str]]:
    """(digest, text) of the answers that are long enough to be alike by more than chance."""
    for text in texts:
        words = text.casefold().split()
        if len(words) >= MIN_SAME_WORDS:
            yield digest_of_text(" ".join(words)), text


def repeats_itself(text: str) -> tuple[str, int] | None:
    """What comes over and over in an answer, and how often; None when nothing does. Code in fences is left out."""
    text = _FENCED.sub(" ", text)
    sentences = [" ".join(one.casefold().split()) for one in _SENTENCE.findall(text)]
    sentences = [one for one in sentences if " " in one]
    if len(sentences) >= MIN_TIMES:
        sentence, times = Counter(sentences).most_common(1)[0]
        if times >= MIN_TIMES and times * len(sentence) >= MIN_SHARE * sum(map(len, sentences)):
            return sentence, times
    words = plain_words(text)[:MAX_WORDS]
    if len(words) >= MIN_LOOP_WORDS and len(set(words)) <= MIN_SHARE * len(words):
        return _loop(words)
    return None


def _loop(words: list[str]) -> tuple[str, int] | None:
    """A phrase that comes MIN_TIMES or more in a row and makes up half of the words, the shortest such phrase."""
    for period in range(1, min(MAX_PERIOD, len(words) // MIN_TIMES) + 1):
        run = best = end = 0
        for index in range(period, len(words)):
            run = run + 1 if words[index] == words[index - period] else 0
            if run > best:
                best, end = run, index
        length = best + period
        if length >= MIN_TIMES * period and length >= max(MIN_LOOP_WORDS, MIN_SHARE * len(words)):
            return " ".join(words[end - length + 1 :][:period]), length // period
    return None


PLUGIN = Answers()

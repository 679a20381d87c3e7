"""Rows in another language than the dataset's.

Languages are told by CLD2 (pycld2, Apache 2.0): a naive Bayes classifier of character fours that runs offline, knows 83
languages, says itself when it is not sure, and read 26,000 texts of 600 characters a second where py3langid read 2,300.
Only sure answers count.

A dataset may well have several languages: those of at least one row in ten are its own, and rows in any other are
told of. Code in fences is left out, and so is text too short to tell.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from workers.examples import AnyExample, TextExample
from workers.scans import Finding, Note, Rows, Scan

OWN_SHARE = 0.1
MIN_LETTERS = 40
COUNTED_CHARACTERS = 200
"""In which so many letters must stand."""
MIN_PERCENT = 70
"""Part of the text, in percent, that is in its main language."""
MAX_CHARACTERS = 2000
MAX_TOLD = 8
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+", re.S)
_NO_TEXT = re.compile("[^\\S\n]+|[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufff0-\uffff]+")


def own_languages(counts: Mapping[str, int]) -> list[str]:
    """ISO codes of the languages that a dataset has by the rows of each, the most frequent first."""
    if not counts:
        return []
    import pycld2

    codes = {_name(name): {"iw": "he"}.get(code, code) for name, code in pycld2.LANGUAGES}
    least = OWN_SHARE * sum(counts.values())
    own = sorted((-num, name) for name, num in counts.items() if num >= least and name in codes)
    return [codes[name] for _, name in own]


class Language(Scan):
    """The language of a row is that of all its turns but the system's."""

    name = "language"
    label = "Language"
    help = (
        f"The languages of the rows (CLD2), and the rows in a language that fewer than {OWN_SHARE:.0%} of them have. "
        "Rows too short or too mixed to tell are left out."
    )
    order = 70

    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """Tells every language first, and then each row in a rare one."""
        identify = _identifier()
        names: list[str] = []
        places: dict[str, int] = {}
        lines, languages = array("Q"), array("H")
        num_rows = 0
        for example in rows:
            num_rows += 1
            if language := identify(_text_of(example)):
                if language not in places:
                    places[language] = len(names)
                    names.append(language)
                lines.append(example.line)
                languages.append(places[language])
        if not lines:
            yield Note("No row is long enough to tell its language.")
            return
        counts = Counter(languages)
        found = [(names[place], num) for place, num in counts.most_common()]
        yield Note(_shares(found, len(lines), num_rows), counts=dict(found))
        main = names[counts.most_common(1)[0][0]]
        rare = {place for place, num in counts.items() if num < OWN_SHARE * len(lines)}
        for line, place in zip(lines, languages, strict=True):
            if place in rare:
                yield Finding(line, names[place], f"In {names[place]}; most rows are in {main}.")


def _text_of(example: AnyExample) -> str:
    if isinstance(example, TextExample):
        return example.text
    return "\n".join(message.content for message in example.messages if message.role in {"user", "assistant"})


def _identifier() -> Callable[[str], str]:
    """A function that gives the name of a text's language, or nothing when it is not sure."""
    import pycld2

    def identify(text: str) -> str:
        text = _NO_TEXT.sub(" ", _CODE.sub(" ", text[: 2 * MAX_CHARACTERS]))[:MAX_CHARACTERS]
        if sum(map(str.isalpha, text[:COUNTED_CHARACTERS])) < _least(text):
            return ""
        try:
            is_sure, _, found = pycld2.detect(text, returnVectors=False)
        except pycld2.error:
            return ""
        name, code, percent, _score = found[0]
        return _name(name) if is_sure and code != "un" and percent >= MIN_PERCENT else ""

    return identify


def _least(text: str) -> int:
    """Letters from which a text says its language; a Chinese or Japanese one says as much as some three of others."""
    return MIN_LETTERS // 3 if any("\u3040" <= one <= "\u9fff" or "\uac00" <= one <= "\ud7a3" for one in text[:200]) \
        else MIN_LETTERS  # fmt: skip


def _name(name: str) -> str:
    """CLD2's names are in capitals for some languages and not for others."""
    return " ".join(part.capitalize() for part in re.split(r"[_ ]", name))


def _shares(counts: list[tuple[str, int]], num_told: int, num_rows: int) -> str:
    shown = ", ".join(f"{name} {num / num_told:.1%}" for name, num in counts[:MAX_TOLD])
    more = f" and {len(counts) - MAX_TOLD} more" if len(counts) > MAX_TOLD else ""
    return f"Languages of the {num_told:,} of {num_rows:,} rows that are long enough to tell: {shown}{more}."


PLUGIN = Language()

"""Text that JSON can carry and a database cannot keep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unstorable:
    """Where such text stands, as a dotted path, and what is wrong with it."""

    field: str
    what: str

    def sentence(self) -> str:
        """For people: names the field."""
        return f"{self.field}: The text has {self.what}, which cannot be stored."


def find_unstorable(value: object) -> Unstorable | None:
    """The first string in plain JSON types, or key of an object, that PostgreSQL refuses; None when there is none."""
    waiting: list[tuple[str, object]] = [("", value)]
    # A loop, for what is nested deeply must not end in a fault of its own.
    while waiting:
        path, one = waiting.pop()
        if isinstance(one, dict):
            for key, inner in one.items():
                if isinstance(key, str) and (what := _unstorable(key)):
                    shown = key.encode("ascii", "backslashreplace").decode().replace("\0", "\\x00")
                    return Unstorable(_join(path, shown), what)
                waiting.append((_join(path, str(key)), inner))
        elif isinstance(one, (list, tuple)):
            waiting += [(_join(path, str(index)), inner) for index, inner in enumerate(one)]
        elif isinstance(one, str) and (what := _unstorable(one)):
            return Unstorable(path, what)
    return None


def storable(text: str) -> str:
    """The text with the replacement character in the place of each that PostgreSQL refuses."""
    if not _unstorable(text):
        return text
    return "".join("\ufffd" if one == "\0" or "\ud800" <= one <= "\udfff" else one for one in text)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unstorable(text: str) -> str:
    if "\0" in text:
        return "a NUL character"
    # Half of a pair, as JSON's "\\ud83d" alone; most text is ASCII and costs one look.
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "half of a character (a lone surrogate)"
    return ""

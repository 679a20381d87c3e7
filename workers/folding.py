"""Text as it is compared when somebody searches: upper and lower case are one, in every script."""

from __future__ import annotations

import unicodedata


def fold(text: str) -> str:
    """Text without differences of case (ß is ss), and with composed letters where the text has them in pieces."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def find_folded(text: str, needle: str, *, most: int) -> list[tuple[int, int]]:
    """Where a folded needle stands in a text, as (start, end) without overlaps; the first `most` places."""
    folded = fold(text)
    if not needle or needle not in folded:
        return []
    starts = range(len(text) + 1) if text.isascii() else _origins(text)
    found: list[tuple[int, int]] = []
    place = folded.find(needle)
    while place >= 0 and len(found) < most:
        end = place + len(needle)
        if end >= len(starts):
            break
        found.append((starts[place], max(starts[end], starts[end - 1] + 1)))
        place = folded.find(needle, end)
    return found


def _origins(text: str) -> list[int]:
    """For each character of the folded text, and its end, the place in the text that it came from."""
    origins: list[int] = []
    place = 0
    while place < len(text):
        end = place + 1
        while end < len(text) and unicodedata.combining(text[end]):
            end += 1
        origins += [place] * len(fold(text[place:end]))
        place = end
    return [*origins, len(text)]

"""Characters that nobody sees, and that change what is seen: written out for people in pages, and for logs."""

from __future__ import annotations

import logging
import re
import unicodedata
from types import TracebackType

# Control, direction and zero-width characters, fillers and tags; line breaks and tabs stay. Variation selectors stay,
# too: they only choose how the character before them is drawn.
_HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f"
)
# Joiners are spelling between letters of scripts that join, and build emoji; anywhere else they only hide.
_SCRIPTS = "\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u17ff"
_EMOJI = "\u2190-\u2bff\ufe0f\U0001f000-\U0001faff"
_JOINERS = (
    f"(?<![{_SCRIPTS}{_EMOJI}])[\u200c\u200d]|[\u200c\u200d](?![{_SCRIPTS}{_EMOJI}])|(?<=[{_EMOJI}])\u200c"
    f"|(?<=[{_SCRIPTS}])[\u200c\u200d](?![{_SCRIPTS}])|(?<=[{_EMOJI}])\u200d(?![{_EMOJI}])"
)
_IN_PAGES = re.compile(f"[{_HIDDEN}]|{_JOINERS}")
# One line of a log is one entry, so that nobody's text can look like another.
_IN_LOGS = re.compile(f"[\n{_HIDDEN}]|{_JOINERS}")


def visible(text: str) -> str:
    """Text whose hidden characters are written out: an escape as ␛, a right-to-left override as [U+202E ...]."""
    return _IN_PAGES.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return f"[U+{code:04X}{' ' + unicodedata.name(found[0], '') if code >= 0xA0 else ''}]".replace(" ]", "]")


def log_safe(text: str) -> str:
    r"""Text as one line without hidden characters: a line break as \n, an escape as \x1b."""
    return _IN_LOGS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class LineFormatter(logging.Formatter):
    """A log entry as one line, whatever text came with it; the lines of a traceback below it are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name, as the next two
        """The entry's own line."""
        return log_safe(super().formatMessage(record))

    def formatException(  # noqa: N802
        self, ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
    ) -> str:
        """The traceback. An error's text may hold lines of somebody else's: none begins as an entry does."""
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """The lines of a stack that was asked for."""
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    # Not splitlines(), which also breaks at characters that are to be written out.
    return "\n".join(f"    {log_safe(line)}" for line in text.split("\n"))

"""Keys, tokens and passwords that stand in rows.

The forms are those of detect-secrets (Yelp, Apache 2.0), the field's most used library that runs offline, plus those
newer ones that every inspection looks for (workers/quality.py). Its detectors by form are used; its guesses by entropy
and by the word "password" are not: in prose they are wrong far more often than right. Nothing is ever tried out over
the network, as the library can.

Most rows hold nothing. One pass of RE2 over a text, linear in its length, says which detectors could find something
in it, and only these look closely.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from workers.quality import SECRET_PIECES, SECRETS
from workers.scans import Finding, Note, Rows, Scan
from workers.scans._texts import masked, texts

if TYPE_CHECKING:
    from detect_secrets.plugins.base import RegexBasedDetector

_NO_SECRETS = frozenset({"IPPublicDetector"})
_WIDE = frozenset({"IbmCloudIamDetector", "IbmCosHmacDetector"})
"""A "key" that is followed by so many characters: whatever another detector knows by name is that instead."""
_WITHOUT_DIGITS = frozenset({"PrivateKeyDetector", "BasicAuthDetector"})
"""What else has no digit is a word: "APPROXIMATELY" has the form of an Artifactory token."""
_LOOKAROUND = re.compile(r"\(\?<?[=!][^()]*\)")
_MANY_TIMES = re.compile(r"\{(\d+),\d{4,}\}")
AUTOMATON_BYTES = 64 * 1024**2
_NAMES = {"Basic Auth Credentials": "password in a URL", "Private Key": "private key"}


class Secrets(Scan):
    """One finding per row and kind of secret."""

    name = "secrets"
    label = "Secrets"
    help = (
        "Keys, tokens and passwords by their form (detect-secrets' detectors, and newer forms). They are shown masked. "
        "What is learned can be got out of a model again: remove them, and revoke those that are valid."
    )
    order = 30

    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """The first secret of each kind in each row, masked, and how many of that kind it holds."""
        look = _looker()
        for example in rows:
            found: dict[str, dict[str, str]] = {}
            for where, text in texts(example):
                for kind, secret in look(text):
                    found.setdefault(kind, {}).setdefault(secret, where)
            for kind, secrets in found.items():
                secret, where = next(iter(secrets.items()))
                more = f", and {len(secrets) - 1} more" if len(secrets) > 1 else ""
                yield Finding(
                    example.line, kind, f"What looks like a secret ({kind}) in {where}{more}.", masked(secret)
                )


def _looker() -> Callable[[str], Iterator[tuple[str, str]]]:
    """A function that gives (kind, secret) of what stands in a text."""
    import re2
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    options = re2.Options()
    options.max_mem = AUTOMATON_BYTES
    first_look = re2.Set.SearchSet(options)
    detectors: list[RegexBasedDetector] = []
    of_pattern: list[int] = []
    always: set[int] = set()
    known: Collection[Any] = get_mapping_from_secret_type_to_class().values()
    for detector in sorted(known, key=lambda one: one.__name__ in _WIDE):
        if not issubclass(detector, RegexBasedDetector) or detector.__name__ in _NO_SECRETS:
            continue
        detectors.append(detector())
        for pattern in detectors[-1].denylist:
            source = _for_re2(pattern.pattern)
            try:
                first_look.Add(f"(?i){source}" if pattern.flags & re.IGNORECASE else source)
            except re2.error:
                # One of a later version: it looks at every text itself.
                always.add(len(detectors) - 1)
            else:
                of_pattern.append(len(detectors) - 1)
    first_look.Compile()

    def look(text: str) -> Iterator[tuple[str, str]]:
        # A lone surrogate is no text that RE2 could read.
        hits = first_look.Match(text.encode("utf-8", "replace")) or ()
        told: list[str] = []
        for index in sorted({*always, *(of_pattern[hit] for hit in hits)}):
            for kind, secret in _by(detectors[index], text):
                if not _is_among(secret, told):
                    told.append(secret)
                    yield kind, secret
        if any(piece in text for piece in SECRET_PIECES):
            for found in SECRETS.finditer(text):
                if not _is_among(found[0], told):
                    yield (found.lastgroup or "secret").replace("_", " "), found[0]

    return look


def _is_among(secret: str, others: list[str]) -> bool:
    """Whether it was found already, in another length perhaps."""
    return any(secret in other or other in secret for other in others)


def _for_re2(pattern: str) -> str:
    """A pattern that RE2 can read and that finds at least as much: without lookaround and repetitions beyond 1,000."""
    return _MANY_TIMES.sub(r"{\1,}", _LOOKAROUND.sub("", pattern))


def _by(detector: Any, text: str) -> Iterator[tuple[str, str]]:
    kind = _NAMES.get(detector.secret_type, detector.secret_type)
    needs_digit = type(detector).__name__ not in _WITHOUT_DIGITS
    for line in text.splitlines():
        for secret in detector.analyze_string(line):
            if secret and not (needs_digit and not any(one.isdigit() for one in secret)):
                yield kind, secret


PLUGIN = Secrets()

"""Data of persons that has a form which can be checked: addresses, and numbers with check digits or numbering plans.

Each is found by its form and then tested by a validator of the field, because a form alone is met by any long number:
phone numbers by phonenumbers (Google's libphonenumber), IBANs by python-stdnum (lengths and formats of each country,
ISO 7064 check digits), card numbers by its Luhn check and the issuers' prefixes, US social security numbers by its
table of what was issued. Names and postal addresses have no such form: finding them takes a trained model of each
language, and is not attempted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from workers.examples import AnyExample
from workers.quality import EMAIL
from workers.scans import Finding, Note, Rows, Scan
from workers.scans._texts import masked, texts

_RESERVED = re.compile(r"@(?:.*\.)?(?:example\.(?:com|org|net)|[^.]+\.(?:test|example|invalid|localhost))$", re.I)
"""Addresses that are nobody's (RFC 2606)."""
_DIGITS = re.compile(r"\d[\d ().\-/]{5,}\d")
"""Without so many digits in a row a text is not looked at for numbers."""
_ABROAD = re.compile(r"(?<![\w+])\+\d[\d ().\-/]{6,20}\d")
_AMERICAN = re.compile(r"(?<![\w.+\-])(?:\(\d{3}\) ?|\d{3}[ .\-])\d{3}[ .\-]\d{4}(?![\w\-]|\.\d)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\w.\-])\d(?:[ -]?\d){12,18}(?![\w\-]|\.\d)")
# Visa, Mastercard, American Express, Discover, Diners Club and JCB: prefix and length (ISO/IEC 7812).
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}"
)
_SSN = re.compile(r"(?<![\w\-])\d{3}-\d{2}-\d{4}(?![\w\-])")


class PersonalData(Scan):
    """One finding per row and kind of data."""

    name = "personal_data"
    label = "Personal data"
    help = (
        "E-mail addresses, phone numbers (international, and North American as they are written), IBANs, payment cards "
        "and US social security numbers, each checked by a validator and shown masked. Names and postal addresses are "
        "not looked for."
    )
    order = 40

    def find(self, rows: Rows) -> Iterator[Finding | Note]:
        """The first of each kind in each row, masked, and how many of that kind it holds."""
        kinds = _kinds()
        for example in rows:
            for kind, found in _in_row(example, kinds):
                first, where = next(iter(found.items()))
                more = f", and {len(found) - 1} more" if len(found) > 1 else ""
                article = "An" if kind[0] in "eI" else "A"
                yield Finding(example.line, kind, f"{article} {kind} in {where}{more}.", _shown(kind, first))


Kinds = dict[str, Callable[[str], Iterator[str]]]


def _in_row(example: AnyExample, kinds: Kinds) -> Iterator[tuple[str, dict[str, str]]]:
    found: dict[str, dict[str, str]] = {}
    for where, text in texts(example):
        if "@" in text:
            for address in EMAIL.findall(text):
                if not _RESERVED.search(address):
                    found.setdefault("e-mail address", {}).setdefault(address, where)
        if _DIGITS.search(text):
            for kind, look in kinds.items():
                for value in look(text):
                    found.setdefault(kind, {}).setdefault(value, where)
    yield from found.items()


def _kinds() -> Kinds:
    import phonenumbers
    from stdnum import iban, luhn
    from stdnum.us import ssn

    def phones(text: str) -> Iterator[str]:
        for region, pattern in ((None, _ABROAD), ("US", _AMERICAN)):
            for match in pattern.finditer(text):
                try:
                    number = phonenumbers.parse(match[0], region)
                except phonenumbers.NumberParseException:
                    continue
                if phonenumbers.is_valid_number(number):
                    yield match[0]

    def ibans(text: str) -> Iterator[str]:
        for match in _IBAN.finditer(text):
            # The words after a number may look like its end.
            pieces = match[0].split(" ")
            for num in range(len(pieces), 0, -1):
                if iban.is_valid("".join(pieces[:num])):
                    yield " ".join(pieces[:num])
                    break

    def cards(text: str) -> Iterator[str]:
        for match in _CARD.finditer(text):
            digits = re.sub(r"\D", "", match[0])
            if _ISSUERS.fullmatch(digits) and luhn.is_valid(digits):
                yield match[0]

    def social_security_numbers(text: str) -> Iterator[str]:
        yield from (match[0] for match in _SSN.finditer(text) if ssn.is_valid(match[0]))

    return {
        "phone number": phones,
        "IBAN": ibans,
        "payment card": cards,
        "social security number": social_security_numbers,
    }


def _shown(kind: str, value: str) -> str:
    if kind == "e-mail address":
        name, _, domain = value.partition("@")
        return f"{name[:1]}…@{domain}"
    return masked(value)


PLUGIN = PersonalData()

"""Personal data at planted lines, numbers that only look like it, and that it is masked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.workers.scans.planting import clean_rows, found, scan

DATA = {
    "e-mail address": ["maria.huber@firma-huber.at", "j.doe+list@mail.university.edu"],
    "phone number": ["+49 30 901820", "+43 (1) 58801-0", "+44 20 7946 0958", "(415) 555-2671", "212-736-5000"],
    "IBAN": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR14 2004 1010 0505 0001 3M02 606"],
    "payment card": ["4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005"],
    "social security number": ["536-90-4399"],
}
CASES = [(kind, value) for kind, values in DATA.items() for value in values]


@pytest.mark.parametrize(("kind", "value"), CASES)
def test_it_finds_what_is_planted_and_masks_it(kind: str, value: str, tmp_path: Path) -> None:
    rows = clean_rows(60)
    rows[8]["prompt"] += f" Write to {value} please."
    rows[59]["completion"] += f" (It is {value}.)"
    events = scan("personal_data", rows, tmp_path)
    assert [(one["finding"]["line"], one["finding"]["kind"]) for one in events[:-1]] == [(9, kind), (60, kind)]
    assert value not in json.dumps(events)


@pytest.mark.parametrize(
    "text",
    [
        "Write to someone@example.com or to root@printer.test.",
        "In 2023-10-12 14:30 there were 1234567890123456 of them.",
        "The number 4111 1111 1111 1112 fails its check.",
        "DE89 3704 0044 0532 0130 01 has wrong check digits.",
        "Pi is 3.14159265358979323846, and 0.4111111111111111 is no card.",
        "Call 123-456-7890 or 000-00-0000 or 987-65-4320.",
        "The part +1 2 or 555 is short; 10.1234/5678-9012 is a paper; ISBN 978-3-16-148410-0.",
        "Add +100 000 000 000 000 to it.",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str, tmp_path: Path) -> None:
    rows = clean_rows(12)
    rows[4]["completion"] = f"{text} {rows[4]['completion']}"
    assert found("personal_data", rows, tmp_path) == {}

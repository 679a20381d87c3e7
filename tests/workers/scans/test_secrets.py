"""Secrets at planted lines, and that they stand nowhere in what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.workers.scans.planting import clean_rows, found, scan

# Put together here, so that no scanner of this repository takes them for real ones.
_LETTERS = "Ab3Cd4Ef5Gh6Ij7Kl8Mn9Op0Qr1St2Uv3Wx4Yz5Ab6Cd7Ef8"
SECRETS = {
    "AWS Access Key": "AKIA" + "IOSFODNN7ABCDEFG",
    "GitHub token": "ghp_" + _LETTERS[:36],
    "Hugging Face token": "hf_" + _LETTERS[:34],
    "Google key": "AIza" + _LETTERS[:35],
    "Slack Token": "xoxb-" + "123456789012-1234567890123-abcdef012345",
    "Stripe Access Key": "sk_live_" + _LETTERS[:24],
    "API key": "sk-proj-" + _LETTERS[:40],
    "JSON Web Token": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "c2lnbmF0dXJl" * 3,
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "password in a URL": "postgres://admin:" + "tr0ub4dor" + "@db.internal/main",
}  # fmt: skip


@pytest.mark.parametrize("kind", SECRETS)
def test_it_finds_the_planted_secret_and_tells_it_to_nobody(kind: str, tmp_path: Path) -> None:
    rows = clean_rows(60)
    rows[6]["prompt"] += f" Use {SECRETS[kind]} for it."
    rows[41]["completion"] += f'\nKEY = "{SECRETS[kind]}"\n'
    events = scan("secrets", rows, tmp_path)
    told = [(one["finding"]["line"], one["finding"]["kind"]) for one in events[:-1]]
    assert told == [(7, kind), (42, kind)]
    if kind != "private key":  # its heading says nothing; the key is never in what is told
        secret = "tr0ub4dor" if "URL" in kind else SECRETS[kind]
        for part in range(len(secret) - 5):
            assert secret[part : part + 6] not in json.dumps(events)


def test_a_row_with_several_of_a_kind_is_one_finding(tmp_path: Path) -> None:
    rows = clean_rows(20)
    second = SECRETS["AWS Access Key"][:-1] + "Z"
    rows[2]["completion"] += f" {SECRETS['AWS Access Key']} and {second}."
    finding = next(
        one["finding"] for one in scan("secrets", rows, tmp_path)[:-1] if one["finding"]["kind"] == "AWS Access Key"
    )
    assert (finding["line"], finding["message"]) == (
        3, "What looks like a secret (AWS Access Key) in turn 2 (assistant), and 1 more."
    )  # fmt: skip


def test_rows_are_counted_once_however_much_is_found_in_them(tmp_path: Path) -> None:
    rows = clean_rows(20)
    rows[2]["completion"] += f" {SECRETS['AWS Access Key']} and {SECRETS['GitHub token']}."
    rows[9]["completion"] += f" {SECRETS['GitHub token']}"
    *_, done = scan("secrets", rows, tmp_path)
    assert (done["num_findings"], done["num_rows"]) == (3, 2)


def test_words_addresses_and_code_are_no_secrets(tmp_path: Path) -> None:
    rows = clean_rows(12)
    rows[1]["completion"] += " APPROXIMATELY and APARTHEIDISM are words in capitals."
    rows[2]["completion"] += " See https://docs.example.org/a:b?c=d@e for the key of the chapter."
    rows[3]["completion"] += " The password is asked for; the token is a word."
    rows[4]["completion"] += " sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 of the file."
    rows[5]["completion"] += " The server stands at 192.168.10.4, and 8.8.8.8 answers."
    assert found("secrets", rows, tmp_path) == {}

"""Hidden characters of other people's text: written out in pages, and harmless in logs."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
from django.conf import settings
from django.template import Context, Template

from studio.hidden_characters import LineFormatter, log_safe, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"),
        ("a\r\nb", "a␍\nb"),
        ("a\x00b", "a␀b"),
        ("abc\u202etxt.exe", "abc[U+202E RIGHT-TO-LEFT OVERRIDE]txt.exe"),
        ("pass\u200bword", "pass[U+200B ZERO WIDTH SPACE]word"),
        ("a\u2066b\u2069", "a[U+2066 LEFT-TO-RIGHT ISOLATE]b[U+2069 POP DIRECTIONAL ISOLATE]"),
        ("so\xadft", "so[U+00AD SOFT HYPHEN]ft"),
        ("x\U000e0041", "x[U+E0041 TAG LATIN CAPITAL LETTER A]"),
        ("\x7f\x85", "[U+007F][U+0085]"),
        ("a\u2028b", "a[U+2028 LINE SEPARATOR]b"),
        ("\u3164", "[U+3164 HANGUL FILLER]"),
        ("user\u200dname a\u200cb", "user[U+200D ZERO WIDTH JOINER]name a[U+200C ZERO WIDTH NON-JOINER]b"),
        ("می\u200cروم 👩\u200d👧 🏳️\u200d🌈 क्\u200dष", "می\u200cروم 👩\u200d👧 🏳️\u200d🌈 क्\u200dष"),
        ("👩\u200cx می\u200cx", "👩[U+200C ZERO WIDTH NON-JOINER]x می[U+200C ZERO WIDTH NON-JOINER]x"),
        ("ordinary\ttext\nÄ 你 ❤️ é", "ordinary\ttext\nÄ 你 ❤️ é"),
    ],
)
def test_hidden_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_every_template_has_the_filter_and_escapes_what_it_gives() -> None:
    page = Template("{{ text|visible }}|{{ nothing|visible }}|{{ number|visible }}")
    shown = page.render(Context({"text": "<b>\u202e", "nothing": None, "number": 7}))
    assert shown == "&lt;b&gt;[U+202E RIGHT-TO-LEFT OVERRIDE]||7"


def logged(*arguments: object, **more: object) -> str:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LineFormatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.Logger("studio.test")
    logger.addHandler(handler)
    logger.warning(*arguments, **more)  # type: ignore[arg-type]
    return written.getvalue()


def test_nobodys_text_makes_a_second_log_entry_or_steers_a_terminal() -> None:
    text = "rows.jsonl\r\n2026-01-01 INFO studio.accounts: alice signed in\x1b[2K\u202e"
    line = logged("Upload of %s was refused.", text)
    assert line.count("\n") == 1
    assert line == (
        "WARNING studio.test: Upload of rows.jsonl\\r\\n2026-01-01 INFO studio.accounts: alice signed in"
        "\\x1b[2K\\u202e was refused.\n"
    )
    assert log_safe("é 你\t") == "é 你\t"


def test_a_traceback_stays_readable_and_none_of_its_lines_begins_as_an_entry_does() -> None:
    try:
        raise ValueError("bad\nERROR studio.jobs: all jobs deleted\x1b[31m")
    except ValueError:
        written = logged("It failed.", exc_info=True, stack_info=True)
    first, *rest = written.splitlines()
    assert first == "WARNING studio.test: It failed."
    assert all(line.startswith("    ") for line in rest)
    assert "    ERROR studio.jobs: all jobs deleted\\x1b[31m" in rest


def test_every_process_logs_in_that_form() -> None:
    # As the web process and the workers do: Django sets logging up, and nothing replaces it afterwards.
    said = subprocess.run(
        [sys.executable, "-c",
         "import django, logging; django.setup(); "
         "logging.getLogger('uvicorn.error').warning('a\\nb'); logging.getLogger('celery.worker').warning('c\\x1bd')"],
        cwd=settings.ROOT, env={"DJANGO_SETTINGS_MODULE": "studio.settings", "STUDIO_SECRET_KEY": "x" * 60, "PATH": ""},
        capture_output=True, text=True, check=True,
    ).stderr.splitlines()  # fmt: skip
    assert [line.rpartition(": ")[2] for line in said] == ["a\\nb", "c\\x1bd"]

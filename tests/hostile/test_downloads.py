"""Rows 23 and 31: no cell of a table is a formula, and no file name leaves its header or its folder."""

from __future__ import annotations

import csv
import io
import re
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from django.conf import settings
from django.test import Client
from django.urls import reverse

from studio.accounts.models import Team, User
from studio.csv_tables import csv_line
from studio.datasets.scanning import scan_next
from tests.factories import make_adapter, make_job_for
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from workers.csv_cells import guard_cell
from workers.scans import scans

pytestmark = pytest.mark.django_db

FORMULAS = [
    '=HYPERLINK("http://zqzq.test","x")',
    "+1+1",
    "-1+cmd|' /C calc'!A0",
    "@SUM(1)",
    "\t=1+1",
    "\r=1+1",
    " =1",
    "\uff1d1",
]


def table(answer: Any) -> list[list[str]]:
    assert answer.status_code == 200
    assert answer["Content-Type"] == "text/csv; charset=utf-8"
    assert answer["Content-Disposition"].startswith("attachment")
    return list(csv.reader(io.StringIO(b"".join(answer.streaming_content).decode(), newline="")))


def begins_a_formula(cell: str) -> bool:
    """As a spreadsheet sees it, which reads numbers as numbers."""
    if re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", cell):
        return False
    return cell.lstrip(" \n\xa0")[:1] in {"=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20"}


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_cell_that_begins_like_a_formula_is_text(formula: str) -> None:
    assert guard_cell(formula) == f"'{formula}"
    assert next(csv.reader(io.StringIO(csv_line([formula, 1]), newline=""))) == [f"'{formula}", "1"]


def test_figures_stay_figures_and_other_text_stays_as_it_is() -> None:
    assert csv_line([-0.5, 3, None, "a-b", "x=1", ["one", "two"]]) == "-0.5,3,,a-b,x=1,one two\r\n"


def test_a_datasets_tables_prefix_formulas_and_its_file_keeps_them(upload: Upload, bob_client: Client) -> None:
    rows = [{"prompt": f"{text} Ä {n}", "completion": text} for n in range(2) for text in FORMULAS]
    content = jsonl([*rows, *rows, *good_rows(), *({"prompt": text} for text in FORMULAS)]) + b"=broken()\n"
    version = upload(content, "=cmd.jsonl")
    assert version.path().read_bytes() == content, "what is stored is what was sent"
    for _ in range(len(scans()) + 1):
        scan_next(version.pk)
    base = version.get_absolute_url()
    tables = ["problems.csv", *(f"scans/{name}.csv" for name in scans())]
    cells = [cell for one in tables for row in table(bob_client.get(base + one)) for cell in row]
    assert [cell for cell in cells if begins_a_formula(cell)] == []
    assert sum("HYPERLINK" in cell for cell in cells) >= 3, "they were there"
    stored: Any = bob_client.get(f"{base}file/")
    assert b"".join(stored.streaming_content) == content
    exported: Any = bob_client.get(f"{base}export/?kind=jsonl")
    assert exported["Content-Type"] == "application/zip", "rows for programs: these read no formulas"


def test_the_tables_of_adapters_and_jobs_prefix_formulas(
    team: Team, alice: User, alice_client: Client, data_dir: Path
) -> None:
    one = make_adapter(team, alice, name=FORMULAS[0])
    other = make_adapter(team, alice, name=FORMULAS[3], settings={"rank": 8})
    one.tags = ["@x"]
    one.save()
    jobs = [make_job_for(adapter, asked_recipe=adapter.recipe | {"name": FORMULAS[2]}) for adapter in (one, other)]
    urls = [
        "/models/export.csv", f"/models/compare/?runs={one.pk},{other.pk}&as=csv",
        f"{reverse('jobs:diff')}?a={jobs[0].pk}&b={jobs[1].pk}&format=csv&all=1",
    ]  # fmt: skip
    for url in urls:
        cells = [cell for row in table(alice_client.get(url)) for cell in row]
        assert [cell for cell in cells if begins_a_formula(cell)] == [], url
        assert any("HYPERLINK" in cell for cell in cells), url


def test_every_table_is_written_in_the_one_place_that_guards_cells() -> None:
    writers = {
        path.relative_to(settings.ROOT).as_posix(): path.read_text()
        for folder in ("studio", "jobs", "workers")
        for path in (settings.ROOT / folder).rglob("*.py")
        if re.search(r"csv\.(writer|DictWriter)|text/csv", path.read_text())
    }
    # The rows of a split are written by a worker's child, which knows no Django; split_files.py sends what it wrote.
    child = "workers/splits/exporting.py"
    assert sorted(writers) == ["studio/csv_tables.py", "studio/datasets/split_files.py", child]
    assert all("guard_cell(" in writers[name] for name in ("studio/csv_tables.py", child))
    assert "csv.writer" not in writers["studio/datasets/split_files.py"]


NAMES = [
    "../../etc/passwd", "a\r\nSet-Cookie: x=1; .jsonl", "n" * 4000 + ".jsonl", "CON.jsonl", "🦜 ümlaut.jsonl",
    'quote".jsonl', "C:\\Users\\me\\x.jsonl", "rows.jsonl\x00.exe", "x;filename=evil.html", "\u202egpj.jsonl", "..", "",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_stored_by_its_digest_and_comes_back_with_a_clean_name_in_its_header(
    upload: Upload, bob_client: Client, data_dir: Path, name: str
) -> None:
    version = upload(jsonl(good_rows()), name, inspect=False)
    files = [path for path in data_dir.rglob("*") if path.is_file()]
    assert files == [data_dir / "blobs" / version.sha256[:2] / version.sha256]
    shown = version.file_name
    assert 0 < len(shown) <= 120
    assert not set(shown) & set("/\\\r\n\x00\u202e")
    assert not re.match(r"(?i)(con|prn|aux|nul)(\.|$)", shown)
    answer = bob_client.get(f"{version.get_absolute_url()}file/")
    assert set(answer.headers) & {"Set-Cookie", "set-cookie"} == set()
    # As RFC 6266 has it: read by a parser that knows nothing of ours.
    header = answer["Content-Disposition"]
    assert "\r" not in header
    assert "\n" not in header
    parsed = Message()
    parsed["Content-Disposition"] = header
    assert parsed.get_content_disposition() == "attachment"
    found = re.fullmatch(r"attachment; filename\*=utf-8''(\S+)", header)
    assert (unquote(found[1]) if found else parsed.get_filename()) == shown
    assert shown in bob_client.get(f"{version.get_absolute_url()}versions/").content.decode() or '"' in shown
    archive = bob_client.get(f"{version.get_absolute_url()}export/")
    assert archive.status_code in {200, 302}

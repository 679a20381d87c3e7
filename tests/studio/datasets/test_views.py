"""Dataset pages: who sees what, and that what people upload is shown as text."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from asgiref.sync import sync_to_async
from django.db import connections
from django.test import AsyncClient, Client
from django.utils import timezone

from jobs.models import Job
from studio import streaming
from studio.accounts.models import Membership, Role, Team, User
from studio.catalogue.models import Adapter, BaseModel
from studio.datasets.models import Dataset, DatasetVersion
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from tests.tiny import make_tiny_base
from workers.csv_cells import guard_cell

TABS = ("", "learned/", "statistics/", "problems/", "versions/", "used-by/", "inspection/", "file/", "problems.csv")
HOSTILE = ["<script>alert(1)</script>", "{{7*7}}", '<div hx-get="/x" hx-trigger="load">', "\x1b[31m", "a\u202eb"]


JOB_NAMES = [f"job-{number}" for number in reversed(range(60))]
"""The newest first."""


def make_users_of(version: DatasetVersion, num: int) -> None:
    """Jobs and adapters that use a version."""
    team, user = version.dataset.team, version.created_by
    base = BaseModel.objects.create(name="tiny", folder="/nowhere", revision="r" * 64)
    used = {"team": team, "base_model": base, "dataset_version": version, "created_by": user, "recipe": {"large": 1}}
    for number in range(num):
        Adapter.objects.create(name=f"adapter-{number}", method="lora", folder=f"1/{number}", **used)
        Job.objects.create(
            name=f"job-{number}", asked_recipe={}, not_before=timezone.now(), idempotency_key=str(number), **used
        )


def page(version: DatasetVersion, tab: str = "") -> str:
    return f"{version.get_absolute_url()}{tab}"


@pytest.mark.parametrize("tab", [*TABS, "mapping/"])
def test_a_team_sees_its_dataset_and_another_team_gets_404(
    upload: Upload, bob_client: Client, charlie_client: Client, tab: str
) -> None:
    version = upload(jsonl([{"alpha": "a", "beta": "b"}] * 12) if tab == "mapping/" else jsonl(good_rows()))
    assert bob_client.get(page(version, tab)).status_code == 200
    assert charlie_client.get(page(version, tab)).status_code == 404
    assert Client().get(page(version, tab)).status_code == 302


def test_the_list_shows_the_teams_datasets_only(
    upload: Upload, bob_client: Client, charlie_client: Client, django_assert_max_num_queries: object
) -> None:
    for number in range(3):
        upload(jsonl(good_rows(10 + number)), f"faq{number}.jsonl", inspect=False)
    with django_assert_max_num_queries(8):  # type: ignore[operator]
        shown = bob_client.get("/datasets/").content.decode()
    assert all(f"faq{number}" in shown for number in range(3))
    empty = charlie_client.get("/datasets/").content.decode()
    assert "faq0" not in empty
    assert "No datasets yet" in empty


def test_the_header_counts_usable_rows_and_rows_set_aside(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl([*good_rows(15), {"prompt": "no answer"}]))
    shown = bob_client.get(page(version)).content.decode()
    assert "15 of 16 rows usable" in shown
    assert "1 set aside" in shown


def test_a_viewer_may_not_upload_map_or_delete(upload: Upload, team: Team, bob_client: Client) -> None:
    version = upload(jsonl(good_rows()))
    Membership.objects.filter(user__username="bob").update(role=Role.VIEWER)
    assert bob_client.get("/datasets/upload/").status_code == 403
    assert bob_client.post(page(version, "mapping/")).status_code == 403
    assert bob_client.post(f"/datasets/{version.dataset_id}/delete/").status_code == 403
    assert Dataset.objects.filter(pk=version.dataset_id).exists()


def test_hostile_rows_are_shown_as_text(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl([{"prompt": text, "completion": text} for text in HOSTILE] + good_rows()))
    shown = bob_client.get(page(version)).content.decode()
    assert "<script>alert" not in shown
    assert "&lt;script&gt;alert(1)" in shown
    assert "{{7*7}}" in shown
    assert '<div hx-get="/x"' not in shown
    # Hidden characters are written out, and htmx leaves what others wrote alone.
    assert "\x1b" not in shown
    assert "␛[31m" in shown
    assert "a[U+202E RIGHT-TO-LEFT OVERRIDE]b" in shown
    assert "hx-ignore" in shown


def test_hostile_problems_are_shown_as_text(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl([*good_rows(), *({"prompt": text} for text in HOSTILE), {'<img src=x onerror="x">': "1"}]))
    shown = bob_client.get(page(version, "problems/")).content.decode()
    assert "<script>alert" not in shown
    assert "<img src=x" not in shown
    assert version.num_quarantined == len(HOSTILE) + 1


def test_problems_are_filtered_by_rule_and_downloaded_without_formulas(upload: Upload, bob_client: Client) -> None:
    content = jsonl(good_rows()) + b"=HYPERLINK(1)\n" + jsonl([{"prompt": "x"}])
    version = upload(content)
    only = bob_client.get(page(version, "problems/?rule=F002")).content.decode()
    assert "Line 13" in only
    assert "Line 14" not in only
    lines = b"".join(bob_client.get(page(version, "problems.csv")).streaming_content).decode().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3
    assert "'=HYPERLINK(1)" in lines[1]


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@x", "\tx", " =1"])
def test_no_cell_is_a_formula(cell: str) -> None:
    assert guard_cell(cell) == f"'{cell}"


def test_the_statistics_are_drawings_with_their_figures_in_tables_beside_them(
    upload: Upload, bob_client: Client, tmp_path: Path
) -> None:
    BaseModel.objects.create(name="tiny", folder=str(make_tiny_base(tmp_path / "base")), revision="r" * 64)
    ask, tell = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 150}
    long = {"role": "assistant", "content": "1 2 " * 300}
    rows = [[{"role": "system", "content": f"s{n}"}, ask, tell] for n in range(12)] + [[ask, long, ask, tell]] * 4
    version = upload(jsonl([{"messages": turns} for turns in rows]))
    shown = bob_client.get(page(version, "statistics/")).content.decode()
    assert "Tokens with tiny" in shown
    assert shown.count('<svg class="text-primary') == 5
    rows_shown = re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL)
    # Some bars' names are links to the rows that they count.
    cells = [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows_shown]
    assert ["512 tokens", "4", "25 %"] in cells
    assert ["1,024 tokens", "4", "25 %"] in cells
    assert ["2,048 tokens", "0", "0 %"] in cells
    for mark in (512, 1024):
        assert re.search(rf"<line [^>]*><title>{mark}</title>", shown), mark
    assert ["3", "12", "75 %"] in cells, "turns"
    assert [cell for cell in cells if cell[:1] in (["User"], ["Assistant"], ["System"])] == [
        ["Assistant", "20", "38 %"], ["User", "20", "38 %"], ["System", "12", "23 %"],
    ]  # fmt: skip
    assert ["0 to 200", "16", "80 %"] in cells, "answers"
    assert ["1,001 to 1,500", "4", "20 %"] in cells


def test_a_version_that_was_read_before_roles_were_counted_shows_what_it_has(
    upload: Upload, bob_client: Client
) -> None:
    version = upload(jsonl(good_rows()))
    for newer in ("roles", "answers"):
        del version.statistics[newer]
    version.save(update_fields=["statistics"])
    answer = bob_client.get(page(version, "statistics/"))
    assert answer.status_code == 200
    assert "Turns per row" in answer.content.decode()
    assert "Roles</h2>" not in answer.content.decode()


def test_the_inspection_polls_until_it_is_over(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl(good_rows()), inspect=False)
    running = bob_client.get(page(version, "inspection/"))
    assert 'hx-trigger="every 1s"' in running.content.decode()
    assert 'id="inspection"' in bob_client.get(page(version)).content.decode()
    DatasetVersion.objects.update(state="unreadable", error="broken")
    over = bob_client.get(page(version, "inspection/"))
    assert "hx-trigger" not in over.content.decode()
    assert over["HX-Redirect"] == version.get_absolute_url()


def test_a_mapping_is_shown_on_rows_and_then_used(upload: Upload, bob_client: Client, no_broker: list[int]) -> None:
    version = upload(jsonl([{"alpha": f"ask {n}", "beta": f"tell {n}", "gamma": "g"} for n in range(12)]))
    assert version.state == "needs_mapping"
    url = page(version, "mapping/")
    assert version.columns == {"prompt": "alpha", "completion": "gamma"}
    assert '<option value="gamma" selected>' in bob_client.get(url).content.decode()
    swapped = {"prompt": "beta", "completion": "alpha", "action": "show"}
    fragment = bob_client.post(url, swapped, HTTP_HX_REQUEST="true").content.decode()
    assert fragment.lstrip().startswith('<section id="mapped-rows"')
    assert "tell 4" in fragment
    assert "<html" in bob_client.post(url, swapped).content.decode()
    version.refresh_from_db()
    assert version.state == "needs_mapping"
    from studio.datasets import inspecting

    answer = bob_client.post(url, {**swapped, "action": "use"})
    assert answer.status_code == 302
    inspecting.inspect(version.pk)
    version.refresh_from_db()
    assert (version.state, version.format, version.num_usable) == ("ready", "mapped", 12)
    assert version.columns == {"prompt": "beta", "completion": "alpha"}


def test_a_mapping_of_one_column_to_both_is_refused(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl([{"alpha": "a", "beta": "b"}] * 12))
    answer = bob_client.post(page(version, "mapping/"), {"prompt": "alpha", "completion": "alpha", "action": "use"})
    assert answer.status_code == 422
    assert "same column" in answer.content.decode()
    answer = bob_client.post(page(version, "mapping/"), {"prompt": "nope", "completion": "beta", "action": "use"})
    assert answer.status_code == 422


def test_a_dataset_in_use_is_kept_and_says_by_what(upload: Upload, team: Team, alice_client: Client) -> None:
    version = upload(jsonl(good_rows()))
    base = BaseModel.objects.create(name="tiny", folder="/nowhere", revision="r" * 64)
    adapter = Adapter.objects.create(
        team=team, name="faq-lora", base_model=base, dataset_version=version, method="lora", recipe={},
        folder="1/x", created_by=version.created_by,
    )  # fmt: skip
    answer = alice_client.post(f"/datasets/{version.dataset_id}/delete/")
    assert answer.status_code == 409
    assert "faq-lora" in answer.content.decode()
    assert "faq-lora" in alice_client.get(page(version, "used-by/")).content.decode()
    assert version.path().exists()
    assert alice_client.get(page(version, "mapping/")).status_code == 302
    adapter.delete()
    assert alice_client.post(f"/datasets/{version.dataset_id}/delete/").status_code == 302
    assert not Dataset.objects.exists()


def test_another_team_cannot_delete_or_map(upload: Upload, charlie_client: Client) -> None:
    version = upload(jsonl(good_rows()))
    assert charlie_client.post(f"/datasets/{version.dataset_id}/delete/").status_code == 404
    assert charlie_client.post(page(version, "mapping/"), {"action": "use"}).status_code == 404
    assert charlie_client.post("/datasets/upload/", {"dataset": version.dataset_id}).status_code == 404
    assert Dataset.objects.filter(pk=version.dataset_id).exists()


def test_the_file_comes_back_as_an_attachment(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl(good_rows()), "ümlaut.jsonl")
    answer = bob_client.get(page(version, "file/"))
    assert b"".join(answer.streaming_content) == jsonl(good_rows())  # type: ignore[attr-defined]
    assert answer["Content-Disposition"].startswith("attachment; filename*=utf-8''%C3%BCmlaut.jsonl")
    assert answer["X-Content-Type-Options"] == "nosniff"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("tab", ["file/", "problems.csv"])
def test_a_download_is_sent_while_it_is_read_when_served_by_asgi(
    upload: Upload, alice: User, alice_client: Client, monkeypatch: pytest.MonkeyPatch, tab: str
) -> None:
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 100)
    version = upload(jsonl([*good_rows(99), *({"prompt": f"no answer {number}"} for number in range(5))]))
    path = page(version, tab)

    async def chunks() -> tuple[list[bytes], str | None]:
        client = AsyncClient()
        await client.aforce_login(alice)
        response = await client.get(path)
        # Django lists a response that is not, before it sends the first byte.
        assert response.is_async
        found = [chunk async for chunk in response]
        await sync_to_async(connections.close_all)()
        return found, response.headers.get("Content-Length")

    received, length = asyncio.run(chunks())
    assert len(received) > 5
    assert b"".join(received) == b"".join(alice_client.get(path).streaming_content)  # type: ignore[attr-defined]
    if tab == "file/":
        assert b"".join(received) == version.path().read_bytes()
        assert length == str(version.num_bytes)


@pytest.mark.parametrize("number", ["²", "٣", "9" * 5000, "-1", "x", "\x00"])
def test_numbers_that_are_none_are_no_fault_of_the_server(
    upload: Upload, bob_client: Client, tmp_path: Path, number: str
) -> None:
    base = BaseModel.objects.create(name="tiny", folder=str(make_tiny_base(tmp_path / "base")), revision="r" * 64)
    version = upload(jsonl(good_rows()))
    for field in ("base", "length", "line"):
        answer = bob_client.get(page(version, "learned/"), {"base": base.pk, field: number})
        is_line = (number, field) == ("٣", "line")  # a three
        assert answer.status_code == (200 if is_line else 422)
        assert ('id="error-summary"' in answer.content.decode()) is not is_line
    assert bob_client.get("/datasets/upload/", {"dataset": number}).status_code == 404
    assert bob_client.get(page(version, "problems/"), {"page": number, "rule": number}).status_code == 200


@pytest.mark.parametrize("tab", ["", "statistics/", "problems/", "problems/?rule=C102&page=2", "versions/", "used-by/"])
def test_a_tab_costs_at_most_eight_queries(
    upload: Upload, bob_client: Client, django_assert_max_num_queries: object, tab: str
) -> None:
    version = upload(jsonl([*good_rows(99), *({"prompt": f"no answer {number}"} for number in range(60))]))
    assert version.num_problems() == 60
    make_users_of(version, 60)
    with django_assert_max_num_queries(8):  # type: ignore[operator]
        assert bob_client.get(page(version, tab)).status_code == 200


def test_the_problems_of_one_rule_have_their_own_pages(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl(good_rows(99)) + b"no JSON\n" + jsonl([{"prompt": f"ask {number}"} for number in range(60)]))
    assert "1 to 50 of 61" in bob_client.get(page(version, "problems/")).content.decode()
    assert "51 to 60 of 60" in bob_client.get(page(version, "problems/?rule=C102&page=2")).content.decode()


def test_what_uses_a_version_comes_in_pages_without_its_recipes(
    upload: Upload, bob_client: Client, django_assert_max_num_queries: object
) -> None:
    version = upload(jsonl(good_rows()))
    make_users_of(version, 60)
    with django_assert_max_num_queries(8) as queries:  # type: ignore[operator]
        first = bob_client.get(page(version, "used-by/?adapters=2")).content.decode()
    assert not any(column in query["sql"] for query in queries for column in ('"recipe"', '"estimate"', '"files"'))
    assert [name for name in JOB_NAMES if f">{name}<" in first] == JOB_NAMES[:50]
    assert first.count(">adapter-") == 10
    assert 'href="?adapters=2&amp;jobs=2"' in first
    second = bob_client.get(page(version, "used-by/?adapters=2&jobs=2")).content.decode()
    assert [name for name in JOB_NAMES if f">{name}<" in second] == JOB_NAMES[50:]

"""A version's rows on their pages and in the API: prepared by a worker, searched, filtered, paged, one by one."""

from __future__ import annotations

import errno
import re
from datetime import timedelta
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.test import Client
from django.utils import timezone

from jobs.celery import app
from studio.accounts.models import ApiToken, AuditEvent, Membership, Role, Team, User
from studio.datasets import inspecting, row_searching, row_tables, tasks
from studio.datasets.models import DatasetVersion, RowTable
from studio.datasets.removing import delete_dataset
from studio.datasets.row_searching import search_children
from studio.datasets.row_tables import prepare, prepare_waiting
from studio.datasets.views import remap
from studio.storage import blob_path
from tests.studio.datasets.conftest import Upload, jsonl


def rows() -> list[Any]:
    """Sixty conversations on three topics; the last but one says what line 4 says, the last has no answer."""
    made: list[Any] = []
    for n in range(60):
        system = [{"role": "system", "content": "Be kind."}] if n % 4 == 0 else []
        turns = [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": "It is " + "x" * n},
        ]
        made.append({"messages": [*system, *turns], "topic": ("billing", "returns", "Größe")[n % 3]})
    return [*made, made[3], {"messages": [{"role": "user", "content": "Nobody answers Straße 7"}]}]


@pytest.fixture
def prepared(upload: Upload) -> DatasetVersion:
    version = upload(jsonl(rows()))
    prepare(version.pk)
    return DatasetVersion.objects.get(pk=version.pk)


def read(client: Client, version: DatasetVersion, query: str = "", status: int = 200, **more: Any) -> str:
    answer = client.get(f"{version.get_absolute_url()}{query}", **more)
    assert answer.status_code == status
    return unescape(answer.content.decode())


def api(team: Team, user: User, *scopes: str) -> Client:
    secret = ApiToken.issue(team=team, user=user, name="t", scopes=list(scopes))[1]
    return Client(headers={"authorization": f"Bearer {secret}"})


def rows_url(version: DatasetVersion) -> str:
    return f"/api/v1/datasets/{version.dataset_id}/versions/{version.number}/rows/"


def test_they_are_prepared_after_the_inspection_and_kept_as_a_blob(upload: Upload, no_broker: list[Any]) -> None:
    version = upload(jsonl(rows()))
    assert no_broker.count(version.pk) == 3  # the inspection, the rows, the scans
    assert tasks.prepare_rows.name == "studio.datasets.tasks.prepare_rows"
    assert app.conf.beat_schedule["prepare-waiting"]["task"] == tasks.prepare_waiting.name
    tasks.prepare_rows(version.pk)
    table = RowTable.objects.get(version=version)
    assert (table.state, table.num_read, table.attempt) == ("done", 62, 1)
    assert blob_path(table.sha256).stat().st_size == table.num_bytes > 0
    assert [column["name"] for column in table.columns] == ["topic"]
    assert list((settings.DATA_DIR / "blobs" / "incoming").iterdir()) == []
    prepare(version.pk)
    assert RowTable.objects.get(version=version).attempt == 1


def test_equal_files_of_two_teams_have_one_blob_which_the_last_one_takes_along(
    prepared: DatasetVersion, upload: Upload, charlie: User, django_capture_on_commit_callbacks: Any
) -> None:
    other_team = charlie.memberships.get().team
    other = upload(jsonl(rows()), team=other_team, user=charlie)
    prepare(other.pk)
    mine, theirs = RowTable.objects.get(version=prepared), RowTable.objects.get(version=other)
    assert mine.sha256 == theirs.sha256
    for version, is_left in ((prepared, True), (other, False)):
        with django_capture_on_commit_callbacks(execute=True):
            delete_dataset(version.dataset, user=charlie)
        assert blob_path(mine.sha256).exists() == is_left


def test_other_columns_make_other_rows(prepared: DatasetVersion, django_capture_on_commit_callbacks: Any) -> None:
    old = RowTable.objects.get(version=prepared).sha256
    with django_capture_on_commit_callbacks(execute=True):
        remap(prepared, {"prompt": "topic", "completion": "topic"})
        inspecting.inspect(prepared.pk)
    assert not RowTable.objects.filter(version=prepared).exists()
    assert not blob_path(old).exists()


def test_the_page_is_a_table_with_how_many_rows_there_are(
    prepared: DatasetVersion, bob_client: Client, django_assert_max_num_queries: Any
) -> None:
    with django_assert_max_num_queries(8):
        page = read(bob_client, prepared)
    assert '<strong class="tabular-nums">62</strong> rows' in page
    assert 'id="row-1"' in page
    assert 'id="row-50"' in page
    assert 'id="row-51"' not in page
    assert f'href="{prepared.get_absolute_url()}rows/50/"' in page
    following = page.split('rel="next" href="')[1].split('"')[0]
    page = read(bob_client, prepared, following)
    assert 'id="row-51"' in page
    assert 'id="row-62"' in page
    assert 'rel="next"' not in page
    assert 'id="row-50"' in read(bob_client, prepared, page.split('rel="prev" href="')[1].split('"')[0])


@pytest.mark.parametrize(
    ("query", "num", "line"),
    [
        ("?q=STRASSE", 1, 62),
        ("?q=what+is+7", 1, 8),
        ("?state=set_aside", 1, 62),
        ("?state=usable&min_turns=3", 15, 1),
        ("?rule=Q501", 1, 61),
        ("?role=system", 15, 1),
        ("?system=without", 47, 2),
        ("?min_turns=3", 15, 1),
        ("?max_turns=1", 1, 62),
        ("?min_turns=9", 0, 0),
        ("?min_characters=75&order=longest", 11, 57),
        ("?column=topic&value=Gr%C3%B6%C3%9Fe", 20, 3),
        ("?q=WHAT&column=topic&value=billing&system=with", 5, 1),
    ],
)
def test_search_and_filters_are_the_query_of_the_url(
    prepared: DatasetVersion, bob_client: Client, query: str, num: int, line: int
) -> None:
    page = read(bob_client, prepared, query)
    assert f'<strong class="tabular-nums">{num}</strong> of 62 rows fit' in page
    shown = re.findall(r'<tr id="row-(\d+)"', page)
    assert shown[:1] == ([str(line)] if num else [])
    assert len(shown) == num
    assert ("No row fits." in page) == (num == 0)
    assert "Without the filter" in page
    fragment = read(bob_client, prepared, query, headers={"HX-Request": "true"})
    assert fragment.startswith('<section id="_rows"')
    assert f'<strong class="tabular-nums">{num}</strong>' in fragment


def test_the_bars_of_the_statistics_lead_to_the_rows_that_they_count(
    prepared: DatasetVersion, bob_client: Client
) -> None:
    page = read(bob_client, prepared, "statistics/")
    links = re.findall(
        rf'href="{prepared.get_absolute_url()}([?]state=usable[^"]*)">[^<]*</a></td><td[^>]*>(\d+)<', page
    )
    assert len(links) >= 3
    for query, num in links:
        assert f'<strong class="tabular-nums">{num}</strong> of 62 rows fit' in read(bob_client, prepared, query)


def test_hits_are_marked_in_the_table_and_in_the_chat(prepared: DatasetVersion, bob_client: Client) -> None:
    assert 'What <mark class="hit">is 7</mark> and 7?' in read(bob_client, prepared, "?q=IS+7")
    chat = read(bob_client, prepared, "?q=IS+7&show=chat")
    assert '<div class="verbatim">What <mark class="hit">is 7</mark> and 7?</div>' in chat
    assert f'href="{prepared.get_absolute_url()}rows/8/?q=IS+7"' in chat
    assert 'aria-current="true" href="?q=IS+7&show=chat"' in chat


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("?min_turns=5&max_turns=2", "2 is less than 5: no row has both."),
        ("?min_turns=many", "Give a whole number from 0 to 1,000,000,000."),
        ("?column=messages&value=1", "There is no such choice."),
        ("?value=1", "Choose the column that has this value."),
        ("?rule=X999", "There is no such choice."),
    ],
)
def test_a_filter_that_cannot_be_is_refused_in_a_sentence(
    prepared: DatasetVersion, bob_client: Client, query: str, sentence: str
) -> None:
    assert sentence in read(bob_client, prepared, query, status=422)


def test_a_cursor_that_was_made_up_leads_back(prepared: DatasetVersion, bob_client: Client) -> None:
    for cursor in ("nonsense", "WzFd", "WyJhIiwgMV0", "W3RydWUsIDFd", "WzFlOTksIDFd"):
        assert "Go back to the first page." in read(bob_client, prepared, f"?after={cursor}")


def test_hostile_text_is_shown_as_text(upload: Upload, bob_client: Client) -> None:
    hostile = "<img src=x onerror=alert(1) hx-get=/x> {{ 7*7 }} \x1b[31m\u202eexe\u200b"
    version = upload(jsonl([{"prompt": hostile, "completion": hostile, "kind": hostile}] * 12))
    prepare(version.pk)
    for query in (
        "",
        "?show=chat",
        "?q=onerror",
        "?q=%3Cimg",
        "?column=kind&value=%3Cscript%3E",
        "rows/1/",
        "rows/1/?q=%3Cimg",
    ):
        page = bob_client.get(f"{version.get_absolute_url()}{query}").content.decode()
        assert "<img src=x" not in page
        assert "<script>" not in page.split("<main")[1].split("</main")[0]
        assert "\u202e" not in page
        assert "\x1b" not in page
    page = bob_client.get(f"{version.get_absolute_url()}?q=%3Cimg").content.decode()
    assert '<mark class="hit">&lt;img</mark> src=x' in page
    assert "U+202E" in page


def test_a_row_has_a_page_with_its_raw_text_problems_findings_and_neighbours(
    prepared: DatasetVersion, bob_client: Client, django_assert_max_num_queries: Any
) -> None:
    scan = prepared.scans.create(name="exact_duplicates", state="done", num_findings=1)
    scan.findings.create(place=0, line=61, other_line=4, kind="duplicate", message="It says what line 4 says.")
    with django_assert_max_num_queries(8):
        page = read(bob_client, prepared, "rows/61/")
    root = prepared.get_absolute_url()
    assert "As in the file" in page
    assert '{"messages": [{"role": "user", "content": "What is 3 and 3?"}' in page
    assert "Line 61 says the same as line 4." in page
    assert "It says what line 4 says." in page
    assert f'href="{root}rows/60/"' in page
    assert f'href="{root}rows/62/"' in page
    assert f'href="{root}learned/?line=61"' in page
    aside = read(bob_client, prepared, "rows/62/")
    assert "This row is set aside" in aside
    assert "Nobody answers Stra\\u00dfe 7" in aside  # as the file has it
    assert "learned/?line" not in aside
    assert "This line holds no usable row" in read(bob_client, prepared, "rows/99/")


def test_the_rows_beside_one_are_those_that_fit(prepared: DatasetVersion, bob_client: Client) -> None:
    page = read(bob_client, prepared, "rows/9/?role=system")
    assert f'href="{prepared.get_absolute_url()}rows/5/?role=system" rel="prev"' in page
    assert f'href="{prepared.get_absolute_url()}rows/13/?role=system" rel="next"' in page
    assert f'href="{prepared.get_absolute_url()}?role=system">Back to the rows that fit' in page
    # A filter that is none any more does not hide the row.
    assert "What is 8 and 8?" in read(bob_client, prepared, "rows/9/?column=gone&value=1")


def test_problems_beyond_those_that_are_kept_are_named_by_their_rule(
    prepared: DatasetVersion, bob_client: Client
) -> None:
    prepared.problems.all().delete()
    page = read(bob_client, prepared, "rows/61/")
    assert "Q501" in page
    assert 'id="problems-title"' in page


def test_rows_that_were_never_prepared_are_asked_for_by_whoever_looks(
    upload: Upload, bob_client: Client, no_broker: list[Any], django_assert_max_num_queries: Any
) -> None:
    version = upload(jsonl(rows()))
    del no_broker[:]
    with django_assert_max_num_queries(8):
        page = read(bob_client, version)
    assert no_broker == [version.pk]
    assert "A worker will prepare the rows" in page
    assert "What is 3 and 3?" in page  # the first rows are there meanwhile
    fragment = bob_client.get(f"{version.get_absolute_url()}rows/").content.decode()
    assert 'hx-trigger="every 1s"' in fragment
    assert no_broker == [version.pk]
    RowTable.objects.filter(version=version).update(state="running", num_read=31, heartbeat_at=timezone.now())
    assert "31 of 62" in bob_client.get(f"{version.get_absolute_url()}rows/").content.decode()
    ago = timezone.now() - timedelta(minutes=9)
    RowTable.objects.filter(version=version).update(heartbeat_at=ago, queued_at=ago)
    prepare(version.pk)
    answer = bob_client.get(f"{version.get_absolute_url()}rows/")
    assert "HX-Redirect" not in answer, "whoever reads the first rows keeps their place"
    assert "Look through them" in answer.content.decode()
    assert "are being prepared" not in read(bob_client, version, "rows/5/")


def test_what_fails_says_so_and_a_trainer_tries_again(
    upload: Upload,
    bob_client: Client,
    bob: User,
    monkeypatch: pytest.MonkeyPatch,
    django_capture_on_commit_callbacks: Any,
    no_broker: list[Any],
) -> None:
    version = upload(jsonl(rows()))
    real = row_tables.run_child

    def starved(name: str, arguments: list[str], *, seconds: float) -> Any:
        return real(name, [*arguments, "--memory-bytes", str(30 * 1024**2)], seconds=seconds)

    monkeypatch.setattr(row_tables, "run_child", starved)
    prepare(version.pk)
    page = read(bob_client, version)
    assert "could not be prepared for searching. Preparing the rows takes more memory or time than it may." in page
    assert "What is 3 and 3?" in page
    url = f"{version.get_absolute_url()}rows/prepare/"
    Membership.objects.filter(user=bob).update(role=Role.VIEWER)
    assert bob_client.post(url).status_code == 403
    Membership.objects.filter(user=bob).update(role=Role.TRAINER)
    del no_broker[:]
    with django_capture_on_commit_callbacks(execute=True):
        bob_client.post(url)
    assert no_broker == [version.pk]
    assert AuditEvent.objects.filter(action="dataset.rows_asked").exists()
    monkeypatch.setattr(row_tables, "run_child", real)
    prepare(version.pk)
    assert "62</strong> rows" in read(bob_client, version)
    with django_capture_on_commit_callbacks(execute=True):
        assert "did not fail" in bob_client.post(url, follow=True).content.decode()


def test_a_full_disk_is_said_and_leaves_nothing(
    upload: Upload, bob_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = upload(jsonl(rows()))

    def full(path: Path) -> Any:
        raise row_tables.StorageError(errno.ENOSPC, "The studio's disk is full (0.0 GB free).")

    monkeypatch.setattr(row_tables, "finished_blob", full)
    prepare(version.pk)
    assert "The studio's disk is full" in read(bob_client, version)
    assert list((settings.DATA_DIR / "blobs" / "incoming").iterdir()) == []


def test_the_sweep_asks_for_what_was_lost_and_gives_up_in_the_end(upload: Upload, no_broker: list[Any]) -> None:
    version = upload(jsonl(rows()))
    long_ago = timezone.now() - timedelta(hours=1)
    assert prepare_waiting() == 0
    RowTable.objects.create(version=version, queued_at=long_ago)
    del no_broker[:]
    assert (prepare_waiting(), prepare_waiting()) == (1, 0)
    assert no_broker == [version.pk]
    table = RowTable.objects.filter(version=version)
    table.update(state="running", attempt=2, queued_at=long_ago, heartbeat_at=long_ago)
    assert prepare_waiting() == 1
    table.update(attempt=row_tables.MAX_ATTEMPTS, queued_at=long_ago)
    assert prepare_waiting() == 0
    assert table.get().state == "failed"
    assert "died 3 times" in table.get().error


def test_a_worker_that_was_presumed_dead_stores_nothing(upload: Upload, monkeypatch: pytest.MonkeyPatch) -> None:
    version = upload(jsonl(rows()))
    real = row_tables.finished_blob

    def overtaken(path: Path) -> Any:
        RowTable.objects.filter(version=version).update(attempt=2)
        return real(path)

    monkeypatch.setattr(row_tables, "finished_blob", overtaken)
    prepare(version.pk)
    table = RowTable.objects.get(version=version)
    assert (table.state, table.sha256) == ("running", "")
    assert [path for path in (settings.DATA_DIR / "blobs").rglob("*") if path.suffix == ".parquet"] == []


def test_a_search_that_is_too_slow_or_too_large_gets_a_sentence(
    prepared: DatasetVersion, bob_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for children, sentences in (
        # By itself, or ended by the one who waits for it.
        (search_children(1, seconds=0.0001), ("The time for looking was over", "takes longer than")),
        (search_children(1, memory_bytes=60 * 1024**2), ("more memory than a search may use",)),
    ):
        monkeypatch.setattr(row_searching, "_children", children)
        page = read(bob_client, prepared, "?q=what")
        children.close()
        assert any(sentence in page for sentence in sentences)


def test_the_api_gives_what_the_page_shows(prepared: DatasetVersion, team: Team, bob: User) -> None:
    client = api(team, bob, "read")
    root = rows_url(prepared)
    asked = {"q": "what is", "system": "with", "order": "longest", "limit": 4}
    found = client.get(root, asked).json()
    assert (found["num_matches"], found["num_rows"], found["is_whole"]) == (15, 62, True)
    assert [row["line"] for row in found["items"]] == [57, 53, 49, 45]
    assert found["items"][0]["example"]["messages"][0] == {
        "role": "system", "content": "Be kind.", "train": None, "weight": 1.0, "reasoning": "", "tool_call_id": "",
        "tool_calls": [],
    }  # fmt: skip
    more = client.get(root, {**asked, "after": found["next"]}).json()
    assert [row["line"] for row in more["items"]] == [41, 37, 33, 29]
    one = client.get(f"{root}61/").json()
    assert (one["previous"], one["next"], one["rules"]) == (60, 62, ["Q501"])
    assert one["problems"][0]["message"].startswith("Line 61 says the same")
    assert one["raw"].startswith('{"messages"')
    assert client.get(f"{root}62/").json()["example"] is None
    assert client.get(f"{root}99/").status_code == 404
    state = client.get(f"{root}prepared/").json()
    assert (state["state"], state["columns"][0]["name"]) == ("done", "topic")


def test_the_api_refuses_in_sentences(prepared: DatasetVersion, upload: Upload, team: Team, bob: User) -> None:
    client = api(team, bob, "read", "write")
    root = rows_url(prepared)
    for query, status, code in (
        ({"column": "nope", "value": "1"}, 422, "invalid_filter"),
        ({"min_turns": 4, "max_turns": 1}, 422, "invalid_filter"),
        ({"q": "a\nb"}, 422, "rows_not_searchable"),
        ({"after": "???"}, 422, "rows_not_searchable"),
        ({"search": "x"}, 400, "unknown_field"),
    ):
        answer = client.get(root, query)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), query
    other = upload(jsonl(rows()[:20]))
    answer = client.get(rows_url(other))
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "rows_not_prepared")
    assert client.post(f"{root}prepare/").status_code == 409
    RowTable.objects.filter(version=other).update(state="failed", error="No.")
    assert "No." in client.get(rows_url(other)).json()["error"]["message"]
    assert client.post(f"{rows_url(other)}prepare/").status_code == 202
    assert api(team, bob, "read").post(f"{rows_url(other)}prepare/").status_code == 403


def test_the_other_team_sees_nothing(prepared: DatasetVersion, charlie: User, charlie_client: Client) -> None:
    root = prepared.get_absolute_url()
    for path in (root, f"{root}?q=what", f"{root}rows/", f"{root}rows/1/"):
        assert charlie_client.get(path).status_code == 404
    assert charlie_client.post(f"{root}rows/prepare/").status_code == 404
    client = api(charlie.memberships.get().team, charlie, "read", "write")
    for path in ("", "1/", "prepared/"):
        assert client.get(rows_url(prepared) + path).status_code == 404
    assert client.post(f"{rows_url(prepared)}prepare/").status_code == 404

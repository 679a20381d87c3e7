"""Scans as stages of their own: what they store, how they are shown, and what happens when one is lost or fails."""

from __future__ import annotations

import csv
import io
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from jobs.celery import app
from studio.accounts.models import ApiToken, AuditEvent, Membership, Role, Team, User
from studio.datasets import inspecting, scanning, tasks
from studio.datasets.models import DatasetScan, DatasetVersion, ScanFinding, ScanState
from studio.datasets.scanning import scan_next, scan_waiting, scans_of
from studio.datasets.views import remap
from tests.studio.datasets.conftest import Upload, jsonl
from tests.workers.scans.planting import clean_rows
from workers.scans import scans


def planted(num_copies: int = 2) -> bytes:
    """Clean rows whose line 4 comes again at the end, so often."""
    rows = clean_rows(60)
    return jsonl([*rows, *[rows[3]] * num_copies])


def run_all(version: DatasetVersion) -> None:
    for _ in range(len(scans()) + 1):
        scan_next(version.pk)


def exact(version: DatasetVersion) -> DatasetScan:
    return version.scans.get(name="exact_duplicates")


def api(team: Team, user: User, *scopes: str) -> Client:
    secret = ApiToken.issue(team=team, user=user, name="t", scopes=list(scopes))[1]
    return Client(headers={"authorization": f"Bearer {secret}"})


def test_they_are_asked_for_after_the_inspection_and_run_one_after_the_other(
    upload: Upload, no_broker: list[Any]
) -> None:
    version = upload(planted())
    assert no_broker == [version.pk] * 3  # the inspection, then the rows at rest and the scans
    for num_run in range(1, len(scans())):
        scan_next(version.pk)
        assert version.scans.filter(state=ScanState.DONE).count() == num_run
        assert no_broker[2 + num_run :] == [version.pk]
    scan_next(version.pk)
    assert {scan.state for scan in version.scans.all()} == {"done"}
    assert no_broker[3:] == [version.pk] * (len(scans()) - 1)
    assert [scan.name for scan in scans_of(version)] == list(scans())
    found = exact(version)
    assert (found.num_findings, found.kinds) == (2, {"duplicate": 2})
    assert [(one.line, one.other_line) for one in found.findings.order_by("place")] == [(61, 4), (62, 4)]


def test_a_worker_and_the_clock_know_the_tasks_by_the_names_that_are_sent(upload: Upload) -> None:
    version = upload(planted())
    assert tasks.scan_dataset.name == "studio.datasets.tasks.scan_dataset"
    assert app.conf.beat_schedule["scan-waiting"]["task"] == tasks.scan_waiting.name
    tasks.scan_dataset(version.pk)
    assert exact(version).state == "done"


def test_the_page_shows_counts_first_rows_and_links(
    upload: Upload, bob_client: Client, django_assert_max_num_queries: Any
) -> None:
    version = upload(planted(7))
    page = f"{version.get_absolute_url()}scans/"
    assert page in bob_client.get(version.get_absolute_url()).content.decode()
    assert "wait for a worker" in bob_client.get(page).content.decode()
    run_all(version)
    with django_assert_max_num_queries(8):
        shown = bob_client.get(page).content.decode()
    assert "7 found" in shown
    assert "nothing found" in shown
    assert f'href="{version.get_absolute_url()}rows/61/"' in shown
    assert f'href="{version.get_absolute_url()}rows/4/"' in shown
    assert f'href="{version.get_absolute_url()}rows/66/"' not in shown
    assert f'href="{page}exact_duplicates/"' in shown
    assert "hx-trigger" not in shown[shown.index('id="_scans"') :].split(">")[0]


def test_while_they_run_the_fragment_shows_how_far_and_asks_again(upload: Upload, bob_client: Client) -> None:
    version = upload(planted())
    scanning.prepare(version)
    version.scans.filter(name="exact_duplicates").update(state="running", num_read=31, heartbeat_at=timezone.now())
    fragment = bob_client.get(f"{version.get_absolute_url()}scans/", headers={"HX-Request": "true"}).content.decode()
    assert fragment.lstrip().startswith('<div id="_scans"')
    assert 'hx-trigger="every 2s"' in fragment
    assert "Running, 50 %" in fragment
    assert "Waiting for a worker" in fragment


def test_all_rows_are_paged_and_come_as_csv(
    upload: Upload, bob_client: Client, django_assert_max_num_queries: Any
) -> None:
    version = upload(planted(60))
    run_all(version)
    page = f"{version.get_absolute_url()}scans/exact_duplicates/"
    with django_assert_max_num_queries(8):
        bob_client.get(page)
    first, second = (bob_client.get(f"{page}?page={number}").content.decode() for number in (1, 2))
    assert "1 to 50 of 60" in first
    assert "rows/110/" in first
    assert "rows/111/" in second
    assert "rows/120/" in second
    answer = bob_client.get(f"{version.get_absolute_url()}scans/exact_duplicates.csv")
    table = list(csv.DictReader(io.StringIO(b"".join(answer.streaming_content).decode())))  # type: ignore[attr-defined]
    assert [int(row["line"]) for row in table] == list(range(61, 121))
    assert {row["other line"] for row in table} == {"4"}


def test_findings_of_one_kind_can_be_asked_for(upload: Upload, bob_client: Client, team: Team, bob: User) -> None:
    rows = clean_rows(30)
    rows[4]["completion"] = "N/A"
    rows[9]["completion"] = "The sea is blue. " * 8
    version = upload(jsonl(rows))
    run_all(version)
    page = bob_client.get(f"{version.get_absolute_url()}scans/answers/?kind=empty").content.decode()
    assert "Repeats itself (1)" in page
    assert "rows/5/" in page
    assert "rows/10/" not in page
    address = f"/api/v1/datasets/{version.dataset_id}/versions/1/scans/answers/findings/"
    items = api(team, bob, "read").get(address, {"kind": "repeats itself"}).json()["items"]
    assert [(one["line"], one["kind"]) for one in items] == [(10, "repeats itself")]


def test_no_secret_is_stored_or_shown_whole(upload: Upload, bob_client: Client) -> None:
    secret = "ghp_" + "Ab3Cd4Ef5Gh6Ij7Kl8Mn9Op0Qr1St2Uv3Wx4"
    rows = clean_rows(12)
    rows[4]["completion"] += f" Use {secret} and write to maria.huber@firma-huber.at."
    version = upload(jsonl(rows))
    run_all(version)
    stored = "".join(f"{one.kind} {one.message} {one.excerpt}" for one in ScanFinding.objects.all())
    shown = "".join(
        bob_client.get(f"{version.get_absolute_url()}scans/{page}").content.decode()
        for page in ("", "secrets/", "personal_data/")
    )
    for text in (stored, shown):
        assert "ghp_… (40 characters)" in text
        assert "m…@firma-huber.at" in text
        assert secret[5:12] not in text
        assert "maria" not in text


def test_the_api_gives_the_same(upload: Upload, team: Team, bob: User) -> None:
    version = upload(planted(3))
    client = api(team, bob, "read", "write")
    address = f"/api/v1/datasets/{version.dataset_id}/versions/1/scans/"
    assert client.get(address).json() == []
    run_all(version)
    listed = client.get(address).json()
    assert [one["name"] for one in listed] == list(scans())
    assert (listed[0]["label"], listed[0]["state"], listed[0]["num_findings"]) == ("Exact duplicates", "done", 3)
    findings = f"{address}exact_duplicates/findings/"
    first = client.get(findings, {"limit": 2}).json()
    rest = client.get(findings, {"limit": 2, "after": first["next"]}).json()
    assert [one["line"] for one in first["items"] + rest["items"]] == [61, 62, 63]
    assert (first["num_findings"], rest["next"]) == (3, None)
    assert client.get(findings, {"kind": "other"}).json()["items"] == []
    again = client.post(f"{address}exact_duplicates/run/")
    assert (again.status_code, again.json()["state"]) == (202, "waiting")
    event = AuditEvent.objects.get(action="dataset.scan_asked")
    assert (event.user, event.details["scan"], event.token_id is not None) == (bob, "exact_duplicates", True)
    assert client.post(f"{address}exact_duplicates/run/").status_code == 409
    assert client.get(f"{address}nothing/findings/").status_code == 404


def test_another_team_sees_nothing_and_a_viewer_cannot_run_one(
    upload: Upload, team: Team, bob: User, other_team: Team, charlie: User, bob_client: Client, charlie_client: Client
) -> None:
    version = upload(planted())
    run_all(version)
    base = version.get_absolute_url()
    for page in ("scans/", "scans/exact_duplicates/", "scans/exact_duplicates.csv"):
        assert bob_client.get(base + page).status_code == 200
        assert charlie_client.get(base + page).status_code == 404
        assert Client().get(base + page).status_code == 302
    stranger = api(other_team, charlie, "read", "write")
    address = f"/api/v1/datasets/{version.dataset_id}/versions/1/scans/"
    assert stranger.get(address).status_code == 404
    assert stranger.get(f"{address}exact_duplicates/findings/").status_code == 404
    assert stranger.post(f"{address}exact_duplicates/run/").status_code == 404
    assert charlie_client.post(f"{base}scans/exact_duplicates/run/").status_code == 404
    Membership.objects.filter(user=bob).update(role=Role.VIEWER)
    assert bob_client.post(f"{base}scans/exact_duplicates/run/").status_code == 403
    assert api(team, bob, "read").post(f"{address}exact_duplicates/run/").status_code == 403
    assert "Run again" not in bob_client.get(f"{base}scans/").content.decode()
    assert exact(version).state == "done"


def test_a_trainer_runs_one_again(upload: Upload, bob_client: Client) -> None:
    version = upload(planted())
    run_all(version)
    bob_client.post(f"{version.get_absolute_url()}scans/exact_duplicates/run/")
    assert exact(version).state == "waiting"
    # What was found stays until the new result is there.
    assert exact(version).findings.count() == 2
    scan_next(version.pk)
    assert (exact(version).state, exact(version).findings.count()) == ("done", 2)


def test_a_scan_that_needs_too_much_fails_alone(
    upload: Upload, bob_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = upload(planted())
    run = inspecting.run_child

    def starve(module: str, arguments: list[str], *, seconds: float) -> Any:
        more = ["--memory-bytes", str(30 * 1024**2)] if arguments[0] == "exact_duplicates" else []
        return run(module, [*arguments, *more], seconds=seconds)

    monkeypatch.setattr(scanning, "run_child", starve)
    run_all(version)
    assert exact(version).state == "failed"
    assert set(version.scans.exclude(name="exact_duplicates").values_list("state", flat=True)) == {"done"}
    assert "more memory or time" in bob_client.get(f"{version.get_absolute_url()}scans/").content.decode()


def test_the_sweep_asks_for_lost_dead_and_lacking_scans_and_gives_up_in_the_end(
    upload: Upload, no_broker: list[Any]
) -> None:
    version = upload(planted())
    no_broker.clear()
    assert scan_waiting() == 1  # it has none yet
    assert version.scans.count() == len(scans())
    assert scan_waiting() == 0  # they were asked for just now
    long_ago = timezone.now() - timedelta(minutes=10)
    version.scans.update(queued_at=long_ago)
    assert scan_waiting() == 1
    version.scans.update(queued_at=long_ago)
    version.scans.filter(name="secrets").update(state="running", heartbeat_at=timezone.now())
    assert scan_waiting() == 0  # the one that runs asks for the next
    version.scans.update(state="running", heartbeat_at=timezone.now(), attempt=1)
    assert scan_waiting() == 0
    version.scans.update(heartbeat_at=long_ago)
    assert scan_waiting() == 1
    version.scans.update(attempt=scanning.MAX_ATTEMPTS)
    assert scan_waiting() == 0
    assert {scan.state for scan in version.scans.all()} == {"failed"}
    assert no_broker == [version.pk] * 3


def test_a_worker_that_was_presumed_dead_stores_nothing(upload: Upload) -> None:
    version = upload(planted())
    scanning.prepare(version)
    mine = scanning._claim(version)
    assert mine is not None
    DatasetScan.objects.filter(pk=mine.pk).update(heartbeat_at=timezone.now() - timedelta(minutes=10))
    successor = scanning._claim(version)
    assert successor is not None
    assert (successor.pk, successor.attempt) == (mine.pk, 2)
    with pytest.raises(scanning._SupersededError):
        scanning._run(mine)
    scanning._run(successor)
    assert (exact(version).state, ScanFinding.objects.count()) == ("done", 2)


def test_other_columns_make_the_scans_start_over(upload: Upload, no_broker: list[Any]) -> None:
    rows = [{"alpha": row["prompt"], "beta": row["completion"]} for row in clean_rows(20)]
    version = upload(jsonl([*rows, rows[0]]))
    remap(version, {"prompt": "alpha", "completion": "beta"})
    inspecting.inspect(version.pk)
    run_all(version)
    assert exact(version).num_findings == 1
    remap(version, {"prompt": "beta", "completion": "alpha"})
    inspecting.inspect(version.pk)
    assert version.scans.count() == 0
    run_all(version)
    assert exact(version).num_findings == 1


def test_rows_of_a_type_that_a_scan_cannot_look_at_are_said_to_be_skipped(upload: Upload, bob_client: Client) -> None:
    version = upload(jsonl([{"text": f"{row['prompt']} {row['completion']}"} for row in clean_rows(20)]))
    run_all(version)
    skipped = {name for name, plugin in scans().items() if plugin.why_not("text")}
    assert set(version.scans.filter(state="skipped").values_list("name", flat=True)) == skipped
    assert set(version.scans.exclude(name__in=skipped).values_list("state", flat=True)) == {"done"}
    assert bob_client.get(f"{version.get_absolute_url()}scans/").status_code == 200

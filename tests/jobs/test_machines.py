"""What devices report and what each team may see of them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import psutil
import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from jobs import machines
from jobs.hardware import CpuMeter, Reading, attribute_memory, own_processes
from jobs.lifecycle import claim
from jobs.machines import Reporter, forget_gone_workers, look_at_machines
from jobs.models import JobAttempt, Worker
from studio.accounts.models import ApiToken, Team, User
from studio.catalogue.models import BaseModel
from studio.devices import boot_id
from studio.version import STUDIO_VERSION
from tests.jobs.making import make_job, make_running_job, make_worker

pytestmark = pytest.mark.django_db
GIB = 1024**3


def gone(worker: Worker, **ago: float) -> None:
    Worker.objects.filter(pk=worker.pk).update(last_seen=timezone.now() - timedelta(**ago))


@pytest.mark.parametrize(
    ("used", "processes", "own", "before", "expected"),
    [
        # Nothing of ours runs: whatever is used is others'.
        (5 * GIB, {}, {1}, 0, (0, 5 * GIB)),
        # The driver names our trainer and somebody else's process.
        (30 * GIB, {2: 20 * GIB, 99: 10 * GIB}, {1, 2}, 0, (20 * GIB, 10 * GIB)),
        # The other one hides in another namespace: what is missing in the list is its.
        (30 * GIB, {2: 20 * GIB}, {1, 2}, 0, (20 * GIB, 10 * GIB)),
        # In a container no process id is known: others hold what they held before our trainer began.
        (30 * GIB, {}, {1, 2}, 4 * GIB, (26 * GIB, 4 * GIB)),
        (30 * GIB, {7: 26 * GIB}, {1, 2}, 4 * GIB, (26 * GIB, 4 * GIB)),
        # The driver tells no amount of ours.
        (30 * GIB, {2: None, 99: 10 * GIB}, {1, 2}, 0, (20 * GIB, 10 * GIB)),
        # A context's few megabytes are nobody's.
        (20 * GIB + 1000, {2: 20 * GIB}, {1, 2}, 0, (20 * GIB + 1000, 0)),
    ],
)
def test_a_gpus_memory_is_told_apart_into_ours_and_others(
    used: int, processes: dict[int, int | None], own: set[int], before: int, expected: tuple[int, int]
) -> None:
    assert attribute_memory(used, processes, own, others_before=before) == expected


def test_the_cpus_memory_adds_up() -> None:
    reading = CpuMeter().read(own_processes())
    total = psutil.virtual_memory().total
    assert os.getpid() in own_processes()
    assert 0 < reading.used_by_own_bytes < reading.free_memory_bytes <= total
    assert reading.free_memory_bytes + reading.used_by_others_bytes <= total
    assert reading.utilisation_percent is not None
    assert 0 <= reading.utilisation_percent <= 100
    assert len(boot_id()) > 5
    assert boot_id() == boot_id()


def test_a_reporter_writes_figures_and_a_heartbeat() -> None:
    worker = make_worker()
    gone(worker, minutes=30)
    Reporter(worker.pk, 0, lambda: True).report()
    worker.refresh_from_db()
    assert worker.reported_at is not None
    assert abs(timezone.now() - worker.last_seen) < timedelta(seconds=20)
    assert worker.free_memory_bytes
    assert worker.used_by_own_bytes


def test_a_device_that_fails_costs_its_figures_and_not_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_slot: int) -> object:
        raise RuntimeError("GPU is lost")

    monkeypatch.setattr(machines, "meter_for", broken)
    worker = make_worker()
    gone(worker, minutes=30)
    Reporter(worker.pk, 0, lambda: True).report()
    worker.refresh_from_db()
    assert worker.reported_at is None
    assert abs(timezone.now() - worker.last_seen) < timedelta(seconds=20)


@pytest.mark.django_db(transaction=True)
def test_a_reporter_ends_with_its_slot() -> None:
    worker = make_worker()
    gone(worker, minutes=30)
    reporter = Reporter(worker.pk, 0, lambda: False)
    reporter.start()
    reporter.join(30)
    assert not reporter.is_alive()
    worker.refresh_from_db()
    assert abs(timezone.now() - worker.last_seen) > timedelta(minutes=29), "a dead slot sends no heartbeat"


def test_another_teams_job_is_there_without_its_name(
    team: Team, alice: User, other_team: Team, charlie: User, alice_client: Client, charlie_client: Client
) -> None:
    job = make_running_job(team, alice, name="secret-name")
    secret = BaseModel.objects.create(name="secret-base", folder="/nowhere", revision="3" * 64)
    Worker.objects.update(warm_base=secret, warm_team=team)
    ours, theirs = alice_client.get("/workers/").content.decode(), charlie_client.get("/workers/").content.decode()
    assert "secret-name" in ours
    assert "secret-base" in ours
    assert f"/jobs/{job.pk}/" in ours
    assert "A job of another team" in theirs
    for hidden in ("secret-name", "secret-base", str(job.pk)):
        assert hidden not in theirs
    [machine] = look_at_machines(other_team)
    [device] = machine.devices
    assert (device.status, device.job, device.is_foreign, device.warm_base) == ("running", None, True, "")


def status_of(team: Team) -> str:
    [machine] = look_at_machines(team)
    [device] = machine.devices
    return device.status


def test_a_worker_is_idle_draining_quarantined_stopped_or_gone(team: Team) -> None:
    worker = make_worker()
    rows = Worker.objects.filter(pk=worker.pk)
    assert status_of(team) == "idle"
    rows.update(quarantined_until=timezone.now() + timedelta(minutes=5))
    assert status_of(team) == "quarantined"
    rows.update(quarantined_until=timezone.now() - timedelta(minutes=5))
    assert status_of(team) == "idle"
    gone(worker, hours=2)
    assert status_of(team) == "gone"
    rows.update(is_draining=True)
    assert status_of(team) == "stopped"
    rows.update(last_seen=timezone.now())
    assert status_of(team) == "draining"
    gone(worker, hours=30)
    assert look_at_machines(team) == []


def test_a_restarted_worker_takes_the_place_of_the_one_before(team: Team) -> None:
    first, second = make_worker(), make_worker()
    gone(first, minutes=30)
    [machine] = look_at_machines(team)
    assert [device.worker for device in machine.devices] == [second]
    make_worker(slot=1)
    [machine] = look_at_machines(team)
    assert [device.worker.slot for device in machine.devices] == [0, 1]


def test_workers_are_forgotten_after_a_week_unless_an_attempt_names_them(team: Team, alice: User) -> None:
    old, recent, used = make_worker(0), make_worker(1), make_worker(2)
    assert claim(make_job(team, alice), used) is not None
    for worker in (old, used):
        gone(worker, days=8)
    gone(recent, days=2)
    assert forget_gone_workers() == 1
    assert set(Worker.objects.all()) == {recent, used}
    assert JobAttempt.objects.get().worker == used


def test_a_foreign_process_an_other_version_and_old_figures_are_pointed_out(alice_client: Client) -> None:
    worker = make_worker()
    values: dict[str, Any] = {
        "device_kind": "cuda", "device": "NVIDIA H100", "memory_bytes": 80 * GIB, "used_by_own_bytes": 10 * GIB,
        "used_by_others_bytes": 30 * GIB, "free_memory_bytes": 50 * GIB, "temperature_celsius": 61.0,
        "utilisation_percent": 97.0, "reported_at": timezone.now(), "version": STUDIO_VERSION,
    }  # fmt: skip
    Worker.objects.filter(pk=worker.pk).update(**values)
    page = alice_client.get("/workers/").content.decode()
    for shown in ("GPU 0", "40.0 of 80.0 GiB", "holds 30.0 GiB of this GPU", "61 °C", "97 %", "just now"):
        assert shown in page
    assert "not the web's" not in page.replace("&#x27;", "'")
    Worker.objects.filter(pk=worker.pk).update(
        version="0.0", used_by_others_bytes=GIB, reported_at=timezone.now() - timedelta(hours=1)
    )
    page = alice_client.get("/workers/").content.decode().replace("&#x27;", "'")
    assert "not the web's" in page
    assert "its figures are from" in page
    assert "of this GPU" not in page


def test_the_list_is_sent_again_only_when_something_has_changed(alice_client: Client) -> None:
    worker = make_worker()
    first = alice_client.get("/workers/list/")
    assert first.status_code == 200
    again = alice_client.get("/workers/list/", headers={"if-none-match": first["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    Worker.objects.filter(pk=worker.pk).update(temperature_celsius=55)
    changed = alice_client.get("/workers/list/", headers={"if-none-match": first["ETag"]})
    assert changed.status_code == 200
    assert "55 °C" in changed.content.decode()


def test_the_page_asks_few_questions_however_many_machines_there_are(
    team: Team, alice: User, alice_client: Client
) -> None:
    def num_queries() -> int:
        with CaptureQueriesContext(
            connection,
        ) as asked:
            assert alice_client.get("/workers/").status_code == 200
        return len(asked)

    make_worker()
    few = num_queries()
    for slot in range(1, 6):
        worker = make_worker(slot)
        claim(make_job(team, alice, name=f"job-{slot}"), worker)
    assert num_queries() == few
    assert few <= 8


def test_the_api_says_what_the_page_says(team: Team, alice: User, other_team: Team, charlie: User) -> None:
    job = make_running_job(team, alice)

    def ask(team: Team, user: User) -> dict[str, Any]:
        _, secret = ApiToken.issue(team=team, user=user, name="x", scopes=["read"])
        [found] = Client().get("/api/v1/workers/", headers={"authorization": f"Bearer {secret}"}).json()
        return found

    ours, theirs = ask(team, alice), ask(other_team, charlie)
    assert (ours["job"], ours["is_foreign"], ours["status"]) == (str(job.pk), False, "running")
    assert (theirs["job"], theirs["is_foreign"], theirs["status"]) == (None, True, "running")
    assert ours["has_other_version"] is True


def test_figures_are_the_columns_of_a_workers_row() -> None:
    names = {field.name for field in Worker._meta.get_fields()}
    assert set(Reading.__dataclass_fields__) <= names

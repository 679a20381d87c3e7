"""Draining a worker: from page and API, written down, and kept over a restart of its process."""

from __future__ import annotations

from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.template import engines
from django.test import Client, RequestFactory
from django.urls import reverse
from django.utils import timezone

from jobs import draining, lifecycle
from jobs.draining import DrainError
from jobs.lifecycle import HeartbeatAnswer
from jobs.models import Job, Worker
from jobs.slots import Slot, register_worker
from jobs.standing import takes_jobs
from jobs.supervising import _wanted_stop
from studio.accounts.models import AuditEvent, Membership, Role, Team, User
from tests.conftest import make_member, signed_in
from tests.jobs.making import make_job, make_running_job, make_worker
from tests.jobs.test_api import caller, post
from workers.errors import RecipeError


@pytest.fixture
def worker(db: None) -> Worker:
    return make_worker()


def drain(worker: Worker, mode: str, team: Team, user: User) -> bool:
    return draining.drain_worker(worker, mode, team=team, user=user)


@pytest.mark.parametrize(
    ("is_stopping", "drain_mode", "state", "stop_mode", "wanted"),
    [
        (False, "", "running", "", None),
        (False, "now", "running", "", "checkpoint"),
        (False, "after_job", "running", "", None),
        (True, "after_job", "running", "", "checkpoint"),
        (False, "", "running", "pause", "checkpoint"),
        (False, "", "cancelling", "keep", "keep"),
        (False, "now", "cancelling", "keep", "checkpoint"),
        (False, "after_job", "cancelling", "keep", "keep"),
        (False, "now", "cancelling", "now", "now"),
    ],
)
def test_what_a_trainer_is_told(
    is_stopping: bool, drain_mode: str, state: str, stop_mode: str, wanted: str | None
) -> None:
    assert _wanted_stop(HeartbeatAnswer(state, stop_mode, drain_mode), is_stopping) == wanted


def test_the_answer_to_a_heartbeat_says_that_the_worker_is_drained(team: Team, bob: User, alice: User) -> None:
    job = make_running_job(team, bob)
    assert lifecycle.heartbeat(job.pk, 1).drain_mode == ""
    assert drain(job.worker, "now", team, alice)
    assert lifecycle.heartbeat(job.pk, 1).drain_mode == "now"
    assert draining.end_draining(job.worker, team=team, user=alice)
    assert lifecycle.heartbeat(job.pk, 1).drain_mode == ""
    texts = [event.text for event in job.events.all()][-2:]
    assert texts == [
        "Its worker is being drained for maintenance, at a checkpoint.", "The draining of its worker was ended."
    ]  # fmt: skip
    assert list(AuditEvent.objects.order_by("pk").values_list("action", flat=True)) == [
        "job.queued",
        "worker.drained", "worker.undrained"
    ]  # fmt: skip


def test_asking_twice_changes_nothing_and_the_way_may_be_changed(worker: Worker, team: Team, alice: User) -> None:
    assert [drain(worker, mode, team, alice) for mode in ("after_job", "after_job", "now")] == [True, False, True]
    worker.refresh_from_db()
    assert (worker.is_draining, worker.drain_mode) == (True, "now")
    assert [draining.end_draining(worker, team=team, user=alice) for _ in range(2)] == [True, False]
    worker.refresh_from_db()
    assert (worker.is_draining, worker.drain_mode) == (False, "")
    with pytest.raises(RecipeError, match="no way to drain"):
        drain(worker, "gently", team, alice)


def test_a_worker_whose_process_stops_is_neither_drained_nor_put_back(worker: Worker, team: Team, alice: User) -> None:
    Worker.objects.filter(pk=worker.pk).update(is_draining=True)
    with pytest.raises(DrainError, match="stops already"):
        drain(worker, "now", team, alice)
    with pytest.raises(DrainError, match="cannot be taken back"):
        draining.end_draining(worker, team=team, user=alice)
    answer = post(caller(team, alice, "write"), f"workers/{worker.pk}/end-draining/", {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "worker_state")


@pytest.mark.django_db(transaction=True)
def test_a_drained_slot_takes_no_job_until_that_ends(data_dir: Path, team: Team, bob: User, alice: User) -> None:
    slot = Slot(0)
    slot.worker = register_worker(0)
    drain(slot.worker, "after_job", team, alice)
    job = make_job(team, bob)
    slot._work()
    assert Job.objects.get(pk=job.pk).attempt == 0
    draining.end_draining(slot.worker, team=team, user=alice)
    slot._work()
    assert Job.objects.get(pk=job.pk).attempt == 1


def test_a_device_stays_drained_when_its_process_starts_again(team: Team, alice: User) -> None:
    first = register_worker(0)
    drain(first, "now", team, alice)
    Worker.objects.create(
        host="elsewhere", slot=0, process_id=1, device="CPU", device_kind="cpu", version="0", last_seen=first.last_seen
    )
    second = register_worker(0)
    assert (second.is_draining, second.drain_mode) == (True, "now")
    draining.end_draining(second, team=team, user=alice)
    third = register_worker(0)
    assert (third.host, third.is_draining, third.drain_mode) == (gethostname(), False, "")
    Worker.objects.filter(pk=third.pk).update(is_draining=True)  # its process was stopped
    assert not register_worker(0).is_draining


def test_only_admins_drain_by_page_and_api(worker: Worker, team: Team, bob: User, alice: User) -> None:
    lea = make_member("lea", team, Role.LEAD)
    urls = {name: reverse(f"jobs:{name}", args=[worker.pk]) for name in ("drain_worker", "end_draining")}
    for user in (bob, lea):
        for url in urls.values():
            assert signed_in(user).post(url, {"mode": "now"}).status_code == 403
        for path in ("drain", "end-draining"):
            assert post(caller(team, user, "write"), f"workers/{worker.pk}/{path}/", {}).status_code == 403
    assert Client().post(urls["drain_worker"]).status_code == 302
    assert not AuditEvent.objects.exists()
    page = signed_in(alice).post(urls["drain_worker"], {"mode": "now"}, follow=True)
    assert f"{worker} takes no more jobs." in page.text
    worker.refresh_from_db()
    assert worker.drain_mode == "now"
    answer = post(caller(team, alice, "write"), f"workers/{worker.pk}/end-draining/", {})
    assert answer.json() == {"id": str(worker.pk), "is_draining": False, "drain_mode": "", "quarantined_until": None}
    answer = post(caller(team, alice, "write"), f"workers/{worker.pk}/drain/", {"mode": "after_job"})
    assert answer.json() == {
        "id": str(worker.pk),
        "is_draining": True,
        "drain_mode": "after_job",
        "quarantined_until": None,
    }
    assert signed_in(alice).post(urls["end_draining"], {"next": "/jobs/?mine=1"})["Location"] == "/jobs/?mine=1"
    assert AuditEvent.objects.filter(user=alice).count() == 4


def test_an_admin_ends_a_quarantine_and_nobody_else(worker: Worker, team: Team, bob: User, alice: User) -> None:
    lifecycle.quarantine(worker, "The GPU has fallen off the bus.")
    worker.refresh_from_db()
    assert not takes_jobs(worker, timezone.now())
    url = reverse("jobs:end_quarantine", args=[worker.pk])
    assert signed_in(bob).post(url).status_code == 403
    assert post(caller(team, bob, "write"), f"workers/{worker.pk}/end-quarantine/", {}).status_code == 403
    page = signed_in(alice).post(url, follow=True)
    assert f"{worker} takes jobs again." in page.text
    worker.refresh_from_db()
    assert takes_jobs(worker, timezone.now())
    event = AuditEvent.objects.get(action="worker.quarantine_ended")
    assert (event.user, event.details) == (alice, {"reason": "The GPU has fallen off the bus."})
    answer = post(caller(team, alice, "write"), f"workers/{worker.pk}/end-quarantine/", {})
    assert answer.json()["quarantined_until"] is None
    assert AuditEvent.objects.count() == 1, "a second time changes nothing"


@pytest.mark.parametrize(
    ("is_draining", "drain_mode", "labels"),
    [
        (False, "", ["Drain after its job", "Drain now"]),
        (True, "after_job", ["End draining", "Drain now"]),
        (True, "now", ["End draining"]),
        (True, "", []),
    ],
)
def test_the_fragment_has_the_buttons_of_the_workers_state(
    is_draining: bool, drain_mode: str, labels: list[str], worker: Worker, alice: User, bob: User, rf: RequestFactory
) -> None:
    worker.is_draining, worker.drain_mode = is_draining, drain_mode
    template = engines["django"].get_template("jobs/_worker_actions.html")

    def shown_to(user: User) -> str:
        request: Any = rf.get("/")
        request.membership = Membership.objects.get(user=user)
        return template.render({"worker": worker, "back_to": "/jobs/"}, request)

    for label in ("Drain after its job", "Drain now", "End draining"):
        assert (label in shown_to(alice)) == (label in labels)
        assert label not in shown_to(bob)


@pytest.mark.django_db(transaction=True)
def test_runjob_takes_no_job_on_a_drained_device(data_dir: Path, team: Team, bob: User, alice: User) -> None:
    drain(register_worker(0), "now", team, alice)
    job = make_job(team, bob)
    with pytest.raises(CommandError, match="Device 0 of this machine is being drained"):
        call_command("runjob", str(job.pk))
    assert Job.objects.get(pk=job.pk).attempt == 0

"""What people may ask of a job: every state and every action against a written table, races, roles and the log."""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models.functions import Now
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from jobs import lifecycle, queueing, scheduling
from jobs.actions import ActionError
from jobs.buttons import buttons_of, ordering_of
from jobs.lifecycle import FencedError
from jobs.models import FINAL_STATES, LEASED_STATES, Job, JobState
from studio.accounts.models import AuditEvent, Membership, Role, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.models import DatasetVersion
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter
from tests.jobs.conftest import MakeJob
from tests.jobs.making import make_worker
from tests.jobs.test_api import caller, post

# Where a job can stand: its state, what was asked of it, its attempt, and the step of its newest checkpoint.
SITUATIONS = {
    "fresh": ("queued", "", 0, 0),
    "handed back": ("queued", "", 1, 10),
    "to finish": ("queued", "keep", 1, 10),
    "retrying": ("retry_wait", "", 1, 10),
    "retrying to finish": ("retry_wait", "keep", 1, 10),
    "lost early": ("retry_wait", "", 1, 0),
    "running": ("running", "", 1, 10),
    "pausing": ("running", "pause", 1, 10),
    "keeping": ("cancelling", "keep", 1, 10),
    "discarding": ("cancelling", "now", 1, 10),
    "paused": ("paused", "", 1, 10),
    "paused before it began": ("paused", "", 0, 0),
    "succeeded": ("succeeded", "", 1, 10),
    "failed": ("failed", "", 1, 10),
    "cancelled": ("cancelled", "now", 1, 10),
}
ACTIONS = ("pause", "resume", "keep", "now")
NO, SAME = "refused", "as asked already"
# "state/what is asked of it" afterwards, in the order of ACTIONS.
WHAT_PEOPLE_DO = {
    "fresh": ("paused/", NO, NO, "cancelled/now"),
    "handed back": ("paused/", NO, "queued/keep", "cancelled/now"),
    "to finish": ("paused/", NO, SAME, "cancelled/now"),
    "retrying": ("paused/", NO, "queued/keep", "cancelled/now"),
    "retrying to finish": ("paused/", NO, SAME, "cancelled/now"),
    "lost early": ("paused/", NO, NO, "cancelled/now"),
    "running": ("running/pause", NO, "cancelling/keep", "cancelling/now"),
    "pausing": (SAME, "running/", "cancelling/keep", "cancelling/now"),
    "keeping": (NO, NO, SAME, "cancelling/now"),
    "discarding": (NO, NO, NO, SAME),
    "paused": (SAME, "queued/", "queued/keep", "cancelled/now"),
    "paused before it began": (SAME, "queued/", NO, "cancelled/now"),
    "succeeded": (NO, NO, NO, NO),
    "failed": (NO, NO, NO, NO),
    "cancelled": (NO, NO, NO, SAME),
}
ENDS = ("hands back", "succeeds", "fails", "fails and may retry", "dies")
WHAT_WORKERS_DO = {
    "running": ("queued/", "succeeded/", "failed/", "retry_wait/", "retry_wait/"),
    "pausing": ("paused/", "succeeded/", "failed/", "paused/", "paused/"),
    "keeping": ("queued/keep", "succeeded/keep", "failed/keep", "retry_wait/keep", "retry_wait/keep"),
    "discarding": ("cancelled/now", NO, "cancelled/now", "cancelled/now", "cancelled/now"),
}


@pytest.fixture
def make_in(make_job: MakeJob, team: Team, bob: User, base_model: BaseModel, version: DatasetVersion) -> Any:
    """A job of Bob's in one of the situations."""

    def make(situation: str, name: str = "support") -> Job:
        state, stop_mode, attempt, checkpoint_step = SITUATIONS[situation]
        values: dict[str, Any] = {
            "state": state, "stop_mode": stop_mode, "attempt": attempt, "checkpoint_step": checkpoint_step,
            "step": checkpoint_step, "num_steps": 40, "created_by": bob,
        }  # fmt: skip
        if state in LEASED_STATES:
            values |= {"lease_until": timezone.now() + timedelta(hours=1), "worker": make_worker(), "phase": "training"}
        if state in FINAL_STATES:
            values["finished_at"] = timezone.now()
        if state == JobState.SUCCEEDED:
            values["adapter"] = make_adapter(team, bob, base_model=base_model, dataset_version=version)
        job = make_job(name, **values)
        if attempt:
            job.attempts.create(number=1, started_at=timezone.now())
        return job

    return make


def ask(job: Job, user: User, action: str, **options: str) -> bool:
    if action in ("keep", "now"):
        return queueing.cancel_job(job, user, action, **options)
    return {"pause": queueing.pause_job, "resume": queueing.resume_job}[action](job, user, **options)


def standing(job: Job) -> str:
    job.refresh_from_db()
    return f"{job.state}/{job.stop_mode}"


def test_the_tables_have_every_state() -> None:
    assert {state for state, *_ in SITUATIONS.values()} == set(JobState.values)
    assert set(WHAT_PEOPLE_DO) == set(SITUATIONS)
    assert set(WHAT_WORKERS_DO) == {name for name, (state, *_) in SITUATIONS.items() if state in LEASED_STATES}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_action_in_every_state(situation: str, action: str, make_in: Any, bob: User) -> None:
    job, expected = make_in(situation), WHAT_PEOPLE_DO[situation][ACTIONS.index(action)]
    before, place = standing(job), job.not_before
    if expected == NO:
        with pytest.raises(ActionError) as raised:
            ask(job, bob, action)
        assert raised.value.state == job.state
    else:
        assert ask(job, bob, action) is (expected != SAME)
    is_changed = expected not in (NO, SAME)
    assert standing(job) == (expected if is_changed else before)
    assert job.events.count() == AuditEvent.objects.count() == (1 if is_changed else 0)
    assert (job.failures_counted, job.attempt, job.checkpoint_step) == (0, *SITUATIONS[situation][2:])
    assert job.not_before == place, "it keeps its place"
    assert bool(job.finished_at) == (job.state in FINAL_STATES)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("situation", WHAT_WORKERS_DO)
def test_every_end_of_an_attempt_in_every_state(
    situation: str, end: str, make_in: Any, team: Team, bob: User, base_model: BaseModel, version: DatasetVersion
) -> None:
    job, expected = make_in(situation), WHAT_WORKERS_DO[situation][ENDS.index(end)]

    def act() -> None:
        match end:
            case "hands back":
                lifecycle.hand_back(job.pk, 1, reason="Its worker stops.")
            case "succeeds":
                adapter = make_adapter(team, bob, base_model=base_model, dataset_version=version)
                lifecycle.succeed(job.pk, 1, adapter)
            case "fails":
                lifecycle.fail(job.pk, 1, code="x", message="It cannot be done.", next_step="")
            case "fails and may retry":
                lifecycle.retry_later(job.pk, 1, code="x", message="It failed.", counted=False)
            case "dies":
                Job.objects.filter(pk=job.pk).update(lease_until=Now() - timedelta(seconds=1))
                lifecycle.reap_expired()

    if expected == NO:
        with pytest.raises(FencedError):
            act()
        return
    act()
    assert standing(job) == expected
    assert job.lease_until is None
    assert (job.adapter is not None) == (job.state == JobState.SUCCEEDED)
    assert job.attempts.get().ended_at is not None
    if job.state == JobState.PAUSED:
        assert (job.worker, job.failures_counted) == (None, 0)
        assert "The checkpoint of step 10 is kept." in job.events.last().text


@pytest.mark.parametrize("situation", ["running", "pausing", "paused", "handed back"])
@pytest.mark.django_db(transaction=True)
def test_two_people_who_ask_at_once_get_what_they_would_have_got_in_turn(
    situation: str, make_in: Any, bob: User
) -> None:
    def in_turn(first: str, second: str) -> str:
        job = make_in(situation)
        for action in (first, second):
            with contextlib.suppress(ActionError):  # what the table says; the next one is asked all the same
                ask(job, bob, action)
        return standing(job)

    def at_once(first: str, second: str) -> str:
        job, ready = make_in(situation), threading.Barrier(2)
        unforeseen: list[Exception] = []

        def one(action: str) -> None:
            ready.wait()
            try:
                ask(job, bob, action)
            except Exception as error:  # noqa: BLE001 a thread's error would be lost
                unforeseen.append(error)
            finally:
                connection.close()

        threads = [threading.Thread(target=one, args=[action]) for action in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(isinstance(error, ActionError) for error in unforeseen), unforeseen
        assert [event.sequence for event in job.events.all()] == list(range(1, job.events.count() + 1))
        return standing(job)

    for at, first in enumerate(ACTIONS):
        for second in ACTIONS[at + 1 :]:
            assert at_once(first, second) in {in_turn(first, second), in_turn(second, first)}, (first, second)


def test_a_button_that_was_drawn_for_another_state_does_nothing(make_in: Any, bob: User) -> None:
    job = make_in("running")
    with pytest.raises(ActionError, match="It has changed meanwhile: it is running now"):
        ask(job, bob, "now", seen="queued")
    assert standing(job) == "running/"
    assert ask(job, bob, "now", seen="running")


def test_a_job_that_waits_may_have_been_drawn_as_waiting_to_retry(make_in: Any, bob: User) -> None:
    assert ask(make_in("handed back"), bob, "pause", seen="retry_wait")
    assert ask(make_in("retrying"), bob, "pause", seen="queued")
    with pytest.raises(ActionError):
        ask(make_in("paused"), bob, "now", seen="queued")


def test_a_worker_hears_of_the_pause_and_of_its_end(make_in: Any, bob: User) -> None:
    job = make_in("running")
    ask(job, bob, "pause")
    assert lifecycle.heartbeat(job.pk, 1).stop_mode == "pause"
    ask(job, bob, "resume")
    assert (answer := lifecycle.heartbeat(job.pk, 1)).stop_mode == ""
    assert answer.state == JobState.RUNNING


def test_a_pause_that_was_taken_back_too_late_queues_the_job(make_in: Any, bob: User) -> None:
    job = make_in("pausing")
    ask(job, bob, "resume")
    lifecycle.hand_back(job.pk, 1, reason="It goes on.")
    assert standing(job) == "queued/"


def test_a_paused_job_takes_no_device_and_a_resumed_one_goes_before_what_came_later(make_in: Any, bob: User) -> None:
    job, later = make_in("handed back"), make_in("fresh", "later")
    ask(job, bob, "pause")
    job.refresh_from_db()
    assert scheduling.queue_position(job) == 0
    ask(job, bob, "resume")
    assert [scheduling.next_job(make_worker(slot)).pk for slot in range(2)] == [job.pk, later.pk]


def test_resuming_a_job_that_waited_to_retry_does_not_wait_any_more(make_in: Any, bob: User) -> None:
    job = make_in("retrying")
    Job.objects.filter(pk=job.pk).update(not_before=Now() + timedelta(hours=1))
    ask(job, bob, "pause")
    ask(job, bob, "resume")
    assert scheduling.next_job(make_worker()).pk == job.pk


def test_who_claims_a_job_that_is_to_be_finished_ends_it(make_in: Any, bob: User) -> None:
    job = make_in("paused")
    ask(job, bob, "keep")
    claimed = scheduling.next_job(make_worker())
    assert (claimed.pk, claimed.state, claimed.stop_mode) == (job.pk, JobState.CANCELLING, "keep")


# --- the order of a team's jobs --------------------------------------------------------------------------------------


def names_in_order() -> list[str]:
    names, slot = [], 0
    while (job := scheduling.next_job(make_worker(slot))) is not None:
        names.append(job.name)
        slot += 1
    return names


@pytest.fixture
def four(make_job: MakeJob, bob: User) -> list[Job]:
    return [make_job(name, created_by=bob) for name in ("one", "two", "three", "four")]


@pytest.mark.parametrize(
    ("moves", "order"),
    [
        ([(2, "up")], "one three two four"),
        ([(1, "down")], "one three two four"),
        ([(3, "top")], "four one two three"),
        ([(3, "top"), (2, "top"), (3, "down")], "three one four two"),
        ([(3, "up"), (3, "up"), (3, "up"), (0, "down")], "four two one three"),
        ([(0, "down"), (0, "down"), (0, "down"), (0, "up")], "two three one four"),
    ],
)
def test_moves_within_a_team(moves: list[tuple[int, str]], order: str, four: list[Job], bob: User) -> None:
    for index, where in moves:
        assert queueing.move_job(four[index], bob, where)
    waiting = list(Job.objects.all())
    queue = scheduling.look_at_queue(waiting)
    assert [job.name for job in sorted(waiting, key=queue.position)] == order.split()
    assert names_in_order() == order.split()


def test_a_job_that_comes_later_stands_behind_those_that_were_moved(
    four: list[Job], make_job: MakeJob, bob: User
) -> None:
    queueing.move_job(four[3], bob, "top")
    queueing.move_job(four[2], bob, "up")
    make_job("late", created_by=bob)
    assert names_in_order() == ["four", "one", "three", "two", "late"]


def test_what_stands_at_the_end_already_is_not_moved(four: list[Job], bob: User) -> None:
    assert not queueing.move_job(four[0], bob, "up")
    assert not queueing.move_job(four[0], bob, "top")
    assert not queueing.move_job(four[3], bob, "down")
    assert not AuditEvent.objects.exists()


def test_no_move_and_no_team_priority_passes_another_teams_job(
    four: list[Job], make_job: MakeJob, bob: User, other_team: Team, charlie: User
) -> None:
    theirs = make_job("theirs", team=other_team, created_by=charlie)

    def turn_of_theirs() -> int:
        with transaction.atomic():
            turn = names_in_order().index("theirs")
            transaction.set_rollback(True)
        return turn

    turn, place = turn_of_theirs(), scheduling.queue_position(theirs)
    assert queueing.move_job(four[3], bob, "top")
    assert queueing.set_team_priority(four[2], bob, "high")
    assert queueing.set_team_priority(four[0], bob, "low")
    assert (turn_of_theirs(), scheduling.queue_position(theirs)) == (turn, place)
    assert [name for name in names_in_order() if name != "theirs"] == ["three", "four", "two", "one"]


def test_moves_stay_within_the_priority(four: list[Job], bob: User) -> None:
    queueing.set_team_priority(four[3], bob, "high")
    assert not queueing.move_job(four[3], bob, "down")
    assert queueing.move_job(four[2], bob, "top")
    assert names_in_order() == ["four", "three", "one", "two"]


def test_an_admins_priority_counts_in_the_whole_studio(
    four: list[Job], make_job: MakeJob, alice: User, other_team: Team, charlie: User
) -> None:
    make_job("theirs", team=other_team, created_by=charlie, not_before=timezone.now() - timedelta(hours=1))
    queueing.set_studio_priority(four[3], alice, "high")
    queueing.set_studio_priority(four[0], alice, "low")
    assert names_in_order() == ["four", "theirs", "two", "three", "one"]


def test_what_does_not_wait_is_not_moved(make_in: Any, bob: User) -> None:
    for situation in ("running", "paused", "failed"):
        with pytest.raises(ActionError, match="It does not wait"):
            queueing.move_job(make_in(situation), bob, "up")
    with pytest.raises(ActionError, match="It has ended"):
        queueing.set_team_priority(make_in("failed"), bob, "high")


# --- who may, and what is written down ------------------------------------------------------------------------------

REQUESTS: list[tuple[str, dict[str, str]]] = [
    ("pause", {}), ("resume", {}), ("cancel", {"mode": "now"}), ("cancel", {"mode": "keep"}), ("move", {"to": "top"}),
    ("priority", {"priority": "high"}), ("retry", {}), ("duplicate", {}),
]  # fmt: skip
NAMES = {
    "pause": "job.paused", "resume": "job.resumed", "cancel": "job.stopped", "move": "job.moved",
    "priority": "job.prioritised", "retry": "job.queued", "duplicate": "job.queued",
}  # fmt: skip
POSSIBLE_IN = {"pause": "fresh", "resume": "paused", "move": "fresh", "priority": "fresh", "retry": "failed"}


@pytest.mark.parametrize(("action", "body"), REQUESTS)
def test_the_api_acts_writes_it_down_and_keeps_others_out(
    action: str, body: dict[str, str], make_in: Any, make_job: MakeJob, team: Team, bob: User, other_team: Team,
    charlie: User,
) -> None:  # fmt: skip
    make_job("ahead", created_by=bob)
    job = make_in(POSSIBLE_IN.get(action, "handed back"))
    vera = make_member("vera", team, Role.VIEWER)
    path, before = f"jobs/{job.pk}/{action}/", standing(job)
    assert post(caller(other_team, charlie, "read", "write"), path, body).status_code == 404
    assert post(caller(team, vera, "read", "write"), path, body).status_code == 403
    assert post(caller(team, bob, "read"), path, body).status_code == 403
    assert (standing(job), AuditEvent.objects.count(), job.events.count()) == (before, 0, 0)

    answer = post(caller(team, bob, "read", "write"), path, body)
    assert answer.status_code in (200, 201), answer.text
    written = AuditEvent.objects.get()
    assert (written.action, written.user, written.team) == (NAMES[action], bob, team)
    assert written.token is not None
    assert "bob" in job.events.get().text
    if answer.status_code == 201:
        assert answer.json()["parent_id"] == str(job.pk)
        assert "support" in Job.objects.get(pk=answer.json()["id"]).events.get().text


@pytest.mark.parametrize(("action", "body"), [one for one in REQUESTS if one[0] != "duplicate"])
def test_the_api_answers_409_with_the_state_when_it_is_too_late(
    action: str, body: dict[str, str], make_in: Any, team: Team, bob: User
) -> None:
    job = make_in("succeeded")
    answer = post(caller(team, bob, "read", "write"), f"jobs/{job.pk}/{action}/", body)
    assert answer.status_code == 409
    assert answer.json()["state"] == "succeeded"
    assert answer.json()["error"]["code"] == "job_state"
    assert "Nothing was done" in answer.json()["error"]["message"]


def test_the_api_does_nothing_to_a_job_that_is_in_another_state_than_was_seen(
    make_in: Any, team: Team, bob: User
) -> None:
    job, api = make_in("running"), caller(team, bob, "read", "write")
    answer = post(api, f"jobs/{job.pk}/pause/", {"state": "queued"})
    assert (answer.status_code, answer.json()["state"]) == (409, "running")
    answer = post(api, f"jobs/{job.pk}/pause/", {"state": "running"})
    assert (answer.status_code, answer.json()["stop_mode"]) == (200, "pause")


def test_a_copy_over_the_api_has_what_was_changed_and_all_else_as_it_was(make_in: Any, team: Team, bob: User) -> None:
    job, api = make_in("running"), caller(team, bob, "read", "write")
    changes = {"name": "twin", "settings": {"rank": 4}, "training": {"epochs": 2.0, "seed": 7}}
    first = post(api, f"jobs/{job.pk}/duplicate/", changes, **{"Idempotency-Key": "twin"})
    assert first.status_code == 201, first.text
    again = post(api, f"jobs/{job.pk}/duplicate/", changes, **{"Idempotency-Key": "twin"})
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    asked = first.json()["asked_recipe"]
    assert (asked["name"], asked["settings"]["rank"], asked["training"]["seed"]) == ("twin", 4, 7)
    unchanged = {key: value for key, value in job.asked_recipe["training"].items() if key not in ("epochs", "seed")}
    assert unchanged.items() <= asked["training"].items()
    assert asked["dataset"] == job.asked_recipe["dataset"]
    other = post(api, f"jobs/{job.pk}/duplicate/", {"method": "ia3"})
    assert (other.status_code, other.json()["asked_recipe"]["method"]) == (201, "ia3")
    assert post(api, f"jobs/{job.pk}/duplicate/", {"training": {"epochs": -1}}).status_code == 422
    assert post(api, f"jobs/{job.pk}/duplicate/", {"dataset_version": 10**9}).status_code == 422


def test_trainers_order_their_own_jobs_and_leads_all_of_the_team(make_in: Any, make_job: MakeJob, team: Team) -> None:
    make_job("ahead")
    job = make_in("fresh")
    tom, lea = make_member("tom", team, Role.TRAINER), make_member("lea", team, Role.LEAD)
    for action, body in (("move", {"to": "top"}), ("priority", {"priority": "high"})):
        assert post(caller(team, tom, "write"), f"jobs/{job.pk}/{action}/", body).status_code == 403
        assert signed_in(tom).post(reverse(f"jobs:{action}", args=[job.pk]), body).status_code == 403
        assert post(caller(team, lea, "write"), f"jobs/{job.pk}/{action}/", body).status_code == 200
    of_studio = {"priority": "high", "within": "studio"}
    assert post(caller(team, lea, "write"), f"jobs/{job.pk}/priority/", of_studio).status_code == 403
    assert signed_in(lea).post(reverse("jobs:priority", args=[job.pk]), of_studio).status_code == 403
    job.refresh_from_db()
    assert job.priority == 0


def test_an_admin_sets_the_priority_in_the_whole_studio(make_in: Any, team: Team, alice: User) -> None:
    job = make_in("fresh")
    answer = post(caller(team, alice, "write"), f"jobs/{job.pk}/priority/", {"priority": "high", "within": "studio"})
    assert (answer.json()["priority"], answer.json()["team_priority"]) == ("high", "normal")
    assert AuditEvent.objects.get().details == {"priority": "high", "within": "studio"}


# --- the pages ------------------------------------------------------------------------------------------------------


def test_the_page_pauses_resumes_and_says_what_happens(make_in: Any, bob_client: Client) -> None:
    job = make_in("running")
    page = bob_client.get(job.get_absolute_url()).text
    assert "Saves a checkpoint within seconds" in page
    answer = bob_client.post(reverse("jobs:pause", args=[job.pk]), {"state": "running"}, follow=True)
    assert "saves a checkpoint and pauses then" in answer.text
    assert "Pausing: it saves a checkpoint" in answer.text
    lifecycle.hand_back(job.pk, 1, reason="")
    page = bob_client.get(job.get_absolute_url()).text
    assert "Paused by bob at step 10 of 40. Its checkpoint is kept" in page
    assert "it stands in the queue where it stood" in page
    assert "Finish and keep" in page
    answer = bob_client.post(reverse("jobs:resume", args=[job.pk]), {"state": "paused"}, follow=True)
    assert "goes on as soon as it has a device" in answer.text
    assert standing(job) == "queued/"


def test_a_late_button_of_the_page_says_so_and_changes_nothing(make_in: Any, bob_client: Client) -> None:
    job = make_in("running")
    answer = bob_client.post(reverse("jobs:cancel", args=[job.pk]), {"mode": "now", "state": "queued"}, follow=True)
    assert "It has changed meanwhile: it is running now." in answer.text
    assert standing(job) == "running/"


def test_with_a_script_the_answer_is_the_new_header_and_the_message(make_in: Any, bob_client: Client) -> None:
    job = make_in("fresh")
    answer = bob_client.post(reverse("jobs:pause", args=[job.pk]), headers={"hx-request": "true"})
    assert answer.status_code == 200
    for expected in ('hx-target="#job-header"', "Paused by bob before it began", 'hx-target="#messages"', "is paused"):
        assert expected in answer.text
    assert "<html" not in answer.text


def test_a_form_goes_back_to_a_page_of_ours_only(make_in: Any, bob_client: Client) -> None:
    job = make_in("fresh")
    for wanted, expected in (("/jobs/?mine=1", "/jobs/?mine=1"), ("//evil.example/", job.get_absolute_url())):
        answer = bob_client.post(reverse("jobs:pause", args=[job.pk]), {"next": wanted})
        assert answer["Location"] == expected


def test_the_list_has_the_actions_of_each_job(make_in: Any, make_job: MakeJob, bob: User, bob_client: Client) -> None:
    make_in("running", "runs")
    make_in("paused", "rests")
    for name in ("one", "two"):
        make_job(name, created_by=bob)
    page = bob_client.get(reverse("jobs:list")).text
    for label in (
        "Pause: runs", "Stop and discard: runs", "Resume: rests", "Discard: rests", "Cancel: one", "Move up: two",
        "Move down: one",
    ):  # fmt: skip
        assert f'aria-label="{label}"' in page
    assert "It is the first of your team&#x27;s waiting jobs" in page
    assert "It is the last of your team&#x27;s waiting jobs" in page


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_buttons_of_a_page_offer_what_the_table_allows(situation: str, make_in: Any, team: Team, bob: User) -> None:
    job = make_in(situation)
    membership = Membership.objects.get(user=bob)
    names = {"pause": "pause", "resume": "resume", "keep": "keep", "discard": "now"}
    for button in buttons_of(job, membership):
        expected = WHAT_PEOPLE_DO[situation][ACTIONS.index(names[button.name])]
        assert bool(button.refusal) == (expected == NO), button.label
        assert button.says
        assert bool(button.loses) == bool(button.confirm and (button.refusal or button.loses))
    assert bool(buttons_of(job, membership)) == (situation not in {"discarding", "succeeded", "failed", "cancelled"})
    assert (ordering_of(job, membership) is not None) == (job.state not in FINAL_STATES and job.state != "cancelling")
    vera = Membership.objects.get(user=make_member("vera", team, Role.VIEWER))
    assert buttons_of(job, vera) == []
    assert ordering_of(job, vera) is None


def test_both_pages_name_the_other_job(make_in: Any, bob_client: Client) -> None:
    job = make_in("failed", "first")
    bob_client.post(reverse("jobs:retry", args=[job.pk]), {"idempotency_key": "again"})
    again = Job.objects.get(parent=job)
    assert f'from <a class="link" href="{job.get_absolute_url()}">' in bob_client.get(again.get_absolute_url()).text
    page = bob_client.get(job.get_absolute_url()).text
    assert f'made into <a class="link" href="{again.get_absolute_url()}">' in page

"""Who is next, and why a job waits."""

from __future__ import annotations

from datetime import timedelta

from django.db.models.functions import Now
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from jobs import lifecycle, scheduling
from jobs.models import Job, Worker
from studio.accounts.models import Team, User
from tests.jobs.making import make_job, make_worker


def test_jobs_start_in_the_order_in_which_they_were_queued(team: Team, bob: User) -> None:
    jobs = [make_job(team, bob, name=name) for name in ("first", "second", "third")]
    worker = make_worker()
    assert [scheduling.queue_position(job) for job in jobs] == [1, 2, 3]
    assert [scheduling.next_job(worker).name for _ in jobs] == ["first", "second", "third"]
    assert scheduling.next_job(worker) is None


def test_a_job_of_higher_priority_goes_first(team: Team, bob: User) -> None:
    make_job(team, bob, name="ordinary")
    urgent = make_job(team, bob, name="urgent")
    Job.objects.filter(pk=urgent.pk).update(priority=10)
    assert scheduling.next_job(make_worker()).name == "urgent"


def test_a_job_that_waits_to_retry_is_not_taken_too_early(team: Team, bob: User) -> None:
    job = make_job(team, bob)
    Job.objects.filter(pk=job.pk).update(not_before=Now() + timedelta(seconds=60))
    assert scheduling.next_job(make_worker()) is None
    job.refresh_from_db()


def test_it_says_when_no_worker_is_running(team: Team, bob: User) -> None:
    assert "No worker is running" in scheduling.explain_wait(make_job(team, bob))


def test_it_names_the_job_that_is_waited_for_and_when_it_ends(team: Team, bob: User) -> None:
    running = lifecycle.claim(make_job(team, bob, name="faq-r16"), make_worker())
    Job.objects.filter(pk=running.pk).update(seconds_left=720)
    second, third = make_job(team, bob, name="second"), make_job(team, bob, name="third")
    assert scheduling.explain_wait(second) == (
        "Waits for a free device: “faq-r16” is running, which should end in about 12 min. It is next."
    )
    assert scheduling.explain_wait(third).endswith("12 min. 1 job of your team goes first.")
    assert scheduling.explain_wait(Job.objects.get(pk=running.pk)) == ""


def test_it_does_not_name_another_teams_job(team: Team, bob: User, other_team: Team, charlie: User) -> None:
    theirs = lifecycle.claim(make_job(other_team, charlie, name="secret merger"), make_worker())
    Job.objects.filter(pk=theirs.pk).update(seconds_left=720)
    said = scheduling.explain_wait(make_job(team, bob))
    assert said == "Waits for a free device: a job of another team is running. It is next."


def test_the_whole_queue_gives_each_job_the_place_that_it_has_alone(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    busy = lifecycle.claim(make_job(team, bob, name="busy"), make_worker())
    mine = [make_job(team, bob, name="slow"), make_job(team, bob, name="urgent")]
    theirs = make_job(other_team, charlie)
    mine.append(make_job(team, bob, name="late"))
    Job.objects.filter(pk=mine[1].pk).update(priority=5)
    Job.objects.filter(pk=mine[0].pk).update(not_before=Now() + timedelta(seconds=60))
    jobs = [Job.objects.get(pk=job.pk) for job in (*mine, busy)]
    queue = scheduling.look_at_queue(jobs)
    assert [queue.position(job) for job in jobs] == [4, 1, 3, 0]
    assert [scheduling.queue_position(job) for job in (*jobs, theirs)] == [4, 1, 3, 0, 2]
    assert (queue.num_waiting, queue.num_busy, queue.has_workers) == (4, 1, True)


def test_the_queue_is_read_at_once_and_without_recipes(
    team: Team, bob: User, other_team: Team, charlie: User, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    for _ in range(3):
        make_job(other_team, charlie, name="secret merger")
    jobs = [make_job(team, bob), make_job(team, bob)]
    with django_assert_num_queries(1) as seen:
        queue = scheduling.look_at_queue(jobs)
    assert not any("recipe" in query["sql"] or "name" in query["sql"].split("running AS")[0] for query in seen)
    assert [queue.position(job) for job in jobs] == [2, 4]  # the teams take turns


def test_a_worker_that_has_not_been_seen_for_long_does_not_count(team: Team, bob: User) -> None:
    worker = make_worker()
    assert scheduling.live_workers().count() == 1
    Worker.objects.filter(pk=worker.pk).update(last_seen=timezone.now() - timedelta(hours=1))
    assert not scheduling.live_workers().exists()

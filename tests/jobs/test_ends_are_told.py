"""How a job ends is an audit event of its team, with its owner, so that webhooks and mail hear of it."""

from __future__ import annotations

import pytest

from jobs import lifecycle
from studio.accounts.models import AuditEvent, Team, User
from tests.factories import make_adapter
from tests.jobs.making import make_running_job

pytestmark = pytest.mark.django_db


def ends() -> list[tuple[str, int | None]]:
    found = AuditEvent.objects.filter(action__in=["job.succeeded", "job.failed"])
    return [(event.action, event.details["owner_id"]) for event in found]


def test_a_success_is_told_once(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    adapter = make_adapter(team, bob)
    lifecycle.succeed(job.pk, job.attempt, adapter)
    with pytest.raises(lifecycle.FencedError):
        lifecycle.succeed(job.pk, job.attempt, adapter)
    assert ends() == [("job.succeeded", bob.pk)]


def test_a_failure_is_told_and_a_job_that_was_to_be_discarded_is_not(team: Team, bob: User) -> None:
    job = make_running_job(team, bob)
    lifecycle.fail(job.pk, job.attempt, code="diverged", message="The loss is no number.", next_step="")
    assert ends() == [("job.failed", bob.pk)]
    other = make_running_job(team, bob)
    lifecycle.ask_stop(other, bob, "now")
    lifecycle.fail(other.pk, other.attempt, code="diverged", message="The loss is no number.", next_step="")
    assert len(ends()) == 1

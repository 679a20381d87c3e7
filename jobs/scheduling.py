"""Which job a free device takes next, decided in Postgres at that moment. Why a job waits: see jobs/waiting.py.

One decision is made at a time, under an advisory lock that ends with the transaction: so two claims cannot both pass a
team's limit, and each sees what the other has started. The job's row is locked besides (SKIP LOCKED), since people
change jobs without that lock. The order is fair_share's; jobs that do not fit are passed by smaller ones (backfill)
under these rules, which keep the big job from waiting for ever:

- Who is first in turn for a device that is too small now is owed one: `owed_since` is noted, and on the next device
  that the job fits it goes before all others of its level, whatever its team has used by then.
- When it has been owed one for `HOLD_AFTER` and a device could hold it but for other jobs on the same machine, that
  device stays free for it: it takes only jobs that should end before those do (EASY backfill, Lifka 1995).
- A device that processes outside the studio fill is not held: nobody knows when they end.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import connection, transaction
from django.db.models import QuerySet

from jobs import lifecycle
from jobs.fair_share import Waiting, heads_in_turn
from jobs.models import Job, LastStart, Worker
from jobs.standing import WAITING_STATES, Facts, Room, live_workers, read_facts, room_of, takes_jobs
from jobs.waiting import QueueSnapshot, explain_wait, look_at_queue, queue_position

__all__ = [
    "OWN_ORDER",
    "QUEUE_ORDER",
    "WAITING_STATES",
    "QueueSnapshot",
    "explain_wait",
    "live_workers",
    "look_at_queue",
    "next_job",
    "queue_position",
    "room_of",
    "takes_jobs",
]  # fmt: skip

OWN_ORDER = ("team_rank", "not_before", "created_at")
"""The order among the jobs of one person and priority."""
QUEUE_ORDER = ("-priority", *OWN_ORDER)

HOLD_AFTER = timedelta(minutes=10)
WARM_PATIENCE = timedelta(minutes=10)
"""How long a person's own jobs may be passed by later ones whose base the worker holds loaded."""

_CLAIM_LOCK = 4_102_001
# A worker that is stopped in the middle of a claim must not stop all others.
_CLAIM_SETTINGS = "SET LOCAL idle_in_transaction_session_timeout = '10s'"


def next_job(worker: Worker, *, now: datetime | None = None) -> Job | None:
    """Claim the next job for a worker. Two workers never get the same one; None when none may start on it now.

    Between jobs of one person that are equal otherwise, one of `worker.warm_base` goes first.

    Args:
        now: when the choice is made; the database's own time when None.
    """
    if not lifecycle.anything_waits():
        return None
    with transaction.atomic():
        _take_turns()
        worker = Worker.objects.get(pk=worker.pk)
        facts = read_facts(room_of(worker), now=now)
        if not takes_jobs(worker, facts.now):
            return None
        return _Choice(worker, facts).claim()


def _take_turns() -> None:
    with connection.cursor() as cursor:
        cursor.execute(_CLAIM_SETTINGS)
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_CLAIM_LOCK])


@dataclass
class _Choice:
    """One choice for one device."""

    worker: Worker
    facts: Facts

    def __post_init__(self) -> None:
        self.room = room_of(self.worker)
        self.fitting = {turn.head.group: turn.fitting for turn in self.facts.turns}
        self._others: list[Room] | None = None

    def claim(self) -> Job | None:
        standing = self.facts.standing
        heads = [turn.head for turn in self.facts.turns if standing.may_start(turn.head.team_id)]
        # A job that is owed a device stands for its person even when it is not their first.
        owed = [job for job in self.facts.owed if standing.may_start(job.team_id) and job not in heads]
        ends_within: float | None = None
        for head in heads_in_turn([*heads, *owed], standing):
            is_free = head.owed_since is None
            if self.room.fits(head) and (ends_within is None or head.expected_seconds <= ends_within):
                if (claimed := self._take(head, by_warmth=is_free)) is not None:
                    return claimed
                if (claimed := self._take_other(head, ends_within)) is not None:
                    return claimed
                continue
            if ends_within is None and not self.room.fits(head):
                self._note_passed(head)
                ends_within = self._held_for(head)
            if (claimed := self._take_other(head, ends_within)) is not None:
                return claimed
        return None

    def _take(self, job: Waiting, *, by_warmth: bool) -> Job | None:
        # A warm trainer serves the team alone for which it is warm.
        is_fresh = self.facts.standing.moment - job.not_before < WARM_PATIENCE.total_seconds()
        if by_warmth and self.worker.warm_base_id is not None and self.worker.warm_team_id == job.team_id and is_fresh:
            equal = self._jobs_of(job).filter(base_model=self.worker.warm_base_id, team_rank=job.team_rank)
            if (claimed := self._lock_and_claim(equal)) is not None:
                return claimed
        return self._lock_and_claim(Job.objects.filter(pk=job.id))

    def _take_other(self, head: Waiting, ends_within: float | None) -> Job | None:
        """Another job of the same person and priority that fits."""
        if self.fitting.get(head.group) is None:
            return None
        jobs = self._jobs_of(head)
        return self._lock_and_claim(jobs if ends_within is None else jobs.filter(expected_seconds__lte=ends_within))

    def _jobs_of(self, head: Waiting) -> QuerySet[Job]:
        jobs = Job.objects.filter(
            team=head.team_id, created_by=head.user_id, priority=head.priority, num_gpus__lte=self.room.num_gpus
        )
        return jobs if self.room.free_bytes is None else jobs.filter(memory_bytes__lte=self.room.free_bytes)

    def _lock_and_claim(self, jobs: QuerySet[Job]) -> Job | None:
        waiting = jobs.filter(state__in=WAITING_STATES, not_before__lte=self.facts.now).order_by(*OWN_ORDER)
        job = waiting.select_for_update(skip_locked=True, of=("self",)).only("pk", "owed_since").first()
        claimed = lifecycle.claim(job, self.worker) if job is not None else None
        if claimed is None:
            return None
        if claimed.owed_since is not None:
            Job.objects.filter(pk=claimed.pk).update(owed_since=None)
            claimed.owed_since = None
        LastStart.objects.bulk_create(
            [LastStart(team_id=claimed.team_id, priority=claimed.priority, at=self.facts.now)],
            update_conflicts=True, unique_fields=["team", "priority"], update_fields=["at"],
        )  # fmt: skip
        return claimed

    def _note_passed(self, head: Waiting) -> None:
        """It was this job's turn: it goes first on the next device that it fits, if there is one."""
        if head.owed_since is None and any(room.could_hold(head) for room in self._rooms()):
            Job.objects.filter(pk=head.id, state__in=WAITING_STATES).update(owed_since=self.facts.now)

    def _rooms(self) -> list[Room]:
        if self._others is None:
            self._others = [room_of(one) for one in self.facts.workers if takes_jobs(one, self.facts.now)]
        return self._others

    def _held_for(self, head: Waiting) -> float | None:
        """Within how many seconds a job must end that runs here before one that is owed the device; None: no matter."""
        if head.owed_since is None or not self.room.could_hold(head):
            return None
        if self.facts.standing.moment - head.owed_since < HOLD_AFTER.total_seconds():
            return None
        if (self.worker.used_by_others_bytes or 0) + head.memory_bytes > (self.room.whole_bytes or 0):
            return None
        beside = Worker.objects.filter(host=self.worker.host).exclude(pk=self.worker.pk).values_list("pk", flat=True)
        neighbours = set(beside)
        ends = [job.seconds_left for job in self.facts.running if job.worker_id in neighbours]
        return max(ends) if ends else None

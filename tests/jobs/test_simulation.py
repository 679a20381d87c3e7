"""A busy day of a studio, played with the real choice of the next job on a real database and a clock of its own.

Only time is made up: attempts are given the simulated times at which they began and ended before what they used is
charged. All else, the choice, limits, usage and its decay, is the product's own code. Everything random has a seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest
from django.utils import timezone

from jobs import scheduling, usage
from jobs.models import Job, JobAttempt, JobState, TeamQuota, Worker
from studio.accounts.models import Role, Team, User
from studio.catalogue.models import BaseModel
from tests.conftest import make_member
from tests.jobs.making import make_ready_version, make_recipe, make_worker

GIBIBYTE = 1024**3
HOUR = 3600.0


@dataclass
class Studio:
    """Devices, a clock in seconds from the start, and who has held a device for how long."""

    devices: list[Worker]
    # In the past, for a job is never given out before its `not_before` by the database's own clock.
    began_at: datetime = field(default_factory=lambda: timezone.now() - timedelta(days=5))
    time: float = 0.0
    idle: list[Worker] = field(default_factory=list)
    starts: dict[uuid.UUID, float] = field(default_factory=dict)
    arrivals: dict[uuid.UUID, float] = field(default_factory=dict)
    held: list[tuple[User, float, float]] = field(default_factory=list)
    on_end: Callable[[User], None] = lambda user: None

    def __post_init__(self) -> None:
        self.idle = list(self.devices)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._seconds: dict[uuid.UUID, float] = {}

    def at(self, time: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), what))

    def submit(self, team: Team, user: User, seconds: float, *, gib: float = 8, priority: int = 0) -> uuid.UUID:
        """Queue a job now that will take so long; the studio expects it to within a factor of two."""
        moment = self._moment(self.time)
        base, _ = BaseModel.objects.get_or_create(name="tiny", defaults={"folder": "/nowhere", "revision": "1" * 64})
        recipe = make_recipe().to_dict()
        job = Job.objects.create(
            team=team, created_by=user, name="simulated", recipe=recipe, asked_recipe=recipe, base_model=base,
            dataset_version=make_ready_version(team, user), not_before=moment, idempotency_key=uuid.uuid4().hex,
            needs={"gpus": 1, "memory_bytes": round(gib * GIBIBYTE)}, priority=priority,
            expected_seconds=seconds * 2 ** random.Random(len(self.arrivals)).uniform(-1, 1),
        )  # fmt: skip
        self._seconds[job.pk] = seconds
        self.arrivals[job.pk] = self.time
        return job.pk

    def play(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.time, _number, what = heapq.heappop(self._events)
            what()
            if not self._events or self._events[0][0] > self.time:
                self._give_out()

    def device_seconds(self, until: float) -> dict[User, float]:
        """Seconds of each person up to a time, what runs then included."""
        spent: dict[User, float] = defaultdict(float)
        for user, start, end in self.held:
            spent[user] += max(0.0, min(end, until) - start)
        return spent

    def _give_out(self) -> None:
        for worker in list(self.idle):
            job = scheduling.next_job(worker, now=self._moment(self.time))
            if job is None:
                continue
            self.idle.remove(worker)
            self.starts[job.pk] = self.time
            JobAttempt.objects.filter(job=job, number=job.attempt).update(started_at=self._moment(self.time))
            end = self.time + self._seconds[job.pk]
            self.held.append((job.created_by, self.time, end))
            self.at(end, lambda job=job, worker=worker: self._end(job, worker))  # type: ignore[misc]

    def _end(self, job: Job, worker: Worker) -> None:
        JobAttempt.objects.filter(job=job, number=job.attempt).update(ended_at=self._moment(self.time))
        Job.objects.filter(pk=job.pk).update(state=JobState.CANCELLED, lease_until=None)
        usage.charge(job.pk, job.attempt)
        self.idle.append(worker)
        self.on_end(job.created_by)

    def _moment(self, time: float) -> datetime:
        return self.began_at + timedelta(seconds=time)


def make_studio(*gibibytes: float) -> Studio:
    workers = []
    for slot, size in enumerate(gibibytes):
        worker = make_worker(slot)
        Worker.objects.filter(pk=worker.pk).update(
            memory_bytes=round(size * GIBIBYTE), free_memory_bytes=round(size * GIBIBYTE), host=f"host-{slot}"
        )
        workers.append(worker)
    return Studio(workers)


def keep_busy(studio: Studio, people: dict[User, tuple[Team, float, int]], seed: int) -> None:
    """Each person keeps so many jobs in the line, of about so many seconds: one that ends brings another."""
    chance = random.Random(seed)

    def submit(user: User) -> None:
        team, seconds, _backlog = people[user]
        studio.submit(team, user, chance.uniform(0.5, 1.5) * seconds)

    for user, (_team, _seconds, backlog) in people.items():
        for _ in range(backlog):
            studio.at(0.0, lambda user=user: submit(user))  # type: ignore[misc]
    studio.on_end = submit


def spent_by(studio: Studio, *users: User, hours: float = 24) -> float:
    spent = studio.device_seconds(hours * HOUR)
    return sum(spent[user] for user in users)


@pytest.fixture
def dora(team: Team) -> User:
    return make_member("dora", team, Role.TRAINER)


@pytest.mark.parametrize("seed", [1, 2])
def test_two_teams_of_equal_share_get_equal_time_over_a_busy_day(
    team: Team, bob: User, dora: User, other_team: Team, charlie: User, seed: int
) -> None:
    # One team has two people, longer jobs and three times as many of them in line.
    studio = make_studio(80, 80, 80, 80)
    keep_busy(
        studio,
        {bob: (team, 2400, 9), dora: (team, 2400, 9), charlie: (other_team, 1200, 6)},
        seed,
    )
    studio.play(24 * HOUR)
    ours, theirs = spent_by(studio, bob, dora), spent_by(studio, charlie)
    assert ours + theirs == pytest.approx(4 * 24 * HOUR)
    assert ours == pytest.approx(theirs, rel=0.05)
    assert spent_by(studio, bob) == pytest.approx(spent_by(studio, dora), rel=0.05)


def test_a_share_of_two_gets_twice_the_time_of_a_share_of_one(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    TeamQuota.objects.create(team=team, share=2)
    studio = make_studio(80, 80, 80)
    keep_busy(studio, {bob: (team, 1500, 6), charlie: (other_team, 1500, 6)}, seed=3)
    studio.play(24 * HOUR)
    assert spent_by(studio, bob) == pytest.approx(2 * spent_by(studio, charlie), rel=0.05)


def test_a_big_job_is_not_starved_by_a_stream_of_small_ones(
    team: Team, bob: User, dora: User, other_team: Team, charlie: User
) -> None:
    # Only the first device holds it, and small ones of three people, its own among them, want every device.
    studio = make_studio(80, 24, 24)
    keep_busy(studio, {bob: (team, 1200, 8), dora: (team, 1200, 8), charlie: (other_team, 1200, 8)}, seed=4)
    big: list[uuid.UUID] = []
    for hour in (1, 2, 3):
        studio.at(hour * HOUR, lambda: big.append(studio.submit(team, bob, 3 * HOUR, gib=60)))
    studio.play(24 * HOUR)
    assert len(big) == 3
    waited = [studio.starts[pk] - studio.arrivals[pk] for pk in big]
    assert max(waited) < 12 * HOUR


def test_a_job_of_low_priority_is_not_starved_by_a_stream_of_higher_ones(
    team: Team, bob: User, other_team: Team, charlie: User
) -> None:
    studio = make_studio(80, 80)
    low: list[uuid.UUID] = []
    chance = random.Random(5)
    studio.on_end = lambda user: None

    def urgent() -> None:
        studio.submit(other_team, charlie, chance.uniform(600, 1800), priority=1)

    # More than two devices can do, the whole day.
    for number in range(150):
        studio.at(number * 576.0, urgent)
    studio.at(HOUR, lambda: low.append(studio.submit(team, bob, 1200)))
    studio.at(HOUR, lambda: low.append(studio.submit(other_team, charlie, 1200, priority=-1)))
    studio.play(23 * HOUR)
    waited = [studio.starts[pk] - studio.arrivals[pk] for pk in low]
    assert waited[0] > HOUR
    assert max(waited) < 16 * HOUR


def test_in_a_mixed_day_every_job_that_was_queued_gets_its_device(
    team: Team, bob: User, dora: User, other_team: Team, charlie: User
) -> None:
    TeamQuota.objects.create(team=team, max_running_jobs=2)
    studio = make_studio(80, 40, 24)
    chance = random.Random(6)
    for _ in range(90):
        owner, user = chance.choice([(team, bob), (team, dora), (other_team, charlie)])
        seconds, gib = chance.uniform(300, 3600), chance.choice([6, 6, 12, 20, 36, 70])
        priority = chance.choice([-1, 0, 0, 0, 1])
        studio.at(
            chance.uniform(0, 16 * HOUR),
            lambda owner=owner, user=user, seconds=seconds, gib=gib, priority=priority: studio.submit(  # type: ignore[misc]
                owner, user, seconds, gib=gib, priority=priority
            ),
        )
    studio.play(72 * HOUR)
    assert set(studio.starts) == set(studio.arrivals)
    assert len(studio.starts) == 90
    assert max(studio.starts[pk] - studio.arrivals[pk] for pk in studio.starts) < 24 * HOUR

"""The order in which waiting jobs get devices: priority, then teams, then people, by what they have used lately.

**Between teams and people.** The team goes first that has used least for its share, and in it the person who has
used least: the levels of Slurm's Fair Tree (https://slurm.schedmd.com/fair_tree.html), which sorts the siblings of
each level by share / usage. What was used fades with a half-life (jobs/usage.py). Jobs that run count with what they
have held so far and are expected to hold still, so that of two free devices one team does not get both.

**A whole queue.** Each start makes its team and person heavier. A job's place in line is therefore its start tag, the
usage of its team when everything of the team before it has started, divided by the team's share (start-time fair
queueing: Goyal, Vin and Cheng 1996). Sorting by start tags is what choosing again and again would give.

**Ageing.** Priorities alone would let a low one wait for ever. A team's jobs of one priority rise by one for every
`AGEING` in which none of them was started, up to the highest priority that waits; among jobs of equal priority
ageing changes nothing, so shares stay exact.

**Jobs that did not fit** when it was their turn are owed a device (`Job.owed_since`) and go first on the next that they
fit, the longest owed first; see `scheduling.next_job` for when a device is held free for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from operator import attrgetter
from typing import NamedTuple

AGEING = timedelta(hours=4)

Person = tuple[int, int]
"""A team's id and a person's: somebody in two teams counts in each."""


@dataclass(frozen=True)
class Quota:
    """A team's share and limits; None is no limit."""

    share: int = 1
    max_running_jobs: int | None = None
    max_gpu_hours: float | None = None
    window_days: int = 7


class Waiting(NamedTuple):
    """A waiting job, as far as its turn depends on it; times in seconds since the epoch, for there are many."""

    id: str
    team_id: int
    user_id: int
    priority: int
    team_rank: int
    not_before: float
    created_at: float
    num_gpus: int
    memory_bytes: int
    expected_seconds: float
    owed_since: float | None = None

    @property
    def person(self) -> Person:
        return self.team_id, self.user_id

    @property
    def group(self) -> tuple[int, int, int]:
        """Jobs of one person and priority start in their own order."""
        return self.team_id, self.user_id, self.priority

    @property
    def cost(self) -> float:
        """Device seconds that it should take."""
        return self.num_gpus * self.expected_seconds


@dataclass
class Standing:
    """What teams and people have used and what they may use, at one moment."""

    now: datetime
    quotas: Mapping[int, Quota] = field(default_factory=dict)
    usage: Mapping[Person, float] = field(default_factory=dict)
    """Faded device seconds, what runs included."""
    num_running: Mapping[int, int] = field(default_factory=dict)
    gpu_hours: Mapping[int, float] = field(default_factory=dict)
    """GPU-hours of a team within its window; only of teams with such a limit."""
    last_starts: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """When a team's jobs of a priority last got a device, in seconds since the epoch."""

    def __post_init__(self) -> None:
        self.moment = self.now.timestamp()
        teams: dict[int, float] = defaultdict(float)
        for (team_id, _user_id), seconds in self.usage.items():
            teams[team_id] += seconds
        self._teams = dict(teams)

    def quota(self, team_id: int) -> Quota:
        return self.quotas.get(team_id, DEFAULT_QUOTA)

    def used_by_team(self, team_id: int) -> float:
        return self._teams.get(team_id, 0.0)

    def used_by_person(self, person: Person) -> float:
        return self.usage.get(person, 0.0)

    def is_at_running_limit(self, team_id: int) -> bool:
        limit = self.quota(team_id).max_running_jobs
        return limit is not None and self.num_running.get(team_id, 0) >= limit

    def is_at_hours_limit(self, team_id: int) -> bool:
        limit = self.quota(team_id).max_gpu_hours
        return limit is not None and self.gpu_hours.get(team_id, 0.0) >= limit

    def may_start(self, team_id: int) -> bool:
        return not self.is_at_running_limit(team_id) and not self.is_at_hours_limit(team_id)


DEFAULT_QUOTA = Quota()


def levels_of(oldest: Mapping[tuple[int, int], float], standing: Standing) -> dict[tuple[int, int], int]:
    """The level of every (team, priority) that waits, aged; `oldest` says since when its oldest job waits."""
    if not oldest:
        return {}
    top = max(priority for _team, priority in oldest)
    levels = {}
    for (team_id, priority), waits_since in oldest.items():
        unserved_since = max(waits_since, standing.last_starts.get((team_id, priority), waits_since))
        steps = max(0, int((standing.moment - unserved_since) // AGEING.total_seconds()))
        levels[team_id, priority] = min(top, priority + steps)
    return levels


def heads_in_turn(heads: Sequence[Waiting], standing: Standing) -> list[Waiting]:
    """The first waiting job of each person and priority, in the order in which a free device is offered to them."""
    levels = levels_of(_oldest(heads), standing)
    first_come = _first_come(heads)

    def turn(job: Waiting) -> tuple[float | str, ...]:
        team_used = standing.used_by_team(job.team_id) / standing.quota(job.team_id).share
        level = -levels[job.team_id, job.priority]
        return (
            level, *_owed(job), team_used, *first_come[job.team_id], job.team_rank, standing.used_by_person(job.person),
            job.not_before, job.created_at, job.id,
        )  # fmt: skip

    return sorted(heads, key=turn)


def in_turn(jobs: Iterable[Waiting], standing: Standing) -> list[Waiting]:
    """All waiting jobs in the order in which they get devices, if each fits and takes as long as expected."""
    # From here on a job's number stands for its place among the jobs of one person, and keys are short.
    numbered = sorted(jobs, key=_OWN_ORDER)
    levels = levels_of(_oldest(numbered), standing)
    people: dict[Person, list[tuple[int, int, float, int]]] = defaultdict(list)
    for number, job in enumerate(numbered):
        level = -levels[job.team_id, job.priority]
        people[job.team_id, job.user_id].append((level, *_owed(job), number))
    teams: dict[int, list[tuple[int, int, float, int, float, int]]] = defaultdict(list)
    for person, own in people.items():
        own.sort()
        used, team = standing.used_by_person(person), teams[person[0]]
        for level, is_free, owed_since, number in own:
            job = numbered[number]
            team.append((level, is_free, owed_since, job.team_rank, used, number))
            used += job.num_gpus * job.expected_seconds
    first_come = _first_come(numbered)
    line: list[tuple[float | int, ...]] = []
    for team_id, waiting in teams.items():
        waiting.sort()
        used, share = standing.used_by_team(team_id), standing.quota(team_id).share
        for level, is_free, owed_since, rank, own_used, number in waiting:
            line.append((level, is_free, owed_since, used / share, *first_come[team_id], rank, own_used, number))
            job = numbered[number]
            used += job.num_gpus * job.expected_seconds
    line.sort()
    return [numbered[int(key[-1])] for key in line]


_OWN_ORDER = attrgetter("team_rank", "not_before", "created_at", "id")


def _owed(job: Waiting) -> tuple[int, float]:
    return (0, job.owed_since) if job.owed_since is not None else (1, 0.0)


def _first_come(jobs: Iterable[Waiting]) -> dict[int, tuple[float, float, int]]:
    """Which of two teams that have used the same goes first: the one whose job came first. Not by rank, which says
    nothing beside another team's."""
    found: dict[int, tuple[float, float, int]] = {}
    for job in jobs:
        came = (job.not_before, job.created_at, job.team_id)
        found[job.team_id] = min(came, found.get(job.team_id, came))
    return found


def _oldest(jobs: Iterable[Waiting]) -> dict[tuple[int, int], float]:
    oldest: dict[tuple[int, int], float] = {}
    for job in jobs:
        key = (job.team_id, job.priority)
        oldest[key] = min(job.not_before, oldest.get(key, job.not_before))
    return oldest

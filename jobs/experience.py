"""What a team's finished jobs, and in sums those of all teams, say about the next one: its time and its memory.

Kept per process for as long as no further job has succeeded, so that the New job form asks Postgres for two ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from uuid import UUID

from django.db.models import OuterRef, QuerySet, Subquery

from jobs.durations import Prediction, learn
from jobs.finished import MAX_LEARNED_FROM, Finished, features_of, finished_jobs
from jobs.models import TRAINED, Job, TeamQuota
from studio.accounts.models import Team
from studio.datasets.models import DatasetVersion
from workers.measured_memory import MeasuredMemory, learn_memory

MAX_TEAMS = 256
"""Teams whose experience a process keeps."""


@dataclass(frozen=True)
class Experience:
    """What has been learned for one team."""

    prediction: Prediction
    finished: Sequence[Finished]
    """The newest of all teams; other teams' count only in sums over a device."""
    team_id: int
    _memory: dict[str, MeasuredMemory] = field(default_factory=dict)

    def memory_on(self, device: str) -> MeasuredMemory:
        """What runs have held on such a device."""
        if device not in self._memory:
            runs = [replace(one.memory, is_own=one.team_id == self.team_id) for one in self.finished if one.memory]
            self._memory[device] = learn_memory(runs, device)
        return self._memory[device]


def with_experience(versions: QuerySet[DatasetVersion]) -> QuerySet[DatasetVersion]:
    """Dataset versions with what `quota_and_experience` needs to know of them, in their own query."""
    of_team = _newest(Job.objects.filter(team=OuterRef("dataset__team")))
    return versions.select_related("dataset__team__quota").annotate(
        newest_own=Subquery(of_team[:1]), newest=Subquery(_newest(Job.objects.all())[:1])
    )


def quota_and_experience(version: DatasetVersion) -> tuple[TeamQuota, Experience]:
    """The quota of a dataset version's team, which has its prices, and what the newest finished jobs say for it."""
    if not hasattr(version, "newest_own"):
        version = with_experience(DatasetVersion.objects.filter(pk=version.pk)).get()
    team = version.dataset.team
    quota: TeamQuota = getattr(team, "quota", None) or TeamQuota(team=team)
    return quota, _experience(team.pk, version.newest_own, version.newest)  # type: ignore[attr-defined]


def experience_of(team: Team) -> Experience:
    """What the newest finished jobs say for a team."""
    own, newest = Team.objects.filter(pk=team.pk).values_list(
        Subquery(_newest(Job.objects.filter(team=OuterRef("pk")))[:1]), Subquery(_newest(Job.objects.all())[:1])
    )[0]
    return _experience(team.pk, own, newest)


def _newest(jobs: QuerySet[Job]) -> QuerySet[Job, UUID]:
    """Ids of succeeded trainings, the newest first."""
    return jobs.filter(TRAINED).order_by("-finished_at").values_list("pk", flat=True)


@lru_cache(maxsize=MAX_TEAMS)
def _experience(team_id: int, own: UUID | None, newest: UUID | None) -> Experience:
    """The experience as of these newest finished jobs, the team's own and that of all teams; None: there is none."""
    if newest is None:
        return Experience(learn([], []), (), team_id)
    of_team = _newest(Job.objects.filter(team=team_id))[:MAX_LEARNED_FROM]
    ids = _newest(Job.objects.all())[:MAX_LEARNED_FROM].union(of_team)
    # The team's own ones that are older than the newest of all teams come last.
    finished = finished_jobs(Job.objects.filter(pk__in=ids), limit=2 * MAX_LEARNED_FROM)
    mine = [one for one in finished if one.team_id == team_id][:MAX_LEARNED_FROM]
    return Experience(learn(mine, finished[:MAX_LEARNED_FROM]), finished, team_id)


def forget() -> None:
    """Read anew what the next estimate needs, as after a job's end."""
    _experience.cache_clear()


def expected_seconds(team: Team, estimate: Mapping[str, Any], *, method: str, base_model: str) -> float | None:
    """Seconds that a job of the team should hold a device; None when it has no estimate to begin with.

    Args:
        estimate: as stored with a job: seconds_low, seconds_high, num_tokens, device.
    """
    features = features_of(estimate, method=method, base_model=base_model)
    return None if features is None else experience_of(team).prediction.expected(features)

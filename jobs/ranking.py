"""Where a job stands among its own team's jobs: three priorities, and an order within each.

Both are in `Job.team_rank`, the lower first: a band of ranks for each priority, whose start is what a job has that
nobody has moved. Who is moved gets a rank below the start, so that a job that comes later stands behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from jobs.models import Job

BAND = 2**40
"""Ranks of one priority; more than all jobs that a team will ever move."""

TEAM_PRIORITIES = {"high": -BAND, "normal": 0, "low": BAND}
"""Of a job among its team's jobs: where its band starts."""

PRIORITIES = {"high": 1, "normal": 0, "low": -1}
"""Of a job among the jobs of all teams, as `Job.priority`."""


def team_priority(job: Job) -> str:
    """high, normal or low among its team's jobs."""
    return min(TEAM_PRIORITIES, key=lambda name: abs(job.team_rank - TEAM_PRIORITIES[name]))


def studio_priority(job: Job) -> str:
    """high, normal or low among the jobs of all teams."""
    return "high" if job.priority > 0 else "low" if job.priority < 0 else "normal"


def top_rank(peers: Sequence[Job]) -> int:
    """The rank of a job that goes before all these, which have one priority and stand in their order."""
    return min(peers[0].team_rank, TEAM_PRIORITIES[team_priority(peers[0])]) - 1


def moved_ranks(peers: Sequence[Job], at: int, to: int) -> dict[UUID, int]:
    """The ranks to store when the job at one place of `peers` swaps places with the one at another beside it.

    `peers` have one priority and stand in their order, by rank and, where that is equal, by time.
    """
    start = TEAM_PRIORITIES[team_priority(peers[0])]
    order = list(peers)
    order[at], order[to] = order[to], order[at]
    # Everybody before the later of the two needs a rank of their own, and so do those who have one.
    num_ranked = max(at, to, *(place for place, job in enumerate(peers) if job.team_rank < start), 0) + 1
    ranks = {job.pk: start - num_ranked + place for place, job in enumerate(order[:num_ranked])}
    known = {job.pk: job.team_rank for job in peers}
    return {pk: rank for pk, rank in ranks.items() if rank != known[pk]}

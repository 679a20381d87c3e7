"""When waiting jobs will likely start: the queue played forward over the devices that there are."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.fair_share import Standing, Waiting
from jobs.standing import Room

MAX_STARTS = 300
"""Starts that are played one by one; what comes later is spread evenly over the devices."""
MAX_LOOKED_AT = 100
"""Jobs of a team among which one that fits is looked for."""


@dataclass(frozen=True)
class Device:
    """A device, busy for so many seconds still with a job of `team_id`, or free."""

    room: Room
    busy_seconds: float = 0.0
    team_id: int | None = None
    takes_jobs: bool = True


@dataclass(frozen=True)
class Forecast:
    """The waiting jobs in the order in which they start, and in how many seconds each does; None: not as things are."""

    order: list[str]
    starts: Mapping[str, float]


class _Play:
    """Devices taking jobs in turn (list scheduling), with the limits of teams."""

    def __init__(
        self, line: Sequence[Waiting], devices: Sequence[Device], standing: Standing, hours_free_in: Mapping[int, float]
    ) -> None:
        self.standing, self.hours_free_in, self.devices = standing, hours_free_in, devices
        self.queues: dict[int, list[tuple[int, Waiting]]] = defaultdict(list)
        for place, job in enumerate(line):
            self.queues[job.team_id].append((place, job))
        self.num_running = dict(standing.num_running)
        self.ends = [(device.busy_seconds, index, device.team_id) for index, device in enumerate(devices)]
        heapq.heapify(self.ends)
        self.starts: dict[str, float] = {}
        not_yet = [self._ready_in(job) for job in line if job.not_before > standing.moment]
        self.ready = sorted([*not_yet, *hours_free_in.values()])

    def run(self) -> None:
        tries = 0
        while self.ends and len(self.starts) < MAX_STARTS and tries < 4 * MAX_STARTS:
            tries += 1
            time, index, team_id = heapq.heappop(self.ends)
            if team_id is not None:
                self.num_running[team_id] = self.num_running.get(team_id, 1) - 1
            if not self.devices[index].takes_jobs:
                continue
            job = self._first_for(self.devices[index].room, time)
            if job is not None:
                self.starts[job.id] = time
                self.num_running[job.team_id] = self.num_running.get(job.team_id, 0) + 1
                heapq.heappush(self.ends, (time + job.expected_seconds, index, job.team_id))
            elif (later := self._next_change(time)) is not None:
                heapq.heappush(self.ends, (later, index, None))

    def _first_for(self, room: Room, time: float) -> Waiting | None:
        best: tuple[int, int, int] | None = None
        for team_id, queue in self.queues.items():
            if not queue or (best is not None and queue[0][0] > best[0]) or not self._may_start(team_id, time):
                continue
            for number, (place, job) in enumerate(queue[:MAX_LOOKED_AT]):
                if room.fits(job) and self._ready_in(job) <= time:
                    if best is None or place < best[0]:
                        best = (place, team_id, number)
                    break
        return self.queues[best[1]].pop(best[2])[1] if best is not None else None

    def _may_start(self, team_id: int, time: float) -> bool:
        limit = self.standing.quota(team_id).max_running_jobs
        if limit is not None and self.num_running.get(team_id, 0) >= limit:
            return False
        return not self.standing.is_at_hours_limit(team_id) or self.hours_free_in.get(team_id, float("inf")) <= time

    def _ready_in(self, job: Waiting) -> float:
        return job.not_before - self.standing.moment

    def _next_change(self, time: float) -> float | None:
        """When a device that found nothing looks again: at the next end of a job, or when something becomes ready."""
        times = [end for end, _index, team_id in self.ends if team_id is not None and end >= time]
        times += [ready for ready in self.ready if ready > time][:1]
        return min(times) if times else None


def forecast(
    line: Sequence[Waiting],
    devices: Sequence[Device],
    standing: Standing,
    hours_free_in: Mapping[int, float] | None = None,
) -> Forecast:
    """Play the queue forward.

    Args:
        line: `fair_share.in_turn` of all waiting jobs.
        hours_free_in: for teams that have used up their GPU-hours, in how many seconds they may start a job again.
    """
    play = _Play(line, devices, standing, hours_free_in or {})
    play.run()
    starts = dict(play.starts)
    rest = [job for job in line if job.id not in starts]
    taking = [device.room for device in devices if device.takes_jobs]
    rooms = set(taking)
    if len(starts) >= MAX_STARTS:
        time = max(starts.values())
        for job in rest:
            if any(room.fits(job) for room in rooms):
                starts[job.id] = time
                time += job.cost / len(taking)
    # The sort is stable: jobs that start at one moment keep the order in which they were taken, which is the dict's.
    order = sorted(starts, key=lambda pk: starts[pk])
    return Forecast([*order, *(job.id for job in rest if job.id not in starts)], starts)

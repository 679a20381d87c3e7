"""What teams and people have used of the devices: charged when an attempt ends, fading with time for the queue.

A second of a device counts half as much one half-life later (Slurm's multifactor priority plugin with
PriorityDecayHalfLife, https://slurm.schedmd.com/priority_multifactor.html). With half-life H, an attempt that held
a device for d seconds until now weighs the integral of 2^(-t / H) over t from 0 to d: H / ln 2 (1 - 2^(-d / H)).
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db import connection

HALF_LIFE = timedelta(days=7)
"""Slurm's default for PriorityDecayHalfLife."""

_HALF_LIFE_SECONDS = HALF_LIFE.total_seconds()

_SPENT = """
    WITH spent AS (
        SELECT job.team_id, job.created_by_id AS user_id, job.num_gpus, attempt.started_at, attempt.ended_at,
               attempt.price_per_gpu_hour::float8 AS price, attempt.currency,
               EXTRACT(EPOCH FROM attempt.ended_at - attempt.started_at)::float8 AS seconds
        FROM jobs_jobattempt attempt JOIN jobs_job job ON job.id = attempt.job_id
        WHERE attempt.job_id = %(job)s AND attempt.number = %(number)s AND attempt.ended_at > attempt.started_at
    )
"""
_FADED = "{amount} * power(0.5, EXTRACT(EPOCH FROM {until} - {since})::float8 / %(half_life)s)"
_LATEST = "GREATEST(EXCLUDED.decayed_at, jobs_usage.decayed_at)"
_CHARGE_PERSON = f"""
    {_SPENT}
    INSERT INTO jobs_usage (team_id, user_id, device_seconds, decayed_at)
    SELECT team_id, user_id,
           num_gpus * %(half_life)s / ln(2.0::float8) * (1 - power(0.5, seconds / %(half_life)s)), ended_at
    FROM spent
    ON CONFLICT (team_id, user_id) DO UPDATE SET
        device_seconds =
            {_FADED.format(amount="jobs_usage.device_seconds", until=_LATEST, since="jobs_usage.decayed_at")}
            + {_FADED.format(amount="EXCLUDED.device_seconds", until=_LATEST, since="EXCLUDED.decayed_at")},
        decayed_at = {_LATEST}
"""  # noqa: S608 our own names
_CHARGE_HOURS = f"""
    {_SPENT}, hours AS (
        SELECT team_id, hour, currency, price, num_gpus * EXTRACT(
            EPOCH FROM LEAST(ended_at, hour + interval '1 hour') - GREATEST(started_at, hour))::float8 AS seconds
        FROM spent, generate_series(date_trunc('hour', started_at), ended_at, interval '1 hour') AS hour
    )
    INSERT INTO jobs_usagehour (team_id, hour, currency, device_seconds, priced_seconds, cost)
    SELECT team_id, hour, currency, seconds, CASE WHEN price IS NULL THEN 0 ELSE seconds END,
           COALESCE(price, 0) * seconds / 3600
    FROM hours
    ON CONFLICT (team_id, hour, currency) DO UPDATE SET
        device_seconds = jobs_usagehour.device_seconds + EXCLUDED.device_seconds,
        priced_seconds = jobs_usagehour.priced_seconds + EXCLUDED.priced_seconds,
        cost = jobs_usagehour.cost + EXCLUDED.cost
"""  # noqa: S608 our own names


def charge(job_id: UUID, attempt: int) -> None:
    """Add an attempt that has ended to what its person and team have used. Call it once per attempt."""
    values: dict[str, Any] = {"job": job_id, "number": attempt, "half_life": _HALF_LIFE_SECONDS}
    with connection.cursor() as cursor:
        cursor.execute(_CHARGE_PERSON, values)
        cursor.execute(_CHARGE_HOURS, values)


def faded(device_seconds: float, age_seconds: float) -> float:
    """What device seconds still weigh that long after they were used."""
    return device_seconds * 0.5 ** (age_seconds / _HALF_LIFE_SECONDS)


def weight_of_stretch(seconds: float) -> float:
    """What a device weighs that was held for so long until now."""
    return _HALF_LIFE_SECONDS / math.log(2) * (1 - 0.5 ** (max(0.0, seconds) / _HALF_LIFE_SECONDS))

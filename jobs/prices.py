"""What a device's hour costs a team, and what its jobs have cost. A price is fixed when an attempt begins.

Later changes of the team's prices leave what was paid by then as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

from django import forms
from django.db.models import F, Q, Sum
from django.utils import timezone

from jobs.models import LEASED_STATES, Job, JobAttempt, TeamQuota, UsageHour
from studio.accounts.models import Team
from studio.api.schemas import Out
from studio.costs import Cost, Stretch, cost_of, plain_price

MAX_PRICE, DECIMAL_PLACES = 100_000, 4
MAX_DEVICE_PRICES, MAX_DEVICE_CHARACTERS = 20, 60


@dataclass(frozen=True)
class Price:
    """What one device costs an hour."""

    amount: Decimal
    currency: str
    device: str
    """The device that it is the price of."""


def price_of(quota: TeamQuota, device: str) -> Price | None:
    """A team's price of a device's hour: the longest name of `device_prices` that stands in the device's, else the
    price of every device; None where there is neither."""
    named = [(name, price) for name, price in quota.device_prices if name.casefold() in device.casefold()]
    if named:
        return Price(Decimal(max(named, key=lambda pair: len(pair[0]))[1]), quota.currency, device)
    if quota.price_per_gpu_hour is None:
        return None
    return Price(quota.price_per_gpu_hour, quota.currency, device)


def frozen_price(team_id: int, device: str) -> dict[str, Any]:
    """The columns of a new attempt that say what its device costs the team now."""
    quota = TeamQuota.objects.filter(team_id=team_id).first()
    price = price_of(quota, device) if quota is not None else None
    return {} if price is None else {"price_per_gpu_hour": price.amount, "currency": price.currency}


def has_prices(quota: TeamQuota) -> bool:
    """Whether the team has said what any device costs."""
    return quota.price_per_gpu_hour is not None or bool(quota.device_prices)


def checked_price(text: str) -> Decimal:
    """A price from text; ValueError with a sentence for what is none."""
    try:
        price = Decimal(text)
    except InvalidOperation:
        raise ValueError(f'"{text}" is no number. Write the price with a point, as in 2.50.') from None
    if not price.is_finite() or not 0 <= price <= MAX_PRICE:
        raise ValueError(f"A price is between 0 and {MAX_PRICE:,}; {text} is not.")
    if price != round(price, DECIMAL_PLACES):
        raise ValueError(f"{text} has more than {DECIMAL_PLACES} decimal places.")
    return round(price, DECIMAL_PLACES)


def checked_device_prices(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Pairs of a device's name, or a part of it, and its price, as they are stored; ValueError for a bad one."""
    found: list[list[str]] = []
    for name, price in pairs:
        if not name or len(name) > MAX_DEVICE_CHARACTERS:
            raise ValueError(f"A device's name, or a part of it, has 1 to {MAX_DEVICE_CHARACTERS} characters.")
        if name.casefold() in {known.casefold() for known, _price in found}:
            raise ValueError(f'"{name}" has two prices. Leave one of them out.')
        found.append([name, plain_price(checked_price(price))])
    if len(found) > MAX_DEVICE_PRICES:
        raise ValueError(f"There are {len(found)} prices; {MAX_DEVICE_PRICES} is the most.")
    return found


class DevicePricesField(forms.CharField):
    """Prices of devices as text, one a line: "H100: 2.50"."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(required=False, widget=forms.Textarea(attrs={"rows": 3, "spellcheck": "false"}), **kwargs)

    def prepare_value(self, value: Any) -> Any:
        return value if isinstance(value, str) else "\n".join(f"{name}: {price}" for name, price in value or ())

    def clean(self, value: Any) -> Any:
        pairs = []
        text = super().clean(value)
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            name, colon, price = (part.strip() for part in line.rpartition(":"))
            if not colon:
                raise forms.ValidationError(
                    f'Line {number}: "{line.strip()[:80]}" has no colon. Write a device and its price: H100: 2.50'
                )
            try:
                checked_device_prices([(name, price)])
            except ValueError as error:
                raise forms.ValidationError(f"Line {number}: {error}") from None
            pairs.append((name, price))
        try:
            return checked_device_prices(pairs)
        except ValueError as error:
            raise forms.ValidationError(str(error)) from None

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool(self.prepare_value(initial) != self.prepare_value(data))


def cost_of_attempts(attempts: Iterable[JobAttempt], num_gpus: int) -> Cost:
    """What attempts have cost, failed and lost ones too; one that runs counts until now."""
    return cost_of(_stretch(one, num_gpus) for one in attempts)


def costs_of_jobs(jobs: Sequence[Job]) -> dict[UUID, Cost]:
    """What each of these jobs has cost over all its attempts; one query. Jobs that nobody has run are left out."""
    num_gpus = {job.pk: job.num_gpus for job in jobs if job.attempt}
    if not num_gpus:
        return {}
    found: dict[UUID, list[Stretch]] = {}
    for one in JobAttempt.objects.filter(job__in=num_gpus).only(
        "job_id", "started_at", "ended_at", "price_per_gpu_hour", "currency"
    ):
        found.setdefault(one.job_id, []).append(_stretch(one, num_gpus[one.job_id]))
    return {key: cost_of(stretches) for key, stretches in found.items()}


def _stretch(attempt: JobAttempt, num_gpus: int, *, since: datetime | None = None) -> Stretch:
    """The time that an attempt held its devices, from `since` on."""
    began = max(attempt.started_at, since) if since is not None else attempt.started_at
    seconds = ((attempt.ended_at or timezone.now()) - began).total_seconds()
    return Stretch(max(0.0, seconds), num_gpus, attempt.price_per_gpu_hour, attempt.currency)


@dataclass(frozen=True)
class Period:
    """A stretch of the calendar: from `since` until before `until`."""

    label: str
    since: datetime
    until: datetime | None = None


def calendar_periods(now: datetime) -> list[Period]:
    """This week, this month and the month before, by the studio's time zone; weeks begin on Monday."""
    today = timezone.localtime(now).replace(hour=0, minute=0, second=0, microsecond=0)
    month = today.replace(day=1)
    return [
        Period("This week", today - timedelta(days=today.weekday())),
        Period(f"{month:%B}, so far", month),
        Period(f"{month - timedelta(days=1):%B}", (month - timedelta(days=1)).replace(day=1), month),
    ]


def costs_of_team(team: Team, periods: Sequence[Period]) -> list[Cost]:
    """What a team has used and paid in each of these periods, runs that go on included; two queries.

    Ended attempts count by whole hours of the clock, those that run by the second.
    """
    wanted: dict[str, Any] = {}
    for number, period in enumerate(periods):
        within = Q(hour__gte=period.since) & (Q(hour__lt=period.until) if period.until is not None else Q())
        for name in ("device_seconds", "priced_seconds", "cost"):
            wanted[f"{name}_{number}"] = Sum(name, filter=within)
    rows = list(
        UsageHour.objects.filter(team=team, hour__gte=min(period.since for period in periods))
        .order_by()
        .values("currency")
        .annotate(**wanted)
    )
    running = list(
        JobAttempt.objects.filter(
            job__team=team, job__state__in=LEASED_STATES, number=F("job__attempt"), ended_at=None
        ).annotate(num_gpus=F("job__num_gpus"))
    )
    now = timezone.now()
    found = []
    for number, period in enumerate(periods):
        total = Cost()
        for row in rows:
            total += _hours_cost(row, number)
        if period.until is None or period.until > now:
            total += cost_of(_stretch(one, one.num_gpus, since=period.since) for one in running)
        found.append(total)
    return found


def _hours_cost(row: Mapping[str, Any], number: int) -> Cost:
    seconds, priced = row[f"device_seconds_{number}"] or 0.0, row[f"priced_seconds_{number}"] or 0.0
    amounts = ((row["currency"], row[f"cost_{number}"]),) if priced else ()
    return Cost(seconds / 3600, amounts, (seconds - priced) / 3600)


class CostOut(Out):
    """An amount of money; one per currency that the team has had."""

    currency: str
    amount: float


def cost_values(cost: Cost) -> dict[str, Any]:
    """A cost for the API: GPU-hours, the sums by currency, and the hours that no sum has because none was set."""
    return {
        "gpu_hours": cost.gpu_hours,
        "costs": [{"currency": currency, "amount": round(float(amount), 4)} for currency, amount in cost.amounts],
        "unpriced_gpu_hours": cost.unpriced_hours,
    }

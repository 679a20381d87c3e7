"""A team's share of the devices, its limits and prices: its members look at them, its leads set them; page and API."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import messages
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods
from ninja import Router
from pydantic import Field

from jobs.models import TeamQuota
from jobs.prices import (
    DECIMAL_PLACES,
    MAX_DEVICE_CHARACTERS,
    MAX_DEVICE_PRICES,
    MAX_PRICE,
    CostOut,
    DevicePricesField,
    Period,
    calendar_periods,
    checked_device_prices,
    cost_values,
    costs_of_team,
    has_prices,
)
from jobs.standing import Room, read_facts
from jobs.usage import HALF_LIFE
from studio.accounts.access import TeamRequest, refuse, team_page
from studio.accounts.models import ApiToken, Role, Scope, Team, User, record
from studio.api.auth import ApiRequest, Token
from studio.api.errors import ERRORS, ApiError
from studio.api.schemas import Body, Out
from studio.costs import MAX_CURRENCY_CHARACTERS, Cost, money_per_hour, plain_price

FIELDS = (
    "share", "max_running_jobs", "max_gpu_hours", "window_days", "price_per_gpu_hour", "currency", "device_prices",
)  # fmt: skip
MAX_SHARE, MAX_JOBS, MAX_HOURS, MAX_DAYS = 100, 10_000, 1_000_000, 366

router = Router(tags=["limits"])
may_lead = Token(Scope.WRITE, Role.LEAD)


class QuotaForm(forms.ModelForm):
    """The settings of a team's quota; an empty limit is none."""

    share = forms.IntegerField(
        min_value=1, max_value=MAX_SHARE,
        help_text="Weight among the teams of this studio while devices are scarce: 2 gets twice the time that 1 gets.",
    )  # fmt: skip
    max_running_jobs = forms.IntegerField(
        min_value=1, max_value=MAX_JOBS, required=False, label="Running jobs at once",
        help_text="Further jobs of the team wait. Empty: no limit.",
    )  # fmt: skip
    max_gpu_hours = forms.FloatField(
        min_value=0.1, max_value=MAX_HOURS, required=False, label="GPU-hours in the window",
        help_text="Once they are used up, no further job starts until hours leave the window; running ones go on. "
        "Empty: no limit.",
    )  # fmt: skip
    window_days = forms.IntegerField(
        min_value=1, max_value=MAX_DAYS, label="Window in days", help_text="How far back GPU-hours are counted."
    )
    price_per_gpu_hour = forms.DecimalField(
        min_value=0, max_value=MAX_PRICE, max_digits=10, decimal_places=DECIMAL_PLACES, required=False,
        label="Price of a GPU-hour",
        help_text="Of every device without a price of its own. Empty: what runs on those shows no cost.",
    )  # fmt: skip
    currency = forms.CharField(
        max_length=MAX_CURRENCY_CHARACTERS, required=False,
        help_text="Stands behind every amount: EUR, $, credits. What was paid keeps the currency that it had.",
    )  # fmt: skip
    device_prices = DevicePricesField(
        label="Prices by device",
        help_text="One a line: a part of the device's name, a colon and its price, as in H100: 2.50. The longest name "
        "that stands in the device's counts. A job keeps the price that holds when it starts.",
    )

    class Meta:
        model = TeamQuota
        fields = FIELDS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # As it was written, without the decimal places of the column.
        if (price := self.initial.get("price_per_gpu_hour")) is not None:
            self.initial["price_per_gpu_hour"] = plain_price(Decimal(price))


@dataclass(frozen=True)
class PersonUsage:
    """What a person of the team has used lately, faded, and the share of the team's that this is."""

    name: str
    gpu_hours: float
    percent: float


@dataclass(frozen=True)
class PeriodUsage:
    """What a team has used and paid in a stretch of the calendar."""

    label: str
    cost: Cost


@dataclass(frozen=True)
class TeamUsage:
    """What a team uses now and has used in its window and in the calendar's weeks and months."""

    num_running: int
    window: Cost
    calendar: list[PeriodUsage]
    people: list[PersonUsage]


def quota_of(team: Team) -> TeamQuota:
    """The team's quota; one with the defaults, not stored, when nobody has set it."""
    return TeamQuota.objects.filter(team=team).first() or TeamQuota(team=team)


def change_quota(quota: TeamQuota, *, by: User, token: ApiToken | None = None) -> None:
    """Store a quota, with an audit event that says what it was and is. Idle workers notice at their next look."""
    with transaction.atomic():
        before = quota_of(quota.team)
        changed = {
            name: [_plain(getattr(before, name)), _plain(getattr(quota, name))]
            for name in FIELDS
            if getattr(before, name) != getattr(quota, name)
        }
        if not changed:
            return
        TeamQuota.objects.update_or_create(team=quota.team, defaults={name: getattr(quota, name) for name in FIELDS})
        record("limits.changed", team=quota.team, user=by, token=token, target=quota.team, **changed)


def usage_of(team: Team, quota: TeamQuota) -> TeamUsage:
    """The team's usage now, what runs included."""
    standing = read_facts(Room()).standing
    now = timezone.now()
    periods = [Period("window", now - timedelta(days=quota.window_days)), *calendar_periods(now)]
    window, *costs = costs_of_team(team, periods)
    total = standing.used_by_team(team.pk)
    used = {
        user_id: amount for (team_id, user_id), amount in standing.usage.items() if team_id == team.pk and amount >= 1
    }
    people = [
        PersonUsage(user.display_name(), used[user.pk] / 3600, 100 * used[user.pk] / total)
        for user in User.objects.filter(pk__in=used)
    ]
    return TeamUsage(
        num_running=standing.num_running.get(team.pk, 0),
        window=window,
        calendar=[PeriodUsage(period.label, cost) for period, cost in zip(periods[1:], costs, strict=True)],
        people=sorted(people, key=lambda person: person.gpu_hours, reverse=True),
    )


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
@team_page(Role.VIEWER)
def limits(request: TeamRequest) -> HttpResponse:
    """The team's share, limits, prices, usage and costs; a lead sets them."""
    quota = quota_of(request.team)
    may_edit = request.membership.may(Role.LEAD)
    form = QuotaForm(request.POST or None, instance=quota_of(request.team))
    if request.method == "POST":
        if not may_edit:
            return refuse(request, Role.LEAD)
        if form.is_valid():
            change_quota(form.save(commit=False), by=request.user)
            messages.success(request, "Limits and prices are saved and hold from the next job that starts.")
            return redirect("jobs:limits")
    usage = usage_of(request.team, quota)
    context = {
        "form": form,
        "quota": quota,
        "usage": usage,
        "prices": _price_words(quota),
        "has_costs": has_prices(quota) or any(one.cost.amounts for one in usage.calendar) or bool(usage.window.amounts),
        "may_edit": may_edit,
        "half_life_days": HALF_LIFE.days,
    }
    return render(request, "jobs/limits.html", context, status=422 if form.errors else 200)


def _price_words(quota: TeamQuota) -> list[tuple[str, str]]:
    """(device, price an hour) for people: the named devices, then every other one."""
    found = [(name, money_per_hour(Decimal(price), quota.currency)) for name, price in quota.device_prices]
    if quota.price_per_gpu_hour is not None:
        other = "Every other device" if found else "Every device"
        found.append((other, money_per_hour(quota.price_per_gpu_hour, quota.currency)))
    return found


class DevicePrice(Body):
    """What an hour of the devices costs in whose names `device` stands; the longest such name counts."""

    device: str = Field(min_length=1, max_length=MAX_DEVICE_CHARACTERS)
    price_per_gpu_hour: float = Field(ge=0, le=MAX_PRICE)


class LimitsIn(Body):
    """What a team may use. null for a limit is none."""

    share: int = Field(1, ge=1, le=MAX_SHARE, description="Weight among the teams of the studio.")
    max_running_jobs: int | None = Field(None, ge=1, le=MAX_JOBS)
    max_gpu_hours: float | None = Field(None, ge=0.1, le=MAX_HOURS, description="Within the window.")
    window_days: int = Field(7, ge=1, le=MAX_DAYS)
    price_per_gpu_hour: float | None = Field(None, ge=0, le=MAX_PRICE, description="Of devices without their own.")
    currency: str = Field("", max_length=MAX_CURRENCY_CHARACTERS)
    device_prices: list[DevicePrice] = Field(default_factory=list, max_length=MAX_DEVICE_PRICES)


class PeriodOut(Out):
    """What a team has used and paid in a stretch of the calendar."""

    label: str
    gpu_hours: float
    costs: list[CostOut]
    unpriced_gpu_hours: float = Field(description="Those of `gpu_hours` that ran without a price; in none of `costs`.")


class LimitsOut(Out):
    """A team's share, limits and prices, and what it uses."""

    share: int
    max_running_jobs: int | None
    max_gpu_hours: float | None
    window_days: int
    price_per_gpu_hour: float | None
    currency: str
    device_prices: list[DevicePrice]
    num_running: int
    gpu_hours: float = Field(description="Used within the window, running jobs included.")
    costs: list[CostOut] = Field(description="Of these, each hour at the price that held when its attempt began.")
    unpriced_gpu_hours: float = Field(description="Those of `gpu_hours` that ran without a price; in none of `costs`.")
    calendar: list[PeriodOut] = Field(description="This week, this month and the month before.")


@router.get("limits/", response={200: LimitsOut, **ERRORS}, summary="The team's share, limits and usage")
def get_limits(request: ApiRequest) -> dict[str, Any]:
    """What the team may use and what it has used."""
    return _shown(request.team)


@router.put("limits/", response={200: LimitsOut, **ERRORS}, auth=may_lead, summary="Set the team's share and limits")
def put_limits(request: ApiRequest, body: LimitsIn) -> dict[str, Any]:
    """Set all of them; what is left out gets its default. Needs a token of a lead or an admin."""
    values = body.model_dump()
    if (price := values["price_per_gpu_hour"]) is not None:
        values["price_per_gpu_hour"] = round(Decimal(str(price)), DECIMAL_PLACES)
    pairs = [(one.device, f"{Decimal(str(one.price_per_gpu_hour)):f}") for one in body.device_prices]
    try:
        values["device_prices"] = checked_device_prices(pairs)
    except ValueError as error:
        raise ApiError(422, "invalid", str(error), field="device_prices") from error
    change_quota(TeamQuota(team=request.team, **values), by=request.user, token=request.token)
    return _shown(request.team)


def _shown(team: Team) -> dict[str, Any]:
    quota = quota_of(team)
    usage = usage_of(team, quota)
    values = {name: getattr(quota, name) for name in FIELDS}
    prices = [{"device": name, "price_per_gpu_hour": float(price)} for name, price in quota.device_prices]
    calendar = [{"label": one.label, **cost_values(one.cost)} for one in usage.calendar]
    return {
        **values, "device_prices": prices, "num_running": usage.num_running, **cost_values(usage.window),
        "calendar": calendar,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Decimal) else value

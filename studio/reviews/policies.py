"""A team's policy: how many approvals and which gates, in versions. A running review keeps the one it began with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from django.db import IntegrityError, connection, transaction

from studio.accounts.models import ApiToken, Team, User, record
from studio.catalogue.findings import Thresholds
from studio.reviews.gates import Gate, Threshold, gates
from studio.reviews.models import Policy
from workers.errors import ExplainedError
from workers.scans import scans as scan_plugins

MAX_APPROVALS = 10
MAX_ROWS = 1_000_000_000
_SLUG = re.compile(r"[-a-zA-Z0-9_]{1,40}")


class PolicyError(ExplainedError):
    """A policy that cannot be."""

    code = "invalid_policy"


@dataclass(frozen=True)
class ScanLimit:
    """How many rows with findings of one scan training data may have: a number, or a share of its usable rows."""

    most: float = 0
    unit: Literal["rows", "percent"] = "rows"

    def to_dict(self) -> dict[str, Any]:
        return {"most": self.most, "unit": self.unit}

    def allows(self, num_found: int, num_rows: int) -> bool:
        """Whether so many of the usable rows may have findings."""
        return num_found <= (self.most if self.unit == "rows" else self.most * num_rows / 100)

    def __str__(self) -> str:
        return f"{self.most:g} %" if self.unit == "percent" else f"{self.most:g} row{'' if self.most == 1 else 's'}"


@dataclass(frozen=True)
class PolicySettings:
    """How many approvals an adapter needs, the settings of the gates that are on, and what scans block, by name."""

    approvals: int
    gates: dict[str, dict[str, Any]]
    scans: dict[str, ScanLimit] = field(default_factory=dict)
    """Scans of training data that block a job. Any other only shows what it found."""

    def to_dict(self) -> dict[str, Any]:
        scans = {name: limit.to_dict() for name, limit in self.scans.items()}
        return {"approvals": self.approvals, "gates": self.gates, "scans": scans}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicySettings:
        """Settings as they were stored: gates that have gone are left out, new thresholds have their defaults."""
        known = gates()
        stored = {name: settings for name, settings in values["gates"].items() if name in known}
        return cls(
            approvals=values["approvals"],
            gates={name: at_first(known[name]) | settings for name, settings in stored.items()},
            scans={
                name: ScanLimit(**limit) for name, limit in values.get("scans", {}).items() if name in scan_plugins()
            },
        )

    @classmethod
    def cleaned(cls, approvals: Any, asked: dict[str, Any], scans: dict[str, Any] | None = None) -> PolicySettings:
        """Settings that somebody typed or sent; raises PolicyError with the field's name."""
        if isinstance(approvals, bool) or not isinstance(approvals, int) or not 1 <= approvals <= MAX_APPROVALS:
            raise PolicyError(f"An adapter needs 1 to {MAX_APPROVALS} approvals.", field="approvals")
        known = gates()
        if unknown := sorted(set(asked) - set(known)):
            raise PolicyError(
                f'There is no gate called "{unknown[0]}".', next_step=f"Choose among: {', '.join(known)}.",
                field=f"gates.{unknown[0]}",
            )  # fmt: skip
        gates_asked = {name: _clean_gate(known[name], asked[name]) for name in known if name in asked}
        return cls(approvals, gates_asked, _clean_scans(scans or {}))


def at_first(gate: Gate) -> dict[str, Any]:
    """A gate's settings before a team changed them."""
    return {threshold.name: threshold.default for threshold in gate.thresholds}


def default_settings() -> PolicySettings:
    """The policy of a team that has made none."""
    return PolicySettings(
        approvals=1, gates={name: at_first(gate) for name, gate in gates().items() if gate.is_on_at_first}
    )


def current_policy(team: Team) -> Policy:
    """The team's newest policy; one with the defaults, not stored, when it has made none."""
    return team.policies.order_by("-version").select_related("created_by").first() or Policy(
        team=team, version=1, settings=default_settings().to_dict()
    )


def stored_policy(team: Team) -> Policy:
    """`current_policy` as a row that a review can point at."""
    policy = current_policy(team)
    if policy.pk is None:
        policy, _ = Policy.objects.get_or_create(team=team, version=1, defaults={"settings": policy.settings})
    return policy


def thresholds_of(team: Team) -> Thresholds:
    """From where on something counts against the team's adapters, by its newest policy. One query."""
    return thresholds_in(PolicySettings.from_dict(current_policy(team).settings))


def thresholds_in(settings: PolicySettings) -> Thresholds:
    """From where on something counts by a policy; of a gate that is off, the defaults."""
    asked = settings.gates
    first = Thresholds()
    forgetting, overlap, base = (asked.get(name, {}) for name in ("forgetting", "overlap", "beats_base"))
    return Thresholds(
        allowed_rise=forgetting["max_rise_percent"] / 100 if forgetting else first.allowed_rise,
        overlap_share=overlap["max_percent"] / 100 if overlap else first.overlap_share,
        figure=base["evaluation"] if base else first.figure,
    )


def change_policy(
    team: Team, settings: PolicySettings, *, by: User, note: str = "", token: ApiToken | None = None
) -> Policy:
    """A new version of the team's policy, with an audit event; the newest one when nothing would change.

    Raises:
        PolicyError: somebody else changed it at this moment.
    """
    try:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended('policy', %s))", [team.pk])
            before = stored_policy(team)
            # As this version writes it: one that was stored earlier has no scans.
            held = PolicySettings.from_dict(before.settings).to_dict()
            if held == settings.to_dict():
                return before
            policy = Policy.objects.create(
                team=team, version=before.version + 1, settings=settings.to_dict(), note=note.strip()[:200],
                created_by=by,
            )  # fmt: skip
            record(
                "review.policy_changed", team=team, user=by, token=token, target=policy, version=policy.version,
                note=policy.note, changed=_differences(held, policy.settings),
            )  # fmt: skip
            return policy
    except IntegrityError as error:
        raise PolicyError(
            "Somebody else changed the policy at this moment.", next_step="Look and try again."
        ) from error


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    changed = [f"approvals {before['approvals']} → {after['approvals']}"] * (before["approvals"] != after["approvals"])
    for name in sorted(set(before["gates"]) | set(after["gates"])):
        was, now = before["gates"].get(name), after["gates"].get(name)
        if was is None or now is None:
            changed.append(f"{name} {'on' if was is None else 'off'}")
            continue
        changed += [f"{name}.{key} {was.get(key)} → {value}" for key, value in now.items() if was.get(key) != value]
    for name in sorted(set(before["scans"]) | set(after["scans"])):
        limits = [_limit_words(one["scans"].get(name)) for one in (before, after)]
        changed += [f"scan {name} {limits[0]} → {limits[1]}"] * (limits[0] != limits[1])
    return changed


def _limit_words(limit: dict[str, Any] | None) -> str:
    return f"blocks above {ScanLimit(**limit)}" if limit else "shows"


def _clean_scans(asked: dict[str, Any]) -> dict[str, ScanLimit]:
    known = scan_plugins()
    if unknown := sorted(set(asked) - set(known)):
        raise PolicyError(
            f'There is no scan called "{unknown[0]}".', next_step=f"Choose among: {', '.join(known)}.",
            field=f"scans.{unknown[0]}",
        )  # fmt: skip
    return {name: _clean_limit(name, asked[name]) for name in known if name in asked}


def _clean_limit(name: str, asked: Any) -> ScanLimit:
    label, where = scan_plugins()[name].label, f"scans.{name}"
    if not isinstance(asked, dict) or set(asked) - {"most", "unit"}:
        raise PolicyError(f'{label}: its limit is an object with "most" and "unit".', field=where)
    most, unit = asked.get("most", 0), asked.get("unit", "rows")
    if unit not in ("rows", "percent"):
        raise PolicyError(
            f'{label}: the unit cannot be "{unit}".', next_step='Choose "rows" or "percent".', field=where
        )
    is_number = isinstance(most, int | float) and not isinstance(most, bool)
    largest = 100 if unit == "percent" else MAX_ROWS
    if not is_number or not 0 <= most <= largest or (unit == "rows" and most != int(most)):
        what = "a number from 0 to 100" if unit == "percent" else f"a whole number from 0 to {MAX_ROWS:,}"
        raise PolicyError(f"{label}: what is allowed is {what}.", field=where)
    return ScanLimit(int(most) if unit == "rows" else float(most), unit)


def _clean_gate(gate: Gate, asked: Any) -> dict[str, Any]:
    if not isinstance(asked, dict):
        raise PolicyError(f"{gate.label}: its settings are no object.", field=f"gates.{gate.name}")
    known = {threshold.name: threshold for threshold in gate.thresholds}
    if extra := sorted(set(asked) - set(known)):
        raise PolicyError(
            f'{gate.label} has no setting "{extra[0]}".',
            next_step=f"It has: {', '.join(known) or 'none'}.", field=f"gates.{gate.name}.{extra[0]}",
        )  # fmt: skip
    return {name: _clean(gate, known[name], asked.get(name, known[name].default)) for name in known}


def _clean(gate: Gate, threshold: Threshold, value: Any) -> Any:
    field = f"gates.{gate.name}.{threshold.name}"
    if threshold.kind == "choice":
        allowed = [name for name, _label in threshold.choices()]
        if value not in allowed:
            raise PolicyError(
                f'{threshold.label} cannot be "{value}".', next_step=f"Choose among: {', '.join(allowed)}.", field=field
            )
        return value
    if threshold.kind == "slug":
        if not isinstance(value, str) or not _SLUG.fullmatch(value):
            raise PolicyError(
                f"{threshold.label} is one word of letters, digits, hyphens and underscores.", field=field
            )
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_right = isinstance(value, int) if threshold.kind == "whole" else True
    if not is_number or not is_right or not threshold.minimum <= value <= threshold.maximum:
        kind = "a whole number" if threshold.kind == "whole" else "a number"
        raise PolicyError(
            f"{threshold.label} is {kind} from {threshold.minimum:g} to {threshold.maximum:g}.", field=field
        )
    return value if threshold.kind == "whole" else float(value)

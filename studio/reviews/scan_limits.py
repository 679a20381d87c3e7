"""Scans that a team's policy lets block training: what each found, against what is allowed, and what was waived.

Only the team's newest policy counts, and only when a job is queued: a job that waits already goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from django.contrib.postgres.expressions import ArraySubquery
from django.db import transaction
from django.db.models import Case, Count, OuterRef, QuerySet, Subquery, When
from django.db.models.functions import JSONObject
from django.urls import reverse
from django.utils import timezone
from django.utils.text import get_text_list

from studio.accounts.models import ApiToken, Team, User, record
from studio.datasets.models import DatasetScan, DatasetVersion, ScanFinding, ScanState
from studio.reviews.models import Policy, ScanWaiver
from studio.reviews.policies import PolicySettings, ScanLimit
from studio.reviews.reviewing import MAX_REASON, MissingReasonError
from workers.errors import ExplainedError, RecipeError
from workers.scans import scans

_WITHOUT_RESULT: dict[str, str] = {
    ScanState.WAITING: "waits for a worker",
    ScanState.RUNNING: "is still running",
    ScanState.FAILED: "could not be run",
}
WHO = "A lead or admin of the team may waive it for this version, with a reason, or change the policy."


class BlockedByScanError(RecipeError):
    """The team's policy does not let these rows be trained on as they are."""

    code = "blocked_by_scan"


class WaiverError(ExplainedError):
    """A waiver that cannot be given."""

    code = "nothing_to_waive"


@dataclass(frozen=True)
class Standing:
    """How a version stands with one scan that the policy lets block. `sentence` says it for people."""

    name: str
    label: str
    limit: ScanLimit
    state: str
    """Of the scan: waiting, running, done, failed, skipped; "missing" when it was never asked for."""
    num_found: int | None
    """Rows with findings; None until the scan is done."""
    is_blocking: bool
    sentence: str
    waiver: ScanWaiver | None = None

    def may_be_waived(self) -> bool:
        """Whether there is something that a lead could let pass: what was found, or that nothing can be."""
        return self.is_blocking and self.state in {ScanState.DONE, ScanState.FAILED}

    def may_be_run(self) -> bool:
        """Whether asking for the scan would change something."""
        return self.is_blocking and self.state in {"missing", ScanState.FAILED}


def with_scan_facts(
    versions: QuerySet[DatasetVersion], team: Team, *, only: Collection[int]
) -> QuerySet[DatasetVersion]:
    """Versions that `blocking` needs no query for: of a long list, those whose keys are in `only`."""
    policies = Policy.objects.filter(team=team).order_by("-version")
    scans_found = DatasetScan.objects.filter(version=OuterRef("pk")).values(
        json=JSONObject(name="name", state="state", num_rows="num_rows", pk="pk", waiver="waiver__pk",
                        num_waived="waiver__num_rows")
    )  # fmt: skip
    return versions.annotate(
        scan_policy=Subquery(policies.values(json=JSONObject(version="version", settings="settings"))[:1]),
        # Asked of those rows alone: the others of the list need no look at their scans.
        scans_found=Case(When(pk__in=only, then=ArraySubquery(scans_found)), default=None),
    )


def standings(version: DatasetVersion, team: Team) -> list[Standing]:
    """Every scan that the team's policy lets block, in the order of the scans' page, with their waivers. Two queries.

    None for a version `with_scan_facts`, whose standings have no waivers to show.
    """
    is_loaded = getattr(version, "scans_found", None) is not None
    facts = version if is_loaded else with_scan_facts(
        DatasetVersion.objects.filter(pk=version.pk), team, only=[version.pk]
    ).first()  # fmt: skip
    if facts is None:
        return []  # deleted at this moment, which whoever asks will find
    policy: dict[str, Any] | None = facts.scan_policy  # type: ignore[attr-defined]
    limits = PolicySettings.from_dict(policy["settings"]).scans if policy else {}
    if policy is None or not limits:
        return []
    found = {one["name"]: one for one in facts.scans_found}  # type: ignore[attr-defined]
    waived = [] if is_loaded else [one["waiver"] for one in found.values() if one["waiver"]]
    waivers = {
        waiver.pk: waiver for waiver in ScanWaiver.objects.filter(pk__in=waived).select_related("waived_by")
    } if waived else {}  # fmt: skip
    return [
        _standing(version, name, limits[name], found.get(name, {}), policy["version"], waivers)
        for name in scans()
        if name in limits
    ]


def blocking(version: DatasetVersion, team: Team) -> list[Standing]:
    """The scans that keep a job from training on a version."""
    return [one for one in standings(version, team) if one.is_blocking]


def refuse_blocked(version: DatasetVersion, team: Team) -> None:
    """Raise BlockedByScanError when the team's policy does not let a version be trained on."""
    blocks = blocking(version, team)
    if blocks:
        raise BlockedByScanError(
            " ".join(one.sentence for one in blocks),
            next_step=f"{_remedy(blocks)} {WHO}",
            field="dataset",
            details={
                "scans": [one.name for one in blocks],
                "url": reverse("datasets:scans", args=[version.dataset_id, version.number]),
            },
        )


def waive(
    version: DatasetVersion, team: Team, name: str, *, reason: str, by: User, token: ApiToken | None = None
) -> ScanWaiver:
    """Let a version be trained on in spite of what a scan found, for a written reason, with an audit event.

    Raises:
        MissingReasonError: there is no reason.
        WaiverError: the scan blocks nothing, or is not over.
    """
    reason = reason.strip()[:MAX_REASON]
    if not reason:
        raise MissingReasonError("Say why these rows may be trained on all the same.")
    with transaction.atomic():
        # What is waived is what stands there now: the scan cannot finish anew meanwhile.
        scan = DatasetScan.objects.select_for_update().filter(version=version, name=name).first()
        standing = next((one for one in standings(version, team) if one.name == name), None)
        if scan is None or standing is None or not standing.may_be_waived():
            raise WaiverError("This scan keeps no job from training on these rows: there is nothing to waive.")
        waiver, _ = ScanWaiver.objects.update_or_create(
            scan=scan,
            defaults={"num_rows": standing.num_found, "reason": reason, "waived_by": by, "waived_at": timezone.now()},
        )
        record(
            "dataset.scan_waived", team=team, user=by, token=token, target=version, scan=name,
            found=standing.sentence, reason=reason,
        )  # fmt: skip
    return waiver


def take_back(version: DatasetVersion, team: Team, name: str, *, by: User, token: ApiToken | None = None) -> None:
    """End a waiver, with an audit event; nothing happens when there is none."""
    with transaction.atomic():
        num, _ = ScanWaiver.objects.filter(scan__version=version, scan__name=name).delete()
        if num:
            record("dataset.scan_waiver_ended", team=team, user=by, token=token, target=version, scan=name)


def _standing(
    version: DatasetVersion, name: str, limit: ScanLimit, scan: Mapping[str, Any], policy_version: int,
    waivers: Mapping[int, ScanWaiver],
) -> Standing:  # fmt: skip
    label = scans()[name].label
    state = scan.get("state", "missing")
    num_found = _num_found(scan) if state == ScanState.DONE else None
    if num_found is not None:
        is_over = not limit.allows(num_found, version.num_usable)
        share = f" ({100 * num_found / version.num_usable:.1f} %)" if version.num_usable and num_found else ""
        rows = "row" if version.num_usable == 1 else "rows"
        sentence = f"“{label}” found something in {num_found:,} of {version.num_usable:,} {rows}{share}"
        verb = "allows no more than" if is_over else "allows"
        sentence += f"; the team's policy v{policy_version} {verb} {limit}."
    elif state == ScanState.SKIPPED:
        is_over, sentence = False, f"“{label}” is not for rows of this type."
    else:
        is_over = True
        how = _WITHOUT_RESULT.get(state, "was never run on these rows")
        sentence = f"“{label}” {how}, and the team's policy v{policy_version} asks for its result before training."
    covers = is_over and scan.get("waiver") is not None and _covers(scan["num_waived"], state, num_found)
    waiver = waivers.get(scan["waiver"]) if covers else None
    return Standing(name, label, limit, state, num_found, is_over and not covers, sentence, waiver)


def _covers(num_waived: int | None, state: str, num_found: int | None) -> bool:
    """Whether a waiver holds still: for no more rows than then, or for a scan that failed and has no result yet."""
    if num_found is None or num_waived is None:
        return state == ScanState.FAILED and num_waived is None
    return num_found <= num_waived


def _num_found(scan: Mapping[str, Any]) -> int:
    """Rows with findings; of a scan from before these were counted, those of its kept findings."""
    if scan["num_rows"] is not None:
        return int(scan["num_rows"])
    kept: int = ScanFinding.objects.filter(scan=scan["pk"]).aggregate(num=Count("line", distinct=True))["num"]
    return kept


def _remedy(blocks: list[Standing]) -> str:
    """What to do about every scan that blocks: those that ask for the same in one sentence."""
    labels_of: dict[str, list[str]] = {}
    for one in blocks:
        labels_of.setdefault(_remedy_of(one), []).append(f"“{one.label}”")
    return " ".join(remedy.format(get_text_list(labels, "and")) for remedy, labels in labels_of.items())


def _remedy_of(block: Standing) -> str:
    if block.may_be_run():
        return "Run {} on the dataset's scans page."
    if block.state in {ScanState.WAITING, ScanState.RUNNING}:
        return "Wait for the result of {}: the dataset's scans say how far it is."
    return "Mend or remove the rows that {} found, which the dataset's scans list, and upload a new version."

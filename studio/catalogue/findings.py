"""What can be wrong with an adapter, in words: damaged files, leaked test rows, forgetting, no gain, odd rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from django.conf import settings
from django.utils.module_loading import import_string

from studio.accounts.models import Team
from studio.catalogue.data_rows import overlap_links, suspicious_row
from studio.catalogue.models import Adapter, FileCheck, Score, TestSet
from workers.evaluations import evaluations
from workers.forgetting import ALLOWED_RISE, MEASURE, Forgetting, Keeping, forgetting
from workers.proportions import clopper_pearson
from workers.results import OverlapRecord
from workers.verdicts import Verdict

LOSS, PRIMARY = "loss", "primary"
"""What is asked whether an adapter is better than its base: the held-out loss, or the first metric of its recipe."""
NUM_SHOWN = 20


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True)
class Thresholds:
    """From where on something counts. The defaults hold where a team's policy says nothing.

    `overlap_share`: of the held-out rows among the training rows; any makes the scores flatter, one in a hundred moves
    them by less than their intervals. `figure`: the evaluation that decides whether it is better than its base, or
    PRIMARY. `suspicious_share`: of the training rows that may be wrong; data sets that people
    rely on hold 3 % wrong labels (Northcutt et al. 2021, "Pervasive label errors in test sets").
    """

    allowed_rise: float = ALLOWED_RISE
    overlap_share: float = 0.01
    figure: str = LOSS
    suspicious_share: float = 0.03


def thresholds_of(team: Team) -> Thresholds:
    """By the team's policy; one query. Policies belong to reviews, which know this module, so a setting names them."""
    found: Thresholds = import_string(settings.THRESHOLDS_OF_TEAM)(team)
    return found


def evaluation_of(adapter: Adapter, figure: str) -> str:
    """The evaluation that decides, by name: PRIMARY is the first of this adapter's recipe beside the loss."""
    if figure != PRIMARY:
        return figure
    metrics = (adapter.recipe.get("evaluation") or {}).get("metrics") or []
    names = [str(metric.get("name", "")) if isinstance(metric, dict) else str(metric) for metric in metrics]
    return next((name for name in names if name and name != LOSS), LOSS)


@dataclass(frozen=True)
class Finding:
    """Something that was looked for. `anchor` is the part of the adapter's page that shows it."""

    code: str
    level: Level
    title: str
    sentence: str
    next_step: str = ""
    anchor: str = ""


def findings_of(adapter: Adapter, thresholds: Thresholds | None = None) -> list[Finding]:
    """Everything that was looked for in an adapter, the worst first. Uses prefetched `scores__run` and `file_check`."""
    thresholds = thresholds or Thresholds()
    looks: tuple[Callable[[Adapter, Thresholds], Finding | None], ...] = (
        _damage, _reload, _overlap, _forgetting, _gain, _incomplete, _suspicious,
    )  # fmt: skip
    found = [finding for look in looks if (finding := look(adapter, thresholds)) is not None]
    if any(one.code == "overlap" and one.level == Level.BAD for one in found):
        # A gain on rows that were trained on is none to boast of.
        found = [one for one in found if not (one.code == "no_gain" and one.level == Level.OK)]
    order = (Level.BAD, Level.WARNING, Level.OK)
    return sorted(found, key=lambda finding: order.index(finding.level))


def shown_details(adapter: Adapter, thresholds: Thresholds | None = None) -> dict[str, Any]:
    """What the page's sections on overlap, forgetting, suspicious rows and files show."""
    thresholds = thresholds or Thresholds()
    overlap, versions = overlap_of(adapter), adapter.versions_of_data()
    return {
        "overlap": overlap,
        "overlap_pairs": overlap_links(versions, overlap, NUM_SHOWN) if overlap else [],
        "general_scores": [score for score in adapter.scores.all() if score.test_set == TestSet.GENERAL],
        "forgotten": forgetting_of(adapter, thresholds.allowed_rise),
        "suspicious_rows": [suspicious_row(versions, one) for one in adapter.suspicious[:NUM_SHOWN]],
        "file_check": file_check_of(adapter),
    }


def evaluation_label(name: str) -> str:
    """An evaluation as people call it."""
    known = evaluations().get(name)
    return known.label if known else name


def overlap_of(adapter: Adapter) -> OverlapRecord | None:
    """What was found of held-out rows among the training rows; None for adapters of before anyone looked."""
    return OverlapRecord.model_validate(adapter.overlap) if adapter.overlap else None


def forgetting_of(adapter: Adapter, allowed: float = ALLOWED_RISE) -> Forgetting | None:
    """How the adapter stands on the general set, by its newest run there; None when it was not scored on it."""
    scores = [one for one in adapter.scores.all() if one.test_set == TestSet.GENERAL and one.evaluation == MEASURE]
    newest = max(scores, key=lambda score: score.run_id, default=None)
    return forgetting(newest, allowed) if newest is not None and newest.base_value > 0 else None


def file_check_of(adapter: Adapter) -> FileCheck | None:
    """The last look at the adapter's files; None when nobody has looked since it was made."""
    try:
        return adapter.file_check
    except FileCheck.DoesNotExist:
        return None


def _damage(adapter: Adapter, _thresholds: Thresholds) -> Finding | None:
    check = file_check_of(adapter)
    if check is None:
        return None
    if not check.damage:
        return Finding("damaged", Level.OK, "Files whole", "All files match their checksums.", anchor="files")
    title = f"Damaged: {_damaged_file(check.damage)}"
    return Finding("damaged", Level.BAD, title, check.damage, "Do not use it until it is restored.", "files")


def _damaged_file(damage: str) -> str:
    parts = damage.split('"')
    return parts[1] if len(parts) > 2 else "its files"


def _reload(adapter: Adapter, _thresholds: Thresholds) -> Finding | None:
    verified = adapter.provenance.get("verified")
    if verified is None:
        return None
    if verified:
        sentence = "The saved folder, loaded by plain programs, gave the same logits as in training."
        return Finding("not_reloaded", Level.OK, "Loads elsewhere", sentence, anchor="lineage")
    sentence = "The saved folder, loaded by plain programs, did not give the logits that it gave in training."
    return Finding(
        "not_reloaded", Level.BAD, "Gives other answers elsewhere", sentence, "Run the job again.", "lineage"
    )


def _overlap(adapter: Adapter, thresholds: Thresholds) -> Finding | None:
    overlap = overlap_of(adapter)
    if overlap is None or not overlap.num_held_out_rows:
        return None
    num = overlap.num_exact + overlap.num_near
    if not num:
        return Finding("overlap", Level.OK, "Tested on rows of its own", overlap.sentence(), anchor="overlap")
    level = Level.BAD if num > thresholds.overlap_share * overlap.num_held_out_rows else Level.WARNING
    title = f"Trained on its test rows: {num:,} of {overlap.num_held_out_rows:,}"
    sentence = f"{overlap.sentence()} Its scores on held-out rows flatter it."
    return Finding("overlap", level, title, sentence, "Remove the repeated rows and train again.", "overlap")


def _forgetting(adapter: Adapter, thresholds: Thresholds) -> Finding | None:
    found = forgetting_of(adapter, thresholds.allowed_rise)
    if found is None:
        return None
    if found.keeping == Keeping.KEEPS:
        return Finding("forgets", Level.OK, "Keeps what its base knew", found.sentence(), anchor="forgetting")
    if found.keeping == Keeping.UNCLEAR:
        return Finding("forgets", Level.WARNING, "May forget", found.sentence(), anchor="forgetting")
    title = f"Forgets: its loss on general text rose by {100 * found.rise:.0f} %"
    advice = "Train for fewer epochs or at a lower learning rate, or mix in rows of other kinds."
    return Finding("forgets", Level.BAD, title, found.sentence(), advice, "forgetting")


def _gain(adapter: Adapter, thresholds: Thresholds) -> Finding | None:
    scores = sorted(adapter.held_out_scores(), key=lambda score: -score.pk)
    figure = evaluation_of(adapter, thresholds.figure)
    score = next((one for one in scores if one.evaluation == figure), None)
    if score is None and thresholds.figure == LOSS:
        score = min(scores, key=lambda one: one.evaluation, default=None)
    if score is None:
        sentence = (
            f"The policy decides by {evaluation_label(figure)}, which was not measured on held-out rows."
            if scores
            else "Its recipe asked for no evaluation, so nobody knows whether it is any good."
        )
        return Finding("unmeasured", Level.WARNING, "Not measured", sentence, "Evaluate it on a suite.", "scores")
    sentence = _gain_sentence(score)
    verdict = score.verdict()
    if verdict == Verdict.BETTER:
        return Finding("no_gain", Level.OK, "Better than its base", sentence, anchor="scores")
    if verdict == Verdict.WORSE:
        return Finding("no_gain", Level.BAD, "Worse than its base", sentence, "Do not use it.", "scores")
    if verdict == Verdict.NO_DIFFERENCE:
        advice = "Use the base, or train longer, at a higher learning rate or on other rows."
        return Finding("no_gain", Level.BAD, "No better than its base", sentence, advice, "scores")
    advice = f"About {score.rows_recommended:,} rows would tell." if score.rows_recommended else "Score more rows."
    return Finding(
        "no_gain", Level.WARNING, "Too few rows to tell whether it is any better", sentence, advice, "scores"
    )


def _gain_sentence(score: Score) -> str:
    return (
        f"{score.label}: {score.base_value:.3g} by the base, {score.value:.3g} by this (95 % interval of the "
        f"difference {difference_interval(score)}, n = {score.num_rows:,}{too_small(score)})."
    )


def difference_interval(score: Score) -> str:
    """The bounds of the difference, with three digits and true minus signs."""
    return f"{score.difference_low:+.3g} to {score.difference_high:+.3g}".replace("-", "\N{MINUS SIGN}")


def too_small(score: Score) -> str:
    """For the end of a parenthesis: why a difference that is certain counts for nothing; else empty."""
    is_certain = not score.difference_low <= 0 <= score.difference_high
    if score.verdict() != Verdict.NO_DIFFERENCE or not is_certain or score.smallest_effect is None:
        return ""
    return f"; less than {score.smallest_effect:.2g} is not worth telling"


def _incomplete(adapter: Adapter, _thresholds: Thresholds) -> Finding | None:
    runs = {score.run_id: score.run for score in adapter.scores.all() if not score.run.is_complete()}
    if not runs:
        return None
    worst = min(runs.values(), key=lambda run: run.num_scored / max(run.num_rows, 1))
    sentence = (
        f"Of {worst.num_rows:,} rows of the {worst.get_test_set_display().lower()}, {worst.num_scored:,} were scored."
    )
    return Finding("incomplete", Level.WARNING, "Incomplete scores", sentence, "Evaluate it again.", "scores")


def _suspicious(adapter: Adapter, thresholds: Thresholds) -> Finding | None:
    # Adapters of before it was counted have the list alone, which ends at 100 rows.
    num = adapter.provenance.get("num_suspicious_rows") or len(adapter.suspicious)
    num_rows = adapter.provenance.get("num_train_rows") or 0
    if not num or not num_rows:
        return None
    # The whole interval decides, as for forgetting: of 100 faultless rows a few stand out by chance alone.
    share_low, _share_high = clopper_pearson(min(num, num_rows), num_rows)
    if share_low <= thresholds.suspicious_share:
        title = f"{num:,} of {num_rows:,} training rows {'stands' if num == 1 else 'stand'} out"
        sentence = "By their losses, or because they contradict others: no more than some do in any dataset."
        return Finding("suspicious_rows", Level.OK, title, sentence, anchor="suspicious")
    noun = "row that may be wrong" if num == 1 else "rows that may be wrong"
    sentence = f"Of {num_rows:,} training rows these stood out by their losses, or contradict others."
    title = f"{num:,} training {noun}"
    return Finding(
        "suspicious_rows", Level.WARNING, title, sentence, "Look at them and mend the dataset.", "suspicious"
    )

"""An adapter's scores by run, and what they say together in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from studio.catalogue.models import Adapter, EvaluationRun, Score, TestSet
from workers.verdicts import Verdict

# Functions of the held-out loss: counting them beside it would count one finding three times.
_SAME_AS_LOSS = {"perplexity", "byte_perplexity"}
# What a reader must not miss stands first.
_ORDER = {Verdict.WORSE: 0, Verdict.BETTER: 1, Verdict.TOO_FEW_ROWS: 2, Verdict.NO_DIFFERENCE: 3}
_RUN_ORDER = {TestSet.HELD_OUT: 0, TestSet.GENERAL: 1, TestSet.SUITE: 2}


@dataclass(frozen=True)
class ScoreGroup:
    """The scores of one run, the regressions first."""

    run: EvaluationRun
    title: str
    scores: list[Score]
    num_older: int
    """Earlier runs on the same test set, which are not shown."""

    @property
    def measures(self) -> list[Score]:
        """The scores that count as findings of their own."""
        has_loss = any(score.evaluation == "loss" for score in self.scores)
        return [score for score in self.scores if not (has_loss and score.evaluation in _SAME_AS_LOSS)]

    @property
    def num_missing(self) -> int:
        return max(0, self.run.num_rows - self.run.num_scored)

    def count(self, word: Verdict) -> int:
        return sum(score.verdict() == word for score in self.measures)

    @property
    def methods(self) -> list[str]:
        """How the intervals were made, each way once."""
        return list(dict.fromkeys(score.interval_method for score in self.scores))


def score_groups(adapter: Adapter) -> list[ScoreGroup]:
    """The newest run on each test set with its scores: held-out rows, the general set, then suites; one query."""
    rows = adapter.scores.select_related("run__suite").order_by("-run_id", "label")
    by_run: dict[int, list[Score]] = {}
    for score in rows:
        by_run.setdefault(score.run_id, []).append(score)
    newest: dict[tuple[str, int | None], tuple[EvaluationRun, list[Score], int]] = {}
    for scores in by_run.values():
        run = scores[0].run
        key = (run.test_set, run.suite_id)
        if key in newest:
            kept, of_kept, num_older = newest[key]
            newest[key] = (kept, of_kept, num_older + 1)
        else:
            newest[key] = (run, scores, 0)
    groups = [
        ScoreGroup(run, str(run.suite) if run.suite else run.get_test_set_display(), _regressions_first(scores), older)
        for run, scores, older in newest.values()
    ]
    return sorted(groups, key=lambda group: (_RUN_ORDER[TestSet(group.run.test_set)], group.title))


def _regressions_first(scores: Iterable[Score]) -> list[Score]:
    return sorted(scores, key=lambda score: (_ORDER[score.verdict()], score.evaluation != "loss", score.label))


@dataclass(frozen=True)
class Summary:
    """What the scores say, in sentences. `word` is the colour's: better, worse or neither."""

    headline: str
    others: list[str]
    is_better: bool | None
    evidence: list[Score]
    """The figures that the headline rests on."""


def summary(groups: Sequence[ScoreGroup]) -> Summary | None:
    """The scores in words; None when nothing was measured. Runs that are not complete have no say."""
    complete = [group for group in groups if group.run.is_complete()]
    others = [
        f"{group.title}: {group.run.num_scored:,} of {group.run.num_rows:,} rows were scored, so nothing follows."
        for group in groups
        if not group.run.is_complete()
    ]
    if not groups:
        return None
    if not complete:
        return Summary("It cannot be told whether it is any good: no evaluation is complete.", others, None, [])
    first, *rest = complete
    others = [_others_sentence(group) for group in rest] + others
    num_better, num_worse = first.count(Verdict.BETTER), first.count(Verdict.WORSE)
    is_worse_anywhere = any(group.count(Verdict.WORSE) for group in complete)
    is_better = False if is_worse_anywhere else True if num_better else None
    if first.run.test_set != TestSet.HELD_OUT:
        return Summary(f"On {first.title}: {_counts(first)}.", others, is_better, first.measures)
    total = len(first.measures)
    measures = "the one measure" if total == 1 else f"{num_better} of {total} measures"
    if num_better:
        headline = f"Better than its base on {measures}; {_worse(num_worse)}."
    elif num_worse:
        measures = "the one measure" if total == 1 else f"{num_worse} of {total} measures"
        headline = f"Worse than its base on {measures}; better on none."
    elif first.count(Verdict.TOO_FEW_ROWS):
        headline = "Too few rows to tell whether it is better than its base."
    else:
        everywhere = "the one measure" if total == 1 else f"any of {total} measures"
        headline = f"No better than its base: no difference on {everywhere}."
    return Summary(headline, others, is_better, first.measures)


def _worse(count: int) -> str:
    return f"worse on {count}" if count else "worse on none"


def _others_sentence(group: ScoreGroup) -> str:
    return f"{group.title}: {_counts(group)}."


def _counts(group: ScoreGroup) -> str:
    found = [
        (group.count(Verdict.WORSE), "worse on"),
        (group.count(Verdict.BETTER), "better on"),
        (group.count(Verdict.TOO_FEW_ROWS), "too few rows to tell on"),
    ]
    total = len(group.measures)
    parts = [f"{words} {count} of {total}" for count, words in found if count]
    return ", ".join(parts) if parts else f"no difference on {'its one measure' if total == 1 else f'{total} measures'}"

"""An adapter's scores by run, and what they say together in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from studio.catalogue.models import Adapter, EvaluationRun, Score, TestSet
from workers.forgetting import ALLOWED_RISE, MEASURE, Forgetting, Keeping, forgetting
from workers.results import ScoreRecord, SourceRecord
from workers.verdicts import Verdict, verdict

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

    def num_worse(self, allowed_rise: float) -> int:
        """How many measures count as worse: on the general set only what exceeds the rise that is allowed there."""
        found = self.forgetting(allowed_rise)
        return self.count(Verdict.WORSE) if found is None else int(found.keeping == Keeping.FORGETS)

    def forgetting(self, allowed_rise: float) -> Forgetting | None:
        """How the adapter stands on the general set; None on other rows, and without the loss."""
        is_general = self.run.test_set == TestSet.GENERAL
        score = next((one for one in self.scores if is_general and one.evaluation == MEASURE), None)
        return forgetting(score, allowed_rise) if score is not None and score.base_value > 0 else None

    @property
    def methods(self) -> list[str]:
        """How the intervals were made, each way once."""
        return list(dict.fromkeys(score.interval_method for score in self.scores))


@dataclass(frozen=True)
class SourceScore:
    """A figure of an adapter on the held-out rows of one of its datasets alone."""

    score: ScoreRecord

    @property
    def verdict(self) -> Verdict:
        return verdict(self.score)

    @property
    def is_better(self) -> bool | None:
        """Whether the adapter beats the base; None when that cannot be told, or there is no difference."""
        return {Verdict.BETTER: True, Verdict.WORSE: False}.get(self.verdict)


@dataclass(frozen=True)
class SourceScores:
    """One of the datasets that an adapter was trained on together, its part in training, and its own figures."""

    source: SourceRecord
    share: float
    """Part of an epoch's rows, from 0 to 1."""
    scores: list[SourceScore]

    @property
    def percent(self) -> str:
        return f"{100 * self.share:.3g}"

    @property
    def times(self) -> str:
        """The passes over its training rows, as people write them."""
        return f"{self.source.passes:.3g}"

    @property
    def weight(self) -> str:
        return f"{self.source.weight:g}"


def source_scores(adapter: Adapter) -> list[SourceScores]:
    """Of an adapter of several datasets: what each had for a part and scored by itself; nothing of any other."""
    sources = [SourceRecord.model_validate(one) for one in adapter.sources]
    total = sum(one.rows_per_epoch for one in sources)
    return [SourceScores(one, one.rows_per_epoch / total, list(map(SourceScore, one.scores))) for one in sources]


def score_groups(adapter: Adapter) -> list[ScoreGroup]:
    """The newest run on each test set with its prefetched scores: held-out rows, the general set, then suites."""
    rows = sorted(adapter.scores.all(), key=lambda score: (-score.run_id, score.label))
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
    """What the scores say, in sentences. `is_better` is None where nothing is better and nothing worse."""

    headline: str
    warnings: list[str]
    """What is worse or was not scored, on any test set."""
    others: list[str]
    is_better: bool | None
    evidence: list[Score]
    """The figures that the headline rests on."""


def summary(
    groups: Sequence[ScoreGroup],
    *,
    figure: str = "loss",
    allowed_rise: float = ALLOWED_RISE,
    is_leaked: bool = False,
    is_damaged: bool = False,
) -> Summary | None:
    """The scores in words; None when nothing was measured. Runs that are not complete have no say.

    Args:
        figure: the evaluation that decides where others tell nothing.
        allowed_rise: of the loss on the general set, as a share of the base's.
        is_leaked: held-out rows were trained on, so that its scores there say nothing.
        is_damaged: its files are not those that were scored.
    """
    complete = [group for group in groups if group.run.is_complete()]
    incomplete = [
        f"{group.title}: incomplete, {group.run.num_scored:,} of {group.run.num_rows:,} rows scored: it has no say."
        for group in groups
        if not group.run.is_complete()
    ]
    if not groups:
        return None
    if not complete:
        headline = "It cannot be told whether it is any good: no evaluation is complete."
        return Summary(headline, incomplete, [], None, [])
    first, *rest = complete
    worse = [group for group in rest if group.num_worse(allowed_rise)]
    warnings = [_sentence(group, allowed_rise) for group in worse] + incomplete
    others = [_sentence(group, allowed_rise) for group in rest if group not in worse]
    if is_damaged:
        warnings.insert(0, "Its files are damaged: the scores are of what it was before.")
    num_better, num_worse = first.count(Verdict.BETTER), first.num_worse(allowed_rise)
    is_better = False if num_worse or worse or is_damaged else True if num_better else None
    if first.run.test_set != TestSet.HELD_OUT:
        return Summary(f"On {first.title}: {_counts(first)}.", warnings, others, is_better, first.measures)
    if is_leaked:
        headline = "Its scores cannot be believed: it was trained on the rows that it was tested on."
        return Summary(headline, warnings, others, False, first.measures)
    headline = _headline(first, num_better, num_worse, figure)
    if worse:
        elsewhere = f"worse on {_listed([_mentioned(group) for group in worse])}."
        if num_better and not num_worse:
            headline = f"{headline.partition(';')[0]}, but {elsewhere}"
        else:
            headline = f"{headline[:-1]}, and {elsewhere}"
    return Summary(headline, warnings, others, is_better, first.measures)


def _headline(group: ScoreGroup, num_better: int, num_worse: int, figure: str) -> str:
    total = len(group.measures)
    if num_better:
        measures = "the one measure" if total == 1 else f"{num_better} of {total} measures"
        return f"Better than its base on {measures}; worse on {num_worse or 'none'}."
    if num_worse:
        measures = "the one measure" if total == 1 else f"{num_worse} of {total} measures"
        return f"Worse than its base on {measures}; better on none."
    if num_unclear := group.count(Verdict.TOO_FEW_ROWS):
        for score in group.measures:
            if score.evaluation == figure and score.verdict() == Verdict.NO_DIFFERENCE:
                noun = "measure" if num_unclear == 1 else "measures"
                return (
                    f"No better than its base: no difference on {score.label}; too few rows for {num_unclear} {noun}."
                )
        return "Too few rows to tell whether it is better than its base."
    everywhere = "the one measure" if total == 1 else f"any of {total} measures"
    return f"No better than its base: no difference on {everywhere}."


def _mentioned(group: ScoreGroup) -> str:
    return "the general set" if group.run.test_set == TestSet.GENERAL else group.title


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(group: ScoreGroup, allowed_rise: float) -> str:
    """How a test set went."""
    found = group.forgetting(allowed_rise)
    return f"{group.title}: {_counts(group)}." if found is None else found.sentence()


def _counts(group: ScoreGroup) -> str:
    """How a test set went, with the measures by name."""
    total = len(group.measures)
    parts = []
    for word, words in (
        (Verdict.WORSE, "worse on"),
        (Verdict.BETTER, "better on"),
        (Verdict.TOO_FEW_ROWS, "too few rows to tell on"),
        (Verdict.NO_DIFFERENCE, "no difference on"),
    ):
        named = [score.label for score in group.measures if score.verdict() == word]
        if named:
            parts.append(f"{words} {', '.join(named)}" if total <= 4 else f"{words} {len(named)} of {total} measures")
    return "; ".join(parts)

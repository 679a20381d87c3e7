"""Each gate says what is wrong with an adapter, and knows what it does not know."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from studio.accounts.models import Team, User
from studio.catalogue.aliases import move_alias
from studio.catalogue.models import Adapter, EvaluationRun, RowCounts, Score, Suite, TestSet
from studio.reviews import checking
from studio.reviews.gates import Found, Gate, gates
from studio.reviews.models import Review
from studio.reviews.policies import at_first
from tests.factories import make_score
from tests.studio.reviews.conftest import add_run, submitted
from workers.results import OverlapRecord


def check(name: str, adapter: Adapter, **settings: Any) -> Found:
    gate = gates()[name]
    return gate.check(adapter, at_first(gate) | settings)


def said(name: str, adapter: Adapter, **settings: Any) -> tuple[str, str]:
    found = check(name, adapter, **settings)
    return found.state.value, found.sentence


@pytest.mark.parametrize(
    ("score", "state", "words"),
    [
        (make_score(-0.6), "passed", "Better than the base: Held-out loss 1.92 → 1.32 (95 % interval"),
        (make_score(-0.05), "failed", "No better than the base"),
        (make_score(0.6), "failed", "Worse than the base"),
        (make_score(-0.05, rows_needed=500, rows_recommended=800), "unknown", "about 800 would do"),
        (make_score(0.3, evaluation="token_f1"), "unknown", "Held-out loss was not measured"),
    ],
)
def test_the_base_must_be_beaten_beyond_doubt(
    score: Any, state: str, words: str, make_good: Callable[..., Adapter]
) -> None:
    found = said("beats_base", make_good(scores=(score,)))
    assert found[0] == state
    assert words in found[1]


def test_a_team_chooses_the_figure_that_decides(make_good: Callable[..., Adapter]) -> None:
    adapter = make_good(scores=(make_score(-0.6), make_score(-0.3, evaluation="token_f1")))
    assert said("beats_base", adapter)[0] == "passed"
    assert said("beats_base", adapter, evaluation="token_f1")[0] == "failed"
    assert said("beats_base", adapter, evaluation="primary")[0] == "failed"


def test_the_newest_run_decides(adapter: Adapter) -> None:
    run = add_run(adapter)
    Score.objects.create(adapter=adapter, run=run, test_set=TestSet.HELD_OUT, **make_score(0.6).model_dump())
    assert said("beats_base", adapter)[0] == "failed"


@pytest.mark.parametrize(
    ("general", "state", "words"),
    [
        ((make_score(0.01, width=0.005),), "passed", "within the 5.0 %"),
        ((make_score(0.8),), "failed", "Forgets what the base knew"),
        ((make_score(0.09, width=0.08),), "unknown", "leaves open"),
        ((), "unknown", "The general set was not scored"),
    ],
)
def test_what_was_forgotten_is_judged_by_the_interval_of_the_rise(
    general: Any, state: str, words: str, make_good: Callable[..., Adapter]
) -> None:
    found = said("forgetting", make_good(general=general))
    assert found[0] == state
    assert words in found[1]


@pytest.mark.parametrize(
    ("overlap", "state", "words"),
    [
        (OverlapRecord(num_held_out_rows=50, num_exact=0, num_near=0), "passed", "None of the 50"),
        (OverlapRecord(num_held_out_rows=200, num_exact=1, num_near=1), "passed", "The policy allows 1 %"),
        (OverlapRecord(num_held_out_rows=50, num_exact=9, num_near=3), "failed", "Leaked test rows: 12 of 50"),
        (OverlapRecord(num_held_out_rows=0, num_exact=0, num_near=0), "unknown", "no held-out rows"),
        (None, "unknown", "Nobody has looked"),
    ],
)
def test_leaked_test_rows_are_counted(overlap: Any, state: str, words: str, make_good: Callable[..., Adapter]) -> None:
    found = said("overlap", make_good(overlap=overlap))
    assert found[0] == state
    assert words in found[1]


def test_a_download_that_nobody_loaded_again_or_that_gave_other_logits_does_not_pass(
    make_good: Callable[..., Adapter],
) -> None:
    adapter = make_good()
    assert said("download", adapter)[0] == "passed"
    for verified, state in ((None, "unknown"), (False, "failed")):
        adapter.provenance["verified"] = verified
        assert said("download", adapter)[0] == state


def test_an_incomplete_evaluation_and_one_of_too_few_rows_fail(make_good: Callable[..., Adapter]) -> None:
    assert said("complete", make_good())[0] == "passed"
    assert said("complete", make_good(num_rows_scored=98))[1].startswith("Incomplete: 98 of 100 held-out rows")
    few = make_score(-0.05, rows_needed=500, rows_recommended=800)
    assert said("complete", make_good(scores=(few,))) == (
        "failed", "100 rows are too few to tell a difference. About 800 would do."
    )  # fmt: skip


@pytest.fixture
def guardrail(team: Team, alice: User, adapter: Adapter) -> Suite:
    return Suite.objects.create(
        team=team, name="Safety", version=2, dataset_version=adapter.dataset_version, evaluation={}, is_guardrail=True
    )


def test_a_guardrail_suite_that_was_not_run_is_not_known_and_one_that_fell_fails(
    adapter: Adapter, guardrail: Suite
) -> None:
    assert said("guardrails", adapter) == (
        "unknown", "Not evaluated on Safety v2. Run it on the adapter's page."
    )  # fmt: skip
    run = add_run(adapter, test_set=TestSet.SUITE, suite=guardrail)
    score = make_score(-0.2, evaluation="token_f1")
    Score.objects.create(adapter=adapter, run=run, test_set=TestSet.SUITE, **score.model_dump())
    state, sentence = said("guardrails", adapter)
    assert (state, "Regressed: Safety v2: Token F1 1.92 → 1.72" in sentence) == ("failed", True)
    assert said("guardrails", adapter, max_percent=20.0)[0] == "passed"
    EvaluationRun.objects.filter(pk=run.pk).update(num_scored=90)
    assert said("guardrails", adapter, max_percent=20.0)[0] == "unknown"


def add_counts(adapter: Adapter, losses: list[float], *, test_set: str = "a" * 64) -> None:
    """The rows of an adapter's held-out run as an evaluation leaves them: summed loss and tokens of each row."""
    run = adapter.runs.get(test_set=TestSet.HELD_OUT)
    EvaluationRun.objects.filter(pk=run.pk).update(test_set_sha256=test_set)
    counts = {"loss": [[10 * loss, 10.0] for loss in losses]}
    RowCounts.objects.create(
        run=run, lines=list(range(1, len(losses) + 1)), adapter_counts=counts, base_counts=counts
    )  # fmt: skip


def test_the_version_in_use_is_compared_row_by_row(make_good: Callable[..., Adapter]) -> None:
    draw = random.Random(3)
    rows = [draw.uniform(0.5, 2.5) for _ in range(100)]
    old, same, better, worse, elsewhere = (make_good() for _ in range(5))
    assert said("beats_champion", old)[1] == "No version of support is the champion yet, so there is nothing to beat."
    move_alias(old, "champion", by=None)
    assert said("beats_champion", old)[1] == "This version is the champion itself."
    add_counts(old, rows)
    add_counts(same, [loss + draw.uniform(-0.01, 0.01) for loss in rows])
    add_counts(better, [loss - 0.2 + draw.uniform(-0.05, 0.05) for loss in rows])
    add_counts(worse, [loss + 0.2 + draw.uniform(-0.05, 0.05) for loss in rows])
    add_counts(elsewhere, rows, test_set="c" * 64)
    assert said("beats_champion", better)[0] == "passed"
    assert said("beats_champion", worse)[1].startswith("Worse than the champion: ")
    assert said("beats_champion", same)[1].startswith("Not worse than the champion: ")
    assert said("beats_champion", same, demand="better")[1].startswith("No better than the champion: ")
    state, sentence = said("beats_champion", elsewhere)
    assert state == "unknown"
    assert "v1 and v5 were not both scored completely on the same rows" in sentence


def test_when_the_version_in_use_changes_open_reviews_are_compared_anew(make_good: Callable[..., Adapter]) -> None:
    old, new = make_good(), make_good()
    review = submitted(new)
    assert not review.gates_are_due()
    move_alias(old, "champion", by=None)
    review.refresh_from_db()
    assert review.gates_are_due()
    checking.check(review.pk)
    assert review.outcomes.get(gate="beats_champion").state == "unknown"


def test_a_gate_whose_storage_fails_is_not_known(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.storage import StorageError

    def broken(*_args: object, **_kwargs: object) -> None:
        raise StorageError(5, "The disk cannot be read.")

    monkeypatch.setattr("studio.reviews.gates.download.check_adapter", broken)
    outcome = submitted(adapter).outcomes.get(gate="download")
    assert (outcome.state, outcome.sentence) == ("unknown", "It could not be checked: The disk cannot be read.")


def test_a_gate_that_is_a_file_is_found(adapter: Adapter) -> None:
    assert all(isinstance(gate, Gate) and gate.help for gate in gates().values())
    review = submitted(adapter)
    on = {name for name, gate in gates().items() if gate.is_on_at_first}
    assert set(Review.objects.get(pk=review.pk).outcomes.values_list("gate", flat=True)) == on

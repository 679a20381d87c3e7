"""Several datasets in one recipe: how many rows of each an epoch takes, and in what order."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from workers.batching import Plan
from workers.errors import RecipeError
from workers.facts import DatasetFacts, Part, mixed
from workers.mixing import MANY_PASSES, Portion, dealt, place_of, portions, row_at, rows_per_epoch, told_lines
from workers.recipe import Recipe
from workers.splitting import Parts

SIZES, WEIGHTS = (40, 6, 300), (0.5, 1.25)


def plan_of(*, epochs: float = 3, batch_size: int = 8, seed: int = 17, max_steps: int | None = None) -> Plan:
    parts = portions(SIZES, WEIGHTS)
    return Plan(sum(one.per_epoch for one in parts), batch_size, epochs, seed, max_steps, parts)


def stream_of(plan: Plan) -> list[int]:
    return [row for step in range(plan.num_steps) for row in plan.rows(step)]


def source_of(row: int) -> int:
    return 0 if row < SIZES[0] else 1 if row < SIZES[0] + SIZES[1] else 2


def test_an_epoch_is_one_pass_over_the_main_rows_and_its_weight_of_every_other() -> None:
    assert portions(SIZES, WEIGHTS) == (Portion(40, 40), Portion(6, 20), Portion(300, 50))
    plan, stream = plan_of(), stream_of(plan_of())
    for epoch in range(3):
        rows = stream[epoch * 110 : (epoch + 1) * 110]
        assert Counter(map(source_of, rows)) == {0: 40, 1: 20, 2: 50}
        assert sorted(row for row in rows if source_of(row) == 0) == list(range(40))
    assert plan.num_rows_of(330) == [120, 60, 150]


def test_no_row_comes_again_before_all_others_of_its_dataset_have_come() -> None:
    counts = Counter(stream_of(plan_of()))
    assert {counts[row] for row in range(40)} == {3}
    assert {counts[row] for row in range(40, 46)} == {10}, "60 rows seen of 6 are 10 passes, neither more nor less"
    assert {counts[row] for row in range(46, 346)} == {0, 1}, "150 of 300 rows, each in another epoch"


@pytest.mark.parametrize("num_seen", [0, 1, 37, 110, 111, 250, 330])
def test_the_rows_seen_of_each_dataset_are_those_that_steps_took(num_seen: int) -> None:
    seen = Counter(map(source_of, stream_of(plan_of())[:num_seen]))
    assert plan_of().num_rows_of(num_seen) == [seen[0], seen[1], seen[2]]


def test_the_datasets_are_mixed_all_the_way_through_an_epoch() -> None:
    halves = stream_of(plan_of(epochs=1, batch_size=55))
    first = Counter(map(source_of, halves[:55]))
    assert all(first[source] > 0.25 * num for source, num in enumerate((40, 20, 50)))


def test_the_seed_alone_decides_the_order_whatever_step_is_asked_for_first() -> None:
    stream = stream_of(plan_of())
    assert stream == stream_of(plan_of())
    assert stream != stream_of(plan_of(seed=18))
    late = plan_of()
    assert [late.rows(step) for step in (40, 3)] == [stream[320:328], stream[24:32]]


def test_part_of_an_epoch_and_a_step_limit_count_rows_of_the_mixture() -> None:
    assert plan_of(epochs=0.5).num_steps == math.ceil(55 / 8)
    assert plan_of(max_steps=4).num_steps == 4
    assert plan_of().epoch(14) == pytest.approx(14 * 8 / 110)


def test_one_dataset_has_the_order_it_always_had() -> None:
    """Adapters that were made before there were mixtures can be made again: these numbers are from then."""
    plan = Plan(num_rows=10, batch_size=10, epochs=2, seed=1)
    assert plan.rows(0) == [8, 4, 7, 0, 1, 2, 5, 9, 6, 3]
    assert plan.rows(1) == [7, 2, 4, 6, 1, 0, 3, 5, 9, 8]
    alone = Plan(10, 10, 2, 1, None, portions([10], []))
    assert (alone.rows(0), alone.rows(1)) == (plan.rows(0), plan.rows(1))


def test_a_weight_gives_one_row_at_least_and_rounds_halves_up() -> None:
    assert [rows_per_epoch(10, weight) for weight in (0.001, 0.05, 0.25, 1, 2.04)] == [1, 1, 3, 10, 20]
    assert Portion(50, 100).passes(3) == 6 > MANY_PASSES


def test_places_tell_rows_of_different_datasets_apart_and_lines_of_the_main_one_stay() -> None:
    assert place_of(0, 7) == 7
    assert [row_at(place_of(source, line)) for source, line in ((0, 7), (1, 7), (8, 2**39))] == [
        (0, 7), (1, 7), (8, 2**39)
    ]  # fmt: skip
    assert place_of(8, 2**39) < 2**53, "a whole number wherever JSON is read"
    places = [3, 4, place_of(1, 5), place_of(1, 6)]
    assert told_lines(places, ["a v1", "b v2"], most=3) == "3, 4 of a v1, 5 of b v2 and 1 more"
    assert told_lines([3, 4], ["a v1"]) == told_lines([3, 4], []) == "3, 4"


def test_dealt_rows_have_one_of_each_dataset_in_turn() -> None:
    assert dealt(["a", "b", "c", "x", "y"], [0, 0, 0, 1, 1]) == ["a", "x", "b", "y", "c"]


def test_the_facts_of_a_mixture_are_those_of_what_an_epoch_takes() -> None:
    long = DatasetFacts(num_rows=100, total_tokens=50_000, longest=900, lengths={512: 80, 1024: 20})
    short = DatasetFacts(num_rows=20, total_tokens=400, longest=30, lengths={32: 20})
    found = mixed([Part(short, per_epoch=18, own=Parts(18, 0, 2)), Part(long, per_epoch=9, own=Parts(90, 4, 6))])
    assert (found.num_rows, found.longest, found.parts) == (39, 900, Parts(27, 4, 8))
    assert found.total_tokens == round(400 + 50_000 * 19 / 100)
    assert found.lengths == {32: 20, 512: 15, 1024: 4}


def recipe_with(mix: list[dict[str, object]]) -> dict[str, object]:
    main = {"name": "main v1", "format": "alpaca", "sha256": "a" * 64}
    return {"name": "Mixture", "base_model": {"name": "tiny"}, "dataset": main, "mix": mix}


def other(name: str, **values: object) -> dict[str, object]:
    return {"name": name, "format": "alpaca", **values}


def test_a_recipe_of_one_dataset_is_written_and_digested_as_before() -> None:
    plain = {key: value for key, value in recipe_with([]).items() if key != "mix"}
    recipe = Recipe.from_dict(recipe_with([]))
    assert "mix" not in recipe.to_dict()
    assert recipe.sha256() == Recipe.from_dict(plain).sha256()
    mixture = Recipe.from_dict(recipe_with([other("faq v2", weight=0.5)]))
    assert Recipe.from_dict(mixture.to_dict()) == mixture
    assert mixture.sha256() != recipe.sha256()
    heavier = Recipe.from_dict(recipe_with([other("faq v2", weight=0.6)]))
    assert heavier.sha256() != mixture.sha256()


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ([other("faq v2", weight=0)], "greater than 0"),
        ([other("faq v2", weight=101)], "less than or equal to 100"),
        ([other("faq v2", weight=float("nan"))], "less than or equal to 100"),
        ([other(f"d{number}") for number in range(9)], "at most 8"),
        ([other("main v1", sha256="a" * 64)], "main v1 is chosen twice"),
        ([other("copy v1", sha256="a" * 64)], "copy v1 has the same file as main v1"),
        ([other("b v1", sha256="b" * 64), other("b v1", sha256="b" * 64)], "b v1 is chosen twice"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_in_words(mix: list[dict[str, object]], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(recipe_with(mix))
    assert said in str(caught.value)

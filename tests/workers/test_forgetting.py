"""Forgetting: over-training on purpose turns it red, an ordinary run stays green, and the words say how much it is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.factories import make_score
from tests.taught import make_taught_base
from tests.tiny import make_tiny_base, write_rows
from workers.base_scores import BaseScores
from workers.bundled import prepare_smollm2
from workers.forgetting import ALLOWED_RISE, Forgetting, Keeping, forgetting
from workers.general import FILE, SHA256, general_rows
from workers.recipe import Recipe
from workers.rendering import Renderer
from workers.results import Result
from workers.training import Folders, train

PRODUCTS = ("kettle", "lamp", "drill", "mower", "heater", "radio", "mixer", "pump", "scale", "fan")
FAULTS = {"does not start": "power", "is too loud": "noise", "came with a dent": "return", "smells of smoke": "danger"}


def narrow_rows(num: int) -> list[dict[str, str]]:
    """A narrow task with a rule to learn: letters about appliances to the queue that they belong to."""
    faults = list(FAULTS)
    return [
        {
            "instruction": f"Letter {index}: my new {PRODUCTS[index % 10]} {faults[index // 10 % 4]}, what now?",
            "input": "",
            "output": f"queue={FAULTS[faults[index // 10 % 4]]};item={PRODUCTS[index % 10]};ref={index % 7}",
        }
        for index in range(num)
    ]


def general_verdict(base: Path, folder: Path, rows: list[dict[str, str]], **training: Any) -> Forgetting:
    """How a run of the product's own code stands on the general set."""
    recipe = Recipe.from_dict(
        {
            "name": "Queues",
            "base_model": {"name": "base"},
            "dataset": {"name": "letters", "format": "alpaca"},
            "precision": "float32",
            "training": {"max_length": 256, "checkpoint_every_steps": 1000} | training,
            "evaluation": {"num_generated": 0, "metrics": ["loss"]},
        }
    )
    folder.mkdir()
    folders = Folders(base, write_rows(folder / "rows.jsonl", rows), folder / "out")
    # The base is the same for every run of a test, and so are its scores.
    scores = BaseScores(folder.parent / "base_scores")
    product = train(recipe, folders, report=lambda event: None, should_stop=lambda: None, base_scores=scores)
    assert product is not None
    general = {score.evaluation: score for score in Result.from_folder(product).general}
    assert set(general) == {"loss", "byte_perplexity"}
    assert general["loss"].num_rows == len(general_rows())
    return forgetting(general["loss"])


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    untaught = make_tiny_base(tmp_path_factory.mktemp("untaught"))
    folder = make_taught_base(tmp_path_factory.mktemp("taught") / "base")
    assert general_loss(folder) < general_loss(untaught) - 2
    return folder


def general_loss(folder: Path) -> float:
    """Mean loss per token of the general set's first rows."""
    from transformers import AutoModelForCausalLM

    from workers.scoring import row_losses

    renderer = Renderer(folder, max_length=256, loss_on="all")
    rows = [renderer.render(example) for example in general_rows()[:32]]
    with torch.no_grad():
        found = row_losses(AutoModelForCausalLM.from_pretrained(folder), [(row.ids, row.trained) for row in rows])
    return float(sum(loss for loss, _ in found) / sum(num for _, num in found))


def test_over_training_turns_it_red_and_an_ordinary_run_stays_green(taught: Path, tmp_path: Path) -> None:
    ordinary = general_verdict(taught, tmp_path / "ordinary", narrow_rows(200))
    assert ordinary.keeping == Keeping.KEEPS, ordinary
    spoilt = general_verdict(taught, tmp_path / "spoilt", narrow_rows(40), learning_rate=0.02, epochs=40)
    assert spoilt.keeping == Keeping.FORGETS, spoilt
    print(f"ordinary: {ordinary.sentence()}\nover-trained: {spoilt.sentence()}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_base_forgets_when_it_is_over_trained_and_only_then(tmp_path: Path) -> None:
    base = prepare_smollm2(tmp_path / "smollm2")
    ordinary = general_verdict(base, tmp_path / "ordinary", narrow_rows(200))
    assert ordinary.keeping == Keeping.KEEPS, ordinary
    spoilt = general_verdict(base, tmp_path / "spoilt", narrow_rows(40), learning_rate=5e-3, epochs=4)
    assert spoilt.keeping == Keeping.FORGETS, spoilt
    print(f"ordinary: {ordinary.sentence()}\nover-trained: {spoilt.sentence()}")


@pytest.mark.parametrize(
    ("difference", "width", "keeping"),
    [
        (0.30, 0.10, Keeping.FORGETS),  # 10 % to 20 % of 2.0
        (0.12, 0.10, Keeping.UNCLEAR),  # 1 % to 11 %
        (0.02, 0.05, Keeping.KEEPS),  # -1.5 % to 3.5 %
        (-0.50, 0.10, Keeping.KEEPS),
    ],
)
def test_the_whole_interval_decides(difference: float, width: float, keeping: Keeping) -> None:
    score = make_score(difference, width=width, base_value=2.0)
    assert forgetting(score, 0.05).keeping == keeping


def test_the_allowed_rise_is_the_policys_to_set() -> None:
    score = make_score(0.3, width=0.1, base_value=2.0)
    assert forgetting(score, 0.25).keeping == Keeping.KEEPS
    assert forgetting(score).allowed == ALLOWED_RISE


def test_the_sentence_gives_the_rise_in_per_cent() -> None:
    sentence = forgetting(make_score(0.3, width=0.1, base_value=2.0, num_rows=144)).sentence()
    assert sentence == (
        "The loss on general text rose by 15.0 % (95 % interval of the rise 10.0 % to 20.0 %, n = 144), "
        "more than the 5.0 % that are allowed."
    )


def test_a_rise_that_rounds_to_nothing_is_none() -> None:
    sentence = forgetting(make_score(-0.0002, width=0.0004, base_value=2.0, num_rows=144)).sentence()
    assert sentence == (
        "The loss on general text stayed the same (95 % interval of the rise 0.0 % to 0.0 %, n = 144), within the "
        "5.0 % that are allowed."
    )


def test_a_base_without_loss_has_no_share_of_it() -> None:
    with pytest.raises(ValueError, match="no rise"):
        forgetting(make_score(base_value=0.0))


def test_the_general_set_is_the_one_that_is_named_and_its_prompts_are_all_different() -> None:
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256
    prompts = [example.messages[0].content for example in general_rows()]
    assert len(set(prompts)) == len(prompts) == 144


def test_a_team_can_do_without_the_general_set(taught: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {
            "name": "Queues",
            "base_model": {"name": "base"},
            "dataset": {"name": "letters", "format": "alpaca"},
            "training": {"max_length": 256, "max_steps": 1},
            "evaluation": {"num_generated": 0, "metrics": ["loss"], "general": False},
        }
    )
    folders = Folders(taught, write_rows(tmp_path / "rows.jsonl", narrow_rows(40)), tmp_path / "out")
    product = train(recipe, folders, report=lambda event: None, should_stop=lambda: None)
    assert product is not None
    assert Result.from_folder(product).general == ()

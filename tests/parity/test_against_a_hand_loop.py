"""The same loss at every step as plain peft in a loop of a few lines, one unpadded row at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.parity.environments import environment
from tests.parity.jobs import PINS, WAYS, Case, Step, compare, make_folders, train_ours, train_theirs, write_job
from workers.training import Folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SCRIPT = Path(__file__).with_name("hand_loop_losses.py")
# The gradients of a prefix are small: a smaller norm clips some of them.
CLIPPED = {"max_grad_norm": 0.04}
CASES = {
    "prefix_tuning": Case("prefix_tuning", {"num_virtual_tokens": 6}, 1e-1, training=CLIPPED),
    "prefix_tuning on gpt2": Case("prefix_tuning", {"num_virtual_tokens": 6}, 1e-1, family="gpt2", training=CLIPPED),
    "prefix_tuning with projection": Case(
        "prefix_tuning", {"num_virtual_tokens": 6, "projection": True, "projection_size": 32}, 2e-2, training=CLIPPED
    ),
    "p_tuning": Case("p_tuning", {"num_virtual_tokens": 6}, 1e-2),
}
Curve = tuple[Case, Folders, list[Step]]


@pytest.fixture(scope="module", params=CASES)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """A method, its base and rows, and the steps that the loop took."""
    case: Case = CASES[request.param]
    root = tmp_path_factory.mktemp("loop")
    folders = make_folders(root, case.family)
    return case, folders, train_theirs(environment("trl", PINS), SCRIPT, write_job(case.recipe(), folders, root))


@pytest.mark.parametrize("way", WAYS)
def test_every_step_has_the_loss_that_plain_peft_has(theirs: Curve, way: str, tmp_path: Path) -> None:
    case, folders, steps = theirs
    compare(case, way, train_ours(case.recipe(**WAYS[way]), replace(folders, out=tmp_path)), steps)

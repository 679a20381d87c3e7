"""The same loss at every step as plain peft in a loop of a few lines, one unpadded row at a time.

What TRL cannot begin from a saved folder: the networks that make a prefix or a prompt are not in it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.parity.environments import environment
from tests.parity.jobs import PINS, WAYS, Case, Step, compare, make_folders, train_ours, train_theirs, write_job
from workers.training import Folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SCRIPT = Path(__file__).with_name("hand_loop_losses.py")
CASES = {
    "prefix_tuning": Case("prefix_tuning", {"num_virtual_tokens": 6}, 5e-2),
    "prefix_tuning on gpt2": Case("prefix_tuning", {"num_virtual_tokens": 6}, 5e-2, family="gpt2"),
    "prefix_tuning with projection": Case(
        "prefix_tuning", {"num_virtual_tokens": 6, "projection": True, "projection_size": 32}, 1e-2
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

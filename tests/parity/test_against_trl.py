"""The same loss at every step as TRL's SFTTrainer with peft: a trainer that shares no code with ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.parity.environments import environment
from tests.parity.jobs import PINS, WAYS, Case, Step, compare, make_folders, train_ours, train_theirs, write_job
from workers.training import Folders

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SCRIPT = Path(__file__).with_name("trl_losses.py")
SMALL = {"rank": 4, "alpha": 8, "dropout": 0.0}
CASES = {
    "lora": Case("lora", SMALL, 1e-2),
    "lora on gpt2": Case("lora", SMALL, 1e-2, family="gpt2"),
    "lora on gemma": Case("lora", SMALL, 1e-2, family="gemma"),
    "lora with warm-up": Case("lora", SMALL, 1e-2, training={"schedule": "linear", "warmup_share": 0.1}),
    "qlora": Case("qlora", SMALL, 1e-2, precision="nf4"),
    "rslora": Case("rslora", SMALL, 1e-2),
    "lora_plus": Case("lora_plus", SMALL | {"learning_rate_ratio": 8.0}, 2e-3),
    "dora": Case("dora", SMALL, 1e-2),
    "ia3": Case("ia3", {}, 1e-1, training={"weight_decay": 0.0, "max_grad_norm": 0.1}),
    "prompt_tuning": Case("prompt_tuning", {"num_virtual_tokens": 6}, 1e-1),
}
Curve = tuple[Case, Folders, list[Step]]


@pytest.fixture(scope="session")
def trl() -> Path:
    """The Python of an environment with TRL."""
    return environment("trl", PINS)


@pytest.fixture(scope="module", params=CASES)
def theirs(request: pytest.FixtureRequest, trl: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """A method, its base and rows, and the steps that TRL took."""
    case: Case = CASES[request.param]
    root = tmp_path_factory.mktemp("trl")
    folders = make_folders(root, case.family)
    return case, folders, train_theirs(trl, SCRIPT, write_job(case.recipe(), folders, root))


@pytest.mark.parametrize("way", WAYS)
def test_every_step_has_the_loss_that_trl_has(theirs: Curve, way: str, tmp_path: Path) -> None:
    case, folders, steps = theirs
    compare(case, way, train_ours(case.recipe(**WAYS[way]), replace(folders, out=tmp_path)), steps)

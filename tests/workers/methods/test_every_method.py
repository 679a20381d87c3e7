"""What holds for every method that is found: on a base of each family, and on every precision that it takes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import FAMILIES, tiny_rows, write_rows
from tests.workers.methods.trying import (
    attach,
    disturb,
    gradients,
    packed,
    padded,
    random_rows,
    recipe_of,
    tiny_settings,
    trainable,
)
from workers import adapters, base_models
from workers.base_folders import read_base_folder
from workers.generation import generate
from workers.losses import summed_cross_entropy
from workers.methods import Method, get_method, methods
from workers.recipe import Precision, Recipe
from workers.training import Folders, train

MISSION = {"lora", "qlora", "prefix_tuning", "prompt_tuning", "bottleneck"}
CANNOT: dict[str, set[str]] = {}
"""Methods beyond the mission's five whose mathematics forbids something, and what; nothing else may be declared."""

PRECISIONS = [(name, precision) for name, method in methods().items() for precision in method.precisions]


def exact_precision(method: Method) -> Precision:
    """float32 where the method takes it, so that only the order of additions may differ."""
    return "float32" if "float32" in method.precisions else method.precisions[0]


def is_supported(name: str, family: str) -> bool:
    """Whether the method says that it takes this family; what it refuses is tested by its own file."""
    return "method" not in get_method(name).refusals(recipe_of(name), FAMILY_SHAPES[family])


FAMILY_SHAPES: dict[str, Any] = {}
EACH_FAMILY = [(name, family) for name in methods() for family in FAMILIES]


@pytest.fixture(scope="session", autouse=True)
def shapes(bases: dict[str, Path]) -> None:
    FAMILY_SHAPES.update({family: read_base_folder(folder).shape for family, folder in bases.items()})


@pytest.fixture
def case(name: str, family: str, bases: dict[str, Path]) -> tuple[str, Path, Precision]:
    """Name, base folder and precision of a method on a family; skipped where the method refuses the family."""
    if not is_supported(name, family):
        assert name not in MISSION or family not in ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt2")
        pytest.skip(f"{name} refuses {family} and says why")
    return name, bases[family], exact_precision(get_method(name))


def tolerance(precision: Precision) -> float:
    return 1e-4 if precision == "float32" else 3e-2


def test_the_missions_five_declare_no_exception() -> None:
    for name in MISSION & set(methods()):
        method = get_method(name)
        assert (method.can_pack, method.can_checkpoint_activations) == (True, True), name
    five = {name: get_method(name).precisions for name in MISSION & set(methods())}
    assert all("nf4" in precisions or name == "lora" for name, precisions in five.items())
    for name, method in methods().items():
        declared = {what for what in ("can_pack", "can_checkpoint_activations") if not getattr(method, what)}
        assert declared == CANNOT.get(name, set()), name


@pytest.mark.parametrize("name", methods())
def test_every_setting_explains_itself(name: str) -> None:
    for key, field in get_method(name).Settings.model_fields.items():
        extra = field.json_schema_extra
        assert field.title, f"{name}.{key} has no title"
        assert field.description, f"{name}.{key} has no description"
        assert isinstance(extra, dict), f"{name}.{key} names no source of its default"
        assert extra.get("source"), f"{name}.{key} names no source of its default"


@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_the_formula_gives_the_real_number_of_parameters(case: tuple[str, Path, Precision], family: str) -> None:
    name, folder, _ = case
    method = get_method(name)
    adapted = attach(name, folder, method.precisions[0])
    settings = method.read_settings(tiny_settings(name))
    found = sum(parameter.numel() for parameter in trainable(adapted).values())
    assert found == method.num_trainable(settings, FAMILY_SHAPES[family])
    assert all(parameter.dtype == torch.float32 for parameter in trainable(adapted).values())


def check_training(name: str, folder: Path, precision: Precision) -> None:
    adapted = attach(name, folder, precision)
    frozen = {key: p.detach().clone() for key, p in adapted.named_parameters() if not p.requires_grad}
    before = {key: p.detach().clone() for key, p in trainable(adapted).items()}
    optimizer = torch.optim.AdamW(trainable(adapted).values(), lr=3e-2, weight_decay=0.0)
    batch = padded(random_rows(24, 17))
    losses = []
    for _ in range(24):
        loss, count = summed_cross_entropy(adapted, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / int(count))
    assert losses[-1] < losses[0] - 0.05
    for key, value in adapted.named_parameters():
        if not value.requires_grad:
            assert torch.equal(value, frozen[key]), f"{key} of the base has changed"
    assert all(not torch.equal(value, before[key]) for key, value in trainable(adapted).items())


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_only_the_adapter_trains_and_its_loss_falls_at_every_precision(
    name: str, precision: Precision, bases: dict[str, Path]
) -> None:
    check_training(name, bases["llama"], precision)


@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_only_the_adapter_trains_and_its_loss_falls_in_every_family(case: tuple[str, Path, Precision]) -> None:
    check_training(*case)


def check_packing(name: str, folder: Path, precision: Precision) -> None:
    if not get_method(name).can_pack:
        pytest.skip("declares that it cannot be packed")
    adapted = attach(name, folder, precision)
    disturb(adapted)
    rows = random_rows(21, 9, 14)
    loss, gradient = gradients(adapted, padded(rows))
    packed_loss, packed_gradient = gradients(adapted, packed(rows))
    assert packed_loss == pytest.approx(loss, rel=tolerance(precision))
    assert (packed_gradient - gradient).norm() / gradient.norm() < (1e-3 if precision == "float32" else 0.15)


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_packed_rows_train_as_separate_rows_do_at_every_precision(
    name: str, precision: Precision, bases: dict[str, Path]
) -> None:
    check_packing(name, bases["llama"], precision)


@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_packed_rows_train_as_separate_rows_do_in_every_family(case: tuple[str, Path, Precision]) -> None:
    check_packing(*case)


@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_four_times_one_row_trains_as_one_batch_of_four(case: tuple[str, Path, Precision]) -> None:
    """Weighted by tokens: the rows differ in length, so a mean of means would be another gradient."""
    name, folder, precision = case
    adapted = attach(name, folder, precision)
    disturb(adapted)
    rows = random_rows(22, 5, 13, 9)
    loss, gradient = gradients(adapted, padded(rows))
    adapted.zero_grad()
    num_tokens, total = sum(len(row) - 1 for row in rows), 0.0
    for row in rows:
        part, _ = summed_cross_entropy(adapted, padded([row]))
        (part / num_tokens).backward()
        total += part.item()
    collected = torch.cat([p.grad.flatten().float() for p in trainable(adapted).values()])  # type: ignore[union-attr]
    assert total / num_tokens == pytest.approx(loss, rel=tolerance(precision))
    assert (collected - gradient).norm() / gradient.norm() < (1e-3 if precision == "float32" else 0.15)


def check_checkpointing(name: str, folder: Path, precision: Precision) -> None:
    if not get_method(name).can_checkpoint_activations:
        pytest.skip("declares that it cannot")
    adapted = attach(name, folder, precision)
    disturb(adapted)
    batch = padded(random_rows(20, 12))
    loss, gradient = gradients(adapted, batch)
    adapted.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    again, other = gradients(adapted, batch)
    assert again == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_gradient_checkpointing_gives_the_same_gradients_at_every_precision(
    name: str, precision: Precision, bases: dict[str, Path]
) -> None:
    check_checkpointing(name, bases["llama"], precision)


@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_gradient_checkpointing_gives_the_same_gradients_in_every_family(case: tuple[str, Path, Precision]) -> None:
    check_checkpointing(*case)


def check_generation(name: str, folder: Path, precision: Precision) -> None:
    adapted = attach(name, folder, precision).eval()
    disturb(adapted)
    prompts = random_rows(14, 6, 9)
    alone = [generate(adapted, [prompt], max_new_tokens=10, stop_ids=())[0] for prompt in prompts]
    assert all(len(answer) == 10 for answer in alone)
    allowed = 1e-4 if precision == "float32" else 0.1
    assert shortfall(adapted, prompts, alone) <= allowed
    for use_cache in (True, False):
        together = generate(adapted, prompts, max_new_tokens=10, stop_ids=(), use_cache=use_cache)
        if precision == "float32":
            assert together == alone, f"use_cache={use_cache}"
        assert shortfall(adapted, prompts, together) <= allowed, f"use_cache={use_cache}"
    ids = torch.tensor([prompts[1]])
    theirs = adapted.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0,
        eos_token_id=1_000_000,
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    if precision == "float32":
        assert theirs == alone[1]
    assert shortfall(adapted, [prompts[1]], [theirs]) <= allowed


def shortfall(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """How far a token written is from the most probable one at most, in standard deviations of the logits there.

    In 16, 8 or 4 bits near-ties fall either way, and the answers differ from there on.
    """
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        chosen_T = logits_TV.gather(1, torch.tensor(answer)[:, None])[:, 0]
        worst = max(worst, float(((logits_TV.max(dim=1).values - chosen_T) / logits_TV.std(dim=1)).max()))
    return worst


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_answers_are_the_same_alone_batched_and_without_a_cache_at_every_precision(
    name: str, precision: Precision, bases: dict[str, Path]
) -> None:
    check_generation(name, bases["llama"], precision)


@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_answers_are_the_same_alone_batched_and_without_a_cache_in_every_family(
    case: tuple[str, Path, Precision],
) -> None:
    check_generation(*case)


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_saving_and_loading_gives_the_same_logits(
    name: str, precision: Precision, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapted = attach(name, bases["llama"], precision).eval()
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(16))
    adapters.save(adapted, tmp_path / "adapter", recipe=recipe_of(name), hub_id="owner/base")
    fresh = base_models.load(bases["llama"], precision, "cpu", checked=True).model
    loaded = adapters.load(fresh, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids_BT).logits, adapted(input_ids=ids_BT).logits, rtol=0, atol=0)


OUTSIDE = """
import importlib.util, json, sys, warnings
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
warnings.simplefilter("ignore")
prompt, found = json.loads(sys.argv[2]), {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for companion in folder.glob("peft_*.py"):
        if companion.stem not in sys.modules:
            spec = importlib.util.spec_from_file_location(companion.stem, companion)
            sys.modules[companion.stem] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[companion.stem])
    is_adapter = (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained((folder / "base").read_text() if is_adapter else folder).eval()
    model = PeftModel.from_pretrained(model, folder).eval() if is_adapter else model
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -len(prompt):]
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=8, eos_token_id=1_000_000, pad_token_id=0)
    found[folder.name] = {"logits": logits.tolist(), "written": written[0, len(prompt):].tolist()}
ours = [name for name in sys.modules if name.split(".")[0] in ("workers", "studio", "jobs")]
print(json.dumps({"found": found, "ours": ours}))
"""
PROMPT = random_rows(17)[0]


@pytest.fixture(scope="session")
def outside(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Logits and answers of every method on every family: as we have them, and as one fresh process has them that
    knows transformers, peft and the files of the download."""
    root = tmp_path_factory.mktemp("downloads")
    found: dict[str, dict[str, Any]] = {}
    for name, family in EACH_FAMILY:
        method = get_method(name)
        if "float32" not in method.precisions or not is_supported(name, family):
            continue
        adapted = attach(name, bases[family], "float32").eval()
        disturb(adapted)
        with torch.no_grad():
            logits = adapted(input_ids=torch.tensor([PROMPT])).logits[0]
        written = generate(adapted, [PROMPT], max_new_tokens=8, stop_ids=())[0]
        folder = root / f"{name}-{family}"
        adapters.save(adapted, folder, recipe=recipe_of(name), hub_id="owner/base")
        (folder / "base").write_text(str(bases[family]))
        found[folder.name] = {"logits": logits, "written": written}
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, str(root), json.dumps(PROMPT)],
        capture_output=True, text=True, check=False, cwd=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ours"] == []
    for key, values in said["found"].items():
        found[key] |= {"their_logits": torch.tensor(values["logits"]), "their_written": values["written"]}
    return found


@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_a_fresh_process_with_transformers_and_peft_gives_the_same_model(
    name: str, family: str, outside: dict[str, dict[str, Any]]
) -> None:
    found = outside.get(f"{name}-{family}")
    if found is None:
        pytest.skip(f"{name} does not train on a float32 base of {family}")
    torch.testing.assert_close(found["their_logits"], found["logits"], rtol=1e-4, atol=1e-4)
    assert found["their_written"] == found["written"]


@pytest.mark.parametrize("name", methods())
def test_switching_the_adapter_off_gives_the_base(name: str, bases: dict[str, Path]) -> None:
    precision = get_method(name).precisions[0]
    ids_BT = torch.tensor(random_rows(16))
    base = base_models.load(bases["llama"], precision, "cpu", checked=True).model
    adapted = attach(name, bases["llama"], precision).eval()
    disturb(adapted)
    with torch.no_grad():
        expected = base(input_ids=ids_BT).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(input_ids=ids_BT).logits, expected, rtol=0, atol=0)
        assert not torch.equal(adapted(input_ids=ids_BT).logits, expected)
        torch.testing.assert_close(adapted.unload()(input_ids=ids_BT).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_merged_it_gives_the_logits_of_the_adapter(case: tuple[str, Path, Precision]) -> None:
    name, folder, precision = case
    if not get_method(name).can_merge:
        pytest.skip("does not merge, by its mathematics")
    if precision != "float32":
        pytest.skip("merges on a reloaded full-precision base")
    adapted = attach(name, folder, precision).eval()
    disturb(adapted)
    ids_BT = torch.tensor(random_rows(16))
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids_BT).logits, expected, rtol=1e-4, atol=1e-4)


# --- killed and resumed -----------------------------------------------------------------------------------------------

NUM_STEPS = 12


class Killed(BaseException):
    """The trainer ends between two events, and nothing of it runs any more: not even a handler of Exception."""


def run(name: str, folder: Path, out: Path, *, kill_at: int | None = None, attempt: int = 1) -> bytes:
    """The weights' bytes of a run; killed right after the step `kill_at` when that is given."""
    dataset = out.parent / "rows.jsonl"
    if not dataset.exists():
        write_rows(dataset, tiny_rows(40))
    settings = tiny_settings(name) | ({"dropout": 0.1} if "dropout" in get_method(name).Settings.model_fields else {})
    recipe = Recipe.from_dict(
        recipe_of(name).to_dict()
        | {
            "settings": settings,
            "precision": exact_precision(get_method(name)),
            "training": {
                "learning_rate": 0.01, "batch_size": 4, "micro_batch_size": 2, "max_length": 96, "packing": False,
                "max_steps": NUM_STEPS, "epochs": 3, "checkpoint_every_steps": 4, "gradient_checkpointing": False,
            },
            "evaluation": {"num_generated": 0, "general": False},
        }
    )  # fmt: skip

    def report(event: Any) -> None:
        if kill_at is not None and getattr(event, "type", "") == "step" and event.step == kill_at:
            raise Killed

    product = train(recipe, Folders(folder, dataset, out), report=report, should_stop=lambda: None, attempt=attempt)
    assert product is not None
    return b"".join(path.read_bytes() for path in sorted(product.glob("*.safetensors")))


def check_resuming(name: str, folder: Path, tmp_path: Path, kills: list[int]) -> None:
    straight = run(name, folder, tmp_path / "straight")
    for kill_at in kills:
        out = tmp_path / f"killed-{kill_at}"
        with pytest.raises(Killed):
            run(name, folder, out, kill_at=kill_at)
        assert run(name, folder, out, attempt=2) == straight, f"killed after step {kill_at}"


@pytest.mark.parametrize("name", methods())
def test_a_killed_run_that_goes_on_ends_with_the_same_bytes(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    check_resuming(name, bases["llama"], tmp_path, [random.Random(name).randint(5, NUM_STEPS)])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), EACH_FAMILY)
def test_killed_at_any_of_twenty_steps_it_ends_with_the_same_bytes(
    case: tuple[str, Path, Precision], tmp_path: Path
) -> None:
    """Twenty kills, some of them at the same step: before the first checkpoint, between two, and on one."""
    name, folder, _ = case
    chance = random.Random(f"{name} {folder.name}")
    kills = sorted({chance.randint(1, NUM_STEPS) for _ in range(20)})
    check_resuming(name, folder, tmp_path, kills)

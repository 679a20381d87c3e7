"""What people paste: right names, right flags, and nothing that a name can break out of."""

from __future__ import annotations

import ast
import shlex

import pytest

from studio.accounts.models import Team, User
from studio.catalogue.usage import usages
from tests.factories import make_adapter, make_base_model

pytestmark = pytest.mark.usefixtures("data_dir")


def snippets(adapter: object) -> dict[str, str]:
    return {usage.key: usage.code or usage.note for usage in usages(adapter)}  # type: ignore[arg-type]


def test_the_python_snippet_names_the_folder_in_the_zip_and_the_base(team: Team, alice: User) -> None:
    adapter = make_adapter(team, alice, name="It's mine", base_model=make_base_model(hub_id="Qwen/Qwen3-0.6B"))
    tree = ast.parse(snippets(adapter)["peft"])
    names = {
        node.targets[0].id: node.value.value  # type: ignore[attr-defined]
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert names == {"BASE": "Qwen/Qwen3-0.6B", "ADAPTER": "its-mine"}


@pytest.mark.parametrize(("rank", "flag"), [(4, "8"), (16, "16"), (24, "32"), (512, "512")])
def test_the_vllm_snippet_asks_for_a_rank_that_vllm_takes(rank: int, flag: str, team: Team, alice: User) -> None:
    words = shlex.split(snippets(make_adapter(team, alice, settings={"rank": rank}))["vllm"].replace("\\\n", " "))
    assert words[:2] == ["vllm", "serve"]
    assert words[words.index("--max-lora-rank") + 1] == flag
    assert words[words.index("--lora-modules") + 1] == "support=./support"


def test_a_method_that_vllm_does_not_load_says_which_programs_do(team: Team, alice: User) -> None:
    note = snippets(make_adapter(team, alice, method="prefix_tuning", settings={}))["vllm"]
    assert "vLLM does not load" in note
    assert "peft" in note


def test_a_base_folder_with_blanks_and_quotes_stays_one_word(team: Team, alice: User) -> None:
    base = make_base_model(hub_id="a b'c$(d)")
    assert (
        shlex.split(snippets(make_adapter(team, alice, base_model=base))["vllm"].replace("\\\n", " "))[2] == base.hub_id
    )


def test_a_whole_model_is_loaded_and_served_without_its_base(team: Team, alice: User) -> None:
    model = make_adapter(team, alice, name="It's mine", method="full", settings={})
    found = snippets(model)
    assert list(found) == ["transformers", "vllm"]
    assert "MODEL = 'its-mine'" in found["transformers"]
    assert "peft" not in found["transformers"]
    ast.parse(found["transformers"])
    words = shlex.split(found["vllm"])
    assert words[:3] == ["vllm", "serve", "./its-mine"]
    assert words[words.index("--dtype") + 1] == "bfloat16"
    assert "--enable-lora" not in words

"""An adapter is born with its files, scores and samples, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from studio.accounts.models import Team, User
from studio.catalogue.models import Adapter
from studio.catalogue.registering import checked_files
from studio.storage import adapter_folder, file_digests
from tests.factories import (
    make_adapter,
    make_adapter_folder,
    make_result,
    make_sample,
    make_score,
)
from workers.errors import DamagedAdapterError
from workers.recipe import Recipe

pytestmark = pytest.mark.usefixtures("data_dir")


def test_it_keeps_recipe_files_scores_and_samples(team: Team, alice: User) -> None:
    result = make_result([make_score(-0.5), make_score(0.2, evaluation="token_f1")], [make_sample(3), make_sample(9)])
    adapter = Adapter.objects.get(pk=make_adapter(team, alice, result=result).pk)
    assert Recipe.from_dict(adapter.recipe).to_dict() == adapter.recipe
    assert adapter.files == file_digests(adapter_folder(adapter.folder))
    assert adapter.num_bytes == sum(file["num_bytes"] for file in adapter.files)
    assert {score.evaluation: score.difference for score in adapter.scores.all()} == {"loss": -0.5, "token_f1": 0.2}
    assert [sample.line for sample in adapter.samples.all()] == [3, 9]
    assert adapter.provenance["device"] == "CPU, 2 cores"


def test_it_refuses_a_folder_that_changed_since_it_was_written(data_dir: Path) -> None:
    key = make_adapter_folder(result=make_result())
    assert {str(file["name"]) for file in checked_files(key)} >= {"adapter_config.json", "result.json"}
    (adapter_folder(key) / "adapter_config.json").write_text("{}")
    with pytest.raises(DamagedAdapterError, match="adapter_config"):
        checked_files(key)


def test_an_answer_with_a_zero_character_can_be_stored(team: Team, alice: User) -> None:
    adapter = make_adapter(team, alice, result=make_result(samples=[make_sample(adapter_answer="a\0b")]))
    assert adapter.samples.get().adapter_answer == "a\N{REPLACEMENT CHARACTER}b"

"""Datasets of pairs, verdicts and plain text: shown and counted, and said plainly to be not yet trainable."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from jobs.forms import JobForm
from jobs.queueing import queue_job
from studio.accounts.models import Team, User
from tests.factories import make_base_model, make_recipe
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from tests.studio.datasets.test_api import caller
from workers.errors import DatasetError, RecipeError
from workers.examples import EXAMPLE_TYPE_LABELS
from workers.objectives import is_trainable
from workers.reading import read_examples

ROWS: dict[str, list[dict[str, Any]]] = {
    "preference": [{"prompt": f"ask {n}", "chosen": f"good {n}", "rejected": f"worse {n}"} for n in range(12)],
    "unpaired": [{"prompt": f"ask {n}", "completion": f"said {n}", "label": n % 2 == 0} for n in range(12)],
    "text": [{"text": f"A passage about {n}."} for n in range(12)],
}
SHOWN = {
    "preference": ["Chosen", "Rejected", "good 1", "worse 1"],
    "unpaired": ["Wanted answer", "Unwanted answer", "said 1"],
    "text": ["A passage about 3."],
}


@pytest.mark.parametrize("example_type", ROWS)
def test_rows_are_shown_and_the_page_says_whether_they_can_be_trained(
    upload: Upload, bob_client: Client, example_type: str
) -> None:
    version = upload(jsonl(ROWS[example_type]))
    assert (version.state, version.num_usable, version.example_type()) == ("ready", 12, example_type)
    page = bob_client.get(version.get_absolute_url()).content.decode()
    assert all(text in page for text in SHOWN[example_type])
    assert EXAMPLE_TYPE_LABELS[version.example_type()] in page
    told = "no objective that learns from them is installed yet" in page
    assert told is not is_trainable(version.example_type())


@pytest.mark.parametrize("example_type", [name for name in ROWS if not is_trainable(name)])  # type: ignore[arg-type]
def test_what_cannot_be_trained_is_not_offered_and_refused_with_the_reason(
    upload: Upload, team: Team, alice: User, example_type: str
) -> None:
    version, chats = upload(jsonl(ROWS[example_type])), upload(jsonl(good_rows()))
    form = JobForm(team=team)
    assert list(form.dataset_versions.rows) == [str(chats.pk)]
    assert "no objective" in form.dataset_versions.left_out[str(version.pk)]
    base = make_base_model()
    with pytest.raises(RecipeError, match="no objective"):
        queue_job(
            team=team, user=alice, recipe=make_recipe(base, version), base_model=base, dataset_version=version,
            idempotency_key="k",
        )  # fmt: skip
    with pytest.raises(DatasetError, match=EXAMPLE_TYPE_LABELS[version.example_type()]):
        next(read_examples(version.path(), version.format, version.columns))


def test_the_api_says_the_type_and_gives_the_parts_of_a_row(upload: Upload, team: Team, bob: User) -> None:
    version = upload(jsonl(ROWS["preference"]))
    api = caller(team, bob, "read")
    url = f"/api/v1/datasets/{version.dataset_id}/versions/1/"
    assert api.get(url).json()["example_type"] == "preference"
    first = api.get(f"{url}preview/").json()[0]
    assert (first["type"], first["line"]) == ("preference", 1)
    assert first["chosen"][0]["content"] == "good 0"
    assert first["rejected"][0]["content"] == "worse 0"

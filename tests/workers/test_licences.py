"""What an adapter may be released under, from the licences of its base and its data."""

from __future__ import annotations

import pytest

from workers.licences import LICENCES, UNKNOWN, adapter_licence, choices, compatible, note_for


@pytest.mark.parametrize(
    ("base", "dataset", "released_under"),
    [
        ("apache-2.0", "mit", "apache-2.0"),
        ("Apache-2.0", "cc-by-4.0", "apache-2.0"),
        ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("apache-2.0", "cc-by-sa-4.0", "cc-by-sa-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("cc-by-sa-4.0", "cc-by-sa-4.0", "cc-by-sa-4.0"),
        ("llama3.1", "apache-2.0", "llama3.1"),
        ("gemma", "cc-by-4.0", "gemma"),
    ],
)
def test_an_adapter_stays_under_the_stricter_licence(base: str, dataset: str, released_under: str) -> None:
    assert adapter_licence(base, dataset) == released_under
    assert compatible(base, dataset) is None


@pytest.mark.parametrize(
    ("base", "dataset", "said"),
    [
        ("apache-2.0", "", "that of the dataset is not known"),
        ("unknown", "mit", "that of the base model is not known"),
        ("apache-2.0", "other", '"other" of the dataset'),
        ("apache-2.0", "house-rules-1.0", '"house-rules-1.0" of the dataset'),
        ("apache-2.0", "cc-by-nd-4.0", "does not allow what is made from it to be shared"),
        ("llama3.1", "cc-by-sa-4.0", "no licence here keeps both"),
        ("gemma", "cc-by-nc-4.0", "no licence here keeps both"),
        ("cc-by-nc-4.0", "cc-by-sa-4.0", "no licence here keeps both"),
    ],
)
def test_what_cannot_be_said_is_said_to_be_so(base: str, dataset: str, said: str) -> None:
    found = compatible(base, dataset)
    assert found is not None
    assert said in found
    assert adapter_licence(base, dataset) == UNKNOWN


def test_every_licence_names_its_source_and_can_be_chosen() -> None:
    assert all(":" in licence.source for licence in LICENCES.values())
    assert {identifier for identifier, _ in choices()} == {*LICENCES, "unknown", "other"}


def test_what_else_sharing_asks_for_is_told() -> None:
    assert "Built with Llama" in note_for("llama3.1", "cc-by-4.0")
    assert "authors of the data" in note_for("llama3.1", "cc-by-4.0")
    assert note_for("unknown", "") == ""

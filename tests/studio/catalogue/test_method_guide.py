"""The page that helps to choose a method: every method in words, and what was measured."""

from __future__ import annotations

from datetime import date

import pytest
from django.test import Client
from django.urls import reverse

from studio.catalogue import views
from workers.measured import Figure, MeasuredMethod, MeasuredTable, measured_methods
from workers.methods import methods

FIGURE = Figure(
    base_value=1.5, value=0.91234, low=0.9, high=0.93, difference=-0.6, difference_low=-0.62, difference_high=-0.58,
    lowest_seed=0.9, highest_seed=0.92, num_rows=400,
)  # fmt: skip
TABLE = MeasuredTable(
    measured_on=date(2026, 1, 2), device="A card", versions={"torch": "2"}, base_model="Some base", dataset="rows",
    num_train_rows=3600, num_held_out_rows=400, num_train_tokens=600_000, command="measure it",
    rows=[
        MeasuredMethod(
            method="lora", label="LoRA", num_seeds=3, num_trainable=4_900_000, adapter_bytes=19_000_000,
            peak_memory_bytes=2**31, tokens_per_second=12_345.6, precision="bfloat16", learning_rate=2e-4, loss=FIGURE,
            numeric_answer=FIGURE.model_copy(update={"value": 0.034, "low": 0.01, "high": 0.06, "base_value": 0.02}),
        )
    ],
)  # fmt: skip


def test_it_says_of_every_method_when_to_choose_it(bob_client: Client) -> None:
    page = bob_client.get(reverse("catalogue:methods")).content.decode()
    for method in methods().values():
        assert method.label in page
        assert len(method.choose_when) > 80, method.name
        assert method.choose_when.split()[0] in page


def test_it_shows_the_measured_table(bob_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "measured_methods", lambda: TABLE)
    page = " ".join(bob_client.get(reverse("catalogue:methods")).content.decode().split())
    for words in (
        "0.912",
        "3.4 %",
        "1.0 % to 6.0 %",
        "4.9 M",
        "12,346",
        "2.0 GB",
        "3,600 rows",
        "measure it",
        "A card",
    ):
        assert words in page.replace("\xa0", " "), words


def test_a_copy_without_measurements_shows_none(bob_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "measured_methods", lambda: None)
    assert "Measured by us" not in bob_client.get(reverse("catalogue:methods")).content.decode()


def test_what_was_measured_is_still_offered() -> None:
    table = measured_methods()
    if table is not None:
        assert {row.method for row in table.rows} <= set(methods())
        assert [row.loss.value for row in table.rows] == sorted(row.loss.value for row in table.rows)


def test_a_stranger_signs_in_first(client: Client) -> None:
    assert client.get(reverse("catalogue:methods")).status_code == 302

"""What the web half says of the bundled base model, against what the worker half makes."""

from __future__ import annotations

from studio import bundled as said
from workers import bundled as made


def test_both_halves_mean_the_same_model() -> None:
    assert (said.NAME, said.HUB_ID, said.LICENCE) == (made.NAME, made.HUB_ID, made.LICENCE)

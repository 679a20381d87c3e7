"""Gates: what an adapter must pass before it is used. One file is one gate; `PLUGIN` holds it.

A gate reads what was measured and says a sentence. What was not measured it does not know, and that is no pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

from studio.catalogue.models import Adapter
from studio.reviews.models import GateState
from workers.plugins import discover, look_up

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Threshold:
    """A setting of a gate that a team chooses: what it is called, what it may be and what it is at first."""

    name: str
    label: str
    default: Any
    kind: Literal["number", "whole", "choice", "slug"] = "number"
    minimum: float = 0.0
    maximum: float = 100.0
    unit: str = ""
    help: str = ""
    choices: Callable[[], list[tuple[str, str]]] = list


@dataclass(frozen=True)
class Found:
    """What a gate found: its state, why in a sentence for people, and the figures behind it as JSON types."""

    state: GateState
    sentence: str
    figures: dict[str, Any] = field(default_factory=dict)


def passed(sentence: str, **figures: Any) -> Found:
    """The gate passed."""
    return Found(GateState.PASSED, sentence, figures)


def failed(sentence: str, **figures: Any) -> Found:
    """The gate failed: what was measured is worse than the policy allows."""
    return Found(GateState.FAILED, sentence, figures)


def unknown(sentence: str, **figures: Any) -> Found:
    """A measurement is missing or tells nothing; the sentence says which, and how to get it."""
    return Found(GateState.UNKNOWN, sentence, figures)


class Gate(ABC):
    """One demand of a policy."""

    name: str
    label: str
    help: str
    thresholds: ClassVar[tuple[Threshold, ...]] = ()
    is_on_at_first: ClassVar[bool] = True

    @abstractmethod
    def check(self, adapter: Adapter, settings: Settings) -> Found:
        """What this gate says of an adapter under a policy's settings; they hold a value for every threshold.

        May read the database and storage; runs in a task, so it may take its time.
        """


@cache
def gates() -> dict[str, Gate]:
    """Every gate by name."""
    return discover(__name__, Gate)  # type: ignore[type-abstract]


def get_gate(name: str) -> Gate:
    """The gate called `name`; raises UnknownPluginError."""
    return look_up(gates(), name, what="gate", field="gates")


def label_of(name: str) -> str:
    """A gate as people call it; its name where the plug-in is not installed any more."""
    gate = gates().get(name)
    return gate.label if gate else name

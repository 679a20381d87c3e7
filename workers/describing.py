"""`python -m workers describe`: the methods, the metrics and every setting, as the form shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from workers.evaluations import Evaluation, evaluations
from workers.methods import get_method, methods
from workers.plugins import look_up
from workers.recipe import EvaluationSettings, SplitSettings, TrainingSettings
from workers.setting import Setting, settings_of

WIDTH = 100
SHARED: tuple[tuple[str, type[BaseModel]], ...] = (
    ("training", TrainingSettings),
    ("split", SplitSettings),
    ("evaluation", EvaluationSettings),
)


def describe(names: Sequence[str]) -> str:
    """What can be chosen: methods and metrics in a line each, or, for those named, all of their settings.

    "training", "split" and "evaluation" name what all methods share.

    Raises:
        UnknownPluginError: there is no such method or metric.
    """
    if names:
        return "\n\n".join("\n".join(_described(name)) for name in names)
    width = max(map(len, [*methods(), *evaluations()]))
    chosen = [f"{name:{width}}  {method.summary}" for name, method in methods().items()]
    measured = [
        f"{name:{width}}  {one.label}{' (has settings)' if one.Settings else ''}" for name, one in evaluations().items()
    ]
    shared = " ".join(group for group, _ in SHARED)
    ending = f"Settings of one: python -m workers describe NAME; what all share: describe {shared}"
    return "\n".join([*chosen, "", "Metrics (evaluation.metrics):", *measured, "", ending])


def _described(name: str) -> Iterator[str]:
    group = dict(SHARED).get(name)
    if group is not None:
        yield from _settings(settings_of(group, name))
        return
    known: dict[str, Any] = {**evaluations(), **methods()}
    found = look_up(known, name, what="method or metric", field="method")
    if isinstance(found, Evaluation):
        yield from _metric(found)
        return
    method = get_method(name)
    yield f"{method.label} ({method.name}): {method.summary}"
    yield from textwrap.wrap(method.choose_when, WIDTH)
    yield f"Paper: {method.source}"
    yield f"Base in: {', '.join(method.precisions)}. Learning rate by default: {method.learning_rate:g}."
    yield f"Loads in: {', '.join(method.runs_in)}."
    yield from _settings(settings_of(method.Settings, "settings"))


def _metric(metric: Evaluation) -> Iterator[str]:
    yield f"{metric.label} ({metric.name})"
    yield from textwrap.wrap(metric.help, WIDTH)
    if metric.Settings is None:
        yield f'In a recipe: "{metric.name}". It has no settings.'
        return
    yield f'In a recipe: {{"name": "{metric.name}", "settings": {{...}}}}, several times with different settings.'
    yield from _settings(settings_of(metric.Settings, "settings"))


def _settings(settings: Sequence[Setting]) -> Iterator[str]:
    for one in settings:
        yield ""
        unit = f" {one.unit}" if one.unit else ""
        yield f"{one.name} = {one.default_text() or 'empty'}{unit}    {one.label}"
        allowed = [sentence for sentence in (one.range_sentence(), ", ".join(one.choices or one.words)) if sentence]
        if one.takes_auto:
            allowed.append('"auto"')
        facts = [one.help, f"Allowed: {'; '.join(allowed)}." if allowed else "", f"Default: {one.source}."]
        text = " ".join(fact for fact in facts if fact)
        yield from textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")

"""Forms of reviews, and the one that a policy's gates make up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django import forms

from studio.reviews.gates import Threshold, gates
from studio.reviews.policies import PolicySettings, ScanLimit, at_first
from workers.scans import scans


class SubmitForm(forms.Form):
    """What somebody says when an adapter is submitted."""

    alias = forms.SlugField(
        max_length=40, initial="champion", help_text="Moves to this version on the last approval: who uses it gets it."
    )
    note = forms.CharField(
        required=False, max_length=4000, widget=forms.Textarea(attrs={"rows": 4}), label="Note to the reviewers",
        help_text="What it is for, and what to look at.",
    )  # fmt: skip
    due_on = forms.DateField(required=False, label="Due", widget=forms.DateInput(attrs={"type": "date"}))


class AssignForm(forms.Form):
    """Who is asked to review, and until when."""

    reviewers = forms.MultipleChoiceField(required=False, widget=forms.CheckboxSelectMultiple, label="Reviewers")
    due_on = forms.DateField(required=False, label="Due", widget=forms.DateInput(attrs={"type": "date"}))


class ItemForm(forms.Form):
    """A flag and a note on a sample."""

    is_flagged = forms.BooleanField(required=False)
    note = forms.CharField(required=False, max_length=4000)


def policy_sections(settings: PolicySettings, typed: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The gates as parts of a form: whether each is on, and a field for each of its thresholds.

    `typed` is what was sent and refused, to be shown again.
    """
    sections = []
    for name, gate in gates().items():
        values = at_first(gate) | settings.gates.get(name, {})
        is_on = name in settings.gates if typed is None else f"{name}.is_on" in typed
        fields = [
            _field(
                f"{name}.{one.name}", one, values[one.name] if typed is None else typed.get(f"{name}.{one.name}", "")
            )
            for one in gate.thresholds
        ]
        sections.append({"name": name, "label": gate.label, "help": gate.help, "is_on": is_on, "fields": fields})
    return sections


def scan_rows(settings: PolicySettings, typed: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The scans as rows of a form: whether each blocks, and above what; `typed` as in `policy_sections`."""
    rows = []
    for name, scan in scans().items():
        limit = settings.scans.get(name, ScanLimit())
        stored = {"most": f"{limit.most:g}", "unit": limit.unit}
        values = stored if typed is None else {key: typed.get(f"scan.{name}.{key}", stored[key]) for key in stored}
        blocks = name in settings.scans if typed is None else f"scan.{name}.blocks" in typed
        rows.append({"name": name, "label": scan.label, "blocks": blocks, **values})
    return rows


def _field(name: str, threshold: Threshold, value: Any) -> dict[str, Any]:
    kind = {"choice": "select", "slug": "text"}.get(threshold.kind, "number")
    shown: dict[str, Any] = {
        "name": name, "label": threshold.label, "type": kind, "help": threshold.help, "unit": threshold.unit,
        "value": f"{value:g}" if isinstance(value, float) else value,
    }  # fmt: skip
    if kind == "select":
        shown["choices"] = threshold.choices()
    elif kind == "number":
        step = 1 if threshold.kind == "whole" else "any"
        shown["attributes"] = {"min": f"{threshold.minimum:g}", "max": f"{threshold.maximum:g}", "step": step}
    return shown


def typed_policy(sent: Mapping[str, str]) -> PolicySettings:
    """The policy that a form asks for; raises PolicyError."""
    asked: dict[str, dict[str, Any]] = {}
    for name, gate in gates().items():
        if f"{name}.is_on" in sent:
            asked[name] = {one.name: _number(one, sent.get(f"{name}.{one.name}", "")) for one in gate.thresholds}
    try:
        approvals: Any = int(sent.get("approvals", ""))
    except ValueError:
        approvals = None
    limits = {
        name: {"most": _figure(sent.get(f"scan.{name}.most", "")), "unit": sent.get(f"scan.{name}.unit", "")}
        for name in scans()
        if f"scan.{name}.blocks" in sent
    }
    return PolicySettings.cleaned(approvals, asked, limits)


def _figure(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text  # `cleaned` says what is wrong with it


def _number(threshold: Threshold, text: str) -> Any:
    if threshold.kind not in {"number", "whole"}:
        return text
    try:
        return int(text) if threshold.kind == "whole" else float(text)
    except ValueError:
        return text  # `cleaned` says what is wrong with it

"""The parts that pages are built from: fields, error summaries, icons, snippets, intervals and bars."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from django import template
from django.forms import BaseForm, BoundField, CheckboxInput, CheckboxSelectMultiple, RadioSelect, Select, Textarea
from django.template.loader import get_template
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe

from studio.accounts.models import Role
from workers.verdicts import Verdict

register = template.Library()

NAVIGATION = (
    ("Home", "home"),
    ("Datasets", "datasets:list"),
    ("Jobs", "jobs:list"),
    ("Models", "catalogue:adapters"),
    ("Reviews", "reviews:inbox"),
    ("Base models", "catalogue:base_models"),
    ("Workers", "workers:list"),
)
# What a lead sees beside an entry, loaded once the entry is in sight: the page itself needs no further query.
COUNTS = {"reviews:inbox": "reviews:count"}


@register.simple_tag(takes_context=True)
def nav_links(context: template.Context) -> list[dict[str, Any]]:
    """The main navigation as {label, url, is_current, count_url}.

    A page belongs to the entry that its path begins with. `count_url` gives what waits behind an entry, for those who
    look after it; it is empty for others.
    """
    request = context.get("request")
    membership = context.get("membership")
    leads = membership is not None and bool(membership) and membership.may(Role.LEAD)
    path = request.path if request is not None else ""
    links = []
    for label, name in NAVIGATION:
        try:
            url = reverse(name)
        except NoReverseMatch:
            continue
        is_current = path == url if name == "home" else path.startswith(url)
        count_url = reverse(COUNTS[name]) if leads and name in COUNTS else ""
        links.append({"label": label, "url": url, "is_current": is_current, "count_url": count_url})
    return links


@register.simple_tag
def icon(name: str) -> SafeString:
    """An inline SVG of templates/components/icons; decorative, so text stands beside it."""
    return _svg(name)


@cache
def _svg(name: str) -> SafeString:
    # A long list has hundreds of icons of a few kinds.
    return mark_safe(get_template(f"components/icons/{name}.html").render())  # noqa: S308  our own files, no input


@register.inclusion_tag("components/field.html")
def field(source: BoundField | Mapping[str, Any], unit: str = "", label: str = "", help: str = "") -> dict[str, Any]:  # noqa: A002
    """A form field with label, control, unit, error and help, wired up for screen readers.

    `source` is a Django bound field, or a dict: name and label, and where they apply value, type ("text",
    "number", "select", "checkbox", "textarea", "password", "hidden"), choices [(value, label)], help, errors
    (a sentence or a list), unit, required (default True), and attributes for the control.
    """
    shown = _from_bound_field(source) if isinstance(source, BoundField) else _from_mapping(source)
    shown["unit"] = unit or shown["unit"]
    shown["label"] = label or shown["label"]
    shown["help"] = help or shown["help"]
    return {"field": shown}


def _control_class(kind: str, *, is_bad: bool) -> str:
    base = {
        "select": "select w-full",
        "textarea": "textarea w-full",
        "checkbox": "checkbox checkbox-sm",
        "file": "file-input w-full",
    }.get(kind, "input w-full")
    return f"{base} {base.split(maxsplit=1)[0]}-error" if is_bad else base


def _from_bound_field(bound: BoundField) -> dict[str, Any]:
    widget = bound.field.widget
    is_group = isinstance(widget, RadioSelect | CheckboxSelectMultiple)
    kind = "text"
    if isinstance(widget, CheckboxInput):
        kind = "checkbox"
    elif isinstance(widget, Textarea):
        kind = "textarea"
    elif isinstance(widget, Select):
        kind = "select"
    elif getattr(widget, "input_type", "") == "file":
        kind = "file"
    identity = bound.auto_id or bound.html_name
    attributes: dict[str, Any] = {}
    if not is_group:
        attributes["class"] = (
            f"{_control_class(kind, is_bad=bool(bound.errors))} {widget.attrs.get('class', '')}".strip()
        )
        described = [f"{identity}_error"] * bool(bound.errors) + [f"{identity}_help"] * bool(bound.help_text)
        if described:
            attributes["aria-describedby"] = " ".join(described)
    return {
        "id": identity,
        "label": bound.label,
        "help": bound.help_text,
        "errors": list(bound.errors),
        "unit": getattr(bound.field, "unit", ""),
        "is_required": bound.field.required,
        "is_checkbox": kind == "checkbox",
        "is_group": is_group,
        "is_hidden": bound.is_hidden,
        "widget": bound.as_widget(attrs=attributes),
    }


def _from_mapping(source: Mapping[str, Any]) -> dict[str, Any]:
    name, kind, value = str(source["name"]), str(source.get("type", "text")), source.get("value", "")
    errors = source.get("errors") or []
    errors = [errors] if isinstance(errors, str) else list(errors)
    identity = str(source.get("id") or "id_" + re.sub(r"\W+", "_", name))
    attributes: dict[str, Any] = {"id": identity, "name": name, "class": _control_class(kind, is_bad=bool(errors))}
    attributes |= dict(source.get("attributes") or {})
    described = [f"{identity}_error"] * bool(errors) + [f"{identity}_help"] * bool(source.get("help"))
    if described:
        attributes["aria-describedby"] = " ".join(described)
    if errors:
        attributes["aria-invalid"] = "true"
    if source.get("required", True) and kind not in {"checkbox", "hidden"}:
        attributes["required"] = True
    return {
        "id": identity,
        "label": source.get("label", name),
        "help": source.get("help", ""),
        "errors": errors,
        "unit": source.get("unit", ""),
        "is_required": source.get("required", True),
        "is_checkbox": kind == "checkbox",
        "is_group": False,
        "is_hidden": kind == "hidden",
        "widget": _control(kind, attributes, value, source.get("choices") or ()),
    }


def _control(kind: str, attributes: dict[str, Any], value: Any, choices: Iterable[tuple[Any, str]]) -> SafeString:
    if kind == "select":
        options = format_html_join(
            "",
            '<option value="{}"{}>{}</option>',
            ((option, SafeString(" selected") if str(option) == str(value) else "", text) for option, text in choices),
        )
        return format_html("<select{}>{}</select>", _attributes(attributes), options)
    if kind == "textarea":
        return format_html("<textarea{}>{}</textarea>", _attributes(attributes), value)
    if kind == "checkbox":
        attributes |= {"value": "on", "checked": bool(value)}
    else:
        attributes["value"] = "" if value is None else value
    return format_html("<input{}>", _attributes({"type": kind, **attributes}))


def _attributes(values: Mapping[str, Any]) -> SafeString:
    return format_html_join(
        "",
        "{}",
        (
            (format_html(" {}", name) if value is True else format_html(' {}="{}"', name, value),)
            for name, value in values.items()
            if value is not False and value is not None
        ),
    )


@register.inclusion_tag("components/error_summary.html")
def error_summary(source: BaseForm | Mapping[str, Any] | None, title: str = "") -> dict[str, Any]:
    """What is wrong with a form, with a link to each field; takes the focus when the page loads.

    `source` is a Django form, or {field name: sentence or list of sentences}; the name "" or "__all__" stands for
    the whole form. Nothing is shown when nothing is wrong.
    """
    problems: list[dict[str, str]] = []
    if isinstance(source, BaseForm):
        problems += [{"message": str(message)} for message in source.non_field_errors()]
        for bound in source:
            problems += [
                {
                    "id": bound.field.widget.attrs.get("id") or bound.auto_id or bound.html_name,
                    "label": str(bound.label),
                    "message": str(message),
                }
                for message in bound.errors
            ]
    elif source:
        for name, messages in source.items():
            for message in [messages] if isinstance(messages, str) else messages:
                where = {} if name in {"", "__all__"} else {"id": "id_" + re.sub(r"\W+", "_", name), "label": name}
                problems.append({**where, "message": str(message)})
    if not title:
        title = "There is one problem." if len(problems) == 1 else f"There are {len(problems)} problems."
    return {"problems": problems, "title": title}


@register.inclusion_tag("components/snippet.html")
def snippet(code: str, id: str, label: str = "") -> dict[str, str]:  # noqa: A002
    """Code to copy. `id` must be unique in the page; `label` says what it is."""
    return {"code": code, "id": id, "label": label}


VERDICT_COLOURS = {Verdict.BETTER: "badge-success", Verdict.WORSE: "badge-error"}


@register.inclusion_tag("components/verdict.html")
def verdict(word: Verdict) -> dict[str, Any]:
    """The comparison with the base as a word and a colour."""
    return {"word": word.value, "colour": VERDICT_COLOURS.get(word, "badge-neutral")}


INTERVAL_WIDTH, INTERVAL_MARGIN = 128, 8


@register.inclusion_tag("components/interval.html")
def interval(
    low: float, value: float, high: float, is_better: bool | None = None, extent: float | None = None
) -> dict[str, Any]:
    """A difference and its interval around zero, as an SVG.

    `extent` is the largest absolute difference on the axis; rows that share it can be compared by eye.
    """
    extent = extent or max(abs(low), abs(high), abs(value)) or 1.0

    def x(number: float) -> str:
        share = (max(-extent, min(extent, number)) / extent + 1) / 2
        return f"{INTERVAL_MARGIN + share * (INTERVAL_WIDTH - 2 * INTERVAL_MARGIN):.1f}"

    colour = "text-base-content/70" if is_better is None else "text-success" if is_better else "text-error"
    return {
        "low": x(low),
        "value": x(value),
        "high": x(high),
        "zero": x(0),
        "colour": colour,
        "description": f"{signed(value)}, 95 % interval {signed(low)} to {signed(high)}",
    }


@register.inclusion_tag("components/bars.html")
def bars(counts: Sequence[tuple[str, int]], description: str) -> dict[str, Any]:
    """A histogram as an SVG: (label, count) per bar, left to right. `description` is its text for screen readers."""
    highest = max((count for _, count in counts), default=0) or 1
    drawn = [
        {
            "x": index * 10 + 1,
            "width": 8,
            "y": f"{100 - 100 * count / highest:.2f}",
            "height": f"{100 * count / highest:.2f}",
            "label": label,
            "count": count,
        }
        for index, (label, count) in enumerate(counts)
    ]
    return {"bars": drawn, "width": max(10, 10 * len(drawn)), "description": description}


MINUS = "\N{MINUS SIGN}"


@register.filter
def significant(value: float | None, digits: int = 3) -> str:
    """A figure with three significant digits and a real minus sign; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        text = f"{value:.{digits - 1}e}"
    elif abs(value) >= 10**digits:
        text = f"{value:.0f}"
    else:
        text = f"{value:#.{digits}g}".rstrip(".")
    # Only the sign: the hyphen in an exponent stays as programs write it.
    return text.replace("-", MINUS, 1) if text.startswith("-") else text


@register.filter
def signed(value: float | None) -> str:
    """A difference with its sign."""
    if value is None:
        return "\N{EN DASH}"
    return significant(value) if value < 0 else f"+{significant(value)}"


@register.filter
def p_equals(value: float | None) -> str:
    """What follows "p" in a sentence: "= 0.004", "< 0.001"."""
    if value is None:
        return "\N{EN DASH}"
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


@register.filter
def percent(share: float | None) -> str:
    """A share as "1.5 %"."""
    return "—" if share is None else f"{100 * share:.1f} %"


@register.filter
def short_number(value: int | None) -> str:
    """A count as people say it: 4.9 M, 135 M, 1.5 B."""
    if value is None:
        return "\N{EN DASH}"
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return str(value)


@register.filter
def duration(seconds: float | None) -> str:
    """Seconds as 45 s, 3 min 20 s, 31 min or 2 h 5 min: as exact as people care about."""
    if seconds is None:
        return "\N{EN DASH}"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole else f"{seconds:.1f} s"
    if whole < 600 and whole % 60:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 3600:
        return f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@register.filter
def gpu_hours(hours: float) -> str:
    """Hours of devices as "12.4 GPU-hours", with enough digits for a job of seconds."""
    if not hours:
        return "0 GPU-hours"
    digits = 0 if hours >= 100 else 1 if hours >= 10 else 2
    rounded = f"{hours:,.{digits}f}"
    return f"{rounded} GPU-hours" if hours >= 0.005 else "less than 0.01 GPU-hours"

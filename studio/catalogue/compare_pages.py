"""Up to ten adapters side by side: what differs in their recipes, and what of their scores is a difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.db.models import Exists, OuterRef
from django.http import HttpResponseBase
from django.shortcuts import render
from django.views.decorators.http import require_GET

from studio.accounts.access import TeamRequest, team_page
from studio.catalogue.comparing import NotComparableError, compare_runs, verdicts
from studio.catalogue.list_pages import adapters_by_id, chosen_ids
from studio.catalogue.models import Adapter, EvaluationRun, RowCounts, RunComparison, Score, TestSet
from studio.csv_tables import csv_response
from studio.query_values import whole_number
from workers.verdicts import Verdict

MAX_COMPARED = 10
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Row:
    """A setting or a fact of every adapter, as text."""

    name: str
    values: list[str]

    def is_same(self) -> bool:
        return len(set(self.values)) == 1


@dataclass(frozen=True)
class Cell:
    """One adapter's figure, and how it stands beside the baseline's."""

    score: Score | None
    comparison: RunComparison | None = None
    verdict: Verdict | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Figure:
    """One evaluation of every adapter; `problem` says why they are not compared."""

    name: str
    label: str
    higher_is_better: bool
    cells: list[Cell]
    problem: str = ""


@require_GET
@team_page()
def compare(request: TeamRequest) -> HttpResponseBase:
    """The adapters that the URL names, beside the baseline that it names; `all` shows equal settings too."""
    asked = chosen_ids(request.GET)
    found = adapters_by_id(request, asked[:MAX_COMPARED])
    base_id = whole_number(request.GET.get("base", ""))
    baseline = next((one for one in found if one.pk == base_id), found[0] if found else None)
    figures = score_figures(found, baseline) if baseline is not None else []
    rows = setting_rows(found)
    if request.GET.get("as") == "csv":
        return _as_csv(request, found, figures, rows)
    shown = rows if "all" in request.GET else [row for row in rows if not row.is_same()]
    runs = ",".join(str(one.pk) for one in found)
    return render(
        request, "catalogue/compare.html",
        {
            "adapters": found, "baseline": baseline, "figures": figures, "rows": shown, "runs": runs,
            "is_all": "all" in request.GET, "num_equal": len(rows) - len(shown),
            "num_left_out": len(asked) - len(found),
            "max_compared": MAX_COMPARED, "width": len(found) + 1,
        },
    )  # fmt: skip


def score_figures(adapters: list[Adapter], baseline: Adapter) -> list[Figure]:
    """Every evaluation on held-out rows that one of the adapters has, compared with the baseline's by row."""
    runs = {
        run.adapter_id: run
        for run in EvaluationRun.objects.filter(adapter__in=adapters, test_set=TestSet.HELD_OUT)
        .annotate(has_rows=Exists(RowCounts.objects.filter(run=OuterRef("pk"))))
        .order_by("pk")
    }
    scores: dict[str, dict[int, Score]] = {}
    for score in Score.objects.filter(adapter__in=adapters, test_set=TestSet.HELD_OUT).order_by("evaluation"):
        scores.setdefault(score.evaluation, {})[score.adapter_id] = score
    known = {
        (one.run_id, one.evaluation): one
        for one in RunComparison.objects.filter(other=runs.get(baseline.pk), run__in=list(runs.values()))
    }
    return [_figure(name, by_adapter, adapters, baseline, runs, known) for name, by_adapter in scores.items()]


def _figure(
    name: str,
    scores: dict[int, Score],
    adapters: list[Adapter],
    baseline: Adapter,
    runs: Mapping[int | None, EvaluationRun],
    known: dict[tuple[int, str], RunComparison],
) -> Figure:
    one = next(iter(scores.values()))
    problem, comparisons = "", {}
    own = runs.get(baseline.pk)
    for adapter in adapters:
        run = runs.get(adapter.pk)
        if adapter == baseline or adapter.pk not in scores or run is None or own is None or baseline.pk not in scores:
            continue
        lacking = next((one for one in (run, own) if not one.has_rows), None)  # type: ignore[attr-defined]
        if lacking is not None and (run.pk, name) not in known:
            # Found here for all pairs at once: to ask for each pair is two queries a figure and adapter.
            problem = (
                f"Not comparable with {adapter.name} v{adapter.version}: single rows of one of them were not kept."
            )
            continue
        try:
            comparisons[adapter.pk] = known.get((run.pk, name)) or compare_runs(run, own, name)
        except NotComparableError as error:
            problem = f"Not comparable with {adapter.name} v{adapter.version}: {error}"
    judged = dict(zip(comparisons, verdicts(list(comparisons.values())), strict=True))
    # Figures of different rows have no best.
    values = [score.value for score in scores.values()]
    best = None if problem or len(values) < 2 else (max if one.higher_is_better else min)(values)
    cells = [
        Cell(
            scores.get(adapter.pk), comparisons.get(adapter.pk), judged.get(adapter.pk),
            is_best=adapter.pk in scores and scores[adapter.pk].value == best,
        )
        for adapter in adapters
    ]  # fmt: skip
    return Figure(name, one.label, one.higher_is_better, cells, problem)


def setting_rows(adapters: list[Adapter]) -> list[Row]:
    """What made each adapter and what it cost, by dotted name."""
    flat = [_flat(adapter.recipe) for adapter in adapters]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [
        Row(name, [one.get(name, NONE) for one in flat]) for name in names if name not in ("name", "recipe_version")
    ]
    facts = {
        "base revision": lambda one: one.base_model.revision[:12],
        "dataset version": lambda one: ", ".join(map(str, one.versions_of_data())),
        "trained parameters": lambda one: f"{one.num_trainable:,}",
        "size in bytes": lambda one: f"{one.num_bytes:,}",
        "training time, s": lambda one: f"{one.provenance.get('train_seconds', 0):,.0f}",
        "tokens": lambda one: f"{one.provenance.get('num_tokens', 0):,}",
        "tokens per second": lambda one: f"{one.provenance.get('tokens_per_second', 0):,.0f}",
        "peak memory, GiB": lambda one: f"{one.provenance.get('peak_memory_bytes', 0) / 2**30:.2f}",
        "device": lambda one: one.provenance.get("device", NONE),
    }
    return [*rows, *(Row(name, [read(one) for one in adapters]) for name, read in facts.items())]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict):
            found |= _flat(inner, f"{name}.")
        elif isinstance(inner, list) and any(isinstance(one, dict) for one in inner):
            found |= _flat({str(number): one for number, one in enumerate(inner, start=1)}, f"{name}.")
        elif isinstance(inner, list):
            found[name] = ", ".join(map(str, inner)) or NONE
        else:
            found[name] = NONE if inner is None or inner == "" else str(inner)
    return found


def _as_csv(request: TeamRequest, adapters: list[Adapter], figures: list[Figure], rows: list[Row]) -> HttpResponseBase:
    lines: list[list[object]] = []
    for figure in figures:
        lines.append([figure.name, *(cell.score.value if cell.score else None for cell in figure.cells)])
        lines.append([f"{figure.name}: verdict", *(cell.verdict or "" for cell in figure.cells)])
    lines += [[row.name, *row.values] for row in rows]
    columns = ["", *(f"{one.name} v{one.version}" for one in adapters)]
    return csv_response(request, "comparison.csv", columns, lines)

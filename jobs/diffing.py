"""Two jobs side by side: what was asked, what it ran on and what came of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, render
from django.views.decorators.http import require_GET

from jobs import showing
from jobs.models import Job, JobKind
from jobs.prices import cost_of_attempts
from studio.accounts.access import TeamRequest, team_page
from studio.accounts.models import Role, Team
from studio.catalogue.lineage import ByteComparison, compare_weights
from studio.catalogue.recipe_table import recipe_sections
from studio.templatetags.components import duration, gpu_hours, significant

MAX_CHOICES = 50
_NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class DiffRow:
    """One value of both jobs, as people read it."""

    section: str
    label: str
    a: str
    b: str

    @property
    def is_different(self) -> bool:
        return self.a != self.b


@dataclass(frozen=True)
class DiffSection:
    """Rows that belong together."""

    title: str
    rows: list[DiffRow]


def diff_rows(a: Job, b: Job) -> list[DiffRow]:
    """Every value of two jobs, the equal ones too."""
    ours, theirs = dict(_values(a)), dict(_values(b))
    keys = dict.fromkeys([*ours, *theirs])
    # Sections keep together also where only one of the jobs has a row.
    sections = {section: place for place, section in enumerate(dict.fromkeys(section for section, _label in keys))}
    return [
        DiffRow(section, label, ours.get((section, label), _NOTHING), theirs.get((section, label), _NOTHING))
        for section, label in sorted(keys, key=lambda key: sections[key[0]])
    ]


def diff_sections(rows: list[DiffRow], *, everything: bool) -> list[DiffSection]:
    """The rows by section: those that differ, or all."""
    found: dict[str, list[DiffRow]] = {}
    for row in rows:
        if everything or row.is_different:
            found.setdefault(row.section, []).append(row)
    return [DiffSection(title, rows) for title, rows in found.items()]


def weights_comparison(a: Job, b: Job) -> ByteComparison | None:
    """Whether both adapters have the same bytes; None when one of the jobs has none."""
    if a.adapter is None or b.adapter is None:
        return None
    label = f"{b.adapter.name} v{b.adapter.version}"
    return compare_weights(a.adapter.files, b.adapter.files, adapter_id=b.adapter.pk, label=label)


def _values(job: Job) -> Iterator[tuple[tuple[str, str], str]]:
    """((section, label), value) of a job."""
    yield ("Data and base", "Dataset version"), job.data_label
    if job.dataset_version is not None:
        yield ("Data and base", "Dataset sha256"), job.dataset_version.sha256
    yield ("Data and base", "Base model"), job.base_model.name
    facts: dict[str, Any] = job.adapter.provenance if job.adapter else {}
    revision = facts.get("base_revision") or job.recipe.get("base_model", {}).get("revision") or job.base_model.revision
    yield ("Data and base", "Base revision"), str(revision)
    for section in recipe_sections(job.recipe, job.asked_recipe):
        for row in section.rows:
            chosen = " (chosen by the studio)" if row.was_auto else ""
            yield (section.title, row.label), f"{row.value}{f' {row.unit}' if row.unit else ''}{chosen}"
    yield ("Run", "State"), job.get_state_display()
    yield ("Run", "Attempts"), str(job.attempt)
    device = facts.get("device") or (job.worker.device if job.worker else "")
    yield ("Run", "Device"), str(device) or _NOTHING
    if facts.get("num_steps"):
        yield ("Run", "Steps"), f"{facts['num_steps']:,}"
    for name, version in sorted(facts.get("versions", {}).items()):
        yield ("Versions", name), str(version)
    elapsed = showing.elapsed_seconds(job)
    yield ("Costs", "Time on a device"), duration(elapsed)
    if attempts := list(job.attempts.all()):
        cost = cost_of_attempts(attempts, job.num_gpus)
        yield ("Costs", "Devices, all attempts"), gpu_hours(cost.gpu_hours)
        if cost.amounts:
            yield ("Costs", "Cost"), f"{cost.words}{', in part' if cost.is_partial else ''}"
    for name, label in (("train_seconds", "Training"), ("wall_seconds", "The last attempt in all")):
        if facts.get(name):
            yield ("Costs", label), duration(facts[name])
    if facts.get("tokens_per_second"):
        yield ("Costs", "Speed"), f"{significant(facts['tokens_per_second'])} tokens/s"
    if facts.get("peak_memory_bytes"):
        yield ("Costs", "Peak memory"), f"{showing.gibibytes(facts['peak_memory_bytes'])} GiB"
    if job.adapter:
        for score in job.adapter.held_out_scores():
            interval = f"[{significant(score.low)}, {significant(score.high)}]"
            yield (
                ("Scores on held-out rows", score.label),
                f"{significant(score.value)} {interval}, n = {score.num_rows:,}",
            )
        for name, digest in sorted((str(file["name"]), str(file["sha256"])) for file in job.adapter.files):
            yield ("Files", name), digest


def jobs_to_compare(team: Team) -> QuerySet[Job]:
    """A team's jobs with all that `diff_rows` reads of them."""
    return team.jobs.select_related(
        "base_model", "dataset_version__dataset", "worker", "adapter", "created_by"
    ).prefetch_related("adapter__scores", "attempts")


@require_GET
@team_page(Role.VIEWER)
def diff(request: TeamRequest) -> HttpResponse:
    """Two jobs side by side, differences only unless all is asked for; CSV with `format=csv`."""
    a, b = (_asked(request, name) for name in ("a", "b"))
    everything = request.GET.get("all") == "1"
    context: dict[str, Any] = {"a": a, "b": b, "everything": everything}
    if a is not None and b is not None:
        rows = diff_rows(a, b)
        if request.GET.get("format") == "csv":
            return _as_csv(a, b, [row for row in rows if everything or row.is_different])
        context |= {
            "sections": diff_sections(rows, everything=everything),
            "num_different": sum(row.is_different for row in rows),
            "num_rows": len(rows),
            "weights": weights_comparison(a, b),
        }
    trained = request.team.jobs.filter(kind=JobKind.TRAIN).select_related("adapter")
    recent = trained.order_by("-created_at").only("pk", "name", "created_at", "adapter__version")
    context["choices"] = list(recent[:MAX_CHOICES])
    return render(request, "jobs/diff.html", context)


def _asked(request: TeamRequest, name: str) -> Job | None:
    """The job of a parameter of the URL; None without one, 404 for one that is not the team's."""
    text = request.GET.get(name, "")
    if not text:
        return None
    try:
        key: UUID | None = UUID(text)
    except ValueError:
        key = None
    found: Job = get_object_or_404(jobs_to_compare(request.team), pk=key)
    return found


def _as_csv(a: Job, b: Job, rows: list[DiffRow]) -> HttpResponse:
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(["section", "setting", _plain(f"{a.name} {a.pk}"), _plain(f"{b.name} {b.pk}")])
    writer.writerows([_plain(cell) for cell in (row.section, row.label, row.a, row.b)] for row in rows)
    response = HttpResponse(written.getvalue(), content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = 'attachment; filename="jobs-diff.csv"'
    return response


def _plain(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell[:1] in {"=", "+", "-", "@", "\t", "\r"} else cell

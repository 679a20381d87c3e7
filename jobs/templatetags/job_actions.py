"""What a person may do with a job or a worker, in templates."""

from __future__ import annotations

from typing import Any

from django import template

from jobs.buttons import Button, Ordering, buttons_of, ordering_of, worker_buttons_of
from jobs.models import Job, Worker

register = template.Library()


@register.simple_tag(takes_context=True)
def job_buttons(context: template.Context, job: Job) -> list[Button]:
    """What the person of this request may ask of a job."""
    return buttons_of(job, _membership(context))


@register.simple_tag(takes_context=True)
def job_ordering(context: template.Context, job: Job) -> Ordering | None:
    """What the person of this request may do about a job's turn."""
    return ordering_of(job, _membership(context))


@register.simple_tag(takes_context=True)
def worker_buttons(context: template.Context, worker: Worker) -> list[Button]:
    """What the person of this request may do with a worker."""
    return worker_buttons_of(worker, _membership(context))


def _membership(context: template.Context) -> Any:
    return getattr(context.get("request"), "membership", None)

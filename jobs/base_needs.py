"""What training on a base model needs on the devices that the studio knows, beside the base's page and in the API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.http import HttpResponse
from django.shortcuts import get_object_or_404, render
from django.views.decorators.http import require_GET
from ninja import Router
from pydantic import Field

from jobs.estimating import choose_device, facts_of
from jobs.models import Worker
from jobs.scheduling import live_workers
from studio.accounts.access import TeamRequest, team_page
from studio.api.auth import ApiRequest
from studio.api.errors import ERRORS
from studio.api.schemas import Out
from studio.catalogue.models import BaseModel
from workers.facts import DeviceFacts
from workers.needs import MethodNeeds, lengths_for, needs_of
from workers.shapes import ModelShape

MAX_DEVICES = 6
"""Kinds of device that are told of, the largest first."""
router = Router(tags=["catalogue"])


@dataclass(frozen=True)
class DeviceNeeds:
    """What each method needs on one kind of device. `num_live` workers have one now; 0: it was seen before."""

    device: DeviceFacts
    num_live: int
    methods: list[MethodNeeds]


def known_devices() -> list[tuple[DeviceFacts, int]]:
    """Each kind of device that workers have, with how many live ones have it; the live and the large ones first.

    Where no worker lives, that of the worker seen last; this machine's CPU where there never was one.
    """
    # A worker of an older version may not have said how much memory its device has.
    live = list(live_workers().filter(memory_bytes__gt=0))
    kinds: dict[tuple[str, str, int], list[Worker]] = {}
    for worker in live or Worker.objects.filter(memory_bytes__gt=0).order_by("-last_seen")[:1]:
        # Two cards of a kind differ by what their drivers keep for themselves.
        kinds.setdefault((worker.device_kind, worker.device, worker.memory_bytes >> 28), []).append(worker)
    found = [
        (facts_of(min(group, key=lambda one: one.memory_bytes)), len(group) if live else 0) for group in kinds.values()
    ]
    found.sort(key=lambda pair: (pair[0].kind == "cuda", pair[0].memory_bytes), reverse=True)
    return found or [(choose_device().facts, 0)]


def device_needs(shape: ModelShape) -> list[DeviceNeeds]:
    """What training on a base of this shape needs on each known kind of device."""
    lengths = lengths_for(shape)
    return [
        DeviceNeeds(device, num_live, needs_of(shape, device, lengths))
        for device, num_live in known_devices()[:MAX_DEVICES]
    ]


@require_GET
@team_page()
def base_needs(request: TeamRequest, base_model_id: int) -> HttpResponse:
    """The table of what fits: a part of the base's page, or without scripts a page of its own."""
    base = get_object_or_404(BaseModel.objects.defer("files"), pk=base_model_id)
    shape = base.model_shape()
    context = {"base": base, "lengths": lengths_for(shape), "devices": device_needs(shape)}
    name = "jobs/_base_needs.html" if "HX-Request" in request.headers else "jobs/base_needs.html"
    return render(request, name, context)


class NeedOut(Out):
    """What a method needs for rows of a length in tokens on one device."""

    length: int
    verdict: str = Field(description="fits, tight, too_large, or impossible: then `refusal` says why.")
    num_bytes: int = Field(description="At the peak of training; of what is too large the least that it could be.")
    micro_batch_size: int = Field(description="Rows in memory at once.")
    gradient_checkpointing: bool
    refusal: str


class MethodNeedsOut(Out):
    """A method at its default settings."""

    name: str
    precision: str = Field(description="How the base is held there; empty when nothing can be trained.")
    needs: list[NeedOut]


class DeviceNeedsOut(Out):
    """A kind of device and what each method needs there."""

    device: str
    kind: str = Field(description="cuda or cpu")
    memory_bytes: int
    num_live: int = Field(description="Live workers that have one.")
    methods: list[MethodNeedsOut]


@router.get(
    "base-models/{int:base_model_id}/needs/",
    response={200: list[DeviceNeedsOut], **ERRORS},
    summary="What training on a base model needs, by device, method and length",
)
def get_needs(request: ApiRequest, base_model_id: int) -> list[dict[str, Any]]:
    """By arithmetic on the base's shape, at each method's default settings."""
    base = get_object_or_404(BaseModel.objects.defer("files"), pk=base_model_id)
    return [
        {
            "device": one.device.name,
            "kind": one.device.kind,
            "memory_bytes": one.device.memory_bytes,
            "num_live": one.num_live,
            "methods": one.methods,
        }
        for one in device_needs(base.model_shape())
    ]

"""REST endpoints that name adapters: aliases, tags, the archive, and what a reference stands for."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.http import Http404
from django.shortcuts import get_object_or_404
from ninja import Query, Router, Status
from pydantic import Field

from studio.accounts.models import Role, Scope
from studio.api.auth import ApiRequest, Token, may_write
from studio.api.errors import ERRORS, ApiError
from studio.api.schemas import Body, Out, QueryFields
from studio.catalogue import aliases
from studio.catalogue.aliases import AliasError
from studio.catalogue.api import AdapterOut
from studio.catalogue.models import Adapter, AliasMove

router = Router(tags=["catalogue"])
may_lead = Token(Scope.WRITE, Role.LEAD)
SHOWN_MOVES = 500


class AliasOut(Out):
    """Where an alias points now."""

    alias: str
    points_at: int = Field(description="id of an adapter")
    version: int


class AliasMoveOut(Out):
    """One move of an alias of the adapters of a name; null: nowhere."""

    alias: str = Field(alias="name")
    from_version: int | None
    to_version: int | None
    by: str | None
    reason: str
    at: datetime

    @staticmethod
    def resolve_from_version(move: AliasMove) -> int | None:
        return move.moved_from.version if move.moved_from else None

    @staticmethod
    def resolve_to_version(move: AliasMove) -> int | None:
        return move.moved_to.version if move.moved_to else None

    @staticmethod
    def resolve_by(move: AliasMove) -> str | None:
        return move.moved_by.display_name() if move.moved_by else None


class MoveBody(Body):
    """Why an alias moves. With `seen` the move is refused (409) when it does not point there any more."""

    reason: str = Field("", max_length=aliases.MAX_REASON)
    seen: int | None = Field(None, description="id of the adapter at which it pointed; null: nowhere")


class TagsOut(Out):
    """The tags of an adapter."""

    tags: list[str]


class StateOut(Out):
    """The state of an adapter."""

    state: str


class ReferenceQuery(QueryFields):
    """name@alias, name:version, or a name for its newest version."""

    reference: str = Field(min_length=1, max_length=200)


def _adapter(request: ApiRequest, adapter_id: int) -> Adapter:
    return get_object_or_404(request.team.adapters.select_related("team"), pk=adapter_id)


@router.get("adapters/resolve/", response={200: AdapterOut, **ERRORS}, summary="The adapter of a reference")
def resolve(request: ApiRequest, query: Query[ReferenceQuery]) -> Adapter:
    """name@alias, name:version, or a name for its newest version."""
    try:
        return aliases.find_adapter(request.team, query.reference)
    except AliasError as error:
        raise Http404(str(error)) from error


@router.get(
    "adapters/{int:adapter_id}/alias-moves/", response={200: list[AliasMoveOut], **ERRORS}, by_alias=False,
    summary="History of the aliases of the adapters of this name, the newest first",
)  # fmt: skip
def list_moves(request: ApiRequest, adapter_id: int) -> Any:
    return aliases.moves_of(request.team, _adapter(request, adapter_id).name)[:SHOWN_MOVES]


@router.put(
    "adapters/{int:adapter_id}/aliases/{alias}/", response={200: AliasOut, **ERRORS}, auth=may_lead,
    summary="Point an alias at this adapter",
)  # fmt: skip
def move(request: ApiRequest, adapter_id: int, alias: str, body: MoveBody) -> dict[str, Any]:
    adapter = _adapter(request, adapter_id)
    with_conflict(
        aliases.move_alias, adapter, alias, by=request.user, token=request.token, reason=body.reason, seen=body.seen,
        is_seen="seen" in body.model_fields_set,
    )  # fmt: skip
    return _pointing(alias, adapter)


@router.post(
    "adapters/{int:adapter_id}/aliases/{alias}/roll-back/", response={200: AliasOut, **ERRORS}, auth=may_lead,
    summary="Let an alias of this adapter point at where it did before",
)  # fmt: skip
def roll_back(request: ApiRequest, adapter_id: int, alias: str) -> dict[str, Any]:
    adapter = _adapter(request, adapter_id)
    return _pointing(
        alias, with_conflict(aliases.roll_back_alias, adapter, alias, by=request.user, token=request.token)
    )


@router.delete(
    "adapters/{int:adapter_id}/aliases/{alias}/", response={204: None, **ERRORS}, auth=may_lead,
    summary="Take an alias away from this adapter",
)  # fmt: skip
def remove(request: ApiRequest, adapter_id: int, alias: str) -> Status[None]:
    with_conflict(aliases.remove_alias, _adapter(request, adapter_id), alias, by=request.user, token=request.token)
    return Status(204, None)


@router.put(
    "adapters/{int:adapter_id}/tags/{tag}/", response={200: TagsOut, **ERRORS}, auth=may_write, summary="Give a tag"
)
def add_tag(request: ApiRequest, adapter_id: int, tag: str) -> dict[str, Any]:
    adapter = _adapter(request, adapter_id)
    return {"tags": aliases.change_tags(adapter, add=tag, by=request.user, token=request.token)}


@router.delete(
    "adapters/{int:adapter_id}/tags/{tag}/", response={200: TagsOut, **ERRORS}, auth=may_write, summary="Take a tag"
)
def remove_tag(request: ApiRequest, adapter_id: int, tag: str) -> dict[str, Any]:
    adapter = _adapter(request, adapter_id)
    return {"tags": aliases.change_tags(adapter, remove=tag, by=request.user, token=request.token)}


@router.post(
    "adapters/{int:adapter_id}/archive/", response={200: StateOut, **ERRORS}, auth=may_lead,
    summary="Put an adapter out of sight",
)  # fmt: skip
def archive(request: ApiRequest, adapter_id: int) -> Adapter:
    adapter = _adapter(request, adapter_id)
    aliases.archive(adapter, by=request.user, token=request.token)
    return _adapter(request, adapter_id)


@router.post(
    "adapters/{int:adapter_id}/unarchive/", response={200: StateOut, **ERRORS}, auth=may_lead,
    summary="Take an adapter out of the archive, as a draft",
)  # fmt: skip
def unarchive(request: ApiRequest, adapter_id: int) -> Adapter:
    adapter = _adapter(request, adapter_id)
    aliases.unarchive(adapter, by=request.user, token=request.token)
    return _adapter(request, adapter_id)


def with_conflict(act: Any, *args: Any, **kwargs: Any) -> Any:
    """What `act` gives; where somebody else was faster, a 409."""
    try:
        return act(*args, **kwargs)
    except aliases.MovedMeanwhileError as error:
        raise ApiError(409, error.code, error.message, help=error.next_step) from error


def _pointing(alias: str, adapter: Adapter) -> dict[str, Any]:
    return {"alias": alias, "points_at": adapter.pk, "version": adapter.version}

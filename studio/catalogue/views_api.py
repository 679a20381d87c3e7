"""REST endpoints for saved views of the list of adapters: what the list's page can do with them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.shortcuts import get_object_or_404
from ninja import Router, Status
from pydantic import Field

from studio.accounts.models import Role, Scope
from studio.api.auth import ApiRequest, Token
from studio.api.errors import ERRORS
from studio.api.schemas import Body, Out
from studio.catalogue.models import SavedView
from studio.catalogue.saved_views import MAX_NAME, MAX_QUERY, save_view, seen_views

router = Router(tags=["catalogue"])
# As on the page: what a person keeps for themselves needs no role.
may_keep = Token(Scope.WRITE, Role.VIEWER)


class SavedViewOut(Out):
    """Filters, order and columns of the list of adapters under a name."""

    id: int
    name: str
    query: str = Field(description="Query string of the page of models.")
    is_shared: bool = Field(description="Whether the whole team sees it.")
    user: str = Field(alias="user.username")
    created_at: datetime


class SavedViewBody(Body):
    """What to keep; a name that was used before keeps the new query."""

    name: str = Field(min_length=1, max_length=MAX_NAME)
    query: str = Field("", max_length=2 * MAX_QUERY, description="Such as sort=token_f1&state=approved.")
    is_shared: bool = False


@router.get("adapters/views/", response={200: list[SavedViewOut], **ERRORS}, summary="Saved views of the adapters")
def list_views(request: ApiRequest) -> Any:
    """One's own, and those that others share with the team, by name."""
    return seen_views(request.team, request.user)


@router.post(
    "adapters/views/", response={201: SavedViewOut, **ERRORS}, auth=may_keep, summary="Save a view of the adapters"
)
def post_view(request: ApiRequest, body: SavedViewBody) -> Status[SavedView]:
    return Status(201, save_view(team=request.team, user=request.user, **body.model_dump()))


@router.delete(
    "adapters/views/{int:view_id}/", response={204: None, **ERRORS}, auth=may_keep, summary="Forget a view of one's own"
)
def delete_view(request: ApiRequest, view_id: int) -> Status[None]:
    get_object_or_404(SavedView, pk=view_id, team=request.team, user=request.user).delete()
    return Status(204, None)

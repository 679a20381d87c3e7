"""Views of the list of adapters that people keep under a name: their own, or for the team."""

from __future__ import annotations

from django.db.models import Q, QuerySet
from django.http import QueryDict

from studio.accounts.models import Team, User
from studio.catalogue.models import SavedView
from workers.errors import ExplainedError

MAX_NAME = 60
MAX_QUERY = 1000


class ViewError(ExplainedError):
    """A view that cannot be saved."""

    code = "invalid"


def seen_views(team: Team, user: User) -> QuerySet[SavedView]:
    """The views that a person sees: their own, and those that others share."""
    return team.saved_views.filter(Q(user=user) | Q(is_shared=True)).select_related("user").order_by("name", "pk")


def save_view(*, team: Team, user: User, name: str, query: str, is_shared: bool) -> SavedView:
    """Keep the list that a query string asks for; a name that the person has used keeps the new one.

    Raises:
        ViewError: no name, or more than can be kept.
    """
    name = name.replace("\0", "").strip()
    if not name:
        raise ViewError("The view was not saved: it needs a name.", field="name")
    if len(name) > MAX_NAME:
        raise ViewError(f"The view was not saved: its name has more than {MAX_NAME} characters.", field="name")
    kept = kept_query(query)
    if len(kept) > MAX_QUERY:
        message = f"The view was not saved: its filters have more than {MAX_QUERY} characters."
        raise ViewError(message, next_step="Search for fewer words.", field="query")
    found, _ = SavedView.objects.update_or_create(
        team=team, user=user, name=name, defaults={"query": kept, "is_shared": is_shared}
    )
    return found


def kept_query(text: str) -> str:
    """A list's query string without the page that was open."""
    query = QueryDict(text.removeprefix("?").replace("\0", "")).copy()
    for left_out in ("after", "before"):
        query.pop(left_out, None)
    return query.urlencode()

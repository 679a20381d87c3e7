"""The page where an adapter gets its aliases and tags, and is put into the archive or taken out of it."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from studio.accounts.access import TeamRequest, refuse, team_page
from studio.accounts.models import Role
from studio.catalogue import aliases
from studio.catalogue.models import Adapter, AdapterState, Alias, AliasMove
from studio.query_values import whole_number
from workers.errors import ExplainedError

SHOWN_MOVES, READ_MOVES = 50, 1000
ROLES = {"tag": Role.TRAINER, "untag": Role.TRAINER}


@never_cache
@require_http_methods(["GET", "POST"])
@team_page()
def naming(request: TeamRequest, adapter_id: int) -> HttpResponse:
    """Where the aliases of adapters of this name point, where they pointed, and this version's tags."""
    found = get_object_or_404(request.team.adapters.select_related("team"), pk=adapter_id)
    if request.method == "POST":
        action = request.POST.get("action", "")
        needed = ROLES.get(action, Role.LEAD)
        if not request.membership.may(needed):
            return refuse(request, needed)
        try:
            messages.success(request, _act(request, found, action))
        except ExplainedError as error:
            messages.error(request, f"{error.message} {error.next_step}".strip())
        return redirect("catalogue:naming", found.pk)
    moves = list(aliases.moves_of(request.team, found.name)[:READ_MOVES])
    pointing = {
        one.name: one
        for one in Alias.objects.filter(team=request.team, adapter_name=found.name).select_related("adapter")
    }
    names = [*aliases.OFFERED, *sorted(set(pointing) - set(aliases.OFFERED))]
    return render(
        request,
        "catalogue/naming.html",
        {
            "adapter": found,
            "aliases": [_row(name, pointing.get(name), found, moves) for name in names],
            "moves": moves[:SHOWN_MOVES],
            "is_archived": found.state == AdapterState.ARCHIVED,
            "may_tag": request.membership.may(Role.TRAINER),
            "may_move": request.membership.may(Role.LEAD),
            "max_reason": aliases.MAX_REASON,
        },
    )


def _row(name: str, alias: Alias | None, adapter: Adapter, moves: list[AliasMove]) -> dict[str, object]:
    target = alias.adapter if alias else None
    return {
        "name": name,
        "target": target,
        "is_here": target == adapter,
        "before": aliases.rollback_target(moves, adapter.pk, name),
    }


def _act(request: TeamRequest, found: Adapter, action: str) -> str:
    """What was done, in a sentence; raises ExplainedError."""
    text = {name: request.POST.get(name, "").replace("\0", "").strip() for name in ("alias", "tag", "reason")}
    alias, by = text["alias"], request.user
    match action:
        case "move":
            seen = request.POST.get("seen")
            moved = aliases.move_alias(
                found, alias, by=by, reason=text["reason"], seen=whole_number(seen or ""), is_seen=seen is not None
            )
            return f"{alias} points at v{found.version} {'now' if moved else 'already'}."
        case "remove":
            aliases.remove_alias(found, alias, by=by, reason=text["reason"])
            return f"The alias {alias} is gone."
        case "roll_back":
            target = aliases.roll_back_alias(found, alias, by=by)
            return f"{alias} points at v{target.version} again."
        case "tag":
            aliases.change_tags(found, add=text["tag"], by=by)
            return "The tags are saved."
        case "untag":
            aliases.change_tags(found, remove=text["tag"], by=by)
            return "The tags are saved."
        case "archive":
            aliases.archive(found, by=by)
            return "It is in the archive: lists show it only when they are asked for that state."
        case "unarchive":
            aliases.unarchive(found, by=by)
            return "It is a draft again."
    raise aliases.NamingError("Nothing was done: this page does not know that action.")

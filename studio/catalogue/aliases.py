"""Aliases, tags and the archive: how people name and put away a team's adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from django.db import transaction
from django.db.models import QuerySet

from studio.accounts.models import ApiToken, Team, User, record
from studio.catalogue.models import Adapter, AdapterState, Alias, AliasMove
from studio.catalogue.registering import lock_versions
from studio.query_values import whole_number
from workers.errors import ExplainedError

OFFERED = ("champion", "candidate")
MAX_TAGS = 20
MAX_REASON = 200
_ALIAS = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_TAG = re.compile(r"[^\W_](?:[\w.-]{0,38}[^\W_])?")


class AliasError(ExplainedError):
    """An alias cannot be moved, taken away or found as asked."""

    code = "alias"


class MovedMeanwhileError(AliasError):
    """Somebody else has moved the alias since."""

    code = "alias_moved"


class NamingError(ExplainedError):
    """A tag cannot be given, or an adapter not be put away, as asked."""

    code = "naming"


def move_alias(
    adapter: Adapter, name: str, *, by: User | None, token: ApiToken | None = None, reason: str = "",
    seen: int | None = None, is_seen: bool = False,
) -> AliasMove | None:  # fmt: skip
    """The alias points at this adapter from now on, with its move and an audit event; None when it did already.

    Args:
        seen: the adapter that the alias pointed at when the person decided, None for nowhere; with `is_seen` the move
            is refused when somebody else has moved it since.

    Raises:
        AliasError: no name for an alias, an archived adapter, or somebody was faster.
    """
    if not _ALIAS.fullmatch(name):
        raise AliasError(
            "An alias has small letters, digits, - and _, at most 40, and begins with a letter or digit.", field="name"
        )
    with transaction.atomic():
        lock_versions(adapter.team_id, adapter.name)
        if Adapter.objects.filter(pk=adapter.pk, state=AdapterState.ARCHIVED).exists():
            raise AliasError("An archived adapter gets no alias.", next_step="Take it out of the archive first.")
        alias, is_new = Alias.objects.select_related("adapter").get_or_create(
            team_id=adapter.team_id, adapter_name=adapter.name, name=name, defaults={"adapter": adapter}
        )
        before = None if is_new else alias.adapter
        if is_seen and (before.pk if before else None) != seen:
            raise _moved_meanwhile(adapter.name, name)
        if before == adapter:
            return None
        Alias.objects.filter(pk=alias.pk).update(adapter=adapter)
        return _note_move(alias, before, adapter, by=by, token=token, reason=reason)


def remove_alias(adapter: Adapter, name: str, *, by: User, token: ApiToken | None = None, reason: str = "") -> None:
    """Take an alias away from the adapter at which it points.

    Raises:
        AliasError: it does not point at it (any more).
    """
    with transaction.atomic():
        lock_versions(adapter.team_id, adapter.name)
        alias = _pointing_here(adapter, name)
        alias_id = alias.pk
        _note_move(alias, adapter, None, by=by, token=token, reason=reason)
        Alias.objects.filter(pk=alias_id).delete()


def roll_back_alias(adapter: Adapter, name: str, *, by: User, token: ApiToken | None = None) -> Adapter:
    """The alias goes back to the adapter that it pointed at before this one, which is given.

    Raises:
        AliasError: it does not point at this one any more, or there is nothing to go back to.
    """
    with transaction.atomic():
        lock_versions(adapter.team_id, adapter.name)
        _pointing_here(adapter, name)
        target = rollback_target(moves_of(adapter.team, adapter.name), adapter.pk, name)
        if target is None:
            raise AliasError(f"There is no version of {adapter.name} that {name} pointed at before.")
        move_alias(target, name, by=by, token=token, reason=f"Rolled back from v{adapter.version}")
        return target


def rollback_target(moves: Iterable[AliasMove], adapter_id: int, name: str) -> Adapter | None:
    """Where an alias that points at an adapter came from; `moves` newest first."""
    # The first arrival, not the last, which may itself have been a way back: else two rollbacks would go in a circle.
    arrivals = [move for move in moves if move.name == name and move.moved_to_id == adapter_id]
    return arrivals[-1].moved_from if arrivals else None


def moves_of(team: Team, adapter_name: str) -> QuerySet[AliasMove]:
    """Every move of the aliases of the team's adapters of a name, the newest first."""
    found = AliasMove.objects.filter(team=team, adapter_name=adapter_name)
    return found.select_related("moved_from", "moved_to", "moved_by").order_by("-pk")


def find_adapter(team: Team, reference: str) -> Adapter:
    """The adapter that "name@alias", "name:version" or a name alone (its newest version) stands for.

    Raises:
        AliasError: there is none in the team.
    """
    found = None if "\0" in reference else _find(team, reference.strip())
    if found is None:
        raise AliasError(
            f'Your team has no adapter "{reference[:200]}".',
            next_step="Say name@alias, name:version, or a name for its newest version.",
        )
    return found


def _find(team: Team, reference: str) -> Adapter | None:
    rows = team.adapters.all()
    # A name may itself hold an @ or a colon, so what it could also be is looked for in turn.
    name, separator, alias = reference.rpartition("@")
    if separator and (found := rows.filter(aliases__name=alias, aliases__adapter_name=name).first()):
        return found
    name, separator, version = reference.rpartition(":")
    number = whole_number(version.removeprefix("v")) if separator else None
    if number is not None and (found := rows.filter(name=name, version=number).first()):
        return found
    return rows.filter(name=reference).order_by("-version").first()


def change_tags(
    adapter: Adapter, *, add: str = "", remove: str = "", by: User, token: ApiToken | None = None
) -> list[str]:
    """The adapter's tags after one was given and one taken away; what changes is an audit event.

    Raises:
        NamingError: no tag, or too many of them.
    """
    added = add.strip().lower()
    if added and not _TAG.fullmatch(added):
        raise NamingError(
            "A tag is one word of at most 40 letters, digits, dots, - and _, with a letter or digit at both ends.",
            field="tag",
        )
    with transaction.atomic():
        before = Adapter.objects.select_for_update().values_list("tags", flat=True).get(pk=adapter.pk)
        tags = sorted({*before, *([added] if added else [])} - {remove})
        if len(tags) > MAX_TAGS:
            raise NamingError(f"An adapter has at most {MAX_TAGS} tags.", next_step="Remove one first.", field="tag")
        if tags != before:
            Adapter.objects.filter(pk=adapter.pk).update(tags=tags)
            record(
                "adapter.tagged", team=adapter.team, user=by, token=token, target=adapter,
                version=adapter.version, tags=tags,
            )  # fmt: skip
    return tags


def archive(adapter: Adapter, *, by: User, token: ApiToken | None = None) -> None:
    """Put an adapter out of sight; nothing of it is deleted.

    Raises:
        NamingError: an alias points at it, it is in review, or it is archived already.
    """
    with transaction.atomic():
        lock_versions(adapter.team_id, adapter.name)
        locked = Adapter.objects.get(pk=adapter.pk)
        held = sorted(locked.aliases.values_list("name", flat=True))
        if held:
            raise NamingError(
                f"{locked.name} v{locked.version} is in use as {', '.join(held)}.",
                next_step="Move these aliases to another version first.",
            )
        allowed = [AdapterState.DRAFT, AdapterState.APPROVED, AdapterState.REJECTED]
        if not Adapter.objects.filter(pk=adapter.pk, state__in=allowed).update(state=AdapterState.ARCHIVED):
            raise NamingError(
                f"{locked.name} v{locked.version} is {locked.get_state_display().lower()} and cannot be archived now."
            )
        record(
            "adapter.archived", team=adapter.team, user=by, token=token, target=adapter,
            version=adapter.version, from_state=locked.state,
        )  # fmt: skip


def unarchive(adapter: Adapter, *, by: User, token: ApiToken | None = None) -> None:
    """Take an adapter out of the archive, as a draft: what was decided of it before is asked anew.

    Raises:
        NamingError: it is not archived.
    """
    with transaction.atomic():
        archived = Adapter.objects.filter(pk=adapter.pk, state=AdapterState.ARCHIVED)
        if not archived.update(state=AdapterState.DRAFT):
            raise NamingError(f"{adapter.name} v{adapter.version} is not in the archive.")
        record("adapter.unarchived", team=adapter.team, user=by, token=token, target=adapter, version=adapter.version)


def _pointing_here(adapter: Adapter, name: str) -> Alias:
    found = Alias.objects.filter(team_id=adapter.team_id, adapter_name=adapter.name, name=name, adapter=adapter)
    alias = found.first()
    if alias is None:
        raise _moved_meanwhile(adapter.name, name)
    return alias


def _moved_meanwhile(adapter_name: str, name: str) -> MovedMeanwhileError:
    return MovedMeanwhileError(
        f"The alias {name[:40]} of {adapter_name} does not point there any more: somebody else was faster.",
        next_step="Look where it points now, then decide again.",
    )


def _note_move(
    alias: Alias, before: Adapter | None, after: Adapter | None, *, by: User | None, token: ApiToken | None, reason: str
) -> AliasMove:
    move = AliasMove.objects.create(
        team_id=alias.team_id, adapter_name=alias.adapter_name, name=alias.name, moved_from=before, moved_to=after,
        moved_by=by, reason=reason[:MAX_REASON],
    )  # fmt: skip
    record(
        "alias.moved" if after else "alias.removed",
        team=alias.team, user=by, token=token, target=after or before, alias=alias.name,
        from_version=before.version if before else None, to_version=after.version if after else None,
    )  # fmt: skip
    return move

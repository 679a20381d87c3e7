"""Moving the aliases of a team's adapters: the one place that does."""

from __future__ import annotations

from django.db import transaction

from studio.accounts.models import ApiToken, Team, User, record
from studio.catalogue.models import Adapter, Alias, AliasMove
from workers.errors import ExplainedError


class AliasError(ExplainedError):
    """An alias cannot be moved as asked."""

    code = "alias"


def move_alias(
    adapter: Adapter, name: str, *, by: User | None, token: ApiToken | None = None, reason: str = ""
) -> AliasMove | None:
    """The alias points at this adapter from now on, with its move and an audit event; None when it did already."""
    with transaction.atomic():
        alias, is_new = Alias.objects.select_for_update().get_or_create(
            team=adapter.team, adapter_name=adapter.name, name=name, defaults={"adapter": adapter}
        )
        before = None if is_new else alias.adapter
        if before == adapter:
            return None
        Alias.objects.filter(pk=alias.pk).update(adapter=adapter)
        move = AliasMove.objects.create(
            team=adapter.team, adapter_name=adapter.name, name=name, moved_from=before, moved_to=adapter, moved_by=by,
            reason=reason[:200],
        )  # fmt: skip
        record(
            "alias.moved", team=adapter.team, user=by, token=token, target=adapter, alias=name,
            from_version=before.version if before else None, to_version=adapter.version,
        )  # fmt: skip
        return move


def roll_back_alias(
    team: Team, adapter_name: str, name: str, *, expected: Adapter, by: User, token: ApiToken | None = None
) -> Adapter:
    """The alias goes back to the adapter that it pointed at before `expected`, which is given.

    Raises:
        AliasError: it does not point at `expected` any more, or nothing was there before.
    """
    with transaction.atomic():
        alias = Alias.objects.select_for_update().filter(team=team, adapter_name=adapter_name, name=name).first()
        if alias is None or alias.adapter_id != expected.pk:
            raise AliasError(f"The alias {name} of {adapter_name} has been moved by somebody else.")
        moves = AliasMove.objects.filter(team=team, adapter_name=adapter_name, name=name)
        # Its first arrival, not its last: that one may itself have been a way back.
        arrival = moves.filter(moved_to=expected).order_by("pk").first()
        if arrival is None or arrival.moved_from is None:
            raise AliasError(f"There is no version of {adapter_name} that {name} pointed at before.")
        move_alias(
            arrival.moved_from, name, by=by, token=token,
            reason=f"Rolled back from v{expected.version}",
        )  # fmt: skip
        return arrival.moved_from

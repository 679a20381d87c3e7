"""Who is in a team and as what. A team always keeps an admin."""

from __future__ import annotations

from django.db import transaction

from studio.accounts.models import LoginLink, Membership, Role, Team, User, record
from workers.errors import ExplainedError


class MemberError(ExplainedError):
    """A change of members that is not possible."""

    code = "invalid_member"


@transaction.atomic
def invite_member(*, team: Team, by: User, username: str, role: Role) -> tuple[Membership, str | None]:
    """Put a person into a team. For somebody new an account is made, with the secret of a one-time link.

    Raises:
        MemberError: the person is in the team already.
    """
    user = User.objects.filter(username__iexact=username).first()
    secret = None
    if user is None:
        user = User.objects.create_user(username=username)
        secret = LoginLink.create_for(user)
    elif Membership.objects.filter(user=user, team=team).exists():
        raise MemberError(f"{user.username} is in {team} already.", field="username")
    membership = Membership.objects.create(user=user, team=team, role=role)
    record("member.invited", team=team, user=by, target=user, role=role)
    return membership, secret


@transaction.atomic
def change_role(membership: Membership, role: Role, *, by: User) -> None:
    """Give a member another role.

    Raises:
        MemberError: the team would be left without an admin.
    """
    if role != Role.ADMIN:
        _keep_an_admin(membership)
    before = membership.role
    membership.role = role
    membership.save(update_fields=["role"])
    record("member.role_changed", team=membership.team, user=by, target=membership.user, before=before, after=role)


@transaction.atomic
def remove_member(membership: Membership, *, by: User) -> None:
    """Take a person out of a team; what they made stays, their tokens for it die.

    Raises:
        MemberError: the team would be left without an admin.
    """
    _keep_an_admin(membership)
    record("member.removed", team=membership.team, user=by, target=membership.user, role=membership.role)
    membership.delete()


@transaction.atomic
def renew_login_link(membership: Membership, *, by: User) -> str:
    """The secret of a fresh one-time link for a member; earlier unused links die.

    Raises:
        MemberError: the person is in other teams too, which this team's admin has no say in.
    """
    user = membership.user
    if user.memberships.exclude(pk=membership.pk).exists():
        raise MemberError(
            f"{user.username} is in other teams too, so a link made here would open those. Ask them to sign in with"
            " their password."
        )
    user.login_links.filter(used_at=None).delete()
    record("login_link.issued", team=membership.team, user=by, target=user)
    return LoginLink.create_for(user)


def _keep_an_admin(membership: Membership) -> None:
    # The team's row is the lock: two admins who remove each other at once must not both succeed.
    Team.objects.select_for_update().get(pk=membership.team_id)
    others = Membership.objects.filter(team_id=membership.team_id, role=Role.ADMIN, user__is_active=True)
    if membership.role == Role.ADMIN and not others.exclude(pk=membership.pk).exists():
        raise MemberError(
            f"{membership.user.username} is the only admin of {membership.team}. Make somebody else an admin first."
        )

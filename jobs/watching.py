"""Who may watch a job's progress, for many watchers in three queries: after a restart all of them come at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from uuid import UUID

from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.sessions.models import Session
from django.utils import timezone
from django.utils.crypto import constant_time_compare

from jobs.models import Job
from studio.accounts.middleware import SESSION_KEY as TEAM_KEY
from studio.accounts.models import Membership, Role, User


@dataclass(frozen=True)
class Visit:
    """A session that asks for a job's progress."""

    session_key: str
    job_id: UUID


def watching_users(visits: Collection[Visit], *, in_any_team: bool = False) -> dict[Visit, int]:
    """The user behind each visit whose job is in the session's current team; the others are left out.

    Args:
        visits: looked at together.
        in_any_team: for pages that are open already: the person may have turned to another team of theirs since.
    """
    users = _signed_in_users({visit.session_key for visit in visits})
    memberships: dict[int, list[Membership]] = defaultdict(list)
    mine = Membership.objects.filter(user__in={user_id for user_id, _team in users.values()})
    for membership in mine.order_by("created_at", "pk"):
        memberships[membership.user_id].append(membership)
    team_of_job = dict(Job.objects.filter(pk__in={visit.job_id for visit in visits}).values_list("pk", "team_id"))
    found = {}
    for visit in visits:
        if (user := users.get(visit.session_key)) is None:
            continue
        user_id, chosen = user
        teams = _teams(memberships[user_id], None if in_any_team else chosen, only_current=not in_any_team)
        if team_of_job.get(visit.job_id) in teams:
            found[visit] = user_id
    return found


def _teams(memberships: Iterable[Membership], chosen: int | None, *, only_current: bool) -> list[int]:
    # As studio.accounts.middleware.current_membership chooses: the session's team, or the person's first.
    teams = [membership.team_id for membership in memberships if membership.may(Role.VIEWER)]
    if not only_current:
        return teams
    return [chosen] if chosen in teams and chosen is not None else teams[:1]


def _signed_in_users(session_keys: Collection[str]) -> dict[str, tuple[int, int | None]]:
    """User and chosen team of each session that is alive and was not ended by a new password."""
    sessions = {}
    for row in Session.objects.filter(session_key__in=session_keys, expire_date__gt=timezone.now()):
        content = SessionStore().decode(row.session_data)
        if content.get(BACKEND_SESSION_KEY) in settings.AUTHENTICATION_BACKENDS and content.get(SESSION_KEY):
            sessions[row.session_key] = content
    users = User.objects.filter(pk__in={content[SESSION_KEY] for content in sessions.values()}, is_active=True)
    hashes = {user.pk: user.get_session_auth_hash() for user in users}
    return {
        session_key: (int(content[SESSION_KEY]), content.get(TEAM_KEY))
        for session_key, content in sessions.items()
        if (expected := hashes.get(int(content[SESSION_KEY])))
        and constant_time_compare(content.get(HASH_SESSION_KEY, ""), expected)
    }

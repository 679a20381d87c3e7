"""Reviews for tests: an adapter of Bob's that passes every gate, and people who may review it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from studio.accounts.models import Role, Team, User
from studio.catalogue.models import Adapter, EvaluationRun, TestSet
from studio.reviews import checking, reviewing
from studio.reviews.models import Review
from studio.reviews.reviewing import Actor
from tests.conftest import make_member
from tests.factories import make_adapter, make_result, make_sample, make_score
from workers.results import OverlapRecord, Provenance


def good_result(**changes: Any) -> Any:
    """What a training gives whose adapter passes every gate of the default policy."""
    made = make_result(
        [make_score(-0.6)],
        [make_sample(line=line, prompt=f"Question {line}?", base_answer=f"base {line}", adapter_answer=f"mine {line}")
         for line in range(1, 7)],
        general=(make_score(0.01, width=0.005),),
        overlap=OverlapRecord(num_held_out_rows=100, num_exact=0, num_near=0),
        num_rows_to_score=100, num_rows_scored=100, test_set_sha256="a" * 64, settings_sha256="b" * 64,
    )  # fmt: skip
    provenance = Provenance(**(made.provenance.model_dump() | {"verified": True, "max_logit_difference": 1e-6}))
    return made.model_copy(update={"provenance": provenance, **changes})


@pytest.fixture
def make_good(team: Team, bob: User, data_dir: object) -> Callable[..., Adapter]:
    """Makes adapters of Bob's that pass; further results as changes."""

    def make(name: str = "support", *, by: User | None = None, **changes: Any) -> Adapter:
        return make_adapter(team, by or bob, name=name, result=good_result(**changes))

    return make


@pytest.fixture
def adapter(make_good: Callable[..., Adapter]) -> Adapter:
    return make_good()


@pytest.fixture
def lena(team: Team) -> User:
    return make_member("lena", team, Role.LEAD)


@pytest.fixture
def ludwig(team: Team) -> User:
    return make_member("ludwig", team, Role.LEAD)


def actor(user: User) -> Actor:
    membership = user.memberships.get()
    return Actor(user, Role(membership.role), membership.team_id)


def submitted(adapter: Adapter, *, check: bool = True, **values: Any) -> Review:
    """A review of an adapter by its author, its gates checked as a worker would."""
    review = reviewing.submit(adapter, actor(adapter.created_by), **values)
    if check:
        checking.check(review.pk)
    review.refresh_from_db()
    return review


def add_run(adapter: Adapter, **changes: Any) -> EvaluationRun:
    """Another run of an evaluation, as a job of its own would leave it."""
    values = {
        "team": adapter.team, "adapter": adapter, "base_model": adapter.base_model, "test_set": TestSet.HELD_OUT,
        "num_rows": 100, "num_scored": 100,
    }  # fmt: skip
    return EvaluationRun.objects.create(**(values | changes))

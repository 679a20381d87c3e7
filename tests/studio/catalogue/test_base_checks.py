"""A base model's files are read when somebody asks and once a week, by a task; the page and the API say what came."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from django.test import Client
from django.utils import timezone

from studio.accounts.models import ApiToken, AuditEvent, Role, Team, User
from studio.catalogue import base_checks
from studio.catalogue.models import BaseFileCheck, BaseModel
from studio.catalogue.tasks import check_base_files
from tests.conftest import make_member, signed_in
from tests.factories import make_base_model

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("data_dir")]


@pytest.fixture
def base() -> BaseModel:
    return make_base_model()


def check_of(base: BaseModel) -> BaseFileCheck:
    return BaseFileCheck.objects.get(base_model=base)


def test_a_check_that_was_asked_for_is_done_once_and_says_what_is_damaged(
    base: BaseModel, alice: User, alice_client: Client
) -> None:
    check_base_files()
    assert not BaseFileCheck.objects.exists(), "new ones were read when they were registered"
    assert "Not checked since it was registered" in alice_client.get(base.get_absolute_url()).text
    for _ in range(2):
        assert alice_client.post(f"/base-models/{base.pk}/check/").status_code == 302
    assert AuditEvent.objects.filter(action="base_model.check_asked", user=alice).count() == 1
    waiting = alice_client.get(f"/base-models/{base.pk}/check/", headers={"HX-Request": "true"}).text
    assert 'hx-trigger="every 3s"' in waiting
    assert "Check now" not in waiting
    check_base_files()
    assert (check_of(base).damage, check_of(base).asked_at) == ("", None)
    assert "all whole." in alice_client.get(base.get_absolute_url()).text

    weights = Path(base.folder) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    alice_client.post(f"/base-models/{base.pk}/check/")
    check_base_files()
    assert 'The file "model.safetensors" has changed since it was registered' in check_of(base).damage
    page = alice_client.get(f"/base-models/{base.pk}/check/", headers={"HX-Request": "true"}).text
    assert "its checksum differs" in page
    assert "every 3s" not in page
    weights.unlink()
    assert 'The file "model.safetensors" is missing.' in base_checks.find_damage(base)


def test_one_that_nobody_has_looked_at_for_a_week_is_read_by_itself(base: BaseModel) -> None:
    BaseModel.objects.filter(pk=base.pk).update(created_at=timezone.now() - timedelta(days=8))
    check_base_files()
    first = check_of(base).checked_at
    assert first is not None
    check_base_files()
    assert check_of(base).checked_at == first, "not again within the week"


def test_who_asks_while_the_files_are_read_is_answered_by_another_look(
    base: BaseModel, team: Team, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_checks.ask_for_check(base, team=team, user=alice)
    find_damage, looks = base_checks.find_damage, []

    def read(found: BaseModel) -> str:
        if not looks:
            BaseFileCheck.objects.filter(base_model=found).update(asked_at=timezone.now())
        looks.append(found)
        return find_damage(found)

    monkeypatch.setattr(base_checks, "find_damage", read)
    check_base_files()
    assert len(looks) == 2
    assert check_of(base).asked_at is None


def test_the_api_asks_too_and_a_viewer_does_not(base: BaseModel, team: Team, alice: User) -> None:
    _, secret = ApiToken.issue(team=team, user=alice, name="x", scopes=["read", "write"])
    api = Client(headers={"authorization": f"Bearer {secret}"})
    url = f"/api/v1/base-models/{base.pk}/"
    assert api.get(url).json()["file_check"] is None
    assert api.post(f"{url}check/").status_code == 202
    assert api.get(url).json()["file_check"]["asked_at"] is not None
    check_base_files()
    told = api.get(url).json()["file_check"]
    assert (told["damage"], told["asked_at"]) == ("", None)
    assert api.post("/api/v1/base-models/999999/check/").status_code == 404

    viewer = signed_in(make_member("vera", team, Role.VIEWER))
    assert viewer.post(f"/base-models/{base.pk}/check/").status_code == 403
    assert "Check now" not in viewer.get(base.get_absolute_url()).text
    assert Client().post(f"/base-models/{base.pk}/check/").status_code == 302
    assert check_of(base).asked_at is None

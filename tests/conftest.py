"""The cast: Alice owns a team, Bob is in it as a trainer, Charlie is in another and must see nothing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings as django_settings
from django.test import Client, override_settings
from hypothesis import HealthCheck
from hypothesis import settings as property_settings

from studio.accounts.models import Membership, Role, Team, User
from studio.catalogue.importing import register_base_model
from studio.catalogue.models import BaseModel
from tests.tiny import make_tiny_base

PASSWORD = "correct horse battery"

# The same draws in every run, however long one takes on a busy machine. Others: --hypothesis-profile=exploring.
property_settings.register_profile("exploring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
property_settings.register_profile("repeating", property_settings.get_profile("exploring"), derandomize=True)
property_settings.load_profile("repeating")


@pytest.fixture(scope="session", autouse=True)
def quick_settings() -> Iterator[None]:
    """Static files by their own names, for nothing is collected before the tests; and passwords without the toil."""
    plain = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    with override_settings(
        STORAGES=django_settings.STORAGES | {"staticfiles": plain},
        STATIC_ROOT=None,
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    ):
        yield


@pytest.fixture(autouse=True)
def unlimited_memory() -> Iterator[None]:
    """A test that limits the memory of this process, as our limited children do, would fail those behind it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    yield
    assert resource.getrlimit(resource.RLIMIT_AS) == before, "run what limits its memory in a process of its own"


def make_member(username: str, team: Team, role: Role) -> User:
    user = User.objects.create_user(username=username, password=PASSWORD)
    Membership.objects.create(user=user, team=team, role=role)
    return user


@pytest.fixture
def team(db: None) -> Team:
    return Team.objects.create(name="Support", slug="support")


@pytest.fixture
def other_team(db: None) -> Team:
    return Team.objects.create(name="Legal", slug="legal")


@pytest.fixture
def alice(team: Team) -> User:
    return make_member("alice", team, Role.ADMIN)


@pytest.fixture
def bob(team: Team) -> User:
    return make_member("bob", team, Role.TRAINER)


@pytest.fixture
def charlie(other_team: Team) -> User:
    return make_member("charlie", other_team, Role.ADMIN)


def signed_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def alice_client(alice: User) -> Client:
    return signed_in(alice)


@pytest.fixture
def bob_client(bob: User) -> Client:
    return signed_in(bob)


@pytest.fixture
def charlie_client(charlie: User) -> Client:
    return signed_in(charlie)


@pytest.fixture
def data_dir(tmp_path: Path, settings: object) -> Path:
    """A data folder of the test's own."""
    settings.DATA_DIR = tmp_path  # type: ignore[attr-defined]
    return tmp_path


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    folder = Path(django_settings.DATA_DIR) / "base_models" / "tiny"
    return folder if folder.exists() else make_tiny_base(folder)


@pytest.fixture
def base_model(tiny_base: Path, transactional_db: None) -> BaseModel:
    return register_base_model(folder=tiny_base, name="tiny-llama", hub_id="studio/tiny-llama", licence="apache-2.0")

"""Aliases, tags and the archive, by page and API, alone and with somebody else at the same moment."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from studio.accounts.models import AuditEvent, Role, Team, User
from studio.catalogue.aliases import AliasError, NamingError, archive, find_adapter, move_alias, roll_back_alias
from studio.catalogue.models import Adapter, AdapterState, Alias, AliasMove
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter, make_base_model, make_dataset_version
from tests.studio.catalogue.test_api import call

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture
def versions(team: Team, alice: User) -> list[Adapter]:
    base, rows = make_base_model(), make_dataset_version(team, alice)
    return [make_adapter(team, alice, name="faq", base_model=base, dataset_version=rows) for _ in range(3)]


@pytest.fixture
def lead_client(team: Team) -> Client:
    return signed_in(make_member("lena", team, Role.LEAD))


def post(client: Client, adapter: Adapter, action: str, **values: Any) -> str:
    return client.post(f"/models/{adapter.pk}/names/", {"action": action, **values}, follow=True).content.decode()


def champion() -> int:
    return Alias.objects.get(name="champion").adapter.version


def test_a_lead_sets_moves_rolls_back_and_removes_an_alias(versions: list[Adapter], lead_client: Client) -> None:
    one, two, three = versions
    for adapter in versions:
        assert f"champion points at v{adapter.version} now" in post(lead_client, adapter, "move", alias="champion")
    assert champion() == 3
    assert "champion points at v2 again" in post(lead_client, three, "roll_back", alias="champion")
    # The way back goes on, it does not swing to and fro.
    assert "champion points at v1 again" in post(lead_client, two, "roll_back", alias="champion")
    assert "There is no version of faq that champion pointed at before." in post(
        lead_client, one, "roll_back", alias="champion"
    )
    page = post(lead_client, one, "remove", alias="champion", reason="Withdrawn")
    assert not Alias.objects.exists()
    assert "The alias champion is gone." in page
    assert "Rolled back from v3" in page
    moves = [(m.moved_from and m.moved_from.version, m.moved_to and m.moved_to.version) for m in
             AliasMove.objects.select_related("moved_from", "moved_to").order_by("pk")]  # fmt: skip
    assert moves == [(None, 1), (1, 2), (2, 3), (3, 2), (2, 1), (1, None)]
    events = AuditEvent.objects.filter(object_type="adapter").order_by("pk")
    assert [one.action for one in events] == ["alias.moved"] * 5 + ["alias.removed"]
    assert events[2].details == {"alias": "champion", "from_version": 2, "to_version": 3}


def test_a_move_is_refused_when_somebody_was_faster(versions: list[Adapter], lead_client: Client, alice: User) -> None:
    one, two, three = versions
    move_alias(one, "champion", by=alice)
    shown = lead_client.get(f"/models/{three.pk}/names/").content.decode()
    assert f'name="seen" value="{one.pk}"' in shown
    move_alias(two, "champion", by=alice)
    assert "somebody else was faster" in post(lead_client, three, "move", alias="champion", seen=one.pk)
    assert "somebody else was faster" in post(lead_client, one, "roll_back", alias="champion")
    assert champion() == 2
    assert "points at v3 now" in post(lead_client, three, "move", alias="champion", seen=two.pk)


@pytest.mark.django_db(transaction=True)
def test_of_several_at_the_same_moment_one_moves_the_alias(versions: list[Adapter], alice: User) -> None:
    one = versions[0]
    move_alias(one, "champion", by=alice)
    barrier, outcomes = threading.Barrier(6), []

    def move(adapter: Adapter) -> None:
        try:
            barrier.wait(60)
            move_alias(adapter, "champion", by=alice, seen=one.pk, is_seen=True)
            outcomes.append("moved")
        except AliasError:
            outcomes.append("refused")
        finally:
            connection.close()

    threads = [threading.Thread(target=move, args=(versions[1 + number % 2],)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(outcomes) == ["moved"] + ["refused"] * 5
    assert AliasMove.objects.count() == 2
    assert AliasMove.objects.latest("pk").moved_to_id == Alias.objects.get().adapter_id


@pytest.mark.django_db(transaction=True)
def test_an_alias_never_points_into_the_archive_however_close_the_two_come(
    versions: list[Adapter], alice: User
) -> None:
    for adapter in versions:
        barrier = threading.Barrier(2)

        def run(act: Any, adapter: Adapter = adapter, barrier: threading.Barrier = barrier) -> None:
            try:
                barrier.wait(60)
                act(adapter)
            except (AliasError, NamingError):
                pass
            finally:
                connection.close()

        acts = (lambda one: archive(one, by=alice), lambda one: move_alias(one, "champion", by=alice))
        threads = [threading.Thread(target=run, args=(act,)) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        held = Alias.objects.filter(adapter=adapter).exists()
        assert held != Adapter.objects.filter(pk=adapter.pk, state=AdapterState.ARCHIVED).exists()


def test_references_find_by_alias_version_or_name(versions: list[Adapter], team: Team, alice: User) -> None:
    move_alias(versions[1], "champion", by=alice)
    odd = make_adapter(team, alice, name="a:1@b", base_model=versions[0].base_model)
    found = {"faq@champion": versions[1], "faq:1": versions[0], "faq:v3": versions[2], "faq": versions[2]}
    for reference, adapter in found.items():
        assert find_adapter(team, reference) == adapter, reference
    assert find_adapter(team, "a:1@b:1") == odd
    for reference in ("faq@candidate", "faq:9", "fa", "", "@", ":", "faq@champion\0", "x" * 5000):
        with pytest.raises(AliasError, match="has no adapter"):
            find_adapter(team, reference)


def test_trainers_tag_and_only_leads_move_and_archive(versions: list[Adapter], bob_client: Client, team: Team) -> None:
    one = versions[0]
    assert "The tags are saved." in post(bob_client, one, "tag", tag=" German ")
    post(bob_client, one, "tag", tag="v1.2")
    for bad in ("two words", "<b>", "-", "x" * 41, ""):
        post(bob_client, one, "tag", tag=bad)
    assert Adapter.objects.get(pk=one.pk).tags == ["german", "v1.2"]
    post(bob_client, one, "untag", tag="v1.2")
    assert Adapter.objects.get(pk=one.pk).tags == ["german"]
    for action in ("move", "remove", "roll_back", "archive", "unarchive", "nonsense"):
        response = bob_client.post(f"/models/{one.pk}/names/", {"action": action, "alias": "champion"})
        assert response.status_code == 403, action
    viewer = signed_in(make_member("vera", team, Role.VIEWER))
    assert viewer.post(f"/models/{one.pk}/names/", {"action": "tag", "tag": "x"}).status_code == 403
    assert viewer.get(f"/models/{one.pk}/names/").status_code == 200
    assert not Alias.objects.exists()


def test_what_is_in_use_or_in_review_is_not_archived(versions: list[Adapter], lead_client: Client, alice: User) -> None:
    one, two, three = versions
    move_alias(one, "champion", by=alice)
    assert "in use as champion" in post(lead_client, one, "archive")
    Adapter.objects.filter(pk=two.pk).update(state=AdapterState.IN_REVIEW)
    assert "in review and cannot be archived" in post(lead_client, two, "archive")
    assert "in the archive" in post(lead_client, three, "archive")
    assert "An archived adapter gets no alias." in post(lead_client, three, "move", alias="candidate")
    post(lead_client, three, "unarchive")
    assert set(Adapter.objects.values_list("version", "state")) == {(1, "draft"), (2, "in_review"), (3, "draft")}
    actions = list(AuditEvent.objects.order_by("pk").values_list("action", flat=True))
    assert actions == ["alias.moved", "adapter.archived", "adapter.unarchived"]


@pytest.mark.parametrize("name", ["", "Champion", "a b", "-a", "a" * 41, "ä", "a\n", "'; drop"])
def test_an_alias_that_is_no_name_is_refused(name: str, versions: list[Adapter], alice: User) -> None:
    with pytest.raises(AliasError, match="small letters"):
        move_alias(versions[0], name, by=alice)


def test_the_page_is_another_teams_404_and_takes_few_queries(
    versions: list[Adapter], alice: User, alice_client: Client, charlie_client: Client
) -> None:
    for number in range(12):
        move_alias(versions[number % 3], "champion", by=alice)
    url = f"/models/{versions[0].pk}/names/"
    assert charlie_client.get(url).status_code == 404
    assert charlie_client.post(url, {"action": "move", "alias": "champion"}).status_code == 404
    with CaptureQueriesContext(connection) as queries:
        assert alice_client.get(url).status_code == 200
    assert len(queries) <= 8, [query["sql"][:120] for query in queries]


def test_the_api_does_the_same_for_the_same_people(
    versions: list[Adapter], team: Team, other_team: Team, bob: User, charlie: User
) -> None:
    lena = make_member("lena", team, Role.LEAD)
    one, two, three = versions
    path = f"adapters/{two.pk}/aliases/champion/"
    write = ("read", "write")
    assert call(bob, team, "PUT", path, {}, write).status_code == 403
    assert call(charlie, other_team, "PUT", path, {}, write).status_code == 404
    moved = call(lena, team, "PUT", path, {"reason": "good"}, write)
    assert (moved.status_code, moved.json()["points_at"]) == (200, two.pk)
    assert call(lena, team, "PUT", f"adapters/{three.pk}/aliases/champion/", {"seen": one.pk}, write).status_code == 409
    assert call(lena, team, "PUT", f"adapters/{three.pk}/aliases/champion/", {"seen": two.pk}, write).status_code == 200
    back = call(lena, team, "POST", f"adapters/{three.pk}/aliases/champion/roll-back/", {}, write)
    assert back.json()["points_at"] == two.pk
    found = call(bob, team, "GET", "adapters/resolve/?reference=faq@champion").json()
    assert (found["id"], found["version"], found["aliases"]) == (two.pk, 2, ["champion"])
    assert call(charlie, other_team, "GET", "adapters/resolve/?reference=faq@champion").status_code == 404
    history = call(bob, team, "GET", f"adapters/{one.pk}/alias-moves/").json()
    assert [move["to_version"] for move in history] == [2, 3, 2]
    assert call(lena, team, "DELETE", path, None, write).status_code == 204
    tagged = call(bob, team, "PUT", f"adapters/{one.pk}/tags/german/", {}, write)
    assert tagged.json() == {"tags": ["german"]}
    assert call(bob, team, "DELETE", f"adapters/{one.pk}/tags/german/", None, write).json() == {"tags": []}
    assert call(bob, team, "POST", f"adapters/{one.pk}/archive/", {}, write).status_code == 403
    assert call(lena, team, "POST", f"adapters/{one.pk}/archive/", {}, write).json()["state"] == "archived"
    assert call(lena, team, "POST", f"adapters/{one.pk}/unarchive/", {}, write).json()["state"] == "draft"
    assert call(lena, team, "POST", f"adapters/{one.pk}/unarchive/", {}, write).status_code == 422


def test_a_rollback_of_what_points_elsewhere_changes_nothing(versions: list[Adapter], alice: User) -> None:
    move_alias(versions[0], "champion", by=alice)
    with pytest.raises(AliasError, match="somebody else was faster"):
        roll_back_alias(versions[1], "champion", by=alice)
    assert champion() == 1

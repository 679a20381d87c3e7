"""Equal bytes of several teams are one file: nobody's deletion or refusal may take it from another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connections

from studio import storage
from studio.accounts.models import Team, User
from studio.datasets.models import DatasetVersion
from studio.datasets.removing import delete_dataset
from studio.datasets.uploads import receive_upload
from tests.studio.datasets.conftest import good_rows, jsonl
from workers.errors import DatasetError

pytestmark = pytest.mark.django_db(transaction=True)
ROWS = jsonl(good_rows())


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> Callable[[], None]:
    """Let `act` begin on a connection of its own when the next blob is in its place and its row is not committed.

    It gets a second to end or to wait for the upload. Gives the function that waits for its end.
    """
    faults: list[Exception] = []
    sync_folder = storage.sync_folder

    def run() -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001  whatever it was, the test fails with it
            faults.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)

    def begin(folder: Path) -> None:
        monkeypatch.setattr(storage, "sync_folder", sync_folder)
        sync_folder(folder)
        thread.start()
        thread.join(1)

    def finish() -> None:
        thread.join(60)
        assert not thread.is_alive()
        assert faults == []

    monkeypatch.setattr(storage, "sync_folder", begin)
    return finish


def test_a_team_that_deletes_its_file_leaves_it_to_one_that_is_storing_the_same(
    team: Team, alice: User, other_team: Team, charlie: User, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = receive_upload(team=team, user=alice, file_name="rows.jsonl", chunks=[ROWS])
    finish = meanwhile(monkeypatch, lambda: delete_dataset(ours.dataset, user=alice))
    theirs = receive_upload(team=other_team, user=charlie, file_name="rows.jsonl", chunks=[ROWS])
    finish()
    assert list(DatasetVersion.objects.all()) == [theirs]
    assert theirs.path().read_bytes() == ROWS
    delete_dataset(theirs.dataset, user=charlie)
    assert not theirs.path().exists()


def test_the_scores_of_base_models_go_with_the_last_version_of_their_team(
    team: Team, alice: User, other_team: Team, charlie: User, data_dir: Path
) -> None:
    ours = receive_upload(team=team, user=alice, file_name="rows.jsonl", chunks=[ROWS])
    again = receive_upload(team=team, user=alice, file_name="again.jsonl", chunks=[jsonl(good_rows(20))], name="Again")
    DatasetVersion.objects.filter(pk=again.pk).update(sha256=ours.sha256)
    theirs = receive_upload(team=other_team, user=charlie, file_name="rows.jsonl", chunks=[ROWS])
    kept = [storage.base_scores_folder(ours.sha256, one.pk) / "one.json" for one in (team, other_team)]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    delete_dataset(ours.dataset, user=alice)
    assert [path.exists() for path in kept] == [True, True], "another dataset of the team has the same rows"
    delete_dataset(again.dataset, user=alice)
    assert [path.exists() for path in kept] == [False, True]
    assert theirs.path().read_bytes() == ROWS
    delete_dataset(theirs.dataset, user=charlie)
    assert not theirs.path().exists()
    assert not kept[1].exists()


def test_the_same_file_sent_twice_at_once_is_one_version(
    team: Team, alice: User, bob: User, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second: list[DatasetVersion] = []

    def again() -> None:
        second.append(receive_upload(team=team, user=bob, file_name="rows.jsonl", chunks=[ROWS]))

    finish = meanwhile(monkeypatch, again)
    first = receive_upload(team=team, user=alice, file_name="rows.jsonl", chunks=[ROWS])
    finish()
    assert second == [first] == list(DatasetVersion.objects.all())
    assert second[0].already_stored


def test_a_name_that_was_taken_in_between_leaves_no_file(
    team: Team, alice: User, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive_upload(team=team, user=alice, file_name="rows.jsonl", chunks=[jsonl(good_rows(20))], name="faq")
    monkeypatch.setattr("django.db.models.query.QuerySet.exists", lambda _: False)
    with pytest.raises(DatasetError, match="already"):
        receive_upload(team=team, user=alice, file_name="rows.jsonl", chunks=[ROWS], name="faq")
    assert len([path for path in (data_dir / "blobs").rglob("*") if path.is_file()]) == 1

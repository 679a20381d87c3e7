"""Splits of a version: made by a worker, frozen in the storage, shown, and kept while something was made with them."""

from __future__ import annotations

import csv
import io
import json
import re
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, transaction
from django.test import Client
from django.utils import timezone

from jobs.celery import app
from studio.accounts.models import ApiToken, AuditEvent, Membership, Role, Team, User
from studio.datasets import inspecting, splitting, tasks
from studio.datasets.models import DatasetSplit, DatasetVersion, SplitState
from studio.datasets.removing import delete_dataset
from studio.datasets.splitting import SplitRefusedError, ask_split, delete_split, freeze, freeze_waiting, make_default
from studio.datasets.views import remap
from studio.storage import blob_path
from tests.factories import make_adapter, make_base_model, make_job_for
from tests.studio.datasets.conftest import Upload, jsonl
from tests.workers.scans.planting import clean_rows
from workers.splits.asked import SplitRequest
from workers.splits.frozen import FrozenSplit


def rows(num: int = 60) -> list[dict[str, Any]]:
    return [{**row, "topic": f"topic {n % 3}", "split": "test" if n % 5 == 0 else "train"} for n, row in
            enumerate(clean_rows(num))]  # fmt: skip


def api(team: Team, user: User, *scopes: str) -> Client:
    secret = ApiToken.issue(team=team, user=user, name="t", scopes=list(scopes))[1]
    return Client(headers={"authorization": f"Bearer {secret}"})


def frozen(version: DatasetVersion, user: User, *, name: str = "", **asked: Any) -> DatasetSplit:
    split = ask_split(version, SplitRequest.from_dict(asked), name=name, user=user)
    freeze(split.pk)
    split.refresh_from_db()
    assert split.state == "done", split.error
    return split


def body(answer: Any) -> bytes:
    return b"".join(answer.streaming_content)


def test_a_split_is_made_by_a_worker_and_frozen_in_the_storage(
    upload: Upload, bob: User, no_broker: list[Any], django_capture_on_commit_callbacks: Any
) -> None:
    version = upload(jsonl(rows()))
    no_broker.clear()
    with django_capture_on_commit_callbacks(execute=True):
        split = ask_split(version, SplitRequest.from_dict({"test": 0.2}), name="", user=bob)
    assert (no_broker, split.state, split.name) == ([split.pk], "waiting", "Split 1")
    tasks.freeze_split(split.pk)
    split.refresh_from_db()
    assert (split.state, split.num_train, split.num_validation, split.num_test) == ("done", 42, 6, 12)
    found = FrozenSplit.read(split.path(), sha256=split.sha256, dataset_sha256=version.sha256)
    assert (len(found.train), len(found.validation), len(found.test)) == (42, 6, 12)
    assert found.settings == SplitRequest.from_dict({"test": 0.2}).to_dict() == split.asked
    assert split.path().stat().st_size == split.num_bytes
    freeze(split.pk)
    assert DatasetSplit.objects.get().attempt == 1, "what is frozen is not made again"
    actions = list(AuditEvent.objects.filter(action__startswith="dataset.split").values_list("action", "user"))
    assert sorted(actions) == [("dataset.split_asked", bob.pk), ("dataset.split_frozen", bob.pk)]


def test_a_worker_and_the_clock_know_the_tasks_by_the_names_that_are_sent() -> None:
    assert tasks.freeze_split.name == "studio.datasets.tasks.freeze_split"
    assert app.conf.beat_schedule["freeze-waiting"]["task"] == tasks.freeze_waiting.name


def test_the_same_question_and_the_same_name_are_refused(upload: Upload, bob: User) -> None:
    version = upload(jsonl(rows()))
    first = frozen(version, bob, name="Mine", test=0.2)
    with pytest.raises(SplitRefusedError, match="have made the split “Mine”"):
        ask_split(version, SplitRequest.from_dict({"test": 0.2}), name="Other", user=bob)
    with pytest.raises(SplitRefusedError, match="has a split “Mine” already") as caught:
        ask_split(version, SplitRequest.from_dict({"test": 0.3}), name="Mine", user=bob)
    assert caught.value.field == "name"
    with pytest.raises(SplitRefusedError, match="has a split “Mine” already"):
        ask_split(version, SplitRequest.from_dict({"test": 0.3}), name=" Mine\u202e\u200b", user=bob)
    assert frozen(version, bob, test=0.3).name == "Split 1"
    with pytest.raises(IntegrityError), transaction.atomic():
        DatasetSplit.objects.create(
            version=version, name="x", asked={}, asked_sha256=first.asked_sha256, created_by=bob
        )
    with pytest.raises(IntegrityError), transaction.atomic():
        DatasetSplit.objects.filter(pk=first.pk).update(sha256="")


def test_what_cannot_be_divided_is_said_and_may_be_asked_again(upload: Upload, bob: User, bob_client: Client) -> None:
    version = upload(jsonl(rows()))
    asked = SplitRequest.from_dict({"group_column": "nothing like it"})
    split = ask_split(version, asked, name="Mine", user=bob)
    freeze(split.pk)
    split.refresh_from_db()
    assert split.state == "failed"
    assert "No usable row has anything in the column “nothing like it”" in split.error
    assert "could not be made" in bob_client.get(split.get_absolute_url()).content.decode()
    again = ask_split(version, asked, name="Mine", user=bob)
    assert [one.pk for one in version.splits.all()] == [again.pk]
    with pytest.raises(SplitRefusedError, match="is not done yet"):
        make_default(again, version, user=bob)


def test_a_split_that_needs_too_much_fails_with_what_to_do(
    upload: Upload, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = upload(jsonl(rows()))
    run = inspecting.run_child

    def starve(module: str, arguments: list[str], *, seconds: float) -> Any:
        return run(module, [*arguments, "--memory-bytes", str(30 * 1024**2)], seconds=seconds)

    monkeypatch.setattr(splitting, "run_child", starve)
    split = ask_split(version, SplitRequest.from_dict({}), name="", user=bob)
    freeze(split.pk)
    split.refresh_from_db()
    assert (split.state, "Keep only equal rows together" in split.error) == ("failed", True)


def test_the_sweep_asks_for_lost_and_dead_splits_and_gives_up_in_the_end(
    upload: Upload, bob: User, no_broker: list[Any]
) -> None:
    version = upload(jsonl(rows()))
    no_broker.clear()
    split = ask_split(version, SplitRequest.from_dict({}), name="", user=bob)
    assert freeze_waiting() == 0  # it was asked for just now
    long_ago = timezone.now() - timedelta(minutes=10)
    version.splits.update(queued_at=long_ago)
    assert freeze_waiting() == 1
    version.splits.update(state="running", heartbeat_at=timezone.now(), attempt=1)
    assert freeze_waiting() == 0
    version.splits.update(heartbeat_at=long_ago)
    assert freeze_waiting() == 1
    version.splits.update(attempt=splitting.MAX_ATTEMPTS)
    assert freeze_waiting() == 0
    split.refresh_from_db()
    assert (split.state, split.error) == ("failed", "Its worker died 3 times.")
    assert no_broker == [split.pk, split.pk]


def test_a_worker_that_was_presumed_dead_stores_nothing(upload: Upload, bob: User) -> None:
    split = ask_split(upload(jsonl(rows())), SplitRequest.from_dict({}), name="", user=bob)
    assert splitting._claim(split)
    DatasetSplit.objects.filter(pk=split.pk).update(heartbeat_at=timezone.now() - timedelta(minutes=10))
    successor = DatasetSplit.objects.get(pk=split.pk)
    assert splitting._claim(successor)
    assert not splitting._claim(DatasetSplit.objects.get(pk=split.pk))
    with pytest.raises(splitting._SupersededError):
        splitting._make(split)
    splitting._make(successor)
    split.refresh_from_db()
    assert (split.state, split.attempt) == ("done", 2)


def test_the_page_lists_splits_and_makes_one(
    upload: Upload, bob: User, bob_client: Client, django_assert_max_num_queries: Any
) -> None:
    version = upload(jsonl(rows()))
    page = f"{version.get_absolute_url()}splits/"
    assert page in bob_client.get(version.get_absolute_url()).content.decode()
    empty = bob_client.get(page).content.decode()
    assert "There is none yet." in empty
    assert '<option value="topic">topic</option>' in empty
    posted = {"method": "share", "validation": "0.1", "test": "0.2", "keep_together": "near", "seed": "17",
              "stratify_column": "topic", "name": "By topic"}  # fmt: skip
    answer = bob_client.post(page, posted)
    split = DatasetSplit.objects.get()
    assert answer.headers["Location"] == split.get_absolute_url()
    waiting = bob_client.get(page, headers={"HX-Request": "true"}).content.decode()
    assert 'hx-trigger="every 2s"' in waiting
    assert "Waiting for a worker" in waiting
    shown = bob_client.get(split.get_absolute_url(), headers={"HX-Request": "true"})
    assert "HX-Refresh" not in shown.headers
    freeze(split.pk)
    assert bob_client.get(split.get_absolute_url(), headers={"HX-Request": "true"}).headers["HX-Refresh"] == "true"
    with django_assert_max_num_queries(8):
        listed = bob_client.get(page).content.decode()
    assert "By topic" in listed
    assert "hx-trigger" not in listed[listed.index('id="_splits"') :].split(">")[0]
    again = bob_client.post(page, {**posted, "name": "Another"})
    assert again.status_code == 422
    assert "These very settings have made the split “By topic”." in again.content.decode()


@pytest.mark.parametrize(
    ("posted", "words"),
    [({"test": "1.5"}, "A share lies between 0 and 1"), ({"test": ""}, "Say how many rows are to be scored"),
     ({"method": "count", "test": "2.5"}, "whole"), ({"method": "column"}, "Choose the column that names the part"),
     ({"test": "many"}, "Give a number"),
     ({"method": "column", "part_column": "split", "train_values": "a, b", "test_values": "b"}, "stands for two parts"),
     ({"group_column": "elsewhere"}, "Select a valid choice")],
)  # fmt: skip
def test_what_makes_no_sense_is_said_beside_its_field(
    upload: Upload, bob_client: Client, posted: dict[str, str], words: str
) -> None:
    version = upload(jsonl(rows()))
    fields = {"method": "share", "validation": "0.1", "test": "0.2", "keep_together": "near", "seed": "17"}
    answer = bob_client.post(f"{version.get_absolute_url()}splits/", fields | posted)
    assert (answer.status_code, words in answer.content.decode()) == (422, True)
    assert not DatasetSplit.objects.exists()


def test_a_splits_page_shows_its_parts_and_what_they_can_say(
    upload: Upload, bob: User, bob_client: Client, django_assert_max_num_queries: Any
) -> None:
    planted = rows(200)
    planted += [{**planted[3], "completion": planted[3]["completion"].replace("That is", "This is")}]
    version = upload(jsonl(planted))
    split = frozen(version, bob, name="By topic", stratify_column="topic", test=0.2, validation=0)
    with django_assert_max_num_queries(8):
        page = bob_client.get(split.get_absolute_url()).content.decode()
    assert "Too small to say anything: from 104 rows on a share is known to ten points." in page
    low, high = split.report["parts"]["test"]["low"], split.report["parts"]["test"]["high"]
    assert f"anything from {100 * low:.1f} % to {100 * high:.1f} %" in re.sub(r"<[^>]+>", "", page)
    assert "topic 2" in page
    assert f'href="{version.get_absolute_url()}rows/201/"' in page
    assert "1 is near another" in " ".join(page.split())
    assert split.sha256[:12] in page
    large = frozen(version, bob, name="Large", test=0.6, validation=0)
    assert "Too small" not in bob_client.get(large.get_absolute_url()).content.decode()


def test_each_part_can_be_downloaded_and_so_can_the_split_itself(upload: Upload, bob: User, bob_client: Client) -> None:
    planted = rows()
    for row in planted:
        row["completion"] = f"=1+1 {row['completion']}"
    version = upload(jsonl(planted))
    split = frozen(version, bob, name="Mine", test=0.2)
    found = FrozenSplit.read(split.path())
    address = split.get_absolute_url()
    answer = bob_client.get(f"{address}test.jsonl")
    lines = [json.loads(line) for line in body(answer).splitlines()]
    assert [one["messages"][-1]["content"] for one in lines] == [planted[line - 1]["completion"] for line in found.test]
    assert 'filename="rows-v1-Mine-test.jsonl"' in answer.headers["Content-Disposition"]
    table = list(csv.reader(io.StringIO(body(bob_client.get(f"{address}train.csv")).decode())))
    assert [int(row[0]) for row in table[1:]] == list(found.train)
    assert not [cell for row in table for cell in row if cell[:1] in "=+-@" and cell]
    assert body(bob_client.get(f"{address}split.jsonl")) == split.path().read_bytes()
    for wrong in ("other.jsonl", "test.txt"):
        assert bob_client.get(address + wrong).status_code == 404
    files = AuditEvent.objects.filter(action="dataset.split_downloaded").values_list("details__file", flat=True)
    assert sorted(files) == ["split.jsonl", "test.jsonl", "train.csv"]


def test_formulas_in_a_table_of_texts_are_harmless(upload: Upload, bob: User, bob_client: Client) -> None:
    version = upload(jsonl([{"text": f"=1+{n} {row['prompt']}"} for n, row in enumerate(clean_rows(40))]))
    split = frozen(version, bob, test=0.2)
    table = list(csv.DictReader(io.StringIO(body(bob_client.get(f"{split.get_absolute_url()}test.csv")).decode())))
    assert {row["text"][:2] for row in table} == {"'="}


def test_one_split_of_a_version_is_its_default(upload: Upload, bob: User, bob_client: Client) -> None:
    version = upload(jsonl(rows()))
    first, second = frozen(version, bob, test=0.2), frozen(version, bob, test=0.3)
    for split in (first, second):
        bob_client.post(f"{split.get_absolute_url()}default/")
        assert [one.pk for one in version.splits.filter(is_default=True)] == [split.pk]
    with pytest.raises(IntegrityError), transaction.atomic():
        DatasetSplit.objects.filter(pk=first.pk).update(is_default=True)
    assert "Make it no default" in bob_client.get(second.get_absolute_url()).content.decode()
    bob_client.post(f"{second.get_absolute_url()}default/", {"off": "1"})
    assert not version.splits.filter(is_default=True).exists()
    assert AuditEvent.objects.filter(action="dataset.split_default").count() == 3


def test_a_split_is_deleted_with_its_file_unless_something_was_made_with_it(
    upload: Upload, team: Team, bob: User, bob_client: Client, django_capture_on_commit_callbacks: Any
) -> None:
    version = upload(jsonl(rows()))
    used, unused = frozen(version, bob, name="Used", test=0.2), frozen(version, bob, name="Unused", test=0.3)
    dataset = {"name": "rows", "sha256": version.sha256, "format": version.format, "split": used.reference()}
    adapter = make_adapter(
        team, bob, dataset_version=version, base_model=make_base_model(), name="mine", dataset=dataset
    )
    make_job_for(adapter)
    with pytest.raises(SplitRefusedError, match="2 jobs and adapters were made with “Used”"):
        delete_split(used, user=bob)
    page = bob_client.get(used.get_absolute_url()).content.decode()
    assert "mine" in page
    assert f"{used.get_absolute_url()}delete/" not in page
    bob_client.post(f"{used.get_absolute_url()}delete/")
    with django_capture_on_commit_callbacks(execute=True):
        bob_client.post(f"{unused.get_absolute_url()}delete/")
    assert [one.name for one in version.splits.all()] == ["Used"]
    assert used.path().is_file()
    assert not blob_path(unused.sha256).exists()


def test_splits_go_with_their_dataset_and_with_other_columns(
    upload: Upload, alice: User, django_capture_on_commit_callbacks: Any
) -> None:
    version = upload(jsonl([{"alpha": row["prompt"], "beta": row["completion"]} for row in clean_rows(40)]))
    remap(version, {"prompt": "alpha", "completion": "beta"})
    inspecting.inspect(version.pk)
    version.refresh_from_db()
    split = frozen(version, alice, test=0.2)
    with django_capture_on_commit_callbacks(execute=True):
        remap(version, {"prompt": "beta", "completion": "alpha"})
        inspecting.inspect(version.pk)
    version.refresh_from_db()
    assert not version.splits.exists()
    assert not blob_path(split.sha256).exists()
    split = frozen(version, alice, test=0.2)
    with django_capture_on_commit_callbacks(execute=True):
        delete_dataset(version.dataset, user=alice)
    assert not DatasetSplit.objects.exists()
    assert not blob_path(split.sha256).exists()


def test_the_api_does_what_the_pages_do(upload: Upload, team: Team, bob: User) -> None:
    version = upload(jsonl(rows()))
    client = api(team, bob, "read", "write")
    address = f"/api/v1/datasets/{version.dataset_id}/versions/1/splits/"
    assert client.get(address).json() == []
    asked = {"name": "Mine", "method": "column", "part_column": "split"}
    made = client.post(address, asked, content_type="application/json")
    assert (made.status_code, made.json()["state"]) == (202, "waiting")
    one = f"{address}{made.json()['id']}/"
    assert client.get(f"{one}file/").status_code == 409
    freeze(made.json()["id"])
    shown = client.get(one).json()
    assert (shown["state"], shown["num_train"], shown["num_test"], shown["num_validation"]) == ("done", 48, 12, 0)
    assert shown["part_values"] == {"train": ["train"], "test": ["test"]}
    assert shown["parts"]["test"]["is_too_small"]
    assert shown["strata"] == [
        {"value": "train", "train": 48, "validation": 0, "test": 0, "left_out": 0},
        {"value": "test", "train": 0, "validation": 0, "test": 12, "left_out": 0},
    ]
    assert [row["name"] for row in client.get(address).json()] == ["Mine"]
    assert client.post(address, asked, content_type="application/json").status_code == 409
    assert body(client.get(f"{one}parts/test/")).count(b"\n") == 12
    assert body(client.get(f"{one}parts/test/?kind=csv")).count(b"\r\n") == 13
    assert body(client.get(f"{one}file/")) == DatasetSplit.objects.get().path().read_bytes()
    assert client.post(f"{one}default/").json()["is_default"]
    assert not client.delete(f"{one}default/").json()["is_default"]
    wrong = client.post(address, {"method": "count", "test": 2.5}, content_type="application/json")
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "test")
    assert client.post(address, {"method": "count"}, content_type="application/json").status_code == 422
    assert client.delete(one).status_code == 204
    assert client.get(one).status_code == 404


def test_another_team_sees_nothing_and_a_viewer_changes_nothing(
    upload: Upload, team: Team, bob: User, other_team: Team, charlie: User, bob_client: Client, charlie_client: Client
) -> None:
    version = upload(jsonl(rows()))
    split = frozen(version, bob, test=0.2)
    base, one = f"{version.get_absolute_url()}splits/", split.get_absolute_url()
    for page in (base, one, f"{one}test.jsonl", f"{one}train.csv", f"{one}split.jsonl"):
        assert charlie_client.get(page).status_code == 404
        assert Client().get(page).status_code == 302
    for page in (base, f"{one}default/", f"{one}delete/"):
        assert charlie_client.post(page, {"method": "share"}).status_code == 404
    address = f"/api/v1/datasets/{version.dataset_id}/versions/1/splits/"
    stranger = api(other_team, charlie, "read", "write")
    for page in (address, f"{address}{split.pk}/", f"{address}{split.pk}/file/", f"{address}{split.pk}/parts/test/"):
        assert stranger.get(page).status_code == 404
    assert stranger.post(address, {}, content_type="application/json").status_code == 404
    for call in (stranger.post, stranger.delete):
        assert call(f"{address}{split.pk}/default/").status_code == 404
    assert stranger.delete(f"{address}{split.pk}/").status_code == 404
    Membership.objects.filter(user=bob).update(role=Role.VIEWER)
    for page in (base, f"{one}default/", f"{one}delete/"):
        assert bob_client.post(page, {"method": "share"}).status_code == 403
    assert bob_client.get(one).status_code == 200
    listed = bob_client.get(base).content.decode()
    assert "Make the split" not in listed
    reader = api(team, bob, "read")
    assert reader.get(address).status_code == 200
    assert reader.post(address, {}, content_type="application/json").status_code == 403
    assert reader.delete(f"{address}{split.pk}/").status_code == 403
    split.refresh_from_db()
    assert (split.state, split.is_default) == (SplitState.DONE, False)

"""The first screen of an adapter's page names its fault, and so does the API."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import reverse

from studio.accounts.models import AuditEvent, Team, User
from studio.catalogue.file_checks import check_oldest
from studio.catalogue.findings import Level, Thresholds, findings_of
from studio.catalogue.models import Adapter
from studio.storage import adapter_folder
from tests.factories import make_adapter, make_result, make_score
from workers.results import OverlapRecord, SuspiciousRecord

pytestmark = pytest.mark.usefixtures("data_dir")


def general(rise: float) -> Any:
    return (make_score(2.0 * rise, width=0.02, base_value=2.0, label="Loss on general text", num_rows=144),)


def overlap(num_exact: int, num_near: int) -> OverlapRecord:
    return OverlapRecord(
        num_held_out_rows=100, num_exact=num_exact, num_near=num_near, pairs=((3, 9, 1.0), (4, 12, 0.9))
    )


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (make_result(general=general(0.01), overlap=overlap(0, 0)), None),
        (make_result([make_score(-0.01, width=0.05)]), "No better than its base"),
        (make_result([make_score(0.5)]), "Worse than its base"),
        (make_result(general=general(0.4)), "Forgets: its loss on general text rose by 40 %"),
        (make_result(overlap=overlap(12, 8)), "Trained on its test rows: 20 of 100"),
    ],
)
def test_the_page_names_the_fault(
    result: Any, words: str | None, team: Team, alice: User, alice_client: Client
) -> None:
    adapter = make_adapter(team, alice, result=result)
    bad = [finding.title for finding in findings_of(adapter) if finding.level == Level.BAD]
    assert bad == ([words] if words else [])
    page = alice_client.get(adapter.get_absolute_url()).content.decode()
    top = page.split('id="findings"', 1)[1].split("</section>", 1)[0]
    assert ("alert-error" in top) == (words is not None)
    assert words is None or f"<strong>{words}</strong>" in top


def test_a_damaged_file_is_named_after_a_check(team: Team, alice: User, alice_client: Client) -> None:
    adapter = make_adapter(team, alice)
    check = reverse("catalogue:check_files", args=[adapter.pk])
    assert alice_client.post(check).status_code == 302
    assert "Files whole" in alice_client.get(adapter.get_absolute_url()).content.decode()
    (adapter_folder(adapter.folder) / "adapter_config.json").write_text("{}")
    alice_client.post(check)
    assert (
        "<strong>Damaged: adapter_config.json</strong>" in alice_client.get(adapter.get_absolute_url()).content.decode()
    )
    assert AuditEvent.objects.filter(action="adapter.files_checked").count() == 2


def test_a_damage_that_a_download_meets_is_kept(team: Team, alice: User, alice_client: Client) -> None:
    adapter = make_adapter(team, alice)
    (adapter_folder(adapter.folder) / "adapter_config.json").unlink()
    assert alice_client.get(reverse("catalogue:download", args=[adapter.pk])).status_code == 500
    assert findings_of(Adapter.objects.get(pk=adapter.pk))[0].title == "Damaged: adapter_config.json"


def test_old_files_are_looked_at_by_themselves(team: Team, alice: User) -> None:
    adapter = make_adapter(team, alice)
    assert check_oldest() == 0
    Adapter.objects.update(created_at="2020-01-01T00:00:00Z")
    assert check_oldest() == 1
    assert Adapter.objects.get(pk=adapter.pk).file_check.damage == ""
    assert check_oldest() == 0


def test_another_team_can_check_nothing(team: Team, alice: User, charlie_client: Client) -> None:
    adapter = make_adapter(team, alice)
    assert charlie_client.post(reverse("catalogue:check_files", args=[adapter.pk])).status_code == 404


def test_thresholds_are_the_policys(team: Team, alice: User) -> None:
    adapter = make_adapter(team, alice, result=make_result(general=general(0.4), overlap=overlap(2, 0)))
    assert [one.code for one in findings_of(adapter) if one.level == Level.BAD] == ["overlap", "forgets"]
    lenient = Thresholds(allowed_rise=0.5, overlap_share=0.05)
    assert [one.level for one in findings_of(adapter, lenient) if one.code == "overlap"] == [Level.WARNING]
    assert not [one for one in findings_of(adapter, lenient) if one.level == Level.BAD]


@pytest.mark.parametrize(("num", "level"), [(17, Level.OK), (22, Level.WARNING)])
def test_a_few_odd_rows_of_many_are_no_warning(num: int, level: Level, team: Team, alice: User) -> None:
    rows = tuple(
        SuspiciousRecord(line=line, reason="Its loss stayed high.", score=2.1, loss=3.0) for line in range(num)
    )
    adapter = make_adapter(team, alice, result=make_result(suspicious=rows))
    assert adapter.provenance["num_train_rows"] == 400
    assert [one.level for one in findings_of(adapter) if one.code == "suspicious_rows"] == [level]


def test_odd_rows_beyond_those_listed_count(team: Team, alice: User) -> None:
    result = make_result(suspicious=(SuspiciousRecord(line=3, reason="Its loss stayed high.", score=2.1, loss=3.0),))
    counted = result.provenance.model_copy(update={"num_train_rows": 5000, "num_suspicious_rows": 400})
    adapter = make_adapter(team, alice, result=result.model_copy(update={"provenance": counted}))
    found = next(one for one in findings_of(adapter) if one.code == "suspicious_rows")
    assert (found.level, found.title) == (Level.WARNING, "400 training rows that may be wrong")


def test_suspicious_rows_link_to_the_dataset(team: Team, alice: User, alice_client: Client) -> None:
    row = SuspiciousRecord(line=7, reason="Others say otherwise.", score=4.2, loss=0.1, base_loss=2.0, other_lines=(3,))
    adapter = make_adapter(team, alice, result=make_result(suspicious=(row,)))
    version = adapter.dataset_version
    url = reverse("datasets:row", args=[version.dataset_id, version.number, 7])
    assert f'href="{url}"' in alice_client.get(adapter.get_absolute_url()).content.decode()
    shown = alice_client.get(url)
    assert "What does the" in shown.content.decode()
    gone = reverse("datasets:row", args=[version.dataset_id, version.number, 10_000])
    assert "holds no usable row" in alice_client.get(gone).content.decode()

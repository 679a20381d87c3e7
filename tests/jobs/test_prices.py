"""What jobs cost: the price that held when an attempt began, all attempts counted, nothing shown without a price."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from django.db.models import F
from django.test import Client
from django.utils import timezone

from jobs import lifecycle, usage
from jobs.models import Job, JobAttempt, TeamQuota, UsageHour
from jobs.prices import Period, calendar_periods, costs_of_jobs, costs_of_team, price_of
from studio.accounts.models import ApiToken, AuditEvent, Role, Team, User
from tests.conftest import make_member, signed_in
from tests.factories import make_adapter, make_job_for
from tests.jobs.making import make_job, make_running_job, make_worker

EUR = "\N{NO-BREAK SPACE}EUR"
VALUES = {"share": "1", "window_days": "7", "price_per_gpu_hour": "2.5", "currency": "EUR", "device_prices": ""}


def set_price(team: Team, price: str | None, **values: object) -> TeamQuota:
    defaults = {"price_per_gpu_hour": price, "currency": "EUR", "device_prices": [], **values}
    return TeamQuota.objects.update_or_create(team=team, defaults=defaults)[0]


def run_for(job: Job, hours: float, outcome: str = "failed") -> Job:
    """The job's running attempt as one that has ended now, and had begun exactly so long before."""
    attempt = JobAttempt.objects.filter(job=job, number=job.attempt)
    # One that has yet to begin is charged for nothing when it ends: how long that takes here is nobody's.
    attempt.update(started_at=timezone.now() + timedelta(days=1))
    if outcome == "failed":
        lifecycle.retry_later(job.pk, job.attempt, code="crashed", message="It crashed.", counted=True)
    else:
        lifecycle.hand_back(job.pk, job.attempt, reason="Handed back.")
    attempt.update(started_at=F("ended_at") - timedelta(hours=hours))
    usage.charge(job.pk, job.attempt)
    Job.objects.filter(pk=job.pk).update(not_before=timezone.now())
    job.refresh_from_db()
    return job


def claim_again(job: Job) -> Job:
    claimed = lifecycle.claim(job, job.attempts.get(number=job.attempt).worker or make_worker(9))
    assert claimed is not None
    return claimed


def test_a_job_costs_what_all_its_attempts_held_devices_for_at_the_price_of_their_beginning(
    team: Team, bob: User, bob_client: Client
) -> None:
    set_price(team, "2.00")
    job = run_for(make_running_job(team, bob), 3)
    set_price(team, "10.00")
    job = run_for(claim_again(job), 1, "stopped")
    set_price(team, "99.00")
    cost = costs_of_jobs([job])[job.pk]
    assert cost.gpu_hours == pytest.approx(4)
    [(currency, amount)] = cost.amounts
    assert (currency, float(amount)) == ("EUR", pytest.approx(3 * 2 + 10))
    page = bob_client.get(job.get_absolute_url()).text
    assert f"<strong>{cost.words}</strong> for 4.00 GPU-hours so far: all 2 attempts" in page


def test_a_job_on_two_gpus_costs_twice_as_much(team: Team, bob: User) -> None:
    set_price(team, "2.00")
    job = make_running_job(team, bob)
    Job.objects.filter(pk=job.pk).update(needs={"gpus": 2, "memory_bytes": 0})
    job = run_for(job, 1)
    [(_currency, amount)] = costs_of_jobs([job])[job.pk].amounts
    assert float(amount) == pytest.approx(4)


def test_without_a_price_no_cost_is_shown_and_no_zero(team: Team, bob: User, bob_client: Client) -> None:
    job = run_for(make_running_job(team, bob), 2)
    assert costs_of_jobs([job])[job.pk].words == ""
    page = bob_client.get(job.get_absolute_url()).text
    assert "2.00 GPU-hours so far" in page
    assert "<strong></strong>" not in page
    assert "Cost" not in bob_client.get("/jobs/").text
    assert "Used</h2>" in bob_client.get("/jobs/limits/").text


def test_hours_before_there_was_a_price_are_said_and_in_no_sum(team: Team, bob: User, bob_client: Client) -> None:
    job = run_for(make_running_job(team, bob), 2)
    set_price(team, "3.00")
    job = run_for(claim_again(job), 1)
    cost = costs_of_jobs([job])[job.pk]
    assert (cost.is_partial, cost.unpriced_hours) == (True, pytest.approx(2))
    page = bob_client.get(job.get_absolute_url()).text
    assert f"3.00{EUR}" in page
    assert "2.00 GPU-hours of them ran before your team had set a price" in page
    assert "2.00 GPU-hours had no price yet" in bob_client.get("/jobs/limits/").text
    _token, secret = ApiToken.issue(team=team, user=bob, name="costs", scopes=["read"])
    shown = Client().get("/api/v1/limits/", headers={"Authorization": f"Bearer {secret}"}).json()
    assert (shown["gpu_hours"], shown["unpriced_gpu_hours"]) == (pytest.approx(3), pytest.approx(2))


def test_a_changed_currency_leaves_what_was_paid_as_it_was(team: Team, bob: User) -> None:
    set_price(team, "2.00")
    job = run_for(make_running_job(team, bob), 1)
    set_price(team, "3.00", currency="USD")
    job = run_for(claim_again(job), 1)
    assert costs_of_jobs([job])[job.pk].words == f"2.00{EUR} + 3.00\N{NO-BREAK SPACE}USD"
    [window] = costs_of_team(team, [Period("", timezone.now() - timedelta(days=1))])
    assert window.words == f"2.00{EUR} + 3.00\N{NO-BREAK SPACE}USD"


def test_the_longest_name_that_stands_in_a_devices_name_has_its_price(team: Team) -> None:
    quota = set_price(team, "1", device_prices=[["h100", "2.5"], ["H100 NVL", "3"], ["CPU", "0.05"]])
    found = {
        device: price.amount
        for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "CPU, 2 cores", "NVIDIA L4")
        if (price := price_of(quota, device)) is not None
    }
    assert [str(amount) for amount in found.values()] == ["2.5", "3", "0.05", "1"]
    quota.price_per_gpu_hour = None
    assert price_of(quota, "NVIDIA L4") is None


def test_the_weeks_and_months_of_the_calendar_are_summed(team: Team, bob: User) -> None:
    now = datetime.fromisoformat("2026-03-04T12:30:00+00:00")  # a Wednesday
    week, month, before = calendar_periods(now)
    assert (week.since.isoformat(), month.since.isoformat()) == (
        "2026-03-02T00:00:00+00:00", "2026-03-01T00:00:00+00:00",
    )  # fmt: skip
    assert (before.since.isoformat(), before.until, before.label) == (
        "2026-02-01T00:00:00+00:00", month.since, "February",
    )  # fmt: skip
    for day, hours in ((1, 4), (27, 1), (2, 2)):
        at = now.replace(month=2 if day == 27 else 3, day=day, hour=5, minute=0)
        UsageHour.objects.create(
            team=team, hour=at, currency="EUR", device_seconds=3600 * hours, priced_seconds=3600 * hours, cost=hours
        )
    costs = costs_of_team(team, [week, month, before])
    assert [cost.gpu_hours for cost in costs] == [2, 6, 1]
    assert [cost.words for cost in costs] == [f"2.00{EUR}", f"6.00{EUR}", f"1.00{EUR}"]


def test_a_run_that_goes_on_counts_in_this_week_only_with_its_hours_of_this_week(
    team: Team, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_price(team, "1.00")
    job = make_running_job(team, bob)
    now = timezone.now()
    monkeypatch.setattr(timezone, "now", lambda: now)
    JobAttempt.objects.filter(job=job).update(started_at=now - timedelta(hours=10))
    last_hour, all_of_it = costs_of_team(
        team, [Period("", now - timedelta(hours=1)), Period("", now - timedelta(days=1))]
    )
    assert last_hour.gpu_hours == pytest.approx(1)
    assert all_of_it.gpu_hours == pytest.approx(10)
    assert all_of_it.words == f"10.00{EUR}"


def test_a_finished_job_shows_its_cost_on_its_page_in_the_list_and_in_the_lineage_of_its_adapter(
    team: Team, bob: User, bob_client: Client, data_dir: object
) -> None:
    adapter = make_adapter(team, bob)
    now = timezone.now()
    job = make_job_for(adapter, attempt=2, started_at=now - timedelta(hours=3), finished_at=now)
    for number, hours, outcome in ((1, 2, "failed"), (2, 1, "succeeded")):
        JobAttempt.objects.create(
            job=job, number=number, started_at=now - timedelta(hours=hours), ended_at=now, outcome=outcome,
            price_per_gpu_hour=Decimal("2.5"), currency="EUR",
        )  # fmt: skip
    assert f"Done in 3 h 0 min for 7.50{EUR}." in bob_client.get(job.get_absolute_url()).text
    assert f"7.50{EUR}" in bob_client.get("/jobs/").text
    lineage = bob_client.get(adapter.get_absolute_url()).text
    assert f"7.50{EUR} for 3.00 GPU-hours, all 2 attempts together" in lineage
    compared = bob_client.get("/jobs/diff/", {"a": job.pk, "b": make_job(team, bob).pk}).text
    assert f"7.50{EUR}" in compared


def test_the_job_in_the_api_says_its_gpu_hours_and_costs(client: Client, team: Team, bob: User, charlie: User) -> None:
    set_price(team, "2.00")
    job = run_for(make_running_job(team, bob), 1)
    _token, secret = ApiToken.issue(team=team, user=bob, name="costs", scopes=["read"])
    url = f"/api/v1/jobs/{job.pk}/"
    shown = client.get(url, headers={"Authorization": f"Bearer {secret}"}).json()
    assert shown["gpu_hours"] == pytest.approx(1)
    assert shown["costs"] == [{"currency": "EUR", "amount": pytest.approx(2)}]
    assert signed_in(charlie).get(job.get_absolute_url()).status_code == 404


def test_a_lead_sets_prices_on_the_page_and_a_viewer_reads_them(team: Team) -> None:
    lead = signed_in(make_member("lena", team, Role.LEAD))
    viewer = signed_in(make_member("vera", team, Role.VIEWER))
    assert "not set" in viewer.get("/jobs/limits/").text
    answer = lead.post("/jobs/limits/", VALUES | {"device_prices": "H100: 3.10\n\nCPU: 0.05\n"})
    assert answer.status_code == 302
    quota = TeamQuota.objects.get(team=team)
    assert (quota.currency, quota.device_prices) == ("EUR", [["H100", "3.1"], ["CPU", "0.05"]])
    details = AuditEvent.objects.get(action="limits.changed").details
    assert details["device_prices"] == [[], [["H100", "3.1"], ["CPU", "0.05"]]]
    page = lead.get("/jobs/limits/").text
    assert "H100: 3.1\nCPU: 0.05" in page
    assert 'name="price_per_gpu_hour" value="2.5"' in page
    page = viewer.get("/jobs/limits/").text
    assert f"3.10{EUR} an hour" in page
    assert f"2.50{EUR} an hour" in page
    assert viewer.post("/jobs/limits/", VALUES).status_code == 403


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H100 3", "has no colon"),
        ("H100: 2,50", "Write the price with a point"),
        ("H100: -1", "between 0 and 100,000"),
        ("H100: NaN", "between 0 and 100,000"),
        ("H100: 1.00001", "more than 4 decimal places"),
        ("H100: 1\nh100: 2", "has two prices"),
        (": 2", "1 to 60 characters"),
        ("\n".join(f"card {number}: 1" for number in range(21)), "20 is the most"),
    ],
)
def test_a_bad_price_is_named_beside_its_field_and_nothing_is_stored(
    alice_client: Client, text: str, message: str
) -> None:
    answer = alice_client.post("/jobs/limits/", VALUES | {"device_prices": text})
    assert answer.status_code == 422
    assert message in answer.text
    assert 'id="id_device_prices_error"' in answer.text
    assert not TeamQuota.objects.exists()


def test_the_api_sets_the_same_prices_with_the_same_checks(client: Client, team: Team, alice: User) -> None:
    _token, secret = ApiToken.issue(team=team, user=alice, name="costs", scopes=["read", "write"])
    headers = {"Authorization": f"Bearer {secret}"}

    def put(prices: list[dict[str, object]]) -> tuple[int, dict[str, object]]:
        body = {"currency": "EUR", "price_per_gpu_hour": 2.5, "device_prices": prices}
        answer = client.put("/api/v1/limits/", body, content_type="application/json", headers=headers)
        return answer.status_code, answer.json()

    prices: list[dict[str, object]] = [{"device": "H100", "price_per_gpu_hour": 3.1}]
    status, shown = put(prices)
    assert (status, shown["device_prices"], shown["currency"]) == (200, prices, "EUR")
    assert shown["calendar"][0]["label"] == "This week"  # type: ignore[index]
    status, refused = put(prices + prices)
    assert (status, refused["error"]["field"]) == (422, "device_prices")  # type: ignore[index]

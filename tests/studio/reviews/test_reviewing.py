"""A review from its submission to its end, and people who act at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.test import Client

from studio.accounts.models import AuditEvent, Team, User
from studio.catalogue.file_checks import check_now
from studio.catalogue.models import Adapter, AdapterState, Alias, AliasMove
from studio.reviews import checking, reviewing
from studio.reviews.models import Review, ReviewState
from studio.reviews.policies import PolicySettings, change_policy, current_policy, default_settings
from studio.reviews.reviewing import NotAllowedError, ReviewError
from studio.storage import adapter_folder
from tests.conftest import signed_in
from tests.studio.reviews.conftest import actor, add_run, submitted


def actions(review: Review) -> list[str]:
    found = AuditEvent.objects.filter(object_type="review", object_id=str(review.pk)).order_by("pk")
    return list(found.values_list("action", flat=True))


def champion(team: Team, name: str = "support") -> Adapter | None:
    alias = Alias.objects.filter(team=team, adapter_name=name, name="champion").first()
    return alias.adapter if alias else None


def at_once(*acts: Callable[[], object]) -> list[object]:
    """What each gives or raises when all begin at the same moment, each with a connection of its own."""
    results: list[object] = [None] * len(acts)
    barrier = threading.Barrier(len(acts))

    def run(index: int, act: Callable[[], object]) -> None:
        barrier.wait(60)
        try:
            results[index] = act()
        except Exception as error:  # noqa: BLE001  handed to the test
            results[index] = error
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(index, act)) for index, act in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_an_approval_moves_the_alias_and_is_written_down(adapter: Adapter, team: Team, lena: User) -> None:
    review = submitted(adapter)
    adapter.refresh_from_db()
    assert adapter.state == AdapterState.IN_REVIEW
    reviewing.approve(review.pk, actor(lena), comment="Good.")
    review.refresh_from_db()
    adapter.refresh_from_db()
    assert (review.state, review.decided_by, adapter.state) == (ReviewState.APPROVED, lena, AdapterState.APPROVED)
    assert champion(team) == adapter
    assert {one["state"] for one in review.decided_gates} == {"passed"}
    assert actions(review) == ["review.submitted", "review.gates_checked", "review.approval_given", "review.approved"]
    assert AuditEvent.objects.filter(action="alias.moved", object_id=str(adapter.pk)).count() == 1


def test_the_policy_says_how_many_must_approve_and_a_running_review_keeps_its_own(
    team: Team, adapter: Adapter, make_good: Any, lena: User, ludwig: User, alice: User
) -> None:
    change_policy(team, PolicySettings(2, default_settings().gates), by=alice)
    review = submitted(adapter)
    change_policy(team, PolicySettings(3, default_settings().gates), by=alice)
    reviewing.approve(review.pk, actor(lena))
    review.refresh_from_db()
    assert review.state == ReviewState.OPEN
    with pytest.raises(ReviewError, match="somebody else"):
        reviewing.approve(review.pk, actor(lena))
    reviewing.approve(review.pk, actor(ludwig))
    review.refresh_from_db()
    assert (review.state, review.policy.version) == (ReviewState.APPROVED, 2)
    assert submitted(make_good()).policy.version == 3


def test_nothing_is_approved_before_the_gates_are_checked_or_while_one_does_not_pass(
    make_good: Any, lena: User
) -> None:
    review = submitted(make_good(overlap=None), check=False)
    with pytest.raises(ReviewError, match="being checked"):
        reviewing.approve(review.pk, actor(lena))
    checking.check(review.pk)
    with pytest.raises(ReviewError, match=r"1 gate did not pass \(Test rows were not trained on\)"):
        reviewing.approve(review.pk, actor(lena))
    with pytest.raises(ReviewError, match="no hindrance"):
        reviewing.waive(review.pk, actor(lena), gate="download", reason="So.")
    with pytest.raises(ReviewError, match="Say why"):
        reviewing.waive(review.pk, actor(lena), gate="overlap", reason="  ")
    reviewing.waive(review.pk, actor(lena), gate="overlap", reason="Checked by hand.")
    reviewing.approve(review.pk, actor(lena))
    review.refresh_from_db()
    assert review.state == ReviewState.APPROVED
    assert [one["waived"] for one in review.decided_gates if one["gate"] == "overlap"] == [True]
    event = AuditEvent.objects.get(action="review.gate_waived")
    assert (event.user, event.details["reason"]) == (lena, "Checked by hand.")


def test_a_waiver_holds_for_what_was_found_then_and_not_for_something_else(make_good: Any, lena: User) -> None:
    adapter = make_good(overlap=None)
    review = submitted(adapter)
    reviewing.waive(review.pk, actor(lena), gate="overlap", reason="Checked by hand.")
    reviewing.ask_gates(review.pk, actor(lena))
    checking.check(review.pk)
    assert review.outcomes.get(gate="overlap").is_waived()
    Adapter.objects.filter(pk=adapter.pk).update(
        overlap={"num_held_out_rows": 10, "num_exact": 5, "num_near": 0, "pairs": []}
    )
    reviewing.ask_gates(review.pk, actor(lena))
    checking.check(review.pk)
    outcome = review.outcomes.get(gate="overlap")
    assert (outcome.state, outcome.is_waived()) == ("failed", False)


def test_a_rejection_needs_a_reason_and_the_author_reads_it(adapter: Adapter, lena: User, bob_client: Client) -> None:
    review = submitted(adapter)
    page = signed_in(lena).post(f"/reviews/{review.pk}/reject/", {"reason": " "})
    assert page.status_code == 422
    assert "Say why it is rejected." in page.text
    signed_in(lena).post(f"/reviews/{review.pk}/reject/", {"reason": "It <b>invents</b> prices."})
    adapter.refresh_from_db()
    assert adapter.state == AdapterState.REJECTED
    assert "It &lt;b&gt;invents&lt;/b&gt; prices." in bob_client.get(f"/reviews/{review.pk}/").text


def test_after_changes_were_asked_for_it_can_be_submitted_again_without_its_approvals(
    team: Team, adapter: Adapter, lena: User, ludwig: User, alice: User
) -> None:
    change_policy(team, PolicySettings(2, default_settings().gates), by=alice)
    first = submitted(adapter)
    reviewing.approve(first.pk, actor(lena))
    reviewing.ask_changes(first.pk, actor(ludwig), reason="Describe it.")
    adapter.refresh_from_db()
    assert adapter.state == AdapterState.DRAFT
    second = submitted(adapter)
    assert second.reviewers.count() == 0
    reviewing.approve(second.pk, actor(lena))
    second.refresh_from_db()
    assert second.state == ReviewState.OPEN


def test_a_new_version_supersedes_the_older_ones_reviews_and_takes_no_approval_along(
    team: Team, make_good: Any, lena: User, alice: User
) -> None:
    change_policy(team, PolicySettings(2, default_settings().gates), by=alice)
    one, two, other = make_good(), make_good(), make_good("legal")
    first, apart = submitted(one), submitted(other)
    reviewing.approve(first.pk, actor(lena))
    second = submitted(two)
    for review in (first, second, apart):
        review.refresh_from_db()
    one.refresh_from_db()
    assert (first.state, second.state, apart.state) == (ReviewState.SUPERSEDED, ReviewState.OPEN, ReviewState.OPEN)
    assert (one.state, second.reviewers.count()) == (AdapterState.DRAFT, 0)
    assert "review.superseded" in actions(first)
    with pytest.raises(ReviewError, match="superseded"):
        reviewing.approve(first.pk, actor(alice))
    with pytest.raises(ReviewError, match="A newer version, support v2, is in review"):
        submitted(one)


def test_nobody_reviews_their_own_work_whatever_their_role(make_good: Any, lena: User) -> None:
    review = submitted(make_good(by=lena))
    for act in (reviewing.approve, lambda pk, who: reviewing.reject(pk, who, reason="No.")):
        with pytest.raises(NotAllowedError, match="nobody reviews their own work"):
            act(review.pk, actor(lena))


def test_one_click_rolls_the_alias_back_version_by_version(team: Team, make_good: Any, lena: User) -> None:
    # Without rows to compare, nothing could follow a version in use.
    gates = {name: one for name, one in default_settings().gates.items() if name != "beats_champion"}
    change_policy(team, PolicySettings(1, gates), by=lena)
    reviews = []
    for _ in range(3):
        reviews.append(submitted(make_good()))
        reviewing.approve(reviews[-1].pk, actor(lena))
    versions = []
    for review in (reviews[2], reviews[1]):
        signed_in(lena).post(f"/reviews/{review.pk}/roll-back/")
        versions.append(champion(team).version)  # type: ignore[union-attr]
    assert versions == [2, 1]
    with pytest.raises(ReviewError, match="no version"):
        reviewing.roll_back(reviews[0].pk, actor(lena))
    with pytest.raises(ReviewError, match="does not point"):
        reviewing.roll_back(reviews[2].pk, actor(lena))
    assert AliasMove.objects.filter(team=team).count() == 5
    assert "review.rolled_back" in actions(reviews[2])


def test_an_adapter_that_is_evaluated_again_after_its_approval_shows_what_changed(
    adapter: Adapter, lena: User, bob_client: Client
) -> None:
    review = submitted(adapter)
    reviewing.approve(review.pk, actor(lena))
    add_run(adapter, num_scored=90)
    review.refresh_from_db()
    assert review.gates_are_due()
    checking.check(review.pk)
    page = " ".join(bob_client.get(f"/reviews/{review.pk}/").text.split())
    assert "Incomplete: 90 of 100 held-out rows were scored." in page
    assert "Passed at the approval" in page


def test_a_check_that_was_lost_is_asked_for_again_and_one_that_comes_twice_changes_nothing(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[int] = []
    monkeypatch.setattr(checking, "queue_check", queued.append)
    review = submitted(adapter, check=False)
    assert checking.check_waiting() == 0, "a message that may still arrive is not doubled"
    Review.objects.update(gates_queued_at=review.gates_queued_at - checking.LOST_AFTER * 2)
    assert checking.check_waiting() == 1
    assert queued == [review.pk]
    checking.check(review.pk)
    checked = review.outcomes.first().checked_at  # type: ignore[union-attr]
    checking.check(review.pk)
    assert review.outcomes.first().checked_at == checked  # type: ignore[union-attr]
    assert checking.check_waiting() == 0


def flip_a_bit(adapter: Adapter) -> None:
    """Another flip brings the file back."""
    weights = adapter_folder(adapter.folder) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def test_damage_after_the_training_is_named_by_file(adapter: Adapter, lena: User) -> None:
    flip_a_bit(adapter)
    outcome = submitted(adapter).outcomes.get(gate="download")
    assert outcome.state == "failed"
    assert '"adapter_model.safetensors" of this adapter has changed' in outcome.sentence


def test_damage_that_a_gate_finds_is_on_the_first_screen_of_the_adapter(adapter: Adapter, bob_client: Client) -> None:
    flip_a_bit(adapter)
    submitted(adapter)
    assert "<strong>Damaged: adapter_model.safetensors</strong>" in bob_client.get(adapter.get_absolute_url()).text


def test_a_look_at_the_files_that_says_otherwise_has_the_gates_checked_again(adapter: Adapter, bob: User) -> None:
    review = submitted(adapter)
    for state in ("passed", "failed", "passed"):
        check_now(Adapter.objects.get(pk=adapter.pk), user=bob)
        review.refresh_from_db()
        assert not review.gates_are_due(), "the gate says what the look at the files has found"
        assert review.outcomes.get(gate="download").state == state
        flip_a_bit(adapter)
        check_now(Adapter.objects.get(pk=adapter.pk), user=bob)
        review.refresh_from_db()
        assert review.gates_are_due()
        checking.check(review.pk)


def test_a_download_gate_that_fails_otherwise_is_not_checked_for_ever(
    make_good: Callable[..., Adapter],
) -> None:
    adapter = make_good()
    adapter.provenance["verified"] = False
    adapter.save(update_fields=["provenance"])
    review = submitted(adapter)
    assert review.outcomes.get(gate="download").state == "failed"
    assert not review.gates_are_due()


@pytest.mark.django_db(transaction=True)
class TestAtTheSameMoment:
    """Threads with connections of their own, on a real PostgreSQL."""

    def test_of_two_approvals_where_one_is_enough_one_decides(
        self, adapter: Adapter, lena: User, ludwig: User, team: Team
    ) -> None:
        review = submitted(adapter)
        results = at_once(*(lambda who=who: reviewing.approve(review.pk, actor(who)) for who in (lena, ludwig)))
        assert sorted(type(one).__name__ for one in results) == ["Review", "ReviewError"]
        assert "it is approved" in next(str(one) for one in results if isinstance(one, ReviewError))
        assert AliasMove.objects.filter(team=team).count() == 1
        assert actions(review).count("review.approved") == 1

    def test_of_two_approvals_where_both_are_needed_the_second_decides(
        self, adapter: Adapter, lena: User, ludwig: User, alice: User, team: Team
    ) -> None:
        change_policy(team, PolicySettings(2, default_settings().gates), by=alice)
        review = submitted(adapter)
        results = at_once(*(lambda who=who: reviewing.approve(review.pk, actor(who)) for who in (lena, ludwig)))
        assert [type(one) for one in results] == [Review, Review]
        review.refresh_from_db()
        assert review.state == ReviewState.APPROVED
        assert actions(review).count("review.approved") == 1

    def test_a_withdrawal_and_an_approval_never_both_happen(
        self, make_good: Any, lena: User, bob: User, team: Team
    ) -> None:
        for number in range(5):
            adapter = make_good(f"support {number}")
            review = submitted(adapter)
            results = at_once(
                lambda pk=review.pk: reviewing.approve(pk, actor(lena)),
                lambda pk=review.pk: reviewing.withdraw(pk, actor(bob)),
            )
            assert sum(isinstance(one, ReviewError) for one in results) == 1
            review.refresh_from_db()
            adapter.refresh_from_db()
            pairs = {
                ReviewState.APPROVED: (AdapterState.APPROVED, adapter.pk),
                ReviewState.WITHDRAWN: (AdapterState.DRAFT, None),
            }
            pointed = champion(team, adapter.name)
            is_champion = adapter.pk if pointed == adapter else None
            assert pairs[ReviewState(review.state)] == (adapter.state, is_champion)

    def test_an_adapter_that_is_submitted_twice_has_one_open_review(self, adapter: Adapter, bob: User) -> None:
        results = at_once(*[lambda: reviewing.submit(adapter, actor(bob))] * 2)
        assert sum(isinstance(one, ReviewError) for one in results) == 1
        assert Review.objects.filter(adapter=adapter).count() == 1

    def test_of_two_changes_of_the_policy_each_makes_a_version(self, team: Team, alice: User, lena: User) -> None:
        gates = default_settings().gates
        results = at_once(
            lambda: change_policy(team, PolicySettings(2, gates), by=alice).version,
            lambda: change_policy(team, PolicySettings(3, gates), by=lena).version,
        )
        assert sorted(results) == [2, 3]  # type: ignore[type-var]
        assert current_policy(team).version == 3

    def test_a_worker_checks_the_gates_of_what_a_page_submitted(
        self, adapter: Adapter, bob_client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[tuple[str, tuple[int, ...]]] = []
        monkeypatch.setattr(
            "studio.reviews.checking.current_app.send_task", lambda name, args, **_: sent.append((name, args))
        )
        assert bob_client.post(f"/reviews/submit/{adapter.pk}/", {"alias": "champion"}).status_code == 302
        review = Review.objects.get(adapter=adapter)
        assert sent == [("studio.reviews.tasks.check_gates", (review.pk,))]
        from jobs.celery import app

        app.loader.import_default_modules()
        app.tasks["studio.reviews.tasks.check_gates"](review.pk)
        assert {one.state for one in review.outcomes.all()} == {"passed"}

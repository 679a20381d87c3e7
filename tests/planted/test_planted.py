"""Is this adapter any good? Ten whose truth is known are made in the browser, and its pages have to tell it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings

from studio.accounts.models import Role, Team, User
from tests.conftest import make_member
from tests.end_to_end.browsing import require_chromium
from tests.end_to_end.site import running_site
from tests.planted.plants import plants
from tests.planted.running import WARM, register_base, run_set
from tests.planted.telling import table, wrongs

browser_test = [pytest.mark.browser, pytest.mark.django_db(transaction=True), pytest.mark.timeout(1800)]


@pytest.fixture
def site(transactional_db: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A running studio whose one base knows general text; its GPU worker keeps the base between jobs."""
    require_chromium()
    # Playwright keeps an event loop running in this thread, which is not one that Django's queries could block.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
    register_base(Path(settings.DATA_DIR) / "base_models" / "taught")
    with running_site(tmp_path, worker=WARM) as root:
        yield root


@pytest.mark.parametrize(
    "number",
    [pytest.param(1, marks=browser_test), pytest.param(2, marks=[*browser_test, pytest.mark.slow])],
)
def test_the_first_screen_and_the_gates_name_the_fault_that_was_planted_and_no_other(
    number: int, site: str, team: Team, bob: User, tmp_path: Path
) -> None:
    lead = make_member("lena", team, Role.LEAD)
    made = run_set(number, site, tmp_path / "planted", trainer=bob, lead=lead)
    print(table(made))
    assert [sentence for one in made for sentence in wrongs(one)] == []


def test_the_two_sets_share_neither_rows_nor_seeds() -> None:
    first, second = plants(1), plants(2)
    assert [one.kind for one in first] == [one.kind for one in second]
    for one, other in zip(first, second, strict=True):
        shared = {row["instruction"] for row in one.rows} & {row["instruction"] for row in other.rows}
        assert not shared, one.kind
        assert one.fields["training.seed"] != other.fields["training.seed"], one.kind

"""Catalogue pages, for a teammate and for an outsider."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from studio.accounts.models import AuditEvent, Role, Team, User
from studio.catalogue.models import Adapter, BaseModel
from tests.conftest import make_member, signed_in
from tests.factories import (
    make_adapter,
    make_base_model,
    make_dataset_version,
    make_job_for,
    make_result,
    make_sample,
    make_score,
)
from tests.tiny import make_tiny_base
from workers.verdicts import Verdict

pytestmark = pytest.mark.usefixtures("data_dir")
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7|add:7 }}'


@pytest.fixture
def adapter(team: Team, alice: User) -> Adapter:
    return make_adapter(team, alice)


def urls_of(adapter: Adapter) -> list[str]:
    return [
        reverse("catalogue:adapter", args=[adapter.pk]),
        reverse("catalogue:download", args=[adapter.pk]),
    ]


def test_a_teammate_reaches_every_page_of_an_adapter(adapter: Adapter, bob_client: Client) -> None:
    for url in urls_of(adapter):
        assert bob_client.get(url).status_code == 200, url


def test_it_hides_an_adapter_from_another_team(adapter: Adapter, charlie_client: Client) -> None:
    for url in urls_of(adapter):
        assert charlie_client.get(url).status_code == 404, url
    listed = charlie_client.get(reverse("catalogue:adapters"))
    assert listed.status_code == 200
    assert "support" not in listed.content.decode().lower().split("<main", 1)[1]
    # A base model is the studio's, the adapters on it are not.
    assert "support" not in charlie_client.get(adapter.base_model.get_absolute_url()).content.decode()


def test_it_sends_a_stranger_to_the_login_page(adapter: Adapter) -> None:
    names = ("adapters", "base_models", "register_base_model")
    for url in [*urls_of(adapter), *(reverse(f"catalogue:{name}") for name in names)]:
        response = Client().get(url)
        assert response.status_code == 302, url
        assert response["Location"].startswith(reverse("accounts:login")), url


def test_the_list_puts_the_best_first_and_the_unscored_last(team: Team, alice: User, alice_client: Client) -> None:
    for name, difference in (("middling", -0.2), ("winner", -0.9), ("loser", 0.4)):
        make_adapter(team, alice, name=name, result=make_result([make_score(difference)]))
    make_adapter(team, alice, name="unscored", result=make_result([]))
    page = alice_client.get(reverse("catalogue:adapters")).content.decode()
    places = [page.index(f">{name}</a>") for name in ("winner", "middling", "loser", "unscored")]
    assert places == sorted(places)
    assert "not measured" in page


def test_the_list_sorts_by_a_metric_of_which_more_is_better(team: Team, alice: User, alice_client: Client) -> None:
    for name, difference in (("low", 0.1), ("high", 0.5)):
        make_adapter(
            team, alice, name=name, result=make_result([make_score(), make_score(difference, evaluation="token_f1")])
        )
    page = alice_client.get(reverse("catalogue:adapters"), {"sort": "token_f1"}).content.decode()
    assert page.index(">high</a>") < page.index(">low</a>")
    assert "+0.500" in page


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"difference": -0.6}, "better"),
        ({"difference": 0.6}, "worse"),
        ({"difference": -0.05}, "no difference"),
        ({"difference": -0.05, "rows_needed": 100}, "no difference"),
        ({"difference": -0.05, "rows_needed": 101}, "too few rows to tell"),
        ({"difference": -0.6, "p_value": 0.4}, "no difference"),
    ],
)
def test_a_verdict_is_a_word_that_follows_from_interval_test_and_rows(
    changes: dict[str, Any], word: str, team: Team, alice: User, alice_client: Client
) -> None:
    make_adapter(team, alice, result=make_result([make_score(**changes)]))
    page = alice_client.get(reverse("catalogue:adapters")).content.decode()
    assert {one.value for one in Verdict if f">{one.value}</span>" in page} == {word}


def test_too_few_rows_are_told_with_the_number_that_would_do(team: Team, alice: User, alice_client: Client) -> None:
    score = make_score(-0.05, rows_needed=700, rows_recommended=1900, smallest_effect=0.02, p_value=0.31)
    adapter = make_adapter(team, alice, result=make_result([score]))
    page = " ".join(alice_client.get(adapter.get_absolute_url()).content.decode().split())
    assert "Too few rows to tell whether it is better than its base." in page
    assert "p = 0.310" in page
    assert "About 1,900 rows would show a difference of 0.0200." in page


def test_the_list_filters_by_base_method_and_dataset(team: Team, alice: User, alice_client: Client) -> None:
    other_base = make_base_model("Other", family="qwen2")
    other_data = make_dataset_version(team, alice, name="Plants")
    make_adapter(team, alice, name="first")
    second = make_adapter(
        team, alice, name="second", base_model=other_base, dataset_version=other_data, method="prefix_tuning",
        settings={},
    )  # fmt: skip
    queries = {
        "base": str(other_base.pk),
        "dataset": str(other_data.dataset_id),
        "method": "prefix_tuning",
    }
    for key, value in queries.items():
        page = alice_client.get(reverse("catalogue:adapters"), {key: value}).content.decode()
        assert f"adapter-row-{second.pk}" in page, key
        assert page.count("adapter-row-") == 1, key
    nothing = alice_client.get(reverse("catalogue:adapters"), {"method": "dora"}).content.decode()
    assert "No adapter matches" in nothing


@pytest.mark.parametrize("query", ["page=0", "page=-1", "page=x", "page=99999999999", "base=x", "sort=;drop", "base=²"])
def test_a_nonsense_query_is_no_error(query: str, adapter: Adapter, alice_client: Client) -> None:
    assert alice_client.get(f"{reverse('catalogue:adapters')}?{query}").status_code == 200


def test_the_list_comes_in_pages_that_keep_the_filters(
    team: Team, alice: User, alice_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.catalogue.listing.PAGE_SIZE", 2)
    version = make_dataset_version(team, alice)
    for number in range(5):
        make_adapter(team, alice, name=f"a{number}", dataset_version=version)
    seen: list[str] = []
    url = f"{reverse('catalogue:adapters')}?sort=name"
    while url:
        page = alice_client.get(url)
        seen += [one.name for one in page.context["page"].adapters]
        following = page.context["next_url"]
        assert not following or "sort=name" in following
        url = reverse("catalogue:adapters") + following if following else ""
    assert seen == ["a0", "a1", "a2", "a3", "a4"]


def test_an_empty_catalogue_says_what_will_be_here(alice_client: Client) -> None:
    page = alice_client.get(reverse("catalogue:adapters")).content.decode()
    assert "No adapters yet" in page
    assert "<table" not in page


def test_the_list_takes_at_most_eight_queries_whatever_its_length(
    team: Team, alice: User, alice_client: Client
) -> None:
    version = make_dataset_version(team, alice)
    for number in range(12):
        make_adapter(team, alice, name=f"adapter {number}", dataset_version=version)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert alice_client.get(reverse("catalogue:adapters")).status_code == 200
    assert len(queries) <= 8, [query["sql"][:120] for query in queries]


def test_the_adapter_page_takes_at_most_eight_queries(adapter: Adapter, alice_client: Client) -> None:
    make_job_for(adapter)
    with CaptureQueriesContext(connection) as queries:
        assert alice_client.get(adapter.get_absolute_url()).status_code == 200
    assert len(queries) <= 8, [query["sql"][:120] for query in queries]


def test_the_adapter_page_begins_with_the_verdict(adapter: Adapter, alice_client: Client) -> None:
    page = " ".join(alice_client.get(adapter.get_absolute_url()).content.decode().split())
    verdict = page.index("Better than its base on the one measure; worse on none.")
    assert "Held-out loss 1.92 → <strong>1.32</strong>: better" in page
    for part in ("\u22120.600,", "95 % \u22120.700 to \u22120.500,", "n = 100"):
        assert part in page[verdict : page.index('id="scores"')]
    assert verdict < page.index('id="scores"')


def test_the_page_of_a_whole_model_says_nothing_of_an_adapter(team: Team, alice: User, alice_client: Client) -> None:
    result = make_result()
    provenance = result.provenance.model_copy(update={"verified": True, "max_logit_difference": 0.0})
    model = make_adapter(
        team, alice, name="Whole", method="full", settings={},
        result=result.model_copy(update={"provenance": provenance}), files={"model.safetensors": b"x" * 3_000_000},
    )  # fmt: skip
    page = alice_client.get(model.get_absolute_url()).content.decode()
    content = " ".join(page[page.index('id="adapter-summary"') :].split())
    assert "Full fine-tuning of <a" in content
    assert "a whole model in float32, which needs no base beside it" in content
    assert "loaded again in plain transformers and gave the same logits" in content
    assert "This model" in content
    assert "vllm serve ./whole" in content
    assert "Download zip (2.9" in page
    for words in ("This adapter", "adapter on", "PeftModel", "plain peft"):
        at = content.find(words)
        assert at < 0, content[max(0, at - 80) : at + 80]


def test_the_adapter_page_says_when_training_stopped_early(team: Team, alice: User, alice_client: Client) -> None:
    stopped = make_adapter(team, alice, result=make_result(stopped_at_step=30))
    assert "Stopped early at step 30" in alice_client.get(stopped.get_absolute_url()).content.decode()


def test_hostile_names_samples_and_cards_are_shown_as_text(team: Team, alice: User, alice_client: Client) -> None:
    hostile = make_adapter(
        team,
        alice,
        name=HOSTILE[:120],
        dataset_version=make_dataset_version(team, alice, name=HOSTILE[:120]),
        result=make_result(
            samples=[make_sample(prompt=HOSTILE, reference=HOSTILE, base_answer=HOSTILE, adapter_answer=HOSTILE)]
        ),
        card=f"# {HOSTILE}\n\n[x](javascript:alert(1)) ![y](https://evil.example/pixel.png)\n",
    )
    for url in (hostile.get_absolute_url(), reverse("catalogue:adapters"), hostile.base_model.get_absolute_url()):
        page = alice_client.get(url).content.decode()
        assert "<script>alert" not in page
        assert "<img" not in page
        assert 'href="javascript' not in page
        assert "&lt;script&gt;alert" in page or url == hostile.base_model.get_absolute_url()


def test_the_recipe_marks_what_was_changed_and_what_the_studio_chose(
    team: Team, alice: User, alice_client: Client
) -> None:
    adapter = make_adapter(team, alice, training={"learning_rate": 2e-4, "batch_size": 4})
    asked = json.loads(json.dumps(adapter.recipe))
    asked["training"]["learning_rate"] = "auto"
    make_job_for(adapter, asked_recipe=asked)
    sections = {
        row.label: row
        for section in alice_client.get(adapter.get_absolute_url()).context["sections"]
        for row in section.rows
    }
    assert sections["Learning rate"].was_auto
    assert not sections["Learning rate"].is_changed
    assert sections["Batch size"].is_changed
    assert not sections["Epochs"].is_changed


def test_the_base_model_page_shows_how_a_conversation_is_read(adapter: Adapter, alice_client: Client) -> None:
    page = alice_client.get(adapter.base_model.get_absolute_url()).content.decode()
    assert "What is the capital of France?" in page
    assert "Madrid.&lt;|im_end|&gt;</mark>" in page


def test_only_an_admin_registers_base_models(team: Team, bob_client: Client, alice_client: Client) -> None:
    url = reverse("catalogue:register_base_model")
    lead = signed_in(make_member("lena", team, Role.LEAD))
    assert bob_client.get(url).status_code == 403
    assert lead.post(url, {"folder": "x", "name": "x"}).status_code == 403
    assert alice_client.get(url).status_code == 200
    assert url not in bob_client.get(reverse("catalogue:base_models")).content.decode()


def test_an_admin_registers_a_base_model_from_a_folder(data_dir: Path, alice_client: Client) -> None:
    make_tiny_base(data_dir / "base_models" / "mine")
    response = alice_client.post(
        reverse("catalogue:register_base_model"), {"folder": "mine", "name": "Mine"}, follow=True
    )
    assert "Mine is registered" in response.content.decode()
    base = BaseModel.objects.get()
    assert (base.name, base.folder) == ("Mine", str(data_dir / "base_models" / "mine"))
    assert AuditEvent.objects.get(action="base_model.registered").object_name == "Mine"


def break_with_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def break_with_code(folder: Path) -> None:
    (folder / "modeling_mine.py").write_text("raise SystemExit\n")


def break_with_config_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))


def break_with_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_with_pickle, "pytorch_model.bin"),
        (break_with_code, "modeling_mine.py"),
        (break_with_config_key, "auto_map"),
        (break_with_architecture, "bert"),
    ],
)
def test_an_unsafe_folder_is_refused_in_place_and_nothing_is_registered(
    damage: object, named: str, data_dir: Path, alice_client: Client
) -> None:
    folder = make_tiny_base(data_dir / "base_models" / "bad")
    damage(folder)  # type: ignore[operator]
    response = alice_client.post(reverse("catalogue:register_base_model"), {"folder": "bad", "name": "Bad"})
    assert response.status_code == 422
    page = response.content.decode()
    assert named.lower() in page.lower()
    assert 'id="id_folder_error"' in page
    assert 'value="Bad"' in page
    assert not BaseModel.objects.exists()


@pytest.mark.parametrize("folder", ["/etc", "../../etc", "link", "", ".", "none\x00"])
def test_a_folder_outside_the_roots_is_refused(folder: str, data_dir: Path, alice_client: Client) -> None:
    outside = make_tiny_base(data_dir / "elsewhere")
    (data_dir / "base_models").mkdir()
    (data_dir / "base_models" / "link").symlink_to(outside)
    response = alice_client.post(reverse("catalogue:register_base_model"), {"folder": folder, "name": "X"})
    assert response.status_code == 422
    assert not BaseModel.objects.exists()


def test_the_same_files_register_once(data_dir: Path, alice_client: Client) -> None:
    make_tiny_base(data_dir / "base_models" / "one")
    url = reverse("catalogue:register_base_model")
    alice_client.post(url, {"folder": "one", "name": "One"})
    again = alice_client.post(url, {"folder": "one", "name": "Two"}, follow=True)
    assert "registered already, as One" in again.content.decode()
    assert BaseModel.objects.count() == 1
    assert AuditEvent.objects.filter(action="base_model.registered").count() == 1


@pytest.mark.parametrize("value", ["%00", "nothing-like-it", "%C2%B2", "9" * 5000])
def test_a_filter_that_nothing_offers_asks_for_nothing(alice_client: Client, adapter: Adapter, value: str) -> None:
    answer = alice_client.get(f"/models/?method={value}&base={value}&dataset={value}&page={value}&sort={value}")
    assert answer.status_code == 200
    assert f"adapter-row-{adapter.pk}" in answer.content.decode()

"""A row as a base model learns it, on the page and over the API; and what a hostile template cannot do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

from studio.accounts.models import ApiToken, Membership, Role, Team, User
from studio.catalogue.models import BaseModel
from studio.datasets.learning import PreviewChild, PreviewError
from studio.datasets.models import DatasetVersion
from studio.datasets.row_tables import prepare
from tests.studio.datasets.conftest import Upload, good_rows, jsonl
from tests.tiny import CHAT_TEMPLATE, make_tiny_base
from workers.examples import Example, Message
from workers.rendering import Renderer


def make_base(folder: Path, name: str = "tiny", template: str = "") -> BaseModel:
    make_tiny_base(folder / name)
    if template:
        (folder / name / "chat_template.jinja").write_text(template)
    base: BaseModel = BaseModel.objects.create(name=name, folder=str(folder / name), revision=name)
    return base


@pytest.fixture
def base(db: None, tmp_path: Path) -> BaseModel:
    return make_base(tmp_path)


@pytest.fixture
def child() -> Iterator[PreviewChild]:
    child = PreviewChild(seconds=1.5)
    yield child
    child.close()


def page(version: DatasetVersion, query: str = "") -> str:
    return f"{version.get_absolute_url()}learned/{query}"


def api_of(version: DatasetVersion, query: str) -> str:
    return f"/api/v1/datasets/{version.dataset_id}/versions/{version.number}/learned/{query}"


def caller(team: Team, user: User) -> Client:
    secret = ApiToken.issue(team=team, user=user, name="t", scopes=["read"])[1]
    return Client(headers={"authorization": f"Bearer {secret}"})


def ids_on(shown: str) -> list[int]:
    return [int(one) for one in re.findall(r'<span title="(\d+)"', shown)]


def test_the_page_shows_the_ids_labels_and_counts_of_training(
    upload: Upload, bob_client: Client, base: BaseModel, django_assert_max_num_queries: Any
) -> None:
    version = upload(jsonl(good_rows()))
    with django_assert_max_num_queries(8):
        answer = bob_client.get(page(version, f"?base={base.pk}&line=3&length=512&loss_on=assistant"))
    assert answer.status_code == 200
    shown = unescape(answer.content.decode())
    row = good_rows()[2]
    example = Example(3, (Message("user", row["prompt"]), Message("assistant", row["completion"])))
    expected = Renderer(Path(base.folder), max_length=512, loss_on="assistant").render(example)
    assert ids_on(shown) == expected.ids
    assert str(expected.ids) in shown
    labels = [token if is_trained else -100 for token, is_trained in zip(expected.ids, expected.trained, strict=True)]
    assert str(labels) in shown
    assert f"Trained</dt><dd><strong>{expected.num_trained}<" in shown
    assert "so the model learns to stop" in shown
    assert f"?base={base.pk}&length=512&loss_on=assistant&line=2" in shown
    assert "&line=4" in shown


def test_prepared_rows_are_learned_as_those_of_the_file_are(
    upload: Upload, bob_client: Client, team: Team, bob: User, base: BaseModel, django_assert_max_num_queries: Any
) -> None:
    version = upload(jsonl([{"prompt": "no answer"}, *good_rows(), {"prompt": "no answer"}]))
    client = caller(team, bob)
    queries = [f"?base_model_id={base.pk}&line={line}" for line in (1, 2, 7, 13, 14, 5000)]
    of_the_file = [client.get(api_of(version, query)).json() for query in queries]
    assert [found["line"] for found in of_the_file] == [2, 2, 7, 13, None, None]
    prepare(version.pk)
    assert [client.get(api_of(version, query)).json() for query in queries] == of_the_file
    with django_assert_max_num_queries(8):
        assert "<strong>Line 2</strong>" in bob_client.get(page(version)).content.decode()


def test_it_opens_with_the_first_row_of_the_first_base_model_and_the_recipes_settings(
    upload: Upload, bob_client: Client, base: BaseModel
) -> None:
    version = upload(jsonl([{"prompt": "no answer"}, *good_rows()]))
    shown = bob_client.get(page(version)).content.decode()
    assert "<strong>Line 2</strong>" in shown
    assert "Line 1 holds no usable row; this is the next one." in shown
    assert 'value="1024"' in shown
    past = bob_client.get(page(version, "?line=5000")).content.decode()
    assert "No usable row stands at line 5,000 or behind it" in past


def test_kinds_are_told_apart_for_those_who_see_no_colour_or_nothing(
    upload: Upload, bob_client: Client, base: BaseModel
) -> None:
    version = upload(jsonl([{"prompt": "What?", "completion": "It is a very long answer to a short question."}] * 12))
    shown = bob_client.get(page(version, "?length=20")).content.decode()
    for kind, spoken in (("trained", "trained"), ("context", "context"), ("cut", "cut off")):
        assert f'class="is-{kind}"><span class="sr-only"> [{spoken}:] </span>' in shown
    css = Path("static/css/studio.css").read_text()
    assert re.search(r"\.is-trained[^}]*underline", css)
    assert re.search(r"\.is-cut[^}]*line-through", css)
    assert "lies behind token 20, where the row is cut" in shown
    assert "would be trained" in shown


def test_a_base_whose_turns_never_end_is_warned_of(upload: Upload, bob_client: Client, tmp_path: Path) -> None:
    endless = make_base(tmp_path, "endless", CHAT_TEMPLATE.replace("<|im_end|>", ""))
    version = upload(jsonl(good_rows()))
    shown = unescape(bob_client.get(page(version, f"?base={endless.pk}")).content.decode())
    assert "does not end in an end-of-turn token (this base stops at <|im_end|>)" in shown
    assert "so the model learns to stop" not in shown


def test_rows_that_no_objective_learns_from_are_shown_as_far_as_they_render(
    upload: Upload, bob_client: Client, base: BaseModel
) -> None:
    pairs = upload(jsonl([{"prompt": f"ask {n}", "chosen": "good", "rejected": "bad"} for n in range(12)]))
    shown = bob_client.get(page(pairs)).content.decode()
    assert "no objective that learns from them is installed yet" in shown
    assert "Chosen</h2>" in shown
    assert "Rejected</h2>" in shown
    words = upload(b"".join(b'{"text": "passage %d of the book"}\n' % n for n in range(12)), "text.jsonl")
    assert words.example_type() == "text"
    shown = bob_client.get(page(words)).content.decode()
    assert "no chat template frames it" in shown


def test_hostile_rows_and_settings_stay_text_and_sentences(upload: Upload, bob_client: Client, base: BaseModel) -> None:
    version = upload(jsonl([{"prompt": "<script>x</script>\u202e", "completion": "<img src=x>"}, *good_rows()]))
    shown = bob_client.get(page(version)).content.decode()
    assert "<script>x" not in shown
    assert "<img" not in shown
    assert "RIGHT-TO-LEFT OVERRIDE" in shown
    for query in ("?length=3", "?line=0", "?loss_on=nothing", "?base=999", "?line=x", "?length=9999999999999"):
        answer = bob_client.get(page(version, query))
        assert answer.status_code == 422, query
        assert 'id="error-summary"' in answer.content.decode()
    assert "Give a whole number from 16 to 1,048,576." in bob_client.get(page(version, "?length=3")).content.decode()


def test_a_viewer_sees_it_and_another_team_does_not(
    upload: Upload, base: BaseModel, bob_client: Client, charlie_client: Client, team: Team, bob: User,
    other_team: Team, charlie: User,
) -> None:  # fmt: skip
    version = upload(jsonl(good_rows()))
    Membership.objects.filter(user=bob).update(role=Role.VIEWER)
    query = f"?base_model_id={base.pk}"
    assert bob_client.get(page(version)).status_code == 200
    assert charlie_client.get(page(version)).status_code == 404
    assert caller(team, bob).get(api_of(version, query)).status_code == 200
    assert caller(other_team, charlie).get(api_of(version, query)).status_code == 404
    assert Client().get(api_of(version, query)).status_code == 401


def test_the_api_gives_the_same_tokens_as_the_page(
    upload: Upload, base: BaseModel, bob_client: Client, team: Team, bob: User
) -> None:
    version = upload(jsonl(good_rows()))
    api = caller(team, bob)
    found = api.get(api_of(version, f"?base_model_id={base.pk}&line=2&max_length=32&loss_on=all")).json()
    (conversation,) = found["conversations"]
    shown = bob_client.get(page(version, f"?base={base.pk}&line=2&length=32&loss_on=all")).content.decode()
    assert ids_on(shown) == [one["id"] for one in conversation["tokens"]]
    assert (found["previous"], found["line"], found["next"], found["template"]) == (1, 2, 3, "own")
    assert conversation["tokens"][0]["kind"] == "context", "nothing predicts the first token"
    assert conversation["num_trained"] == conversation["num_tokens"] - conversation["num_cut"] - 1
    few = api.get(api_of(version, f"?base_model_id={base.pk}&max_tokens=3")).json()["conversations"][0]
    assert len(few["tokens"]) == 3 < few["num_tokens"]
    assert api.get(api_of(version, "?base_model_id=99999")).status_code == 404
    assert api.get(api_of(version, f"?base_model_id={base.pk}&max_length=1")).json()["error"]["field"] == "max_length"
    DatasetVersion.objects.update(state="unreadable")
    assert api.get(api_of(version, f"?base_model_id={base.pk}")).status_code == 409


def test_a_base_model_whose_folder_is_gone_is_explained(
    upload: Upload, bob_client: Client, team: Team, bob: User, tmp_path: Path
) -> None:
    gone = BaseModel.objects.create(name="gone", folder=str(tmp_path / "gone"), revision="gone")
    version = upload(jsonl(good_rows()))
    assert "tokenizer.json" in bob_client.get(page(version)).content.decode()
    answer = caller(team, bob).get(api_of(version, f"?base_model_id={gone.pk}"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_renderable")


SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{{ 'x' * 9000000000 }}"
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


def request(folder: Path, rows: Path, **more: Any) -> dict[str, Any]:
    return {
        "path": str(rows), "format": "prompt_completion",
        "columns": {"prompt": "prompt", "completion": "completion"}, "line": 1, "folder": str(folder),
        "revision": folder.name, "max_length": 512, "loss_on": "assistant", "max_tokens": 100, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("template", "sentence"),
    [(SPIN, "not rendered within 1.5 seconds"), (HUGE, "more memory than a page may use"), (ESCAPE, "unsafe")],
)
def test_a_hostile_template_is_stopped_and_the_next_question_is_answered(
    tmp_path: Path, child: PreviewChild, template: str, sentence: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(jsonl(good_rows()))
    good, bad = make_tiny_base(tmp_path / "good"), make_tiny_base(tmp_path / "bad")
    patient = PreviewChild(seconds=120)  # for what is not to end by the clock
    (bad / "chat_template.jinja").write_text(
        "{% if messages | length > 1 %}" + template + "{% endif %}" + CHAT_TEMPLATE
    )
    with pytest.raises(PreviewError, match=sentence):
        (child if template == SPIN else patient).ask(request(bad, rows))
    assert patient.ask(request(good, rows))["line"] == 1
    patient.close()


def test_a_process_that_dies_over_a_question_is_asked_once_more_afresh(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(jsonl(good_rows()))
    base = make_tiny_base(tmp_path / "base")
    child = PreviewChild(seconds=30)
    child.ask(request(base, rows))
    process = child._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.write(b"no request\n")  # what it dies of, before it comes to the question
    assert child.ask(request(base, rows, line=2))["line"] == 2
    assert child._process is not process
    child.close()


def test_the_process_is_kept_and_comes_back_after_it_was_killed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(jsonl(good_rows()))
    base = make_tiny_base(tmp_path / "base")
    child = PreviewChild(seconds=30)
    child.ask(request(base, rows))
    process = child._process
    assert process is not None
    assert child.ask(request(base, rows, line=2))["line"] == 2
    assert child._process is process
    os.kill(process.pid, 9)
    process.wait()
    assert child.ask(request(base, rows))["line"] == 1
    assert child._process is not process
    child.close()

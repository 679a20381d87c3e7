"""The shell around every page: navigation, theme, components, and nothing that the content policy forbids."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from django import forms
from django.conf import settings
from django.template import Context, Template
from django.test import RequestFactory

from studio.accounts.models import Membership, Role, Team, User
from studio.templatetags import components

TEMPLATES = sorted(Path(settings.ROOT, "templates").rglob("*.html"))


def render(source: str, **context: object) -> str:
    return Template("{% load components %}" + source).render(Context(context))


class ForbiddenByPolicy(HTMLParser):
    """Collects what `default-src 'self'` forbids: inline scripts, styles and handlers, foreign hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag == "style" or (tag == "script" and not names.get("src")):
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            if name == "style" or name.startswith(("on", "hx-on")):
                self.found.append(f"{tag} {name}")
            if name in {"src", "href", "action"} and re.match(r"(https?:)?//", value or "") and tag != "a":
                self.found.append(f"{tag} {name}={value}")
            if (value or "").startswith(("js:", "javascript:")):
                self.found.append(f"{tag} {name}={value}")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_has_nothing_that_the_content_policy_forbids(path: Path) -> None:
    # Tags inside attributes would confuse the parser; what they print is attribute text or a word.
    source = re.sub(r"{#.*?#}|{%.*?%}", "x", path.read_text(), flags=re.S)
    parser = ForbiddenByPolicy()
    parser.feed(source)
    assert parser.found == []


def test_the_policy_check_itself_finds_what_is_forbidden() -> None:
    parser = ForbiddenByPolicy()
    parser.feed('<p style="x" onclick="y"><script>1</script><img src="//host/x"><a href="https://fine.example">')
    assert parser.found == ["p style", "p onclick", "<script>", "img src=//host/x"]


@pytest.fixture
def page(team: Team, alice: User) -> str:
    second = Team.objects.create(name="<b>Research</b>", slug="research")
    Membership.objects.create(user=alice, team=second, role=Role.VIEWER)
    request = RequestFactory().get("/models/")
    request.user = alice
    request.team = team  # type: ignore[attr-defined]
    request.membership = alice.memberships.get(team=team)  # type: ignore[attr-defined]
    request.memberships = list(alice.memberships.select_related("team"))  # type: ignore[attr-defined]
    template = Template("{% extends 'base.html' %}{% block heading %}Models{% endblock %}")
    from django.template import RequestContext

    return template.render(RequestContext(request))


def test_the_shell_links_to_every_main_page_and_marks_the_current_one(page: str) -> None:
    assert re.findall(r'<a class="nav-link" href="([^"]+)" aria-current="page">', page) == ["/models/"] * 2
    for label in ("Home", "Datasets", "Jobs", "Models", "Base models", "Members", "API tokens", "Audit", "Account"):
        assert re.search(rf'<a class="nav-link" href="/[^"]*"[^>]*>{label}</a>', page), label


def test_the_shell_logs_out_and_switches_teams_by_post_with_a_csrf_token(page: str) -> None:
    forms_by_action = dict(re.findall(r'<form method="post" action="([^"]+)">(.*?)</form>', page, flags=re.S))
    assert len(forms_by_action) == 2
    assert all("csrfmiddlewaretoken" in body for body in forms_by_action.values())


def test_the_shell_shows_a_hostile_team_name_as_text(page: str) -> None:
    assert "&lt;b&gt;Research&lt;/b&gt;" in page
    assert "<b>Research</b>" not in page


def test_the_shell_hands_the_csrf_token_to_htmx_and_lets_people_skip_to_the_content(page: str) -> None:
    assert re.search(r"hx-headers:inherited='\{\"X-CSRFToken\": \"\w{64}\"\}'", page)
    assert page.index('href="#main"') < page.index("<header")
    assert 'role="status"' in page


class SampleForm(forms.Form):
    name = forms.CharField(help_text="As people call it.")
    rank = forms.IntegerField(min_value=1)
    kind = forms.ChoiceField(choices=[("a", "First"), ("b", "Second")])
    agree = forms.BooleanField(required=False)


def test_a_field_ties_its_help_and_error_to_the_control() -> None:
    form = SampleForm({"name": "", "rank": "0", "kind": "a"})
    shown = render("{% field form.name %}{% field form.rank unit='dimensions' %}", form=form)
    assert 'aria-describedby="id_name_error id_name_help"' in shown
    assert 'id="id_name_error">This field is required.' in shown
    assert 'aria-invalid="true"' in shown
    assert "input-error" in shown
    assert "dimensions" in shown


def test_a_field_from_a_dict_escapes_its_value() -> None:
    shown = render(
        "{% field f %}", f={"name": "settings.rank", "label": "Rank", "value": '"><script>', "errors": "No."}
    )
    assert '<input type="text" id="id_settings_rank" name="settings.rank"' in shown
    assert "<script>" not in shown
    assert 'id="id_settings_rank_error">No.' in shown


def test_a_select_from_a_dict_marks_the_chosen_option() -> None:
    shown = render(
        "{% field f %}", f={"name": "m", "type": "select", "value": 2, "choices": [(1, "One"), (2, "<Two>")]}
    )
    assert '<option value="2" selected>&lt;Two&gt;</option>' in shown
    assert '<option value="1">One</option>' in shown


def test_an_error_summary_links_to_each_field_and_takes_the_focus() -> None:
    shown = render("{% error_summary form %}", form=SampleForm({"name": "", "rank": "0", "kind": "a"}))
    assert 'href="#id_name"' in shown
    assert 'href="#id_rank"' in shown
    assert "There are 2 problems." in shown
    assert 'role="alert"' in shown
    assert "data-take-focus" in shown


def test_an_error_summary_is_absent_when_nothing_is_wrong() -> None:
    assert render("{% error_summary form %}", form=SampleForm()).strip() == ""


def test_an_interval_that_covers_zero_straddles_the_zero_line() -> None:
    drawn = components.interval(-1.0, 0.5, 2.0)
    assert float(drawn["low"]) < float(drawn["zero"]) < float(drawn["value"]) < float(drawn["high"])
    assert float(drawn["zero"]) == components.INTERVAL_WIDTH / 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (1.9234, "1.92"), (-0.604, "\u22120.604"), (1234.5, "1234"), (None, "\u2013"), (2e-5, "2.00e-05")],
)
def test_figures_have_three_significant_digits(value: float | None, text: str) -> None:
    assert components.significant(value) == text


def test_a_difference_always_shows_its_sign() -> None:
    assert (components.signed(0.25), components.signed(-0.25)) == ("+0.250", "\u22120.250")


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.2 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert components.duration(seconds) == text


def test_a_snippet_is_shown_as_text() -> None:
    shown = render("{% snippet code 'one' 'Python' %}", code="print('<b>')")
    assert '<code id="one">print(&#x27;&lt;b&gt;&#x27;)</code>' in shown

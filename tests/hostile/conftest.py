"""Hostile text, and a way to see on a page that it is shown as text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from tests.studio.datasets.conftest import no_broker as no_broker
from tests.studio.datasets.conftest import upload as upload

MARK = "zqzq"
"""Stands in every hostile text, so that a page can be searched for them."""
MARKUP = [
    f'<img src=/{MARK}-img onerror="window.{MARK}=1"><script>window.{MARK}=2</script>',
    f'</div></article></section><div hx-get="/{MARK}-hx" hx-trigger="load">{MARK}</div>',
    f'<hx-partial hx-target="#main">{MARK}</hx-partial><svg onload="window.{MARK}=3">',
    f"{{{{7*7}}}} {{% load log %}} ${{7*7}} {MARK} <template>x</template>",
    f'"><a href="javascript:window.{MARK}=4" hx-on:click="window.{MARK}=5">{MARK}</a>',
]
HIDDEN = [
    f"{MARK} \x1b[31mred\x1b[2K \x07 and \x9b1m",
    f"{MARK} first\r\nsecond\rthird",
    f"{MARK} abc\u202etxt.exe \u2066isolated\u2069",
    f"{MARK} pass\u200bword zero\u200dwidth\ufeff \u2060joined so\xadft",
    f"{MARK} tags \U000e0049\U000e0047",
]
TEXTS = [*MARKUP, *HIDDEN]
# Emoji and scripts may hold joiners of their own in our pages; none does today.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class _Page(HTMLParser):
    """Where hostile text stands on a page. SVG leaves close themselves, so handle_startendtag opens nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.problems: list[str] = []
        self.num_texts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look_at_tag(tag, attrs)
        if tag not in _VOID:
            self.open.append((tag, any(name == "hx-ignore" for name, _ in attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look_at_tag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if not self.open or self.open[-1][0] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:]}")
            return
        self.open.pop()

    def handle_data(self, data: str) -> None:
        within = [tag for tag, _ in self.open]
        if "textarea" in within:
            return  # somebody's own text, to be changed
        self.problems += [f"unseen {found[0]!r}" for found in _UNSEEN.finditer(data)]
        if MARK not in data:
            return
        self.num_texts += 1
        if within[-1:] not in (["title"], ["option"]) and not any(ignored for _, ignored in self.open):
            self.problems.append(f"not where htmx looks for nothing: {data.strip()[:60]!r} in {within[-4:]}")

    def _look_at_tag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            runs = name.startswith(("on", "hx-on")) or (value or "").strip().lower().startswith("javascript:")
            asks = name.startswith("hx-") or name in {"src", "href", "action"}
            if name != "value":
                self.problems += [f"unseen {found[0]!r} in {name}" for found in _UNSEEN.finditer(value or "")]
            if (MARK in (value or "") and (runs or asks)) or (runs and MARK in name):
                self.problems.append(f"<{tag} {name}={value!r}>")


def problems_of(html: str) -> list[str]:
    """What is wrong with a page that shows hostile text: tags made of it, unseen characters, htmx at work in it."""
    page = _Page()
    page.feed(html)
    return page.problems


def num_hostile_texts(html: str) -> int:
    """Texts of a page with the mark, so that a test knows that it looked at something."""
    page = _Page()
    page.feed(html)
    return page.num_texts

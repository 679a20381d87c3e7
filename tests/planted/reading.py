"""What a person reads: the words of the first screen of an adapter's page, and the gates of its review."""

from __future__ import annotations

from dataclasses import dataclass

from playwright.sync_api import Locator, Page

WIDTH, HEIGHT = 1280, 800
"""The first screen: what a laptop's window shows before anybody scrolls."""

# Text counts where every line of it lies within the window and something is painted: hidden text has no boxes.
_WORDS_IN_SIGHT = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const range = document.createRange(), found = [];
  while (walker.nextNode()) {
    range.selectNodeContents(walker.currentNode);
    const boxes = [...range.getClientRects()].filter(box => box.width > 1 && box.height > 1);
    const inside = box => box.top >= 0 && box.left >= 0 && box.bottom <= innerHeight && box.right <= innerWidth;
    if (boxes.length && boxes.every(inside)) found.push(walker.currentNode.textContent);
  }
  return found.join(" ").replace(/\\s+/g, " ");
}"""


@dataclass(frozen=True)
class Gate:
    """A gate as the review's page shows it: its name, its state in the page's word, and its sentence."""

    name: str
    state: str
    sentence: str


@dataclass(frozen=True)
class FirstScreen:
    """What stands in the window before anybody scrolls: titles of findings by their colour, the sentence that sums the
    scores up and whether it is red, and every word."""

    red: list[str]
    yellow: list[str]
    green: list[str]
    headline: str
    is_headline_red: bool
    words: str


def first_screen(page: Page) -> FirstScreen:
    """The adapter's page that is open, as it opens: nothing is scrolled. Only what is whole in the window counts."""
    assert page.viewport_size == {"width": WIDTH, "height": HEIGHT}, page.viewport_size
    page.evaluate("scrollTo(0, 0)")
    places = ("#findings .alert-error strong", "#findings .alert-warning strong", "#findings p a[href^='#']:not(.link)")
    red, yellow, green = ([one.inner_text().strip() for one in page.locator(place).all() if _is_whole(one)]
                          for place in places)  # fmt: skip
    summary = page.locator("#adapter-summary .panel")
    assert _is_whole(summary), "the sentence that sums the scores up is below the first screen"
    is_red = summary.evaluate("one => one.matches('.border-l-error') || !!one.querySelector('.text-error')")
    headline = summary.locator("p").first.inner_text()
    return FirstScreen(red, yellow, green, headline, is_red, page.evaluate(_WORDS_IN_SIGHT))


def _is_whole(one: Locator) -> bool:
    box = one.bounding_box()
    return box is not None and box["y"] >= 0 and box["y"] + box["height"] <= HEIGHT


def gates_on_page(page: Page) -> list[Gate]:
    """The gates of the review that is open, in the page's order."""
    found = []
    for row in page.locator("#gates li[id^='gate-']").all():
        said = row.locator("p").all_inner_texts()
        label, _, state = said[0].rpartition(": ")
        assert label, said
        found.append(Gate((row.get_attribute("id") or "").removeprefix("gate-"), state.strip(), said[1]))
    return found

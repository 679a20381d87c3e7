"""The model card of an adapter: README.md of its folder, as HTML that is safe to show."""

from __future__ import annotations

import re

import nh3
from django.utils.safestring import SafeString, mark_safe
from markdown_it import MarkdownIt

from studio.catalogue.models import Adapter
from studio.storage import open_adapter_file

CARD_FILE = "README.md"
MAX_CARD_BYTES = 512 * 1024
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?\r?\n---\r?\n", re.DOTALL)
TAGS = {"h1", "h2", "h3", "h4", "p", "ul", "ol", "li", "pre", "code", "em", "strong", "a", "table", "thead", "tbody",
        "tr", "th", "td", "blockquote", "hr", "br"}  # fmt: skip


def render_markdown(source: str) -> SafeString:
    """Markdown as HTML: raw HTML shown as text, no images, links that carry no referrer."""
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(_FRONT_MATTER.sub("", source, count=1))
    clean = nh3.clean(
        html,
        tags=TAGS,
        attributes={"a": {"href"}},
        url_schemes={"http", "https"},
        link_rel="noopener noreferrer nofollow",
    )
    return mark_safe(clean)  # noqa: S308  nh3 has just cleaned it


def read_card(adapter: Adapter) -> SafeString | None:
    """The adapter's card; None when its folder has none."""
    try:
        with open_adapter_file(adapter.folder, CARD_FILE) as file:
            return render_markdown(file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace"))
    except FileNotFoundError:
        return None

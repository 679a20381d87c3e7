"""What people write in Markdown, as HTML that is safe to show."""

from __future__ import annotations

import re

from django.utils.safestring import SafeString, mark_safe

from studio.hidden_characters import visible

_FRONT_MATTER = re.compile(r"\A---\r?\n.*?\r?\n---\r?\n", re.DOTALL)
TAGS = {"h1", "h2", "h3", "h4", "p", "ul", "ol", "li", "pre", "code", "em", "strong", "a", "table", "thead", "tbody",
        "tr", "th", "td", "blockquote", "hr", "br"}  # fmt: skip


def render_markdown(source: str) -> SafeString:
    """Markdown as HTML: raw HTML shown as text, no images, hidden characters written out, links without a referrer."""
    # Imported when something is shown: a web process that only takes uploads does without.
    import nh3
    from markdown_it import MarkdownIt

    # A browser ends the lines of a text field with two characters, which hide nothing.
    text = visible(without_front_matter(source).replace("\r\n", "\n"))
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    clean = nh3.clean(
        html,
        tags=TAGS,
        attributes={"a": {"href"}},
        url_schemes={"http", "https"},
        link_rel="noopener noreferrer nofollow",
    )
    return mark_safe(clean)  # noqa: S308  nh3 has just cleaned it


def without_front_matter(source: str) -> str:
    """A card's text without the YAML block that the Hub reads."""
    return _FRONT_MATTER.sub("", source, count=1)

"""Other people's text in pages. Loaded into every template by the settings, so that none has to remember it."""

from __future__ import annotations

from django import template

from studio import hidden_characters

register = template.Library()


@register.filter
def visible(text: object) -> str:
    """Text whose hidden characters are written out; nothing for None. Escaping is left to the template."""
    return "" if text is None else hidden_characters.visible(str(text))


@register.filter
def visible_token(text: str) -> str:
    """A token's text with its line breaks written out; a token that shares the character before it as ⁺."""
    return visible(text).replace("\n", "↵\n") if text else "⁺"

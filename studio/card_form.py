"""The form in which the card of an adapter or a dataset is edited, with a preview and the text of who was faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render

from studio.cards import MAX_CHARACTERS, CardConflictError, card_version, cleaned
from studio.markdown import render_markdown
from workers.errors import ExplainedError


def card_form(
    request: HttpRequest,
    template: str,
    context: dict[str, Any],
    *,
    stored: Callable[[], str | None],
    save: Callable[[str, str], bool],
    saved_url: Callable[[], str],
) -> HttpResponse:
    """The form over a card, or, after a POST that stored its text, the way to where the card is shown.

    Args:
        template: extends components/card_editor.html, with what `context` has for it.
        stored: gives the card's text as it is stored now.
        save: takes the text and the version that the person began with, and says whether anything changed; raises
            CardConflictError and what else is to be said.
        saved_url: where to go then.
    """
    text = stored()
    seen = request.POST.get("seen", "") or card_version(text)
    text, theirs, preview, status = text or "", None, None, 200
    problem: ExplainedError | None = None
    if request.method == "POST":
        text = request.POST.get("body", "").replace("\0", "")
        if "preview" in request.POST:
            preview = render_markdown(cleaned(text))
        else:
            try:
                is_changed = save("" if "generated" in request.POST else text, seen)
            except CardConflictError as error:
                # The next save of this form is of somebody who has seen the other text.
                problem, theirs, status = error, stored(), 409
                seen = card_version(theirs)
            except ExplainedError as error:
                problem, status = error, 422
            else:
                messages.success(request, "The card is saved." if is_changed else "The card was not changed.")
                return redirect(saved_url())
    values = {
        "text": text, "seen": seen, "problem": problem, "theirs": theirs, "preview": preview,
        "max_characters": MAX_CHARACTERS,
    }  # fmt: skip
    return render(request, template, context | values, status=status)

"""What somebody gets whose session has ended: the login page and a way back, and never the loss of a form."""

from __future__ import annotations

from urllib.parse import urlsplit

from django.contrib.auth.views import redirect_to_login
from django.http import HttpRequest, HttpResponse, HttpResponseBase, QueryDict
from django.shortcuts import render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme

SESSION_KEY = "kept_form"
# A session is a row of the database that anybody can make: no more than a form that people fill in.
MAX_KEPT_CHARACTERS = 16_000


def ask_to_sign_in(request: HttpRequest, *, keeps_form: bool = False) -> HttpResponseBase:
    """The login page, from which one comes back to the page one was on; for htmx a message on that page.

    Args:
        request: of somebody who is not signed in.
        keeps_form: the same address shows the form that was sent, and asks `take_kept_form` for its values.
    """
    if request.htmx:  # type: ignore[attr-defined]  # set by the middleware
        return say_on_page(request, "components/signed_out.html", {"login_url": _login_url(request)})
    if request.method in {"GET", "HEAD"}:
        return redirect_to_login(request.get_full_path())
    if keeps_form:
        _keep_form(request)
        return redirect_to_login(request.get_full_path())
    return redirect_to_login(page_before(request))


def say_on_page(request: HttpRequest, template: str, context: dict[str, str] | None = None) -> HttpResponse:
    """403 whose content htmx shows among the page's messages: what was typed stays where it is."""
    response = render(request, template, context, status=403)
    response["HX-Retarget"] = "#messages"
    # A morph leaves an equal message alone, so that a list that asks every few seconds is not read out each time.
    response["HX-Reswap"] = "innerMorph"
    return response


def page_before(request: HttpRequest) -> str:
    """The page of this site that a request was sent from; home when it does not say."""
    referer = request.headers.get("Referer", "")
    if not url_has_allowed_host_and_scheme(referer, {request.get_host()}, require_https=request.is_secure()):
        return reverse("home")
    parts = urlsplit(referer)
    path = parts.path or "/"
    return f"{path}?{parts.query}" if parts.query else path


def take_kept_form(request: HttpRequest) -> QueryDict | None:
    """The values of a form that was sent to this address while signed out; they are given once."""
    kept = request.session.get(SESSION_KEY)
    if not kept or kept["path"] != request.path:
        return None
    del request.session[SESSION_KEY]
    return QueryDict(kept["values"])


def _keep_form(request: HttpRequest) -> None:
    values = request.POST.copy()
    values.pop("csrfmiddlewaretoken", None)
    text = values.urlencode()
    if len(text) <= MAX_KEPT_CHARACTERS:
        request.session[SESSION_KEY] = {"path": request.path, "values": text}


def _login_url(request: HttpRequest) -> str:
    location: str = redirect_to_login(page_before(request))["Location"]
    return location

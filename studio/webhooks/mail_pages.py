"""What a person wants mail about, and the link in each mail that ends it."""

from __future__ import annotations

from typing import Any, cast

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods

from studio.accounts.access import signed_in_page
from studio.accounts.models import User
from studio.webhooks.forms import MailForm
from studio.webhooks.hearing import JOBS, MENTIONS, REVIEWS
from studio.webhooks.mailing import is_configured, read_token
from studio.webhooks.models import MailSettings

WORDS = {JOBS: "your own jobs", REVIEWS: "reviews that wait for you", MENTIONS: "comments that name you"}


@signed_in_page
@require_http_methods(["GET", "HEAD", "POST"])
def mail(request: HttpRequest) -> HttpResponse:
    """Address and kinds of mail."""
    user = cast("User", request.user)
    form = MailForm(request.POST if request.method == "POST" else None, initial=mail_values(user))
    if form.is_bound and form.is_valid():
        form.save(user)
        messages.success(request, "Your mail settings are saved.")
        return redirect("webhooks:mail")
    context = {"form": form, "is_configured": is_configured()}
    return render(request, "webhooks/mail_settings.html", context, status=422 if form.is_bound else 200)


def mail_values(user: User) -> dict[str, Any]:
    """A person's address and the kinds of mail that they want, as the form has them."""
    kept = MailSettings.objects.filter(user=user).first() or MailSettings(user=user)
    return {"email": user.email, "jobs": kept.jobs, "reviews": kept.reviews, "mentions": kept.mentions}


# Mail programs post here by themselves (RFC 8058); the signed token is what protects it.
@csrf_exempt
@require_http_methods(["GET", "HEAD", "POST"])
def unsubscribe(request: HttpRequest, token: str) -> HttpResponse:
    """End one kind of mail without signing in. Opening the link does nothing yet: mail programs look at links."""
    found = read_token(token)
    if found is None or found[1] not in WORDS:
        raise Http404
    person = get_object_or_404(User, pk=found[0])
    if request.method == "POST":
        MailSettings.objects.update_or_create(user=person, defaults={found[1]: False})
    context = {"what": WORDS[found[1]], "is_done": request.method == "POST"}
    return render(request, "webhooks/unsubscribe.html", context)

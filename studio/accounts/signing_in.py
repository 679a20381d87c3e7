"""Signing in and out."""

from __future__ import annotations

from django.contrib.auth import authenticate, login, logout
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters, sensitive_variables
from django.views.decorators.http import require_http_methods, require_POST

from studio.accounts.forms import LoginForm
from studio.accounts.models import LoginLink, Team, User, record
from studio.accounts.throttling import forget_attempts, seconds_to_wait

BACKEND = "django.contrib.auth.backends.ModelBackend"
WRONG = "This user name and password do not belong together. Check both and try again."


@sensitive_post_parameters("password")
@sensitive_variables("form")
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def sign_in(request: HttpRequest) -> HttpResponse:
    """The login page."""
    next_url = safe_next(request)
    if request.user.is_authenticated:
        return redirect(next_url)
    form = LoginForm(request.POST or None)
    status, headers = 200, dict[str, str]()
    if request.method == "POST":
        status = 422
        if form.is_valid():
            username, password = form.cleaned_data["username"], form.cleaned_data["password"]
            wait = seconds_to_wait(username, request.META.get("REMOTE_ADDR", ""))
            # While an account waits, its password is not even looked at: the answer tells nothing about it.
            user = authenticate(request, username=username, password=password) if not wait else None
            if isinstance(user, User):
                forget_attempts(username)
                _start_session(request, user, "login.password")
                return redirect(next_url)
            if wait:
                status, headers = 429, {"Retry-After": str(wait)}
                minutes = -(-wait // 60)
                form.add_error(None, f"There were too many attempts. Wait {minutes} min and try again.")
            else:
                form.add_error(None, WRONG)
            _record_failure(username, throttled=bool(wait))
    response = render(request, "accounts/login.html", {"form": form, "next": next_url}, status=status)
    for name, value in headers.items():
        response[name] = value
    return response


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def login_link(request: HttpRequest, secret: str) -> HttpResponse:
    """Sign in with a one-time link. Opening it only shows a button: a preview in a chat must not use it up."""
    if request.method != "POST":
        return render(request, "accounts/login_link.html", {"is_dead": False})
    user = LoginLink.redeem(secret)
    if user is None:
        return render(request, "accounts/login_link.html", {"is_dead": True}, status=410)
    if request.user.is_authenticated:
        # Nothing of an earlier person's session passes over.
        logout(request)
    _start_session(request, user, "login.link")
    return redirect("home")


@require_POST
def sign_out(request: HttpRequest) -> HttpResponse:
    """End this session."""
    if isinstance(request.user, User):
        record("logout", team=_team_of(request.user), user=request.user, target=request.user)
    logout(request)
    return redirect("accounts:login")


def safe_next(request: HttpRequest) -> str:
    """Where to go after signing in: `next` when it stays on this site, else home."""
    wanted = request.POST.get("next") or request.GET.get("next") or ""
    if url_has_allowed_host_and_scheme(wanted, allowed_hosts={request.get_host()}, require_https=request.is_secure()):
        return wanted
    return reverse("home")


def _start_session(request: HttpRequest, user: User, action: str) -> None:
    # login() gives the session a new key, so one that was planted before is worth nothing.
    login(request, user, backend=BACKEND)
    record(action, team=_team_of(user), user=user, target=user)


def _record_failure(username: str, *, throttled: bool) -> None:
    # Only a known name is recorded: an unknown one may be a password in the wrong field.
    user = User.objects.filter(username=username).first()
    record("login.failed", team=_team_of(user) if user else None, target=user, throttled=throttled)


def _team_of(user: User) -> Team | None:
    return user.teams.order_by("memberships__created_at", "memberships__pk").first()

"""The forms of the accounts pages."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib.auth.forms import PasswordChangeForm, SetPasswordForm
from django.contrib.auth.validators import UnicodeUsernameValidator

from studio.accounts.models import ApiToken, Role, Scope, User


class LoginForm(forms.Form):
    """User name and password; whether they are right is not this form's matter."""

    username = forms.CharField(
        max_length=150, label="User name",
        widget=forms.TextInput(attrs={"autocomplete": "username", "autofocus": True, "autocapitalize": "none"}),
    )  # fmt: skip
    password = forms.CharField(
        max_length=4096, strip=False, widget=forms.PasswordInput(attrs={"autocomplete": "current-password"})
    )


class NameForm(forms.ModelForm):
    """How a person is called."""

    class Meta:
        model = User
        fields = ("first_name", "last_name")


class InviteForm(forms.Form):
    """A person to put into the team."""

    username = forms.CharField(
        max_length=150, label="User name", validators=[UnicodeUsernameValidator()],
        widget=forms.TextInput(attrs={"autocomplete": "off", "autocapitalize": "none"}),
    )  # fmt: skip
    role = forms.ChoiceField(choices=Role.choices, initial=Role.TRAINER)


class RoleForm(forms.Form):
    """Another role for a member."""

    role = forms.ChoiceField(choices=Role.choices)


class TokenForm(forms.Form):
    """A new API token."""

    name = forms.CharField(
        max_length=ApiToken._meta.get_field("name").max_length, help_text="What will use it, for example: nightly CI."
    )
    scopes = forms.MultipleChoiceField(
        choices=Scope.choices, initial=[Scope.READ], widget=forms.CheckboxSelectMultiple, label="It may"
    )


class AuditFilter(forms.Form):
    """Which audit events to show."""

    action = forms.CharField(max_length=60, required=False)
    person = forms.CharField(max_length=150, required=False)
    before = forms.IntegerField(min_value=1, required=False)


def password_form(user: User, data: Any = None) -> SetPasswordForm:
    """The form for a new password; who has one must give it first."""
    return PasswordChangeForm(user, data) if user.has_usable_password() else SetPasswordForm(user, data)

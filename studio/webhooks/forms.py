"""Forms of webhooks and mail."""

from __future__ import annotations

from django import forms

from studio.accounts.models import User
from studio.webhooks.managing import EVENTS
from studio.webhooks.models import MailSettings
from studio.webhooks.posting import PostError, checked_url


class WebhookForm(forms.Form):
    """An address and what it is told."""

    url = forms.CharField(max_length=500, label="Address", help_text="https; it must answer with a status of 2xx.")
    events = forms.MultipleChoiceField(
        choices=[(name, f"{name}: {text}") for name, text in EVENTS.items()], widget=forms.CheckboxSelectMultiple,
        label="It is told of", initial=["job.succeeded", "job.failed"],
    )  # fmt: skip

    def clean_url(self) -> str:
        url: str = self.cleaned_data["url"].strip()
        try:
            checked_url(url)
        except PostError as error:
            raise forms.ValidationError(str(error)) from None
        return url


class MailForm(forms.Form):
    """Where mail goes and what it is about."""

    email = forms.EmailField(required=False, label="Your address", help_text="Empty: no mail.")
    jobs = forms.BooleanField(required=False, label="My jobs that are done or have failed")
    reviews = forms.BooleanField(required=False, label="Reviews that wait for me")
    mentions = forms.BooleanField(required=False, label="Comments that name me")

    def save(self, user: User) -> None:
        User.objects.filter(pk=user.pk).update(email=self.cleaned_data["email"])
        chosen = {name: self.cleaned_data[name] for name in ("jobs", "reviews", "mentions")}
        MailSettings.objects.update_or_create(user=user, defaults=chosen)

"""Catalogue forms."""

from __future__ import annotations

from django import forms


class RegisterBaseModelForm(forms.Form):
    """Which folder, and what people need to know about the model in it."""

    folder = forms.CharField(max_length=1000, help_text="A folder with config.json, tokenizer.json and *.safetensors.")
    name = forms.CharField(max_length=120, help_text="As people will see it in lists.")
    hub_id = forms.CharField(
        max_length=200,
        required=False,
        label="Name on a model hub",
        help_text="Written into adapter_config.json, so that adapters open elsewhere. For example Qwen/Qwen3-0.6B.",
    )
    licence = forms.CharField(
        max_length=80, required=False, help_text="Its SPDX name, for example apache-2.0. Empty: as the folder says."
    )

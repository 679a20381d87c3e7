"""Forms of the dataset pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django import forms

from studio.hidden_characters import visible
from workers.formats import get_format
from workers.licences import choices


class TargetForm(forms.Form):
    """What a new dataset is to be called."""

    name = forms.CharField(
        max_length=120, required=False, help_text="Empty: the file's name without its ending.", label="Name"
    )
    licence = forms.ChoiceField(
        choices=choices, required=False, label="Licence of the data", help_text="Decides what adapters may be shared."
    )


class UploadForm(TargetForm):
    """A file and what to call it."""

    file = forms.FileField(
        label="File",
        allow_empty_file=True,
        max_length=None,
        help_text="JSON Lines, JSON, CSV, TSV or text in UTF-8, also in gzip or zstd; or Parquet.",
    )


class PasteForm(TargetForm):
    """Rows as text, and what to call them."""

    # Stripped rows would have other line numbers than the person sees.
    rows = forms.CharField(
        label="Rows", widget=forms.Textarea(attrs={"rows": 14, "class": "font-mono text-sm", "spellcheck": "false"}),
        strip=False, help_text="JSON Lines, a JSON list, or a table with a header: copied cells of a spreadsheet work.",
    )  # fmt: skip

    field_order = ("rows", "name", "licence")


class FolderForm(TargetForm):
    """A file of the server, and what to call it."""

    path = forms.CharField(max_length=4000, label="File", widget=forms.HiddenInput)


class HubForm(TargetForm):
    """A dataset of the Hugging Face Hub, and what to call it."""

    hub_id = forms.CharField(max_length=200, label="Dataset", help_text="As on the Hub: owner/name.")
    revision = forms.CharField(
        max_length=120, required=False, label="Revision",
        help_text="A branch, tag or commit; empty: main. The commit that it stands for is kept with the version.",
    )  # fmt: skip
    config = forms.CharField(max_length=120, required=False, label="Configuration", help_text="Empty: the default one.")
    split = forms.CharField(max_length=120, label="Split", initial="train")

    field_order = ("hub_id", "revision", "config", "split", "name", "licence")


class LicenceForm(forms.Form):
    """Under which licence a dataset's rows came."""

    licence = forms.ChoiceField(choices=choices, label="Licence of the data")


class MappingForm(forms.Form):
    """Which column is which, for a file whose columns nobody knows."""

    def __init__(self, *args: Any, column_names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plugin = get_format("mapped")
        for name, label in plugin.fields.items():
            is_required = name in plugin.required_fields
            none = [] if is_required else [("", "none")]
            self.fields[name] = forms.ChoiceField(
                label=label,
                required=is_required,
                choices=[*none, *((column, visible(column)) for column in column_names)],
            )

    def clean(self) -> dict[str, Any]:
        chosen = super().clean() or {}
        if chosen.get("prompt") and chosen.get("prompt") == chosen.get("completion"):
            self.add_error("completion", "The prompt and the answer are the same column: choose another one.")
        return chosen

    def columns(self) -> dict[str, str]:
        """The mapping without the fields that were left out."""
        return {name: column for name, column in self.cleaned_data.items() if column}

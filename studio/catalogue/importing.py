"""Base models: from a folder on this machine into the catalogue, after it was found safe and complete."""

from __future__ import annotations

from pathlib import Path

from django.conf import settings
from django.db import connection, transaction

from studio.accounts.models import User
from studio.catalogue.models import BaseModel
from workers.base_folders import read_base_folder
from workers.errors import BaseModelError

# Any number that nothing else in the studio locks: two registrations wait for each other.
REGISTRATION_LOCK = 0x62617365


def model_roots() -> list[Path]:
    """The folders below which an admin may register base models."""
    return [(settings.DATA_DIR / "base_models").resolve(), *(root.resolve() for root in settings.BASE_MODEL_ROOTS)]


def allowed_folder(text: str) -> Path:
    """The real folder that a person named, when it lies below one of the roots.

    Raises:
        BaseModelError: it lies elsewhere, also by a symbolic link, or is no folder. Whether a folder outside
            the roots exists is not said.
    """
    roots = model_roots()
    # A relative name is meant below the first root that has it.
    candidates = [Path(text)] if Path(text).is_absolute() else [root / text for root in roots]
    inside = [
        real
        for real in (candidate.resolve() for candidate in candidates)
        if any(real != root and real.is_relative_to(root) for root in roots)
    ]
    if not inside:
        raise BaseModelError(
            f'"{text}" lies outside the folders that base models may come from.',
            next_step=f"Put it below {' or '.join(map(str, roots))}, or add a folder to STUDIO_BASE_MODEL_ROOTS.",
            field="folder",
        )
    for folder in inside:
        if folder.is_dir():
            return folder
    raise BaseModelError(f'There is no folder "{text}".', next_step="Check the spelling.", field="folder")


def suggested_folders() -> list[str]:
    """Folders below the roots, at most two levels down, that have a config.json and are not registered yet."""
    known = set(BaseModel.objects.values_list("folder", flat=True))
    found = {
        str(config.parent)
        for root in model_roots()
        for pattern in ("*/config.json", "*/*/config.json")
        for config in root.glob(pattern)
    }
    return sorted(found - known)[:50]


def register_base_model(*, folder: Path, name: str, hub_id: str, licence: str, user: User | None = None) -> BaseModel:
    """The base model in `folder`, registered. The same content registers once, whatever its folder or name.

    The files are hashed, which takes about a second per gigabyte. Nothing is registered when anything is wrong.

    Raises:
        BaseModelError: the folder is unsafe, incomplete or no causal language model, or the name is taken.
    """
    name = name.strip()
    if not name:
        raise BaseModelError("The base model has no name.", next_step="Give it one.", field="name")
    folder = folder.resolve()
    found = read_base_folder(folder)
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [REGISTRATION_LOCK])
        same = BaseModel.objects.filter(revision=found.revision).first()
        if same is not None:
            if not Path(same.folder).is_dir():
                # The folder was moved; its content is the same, so nothing that was trained on it changes.
                BaseModel.objects.filter(pk=same.pk).update(folder=str(folder))
                same.folder = str(folder)
            return same
        if BaseModel.objects.filter(name=name).exists():
            raise BaseModelError(
                f'There is a base model called "{name}" with other files.',
                next_step="Choose another name.",
                field="name",
            )
        return BaseModel.objects.create(
            name=name,
            hub_id=hub_id.strip() or found.hub_id,
            licence=licence.strip() or found.licence,
            folder=str(folder),
            revision=found.revision,
            files=[dict(file) for file in found.files],
            shape=found.shape.model_dump(mode="json"),
            num_bytes=found.num_bytes,
            has_chat_template=found.has_chat_template,
            created_by=user,
        )

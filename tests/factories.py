"""Objects for tests, made by the product's own functions wherever these do not need a queue or a GPU."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from django.conf import settings
from django.utils import timezone
from safetensors.numpy import save_file

from studio.accounts.models import Team, User
from studio.catalogue.importing import register_base_model
from studio.catalogue.models import Adapter, BaseModel
from studio.catalogue.registering import checked_files, register_adapter
from studio.datasets.models import Dataset, DatasetVersion, VersionState
from studio.storage import adapter_folder, file_digests, store_blob
from tests.tiny import make_tiny_base, tiny_rows
from workers.recipe import Recipe
from workers.results import Provenance, Result, SampleRecord, ScoreRecord

CARD = "---\nbase_model: tiny\n---\n# Support\n\nAnswers questions about *animals*.\n"


def make_base_model(name: str = "Tiny", *, family: str = "llama", hub_id: str = "", licence: str = "mit") -> BaseModel:
    """A registered tiny base model in the data folder; the same family is registered once."""
    folder = Path(settings.DATA_DIR) / "base_models" / f"tiny-{family}"
    if not folder.exists():
        make_tiny_base(folder, family)  # type: ignore[arg-type]
    return register_base_model(folder=folder, name=name, hub_id=hub_id, licence=licence)


def make_dataset_version(
    team: Team, user: User, *, name: str = "Animals", num_rows: int = 40, rows: Sequence[dict[str, Any]] | None = None
) -> DatasetVersion:
    """A ready version with its file in the storage; another call with the same name adds a version."""
    rows = tiny_rows(num_rows) if rows is None else rows
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    blob = store_blob([content], max_bytes=len(content))
    dataset, _ = Dataset.objects.get_or_create(team=team, name=name, defaults={"created_by": user})
    return DatasetVersion.objects.create(
        dataset=dataset,
        number=dataset.versions.count() + 1,
        state=VersionState.READY,
        file_name="animals.jsonl",
        sha256=blob.sha256,
        num_bytes=blob.num_bytes,
        format="alpaca",
        num_rows=len(rows),
        num_usable=len(rows),
        created_by=user,
    )


def make_recipe(base_model: BaseModel, version: DatasetVersion, **changes: Any) -> Recipe:
    """A recipe for a base and a dataset version; `changes` replace its top-level fields."""
    return Recipe.from_dict(
        {
            "name": "support",
            "base_model": {"name": base_model.name, "revision": base_model.revision},
            "dataset": {"name": version.dataset.name, "sha256": version.sha256, "format": version.format},
            "method": "lora",
            "settings": {"rank": 16},
            **changes,
        }
    )


def make_score(
    difference: float = -0.6, *, evaluation: str = "loss", width: float = 0.1, **changes: Any
) -> ScoreRecord:
    """A score whose interval reaches `width` to both sides of the difference."""
    base = 1.92
    values: dict[str, Any] = {
        "evaluation": evaluation,
        "label": {"loss": "Held-out loss", "token_f1": "Token F1"}.get(evaluation, evaluation),
        "higher_is_better": evaluation != "loss",
        "num_rows": 100,
        "value": base + difference,
        "low": base + difference - 0.05,
        "high": base + difference + 0.05,
        "base_value": base,
        "base_low": base - 0.05,
        "base_high": base + 0.05,
        "difference": difference,
        "difference_low": difference - width,
        "difference_high": difference + width,
        "interval_method": "paired bootstrap, 10,000 resamples",
    }
    return ScoreRecord(**(values | changes))


def make_sample(line: int = 7, **changes: str) -> SampleRecord:
    texts = {
        "prompt": "What does the cat say?",
        "reference": "meow",
        "base_answer": "The cat is an animal.",
        "adapter_answer": "meow",
    }
    return SampleRecord(line=line, **(texts | changes))


def make_result(
    scores: Sequence[ScoreRecord] | None = None, samples: Sequence[SampleRecord] | None = None, **changes: Any
) -> Result:
    """What a finished training gives, with plausible provenance."""
    return Result(
        scores=tuple([make_score()] if scores is None else scores),
        samples=tuple([make_sample()] if samples is None else samples),
        provenance=Provenance(
            versions={"torch": "2.13.0", "peft": "0.21.2"},
            device="CPU, 2 cores",
            wall_seconds=200,
            train_seconds=150,
            num_tokens=40_000,
            tokens_per_second=266.7,
            peak_memory_bytes=1_500_000_000,
            first_loss=2.1,
            last_loss=1.2,
            num_steps=50,
            epochs=1.0,
            num_train_rows=400,
            num_held_out_rows=100,
        ),
        **({"num_trainable": 4_884_480} | changes),
    )


def make_adapter_folder(*, files: dict[str, bytes] | None = None, card: str = CARD, result: Result) -> str:
    """A finished adapter's folder in the storage; gives its storage key."""
    key = f"tests/{uuid.uuid4()}"
    folder = adapter_folder(key)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}\n')
    save_file({"lora_A": np.zeros((16, 64), dtype=np.float32)}, folder / "adapter_model.safetensors")
    (folder / "README.md").write_text(card)
    result.write(folder)
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    checksums = "".join(f"{file['sha256']}  {file['name']}\n" for file in file_digests(folder))
    (folder / "SHA256SUMS").write_text(checksums)
    return key


def make_adapter(
    team: Team,
    user: User,
    *,
    name: str = "support",
    base_model: BaseModel | None = None,
    dataset_version: DatasetVersion | None = None,
    mixed: Sequence[DatasetVersion] = (),
    result: Result | None = None,
    files: dict[str, bytes] | None = None,
    card: str = CARD,
    **recipe_changes: Any,
) -> Adapter:
    """A registered adapter with its files on disk; born, as in the product, in `register_adapter`."""
    base_model = base_model or make_base_model()
    dataset_version = dataset_version or make_dataset_version(team, user)
    result = result or make_result()
    key = make_adapter_folder(files=files, card=card, result=result)
    mix = [{"name": str(one), "sha256": one.sha256, "format": one.format, "weight": 0.5} for one in mixed]
    return register_adapter(
        team=team,
        user=user,
        name=name,
        base_model=base_model,
        dataset_version=dataset_version,
        mixed=mixed,
        recipe=make_recipe(base_model, dataset_version, **({"mix": mix} | recipe_changes)),
        folder_key=key,
        files=checked_files(key),
        result=result,
    )


def make_job_for(adapter: Adapter, **changes: Any) -> Any:
    """The succeeded job that made an adapter."""
    from jobs.models import Job, JobState

    return Job.objects.create(
        team=adapter.team,
        created_by=adapter.created_by,
        name=adapter.name,
        recipe=adapter.recipe,
        asked_recipe=changes.pop("asked_recipe", adapter.recipe),
        base_model=adapter.base_model,
        dataset_version=adapter.dataset_version,
        adapter=adapter,
        state=JobState.SUCCEEDED,
        not_before=timezone.now(),
        idempotency_key=str(uuid.uuid4()),
        **changes,
    )

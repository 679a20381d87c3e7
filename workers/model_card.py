"""The model card of a finished product: what it is, what it scored and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from workers.forgetting import MEASURE, forgetting
from workers.methods import ADAPTER, get_method, methods
from workers.recipe import Recipe
from workers.results import Provenance, Result

HELD_OUT_SPLIT = "held-out"
# The Hub's own words for licences; any other one is "other" with its name beside it.
HUB_LICENCES = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research",
    "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0",
    "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr",
    "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "grok2-community", "gemma", "unknown",
})  # fmt: skip
# Names of metrics as the Hub has them, where they differ from ours.
_HUB_METRICS = {
    "token_f1": "f1", "rouge_1": "rouge", "rouge_2": "rouge", "rouge_l": "rouge", "byte_perplexity": "perplexity",
    "numeric_answer": "accuracy", "multiple_choice": "accuracy",
}  # fmt: skip


class Measured(Protocol):
    """One figure of the product beside the untouched base: a ScoreRecord, or the row of a table."""

    @property
    def evaluation(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def base_value(self) -> float: ...


@dataclass(frozen=True)
class MeasuredOn:
    """The figures from one test set. `revision` is the sha256 of its file, or empty."""

    dataset: str
    split: str
    revision: str
    scores: Sequence[Measured]


def front_matter(
    *, name: str, method: str, objective: str, hub_id: str, licence: str, measured: Sequence[MeasuredOn]
) -> list[str]:
    """The lines of YAML between which and including "---" model hubs look for what a model is.

    What is not known is left out: a base without a hub's name would be taken for another one, and datasets are the
    team's own. Every text is quoted as JSON, which YAML contains.
    """
    plugin = methods().get(method)
    product = plugin.product if plugin else ADAPTER  # cards outlive plug-ins
    tags = [method, objective, "peft-studio", *([f"base_model:{product.relation}:{hub_id}"] if hub_id else [])]
    named = [score.evaluation for one in measured for score in one.scores]
    metrics = list(dict.fromkeys(_HUB_METRICS.get(evaluation, evaluation) for evaluation in named))
    lines = ["---"]
    if hub_id:
        lines += [f"base_model: {_quoted(hub_id)}", f"base_model_relation: {product.relation}"]
    lines += [f"library_name: {product.library}", "pipeline_tag: text-generation", *_licence_lines(licence)]
    lines.append(f"tags: {_quoted(tags)}")
    if metrics:
        lines.append(f"metrics: {_quoted(metrics)}")
        lines += ["model-index:", f"- name: {_quoted(name)}", "  results:"]
    for one in measured:
        if not one.scores:
            continue
        revision = f", revision: {_quoted(one.revision)}" if one.revision else ""
        lines += [
            "  - task: {type: text-generation, name: Text Generation}",
            f"    dataset: {{type: {_quoted(_slug(one.dataset))}, name: {_quoted(f'{one.dataset} ({one.split})')}, "
            f"split: {_quoted(one.split)}{revision}}}",
            "    metrics:",
        ]
        lines += [
            f"    - {{type: {_quoted(_HUB_METRICS.get(score.evaluation, score.evaluation))}, "
            f"name: {_quoted(score.label)}, value: {_number(score.value)}, args: {{n: {score.num_rows}, "
            f"baseline: {_number(score.base_value)}, ci95: [{_number(score.low)}, {_number(score.high)}]}}}}"
            for score in one.scores
        ]
    return [*lines, "---"]


def _licence_lines(licence: str) -> list[str]:
    if not licence:
        return []
    known = licence.lower()
    if known in HUB_LICENCES:
        return [f"license: {_quoted(known)}"]
    return ["license: other", f"license_name: {_quoted(_slug(licence))}"]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "unnamed"


def _number(value: float) -> str:
    """Six digits as YAML reads them: "1e-05" without a point would be a text there."""
    text = f"{value:.6g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text


def _quoted(value: object) -> str:
    """A value as JSON, with what YAML's readers take for unprintable as escapes."""
    # JSON escapes a sign beyond 16 bits as two, which YAML reads as two broken ones: so they stay as they are.
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text
    )


def write_card(folder: Path, recipe: Recipe, result: Result, *, hub_id: str, licence: str, commit: str) -> None:
    """README.md as model hubs read it."""
    base = hub_id or recipe.base_model.name
    method = get_method(recipe.method)
    product = method.product
    front = front_matter(
        name=recipe.name, method=recipe.method, objective=recipe.objective, hub_id=hub_id, licence=licence,
        measured=[MeasuredOn(recipe.dataset.name, HELD_OUT_SPLIT, recipe.dataset.sha256, result.scores)],
    )  # fmt: skip
    body = [
        "",
        f"# {_one_line(recipe.name)}",
        "",
        f"{product.described.format(label=method.label, base=f'`{base}`')}, trained on "
        f"{_one_line(recipe.dataset.name)} "
        f"({result.provenance.num_train_rows} rows, {result.provenance.num_steps} steps, "
        f"{result.num_trainable} trained parameters). {method.source}.",
        "",
        *_score_table(result, product.noun),
        "## Use",
        "",
        "```python",
        *([f"import {method.companion_module}  # lies in this folder"] if method.companion_module else []),
        *_USE[product.library](base, commit),
        "```",
        "",
        f"Loads in: {', '.join(method.runs_in)}.",
        "",
        "## How it was made",
        "",
        f"- base precision: {recipe.precision}; learning rate: {recipe.training.learning_rate}; "
        f"batch size: {recipe.training.batch_size}; epochs: {result.provenance.epochs:.3g}",
        f"- digest of the base's files: `{result.provenance.base_revision}`",
        f"- digest of the dataset: `{result.provenance.dataset_sha256}`",
        *_split_lines(recipe),
        f"- recipe, versions and device: `studio.json`; answers of base and {product.noun}: `eval/samples.jsonl`",
    ]
    body += _choice_lines(recipe, result.provenance)
    body += _fault_lines(result)
    if result.stopped_at_step is not None:
        body.append(f"- training was stopped by a person at step {result.stopped_at_step}")
    if result.provenance.verified is not None:
        outcome = "gives the same logits" if result.provenance.verified else "does NOT give the same logits"
        body.append(
            f"- this folder, loaded in plain {product.library}, {outcome} as in training "
            f"(largest difference {result.provenance.max_logit_difference:.2g})"
        )
    (folder / "README.md").write_text("\n".join([*front, *body]) + "\n", "utf-8")


def _split_lines(recipe: Recipe) -> list[str]:
    """The frozen split that says which rows were trained on and which scored, for the card."""
    split = recipe.dataset.split
    if split is None:
        return []
    return [
        f"- rows by the split {_one_line(split.name)}, digest `{split.sha256}`: {split.num_train} to train, "
        f"{split.num_validation} for validation, {split.num_test} scored"
    ]


def _choice_lines(recipe: Recipe, provenance: Provenance) -> list[str]:
    """What was chosen on validation rows, for the card."""
    found = []
    if provenance.early_stopped_at_step is not None:
        found.append(
            f"- early stopping ended training at step {provenance.early_stopped_at_step}, after "
            f"{recipe.training.early_stopping_patience} validations without improvement"
        )
    if provenance.best_value is not None and recipe.training.keep_best == "best":
        found.append(
            f"- the adapter has the weights of step {provenance.adapter_step or provenance.num_steps} of "
            f"{provenance.num_steps}, the best validated one: {provenance.best_by} {provenance.best_value:.4f}"
        )
    if found or provenance.num_validation_rows:
        found.append(
            f"- validation used {provenance.num_validation_rows} held-out rows of its own; the scores above do not"
            " use them"
        )
    return found


def _fault_lines(result: Result) -> list[str]:
    """What the held-out scores do not show: overlap, forgetting and rows that may be wrong, for the card."""
    found = []
    if result.overlap is not None:
        found.append(f"- {result.overlap.sentence()[0].lower()}{result.overlap.sentence()[1:].rstrip('.')}")
    general = next((score for score in result.general if score.evaluation == MEASURE and score.base_value > 0), None)
    if general is not None:
        sentence = forgetting(general).sentence()
        found.append(f"- {sentence[0].lower()}{sentence[1:].rstrip('.')}")
    if result.suspicious:
        num = result.provenance.num_suspicious_rows or len(result.suspicious)
        found.append(f"- training rows that may be wrong, by their losses and contradictions: {num}")
    return found


def _use_with_peft(base: str, commit: str) -> list[str]:
    pinned = f", revision={json.dumps(commit)}" if commit else ""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{pinned})",
        'model = PeftModel.from_pretrained(base, ".")',
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)})",
    ]


def _use_with_transformers(base: str, commit: str) -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained(".")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ]


_USE = {"peft": _use_with_peft, "transformers": _use_with_transformers}
"""Lines that load the folder from within, by the library that does so."""


def _score_table(result: Result, noun: str) -> list[str]:
    if not result.scores:
        return []
    rows = [
        f"| {_cell(score.label)} ({'higher' if score.higher_is_better else 'lower'} is better) | "
        f"{score.base_value:.4f} | "
        f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}] | {score.difference:+.4f} "
        f"[{score.difference_low:+.4f}, {score.difference_high:+.4f}] | {score.num_rows} |"
        for score in result.scores
    ]
    return [
        "On held-out rows, with 95 % intervals; the difference is paired by row:",
        "",
        f"| measure | base | {noun} | difference | rows |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]


def _cell(text: str) -> str:
    """Text that stays within its cell of a table; a regular expression may have bars in it."""
    return text.replace("|", r"\|").replace("`", "'")


def _one_line(text: str) -> str:
    return " ".join(text.split())

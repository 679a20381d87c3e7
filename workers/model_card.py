"""The model card of a finished product: what it is, what it scored and how to use it."""

from __future__ import annotations

import json
from pathlib import Path

from workers.methods import get_method
from workers.recipe import Recipe
from workers.results import Provenance, Result


def write_card(folder: Path, recipe: Recipe, result: Result, *, hub_id: str, licence: str, commit: str) -> None:
    """README.md as model hubs read it. Every string in the front matter is JSON, which YAML contains."""
    base = hub_id or recipe.base_model.name
    method = get_method(recipe.method)
    product = method.product
    quoted = json.dumps
    tags = [recipe.method, recipe.objective, "peft-studio", f"base_model:{product.relation}:{base}"]
    front = [
        "---",
        f"base_model: {quoted(base)}",
        f"base_model_relation: {product.relation}",
        f"library_name: {product.library}",
        "pipeline_tag: text-generation",
        *([f"license: {quoted(licence)}"] if licence else []),
        f"tags: {quoted(tags)}",
        f"metrics: {quoted([score.evaluation for score in result.scores])}",
    ]
    if result.scores:
        front += [
            "model-index:",
            f"- name: {quoted(recipe.name)}",
            "  results:",
            "  - task: {type: text-generation, name: Text Generation}",
            f"    dataset: {{type: {quoted(recipe.dataset.name)}, name: {quoted(recipe.dataset.name + ' (held-out)')}, "
            f"split: held_out, revision: {quoted(recipe.dataset.sha256)}}}",
            "    metrics:",
        ]
        front += [
            f"    - {{type: {score.evaluation}, name: {quoted(score.label)}, value: {score.value:.6g}, args: "
            f"{{n: {score.num_rows}, baseline: {score.base_value:.6g}, ci95: [{score.low:.6g}, {score.high:.6g}]}}}}"
            for score in result.scores
        ]
    front.append("---")
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
        f"- recipe, versions and device: `studio.json`; answers of base and {product.noun}: `eval/samples.jsonl`",
    ]
    body += _choice_lines(recipe, result.provenance)
    if result.stopped_at_step is not None:
        body.append(f"- training was stopped by a person at step {result.stopped_at_step}")
    if result.provenance.verified is not None:
        outcome = "gives the same logits" if result.provenance.verified else "does NOT give the same logits"
        body.append(
            f"- this folder, loaded in plain {product.library}, {outcome} as in training "
            f"(largest difference {result.provenance.max_logit_difference:.2g})"
        )
    (folder / "README.md").write_text("\n".join([*front, *body]) + "\n", "utf-8")


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

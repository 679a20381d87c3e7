"""Score a downloaded adapter again in plain transformers and peft, and compare with what the studio said.

    python -m tests.bench.rescore ADAPTER_FOLDER BASE_MODEL_FOLDER DATASET.jsonl [--prompt question --answer answer]

Nothing of the studio is imported: the chat template, the trained span, the loss and the mean are made here by other
means. Prints both figures and their difference, and exits with 1 when they differ by more than 1e-3 nats per token.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-3
"""Nats per token."""


def answer_loss(model, tokenizer, prompt: str, answer: str) -> tuple[float, int]:
    """Summed cross-entropy of the answer and its end-of-turn token, and how many tokens that is."""
    turns = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(before + answer + tokenizer.eos_token, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if end > len(before) else -100
        for token, (_, end) in zip(ids.input_ids, ids.offset_mapping, strict=True)
    ]  # fmt: skip
    input_ids = torch.tensor([ids.input_ids])
    with torch.no_grad():
        # transformers' own loss is the mean over labels that are not -100, the first token never among them.
        loss = model(input_ids=input_ids, labels=torch.tensor([labels])).loss
    count = sum(label != -100 for label in labels[1:])
    return float(loss) * count, count


def row_losses(adapter: Path, base: Path, rows: list[dict], lines: list[int], prompt: str, answer: str):
    """(summed loss in nats, tokens) of each line, in float32 on the CPU, by the adapter on the base."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    return [answer_loss(model, tokenizer, rows[line - 1][prompt], rows[line - 1][answer]) for line in lines]


def read_rows(dataset: Path) -> list[dict]:
    return [json.loads(line) for line in dataset.read_text("utf-8").splitlines()]


def held_out_lines(adapter: Path) -> list[int]:
    return [json.loads(line)["line"] for line in (adapter / "eval" / "held_out.jsonl").read_text().splitlines()]


def said_loss(adapter: Path) -> float:
    scores = json.loads((adapter / "eval" / "scores.json").read_text())
    return float(next(score["value"] for score in scores if score["evaluation"] == "loss"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--prompt", default="question")
    parser.add_argument("--answer", default="answer")
    options = parser.parse_args()
    lines = held_out_lines(options.adapter)
    losses = row_losses(
        options.adapter, options.base, read_rows(options.dataset), lines, options.prompt, options.answer
    )
    said = said_loss(options.adapter)
    again = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    difference = again - said
    print(f"studio {said:.6f}  plain transformers + peft {again:.6f}  difference {difference:+.2e}  rows {len(lines)}")
    return abs(difference) > TOLERANCE


if __name__ == "__main__":
    sys.exit(main())

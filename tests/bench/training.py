"""Tokens per second and peak memory of real training steps on random weights of a size: one JSON line per run.

    python -m tests.bench.training ours --shape 8b --method lora --rows DIR
    python -m tests.bench.training suite --rows DIR
    python -m tests.bench.training merge DIR

A step is the product's own, from the loop that jobs run: collation, copies to the device, forward and backward pass,
clipping, the optimizer, and every event written as it would be to the worker's pipe. The rows are those of an
instruction dataset in their lengths: log-normal, 220 tokens in the median, 16 to 2,048, the first 35 % without loss.

A row that a folder has already is not measured again, so a run that broke off goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.bench.training_table import table
from tests.bench.workload import (
    ALL_SHAPES,
    ALPHA,
    BATCH,
    LEARNING_RATE,
    MAX_LENGTH,
    RANK,
    STEPS,
    WARM,
    row_lengths,
    row_tokens,
    sizes_of,
)
from tests.tiny import tokenizer_json
from workers import devices, training
from workers.base_folders import BaseFolder
from workers.base_models import prepare_process
from workers.base_scores import BaseScores
from workers.batching import TokenRows
from workers.checkpoints import trainable_parameters
from workers.events import Event, MessageEvent, Report, ShouldStop, StepEvent
from workers.examples import Example, Message
from workers.facts import DatasetFacts
from workers.methods import get_method
from workers.mixing import portions
from workers.recipe import Recipe
from workers.rendering import Rendered
from workers.results import OverlapRecord
from workers.shapes import ModelShape


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training", description=__doc__.split("\n\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    ours = kinds.add_parser("ours", help="the product's own steps")
    ours.add_argument("--shape", choices=sorted(ALL_SHAPES), default="tiny")
    ours.add_argument("--model", type=Path, help="folder of a Llama with weights of its own, instead of a shape")
    ours.add_argument("--method", default="lora")
    ours.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16", "nf4"))
    ours.add_argument("--batch", type=int, default=BATCH, help="rows of a step")
    ours.add_argument("--micro", type=int, help="rows at once; by default the whole step")
    ours.add_argument("--length", type=int, help="every row has this many tokens")
    ours.add_argument("--steps", type=int, default=STEPS)
    ours.add_argument("--warm", type=int, default=WARM, help="steps before the clock runs")
    ours.add_argument("--dropout", type=float, default=0.0, help="of low-rank branches; the product's default is 0.05")
    ours.add_argument("--lean", action="store_true", help="keep as little as possible for the way back")
    ours.add_argument("--memory-gib", type=float, help="of the GPU, what the run may take; it chooses what it keeps")
    ours.add_argument("--plain", action="store_true", help="the model's own blocks")
    ours.add_argument("--rows", type=Path, help="folder of the JSON lines; by default they are printed alone")
    suite = kinds.add_parser("suite", help="all of our rows that a GPU is measured by, in one process")
    suite.add_argument("--rows", type=Path, required=True)
    suite.add_argument("--only", default="", help="those whose options hold this")
    merge = kinds.add_parser("merge", help="the table of a folder's lines")
    merge.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.kind == "merge":
        print(table(options.folder))
    elif options.kind == "suite":
        for row in SUITE:
            if options.only in row:
                measure_once(parser.parse_args(["ours", *row.split(), "--rows", str(options.rows)]))
                gc.collect()
                torch.cuda.empty_cache()
    else:
        measure_once(options)


def measure_once(options: argparse.Namespace) -> None:
    """Prints a run's line and keeps it, unless it is there already."""
    name = "-".join(
        str(one)
        for one in (
            "ours", shape_name(options), options.method, options.precision, options.batch,
            options.micro or options.batch, options.length or "mixed", f"dropout{options.dropout:g}",
            "lean" if options.lean else "full", "plain" if options.plain else "fast",
        )
    )  # fmt: skip
    if options.memory_gib is not None:
        name += f"-within{options.memory_gib:g}"
    path = None if options.rows is None else options.rows / f"{name}.json"
    if path is not None and path.exists():
        print(f"{name} is measured already.")
        return
    line = json.dumps({"name": name} | measure(options))
    print(line)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n", "utf-8")


SUITE = (
    "--shape 8b --method qlora --precision nf4 --lean --batch 1 --length 2048",
    "--shape 8b --method lora --steps 40 --warm 10",
    "--shape 8b --method lora --memory-gib 16.5",
    "--shape 8b --method lora --dropout 0.05",
    "--shape 8b --method qlora --precision nf4",
    "--shape 8b --method prefix_tuning",
    "--shape 8b --method prompt_tuning",
    "--shape 8b --method bottleneck",
    "--shape 1b --method lora --steps 240 --warm 120",
    "--shape 135m --method lora --steps 480 --warm 200",
)
"""What the goals of training on a GPU are held against; the leanest first, whose peak of memory is looked at most."""


def shape_name(options: argparse.Namespace) -> str:
    return options.shape if options.model is None else options.model.resolve().name


@dataclass
class Ready:
    """A renderer of rows that are tokens already."""

    lengths: list[int]
    num_tokens: int

    def examples(self) -> Iterator[Example]:
        for line in range(1, len(self.lengths) + 1):
            yield Example(line, (Message("assistant", "."),))

    def try_render(self, example: Example) -> Rendered:
        length = self.lengths[example.line - 1]
        ids, masked = row_tokens(example.line, length, self.num_tokens)
        return Rendered(ids, [False] * masked + [True] * (length - masked), "", 0, [])


class Waits:
    """How long a GPU has nothing to do while the host makes batches: marks on the GPU's own clock, before and after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the batches of steps are watched."""
        if self._device.type != "cuda":
            yield
            return
        make = training._step_batches

        def watched(*args: Any) -> Iterator[Any]:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            found = list(make(*args))
            after.record()
            self._marks.append((before, after))
            return iter(found)

        with mock.patch.object(training, "_step_batches", watched):
            yield

    def share(self) -> float | None:
        """Share of the time between the first step and the last; None where nothing was watched."""
        if len(self._marks) < 2:
            return None
        torch.cuda.synchronize(self._device)
        waited = sum(before.elapsed_time(after) for before, after in self._marks[1:])
        return round(waited / self._marks[0][1].elapsed_time(self._marks[-1][1]), 5)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and gives what came out: rates over the steps behind the warm ones."""
    device = devices.choose_device()
    sizes = ALL_SHAPES[options.shape] if options.model is None else sizes_of(options.model)
    lengths = row_lengths(options.batch * options.steps, options.length)
    recipe = Recipe.model_validate(
        {
            "name": "bench", "base_model": {"name": shape_name(options)},
            "dataset": {"name": "random", "format": "alpaca"}, "method": options.method, "precision": options.precision,
            "settings": (
                {"rank": RANK, "alpha": ALPHA, "dropout": options.dropout} if "lora" in options.method else {}
            ),
            "training": {
                "learning_rate": LEARNING_RATE, "max_steps": options.steps, "batch_size": options.batch,
                "micro_batch_size": options.micro or options.batch, "max_length": MAX_LENGTH, "packing": True,
                "gradient_checkpointing": options.lean, "checkpoint_every_steps": 10**6, "validate_every_steps": 0,
            },
            "evaluation": {"num_samples_shown": 0},
        }
    )  # fmt: skip
    seen: list[tuple[float, float, StepEvent]] = []
    with tempfile.TemporaryDirectory() as temporary, open(os.devnull, "w") as pipe:  # noqa: PTH123

        def report(event: Event) -> None:
            pipe.write(event.model_dump_json() + "\n")
            if isinstance(event, StepEvent):
                seen.append((time.monotonic(), time.process_time(), event))
            elif isinstance(event, MessageEvent):
                print(event.text, file=sys.stderr)

        folder = Path(temporary)
        prepare_process()
        model = random_model(sizes, options.precision, device, options.model)
        limit_memory(device, options.memory_gib)
        run = make_run(recipe, lengths, sizes, folder, device, report, lambda: None)
        model.name_or_path = model.config._name_or_path = str(folder)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        method = get_method(options.method)
        devices.seed_everything(17)
        model = method.attach(model, method.read_settings(recipe.settings)).train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        waits = Waits(device)
        try:
            with nullcontext() if options.plain else training.computed_by_hand(run, model), waits.watched():
                training.optimise(run, model)
                keeping = [] if run.engine is None else list(run.engine.keeping)
                attention = None if run.engine is None else run.engine.attention_kernel
                num_recorded = 0 if run.recorder is None else run.recorder.num_recorded
                budget = None if run.budget is None else run.budget.tokens
        finally:
            limit_memory(device, None)
    warm, *later = [one for one in seen if one[-1].step >= options.warm]
    assert later, "no step is left behind the warm ones"
    seconds, processor_seconds = (later[-1][clock] - warm[clock] for clock in (0, 1))
    return {
        "contender": "ours", "shape": shape_name(options), "method": options.method, "precision": options.precision,
        "blocks": "by hand" if keeping else "the model's own",
        "attention": attention, "kept": {one: keeping.count(one) for one in sorted(set(keeping))},
        "recorded": num_recorded,
        "batch": options.batch, "at_once": options.micro or options.batch, "length": options.length,
        "dropout": options.dropout, "lean": options.lean, "memory_gib": options.memory_gib,
        "tokens_at_once": budget,
        "tokens_per_second": round((later[-1][-1].num_tokens - warm[-1].num_tokens) / seconds, 1),
        "tokens_per_step": round(sum(lengths) / options.steps), "steps": later[-1][-1].step - warm[-1].step,
        "seconds": round(seconds, 2), "processor_seconds": round(processor_seconds, 2),
        "num_trainable": sum(one.numel() for one in trainable_parameters(model).values()),
        "waits_for_data": waits.share(), "base_gib": round(before / 2**30, 2),
        "peak_gib": round(devices.peak_memory_bytes(device) / 2**30, 2), "first_loss": round(seen[0][-1].loss, 4),
        "last_loss": round(seen[-1][-1].loss, 4), "device": devices.device_name(device),
        "versions": training.versions(),
    }  # fmt: skip


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Has this process take no more than so much of a GPU's memory, or again all of it."""
    if device.type != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
    share = 1.0 if gib is None else gib * 2**30 / devices.memory_bytes(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def make_run(
    recipe: Recipe,
    lengths: list[int],
    sizes: dict[str, int],
    folder: Path,
    device: torch.device,
    report: Report,
    should_stop: ShouldStop,
) -> training.Run:
    """A run over random rows of these lengths, ready for its loop, in a folder of its own."""
    ready = Ready(lengths, sizes["vocab_size"])
    tokens, problems, num_cut = TokenRows.render(ready.examples(), ready, folder)  # type: ignore[arg-type]
    assert not problems
    assert not num_cut
    # Trained prompts and prefixes begin as a text's tokens.
    (folder / "tokenizer.json").write_text(tokenizer_json(), "utf-8")
    return training.Run(
        recipe,
        training.Folders(folder, folder, folder),
        1,
        device,
        BaseFolder(folder, shape_of(sizes), [], "", 0, has_chat_template=True, context_length=8192),
        ready,  # type: ignore[arg-type]
        training.Data(
            tokens,
            list(range(len(tokens))),
            [],
            [],
            0,
            0,
            "",
            OverlapRecord(num_held_out_rows=0, num_exact=0, num_near=0),
            [],
            portions([len(tokens)], []),
            frozenset(),
        ),
        DatasetFacts(len(tokens), sum(lengths), max(lengths)),
        training.facts_of_device(device),
        report,
        should_stop,
        BaseScores(folder / "base_scores"),
        visits=training.Visits(len(tokens)),
    )


def shape_of(sizes: dict[str, int]) -> ModelShape:
    """The sizes as estimates know them; nothing of them is used by a step."""
    return ModelShape(
        family="llama", num_layers=sizes["num_hidden_layers"], hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"], num_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_key_value_heads"], head_size=sizes["head_dim"],
        vocabulary_size=sizes["vocab_size"], context_length=8192, tied_embeddings=False, num_parameters=0, linears=(),
    )  # fmt: skip


def random_model(sizes: dict[str, int], precision: str, device: torch.device, folder: Path | None = None) -> Any:
    """A frozen Llama with random weights, made on the device itself, or one of a folder; quantised layer by layer for
    nf4."""
    config = LlamaConfig(
        **sizes, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    dtype = torch.float32 if precision == "float32" or device.type == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(17)
    try:
        with torch.device(device):
            model = (
                LlamaForCausalLM(config) if folder is None else LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
            )
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    if precision == "nf4":
        quantise(model, dtype)
    return model.eval()


def quantise(model: Any, dtype: torch.dtype) -> None:
    """Puts NF4 layers with quantised scales in the place of the blocks' linear layers."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                small = Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
                    device="meta",
                )  # fmt: skip
                weight = module.weight.data
                small.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
                small = small.to(weight.device)
                small.support_avx512bf16_for_cpu = False
                block.set_submodule(name, small)
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


if __name__ == "__main__":
    main()

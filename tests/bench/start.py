"""How soon a job starts: `python -m tests.bench.start trainer` and `python -m tests.bench.start submits`.

`trainer` measures the seconds from giving a job to a trainer until its first step is reported, cold (the process is
started for it) and warm (the process has just done a job on the same base). It needs neither Postgres nor Redis:

    python -m tests.bench.start trainer --base .data/base_models/SmolLM2-135M-Instruct
    python -m tests.bench.start trainer --shape 8b --precision bfloat16     (random weights; 16 GB on the disk)
    python -m tests.bench.start trainer --shape 8b --precision nf4          (with and without the quantised cache)

`submits` measures the seconds from queueing a job until an idle worker has claimed it, on servers and a worker of its
own; `--without-messages` loses every wake-up:

    python -m tests.bench.start submits --jobs 40
    python -m tests.bench.start submits --jobs 10 --without-messages
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.workload import LLAMA_SHAPES
from tests.tiny import CHAT_TEMPLATE, make_tiny_base, tiny_rows, tokenizer_json, write_rows
from workers.events import PHASES, EndedEvent, FailedEvent, PhaseEvent, StepEvent, parse_event

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.start", description=__doc__.split("\n\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    trainer = kinds.add_parser("trainer", help="cold against warm, without any server")
    trainer.add_argument("--base", type=Path, metavar="DIR", help="a base model folder; by default the tests' tiny one")
    trainer.add_argument("--shape", choices=sorted(LLAMA_SHAPES), help="make a base of this size with random weights")
    trainer.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "nf4", "int8"))
    trainer.add_argument("--method", help='by default "lora", or "qlora" on a quantised base')
    trainer.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    trainer.add_argument("--folder", type=Path, help="where files go; by default a temporary folder")
    submits = kinds.add_parser("submits", help="from queueing to claimed, on a real worker")
    submits.add_argument("--jobs", type=int, default=40)
    submits.add_argument("--workers", type=int, default=1)
    submits.add_argument("--without-messages", action="store_true", help="every wake-up is lost")
    options = parser.parse_args()
    if options.kind == "submits":
        from tests.bench.submits import measure

        measure(num_jobs=options.jobs, num_workers=options.workers, with_messages=not options.without_messages)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        base = options.base.resolve() if options.base else make_base(folder, options.shape)
        method = options.method or ("qlora" if options.precision in ("nf4", "int8") else "lora")
        measure_trainer(folder, base, options.precision, method, options.rounds)


# --- cold against warm -----------------------------------------------------------------------------------------------


def measure_trainer(folder: Path, base: Path, precision: str, method: str, rounds: int) -> None:
    """Prints a table of starts: cold, cold from the quantised cache where there is one, and warm."""
    write_rows(folder / "data.jsonl", tiny_rows(60))
    cache = folder / "quantised" if precision in ("nf4", "int8") else None
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"base {base.name}: {size / 1e9:.2f} GB of weights, held as {precision}; {method}")
    print("seconds from giving the job to its first step, and in what they were spent:\n")
    print(f"{'':28}{'first step':>11}  " + "".join(f"{name:>13}" for name in PHASES[:4]))
    starts: dict[str, list[Start]] = {}
    for turn in range(rounds):
        kinds = [("cold", None)]
        if cache is not None:
            shutil.rmtree(cache, ignore_errors=True)
            kinds = [("cold, quantises and keeps", cache), ("cold, quantised cache", cache)]
        for kind, where in kinds:
            with Trainer(folder) as trainer:
                starts.setdefault(kind, []).append(trainer.run(base, precision, method, seed=turn, cache=where))
                print(starts[kind][-1].line(kind), flush=True)
                if kind == kinds[-1][0]:
                    warm = trainer.run(base, precision, method, seed=100 + turn, cache=where)
                    starts.setdefault("warm", []).append(warm)
                    print(warm.line("warm"), flush=True)
    best = {kind: sorted(one.first_step for one in found)[len(found) // 2] for kind, found in starts.items()}
    print("\nmedians: " + ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in best.items()))
    for kind, seconds in best.items():
        if kind != "warm":
            print(f"warm is {best['warm'] / seconds:.1%} of {kind}")


@dataclass
class Start:
    """Seconds from giving the job until its first step was reported, and until each phase began."""

    first_step: float
    began: dict[str, float] = field(default_factory=dict)

    def line(self, kind: str) -> str:
        phases = list(self.began)
        ends = {name: self.began[after] for name, after in pairwise(phases)}
        ends[phases[-1]] = self.first_step
        spent = {name: ends[name] - self.began[name] for name in phases}
        # What comes before the first event is the process's own start: the interpreter and its imports.
        columns = "".join(f"{spent.get(name, 0.0):>13.2f}" for name in PHASES[:4])
        return f"{kind:28}{self.first_step:>11.2f}  {columns}   (process {next(iter(self.began.values())):.2f})"


class Trainer:
    """A resident trainer, driven as a worker drives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Trainer:
        reading, writing = os.pipe()
        self._started: float | None = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workers", "--resident", "--events", str(writing), "--supervised"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, pass_fds=[writing],
        )  # fmt: skip
        os.close(writing)
        self._events = os.fdopen(reading, "rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._events.close()

    def run(self, base: Path, precision: str, method: str, *, seed: int, cache: Path | None) -> Start:
        """Runs a short job to its end; the clock of a process's first job began with the process."""
        given = self._started or time.monotonic()
        self._started = None
        start = Start(0.0)
        recipe = _recipe(base, precision, method, seed)
        for event in self.events_of(recipe, base, self._folder / "data.jsonl", cache=cache):
            now = time.monotonic() - given
            if isinstance(event, PhaseEvent):
                start.began.setdefault(event.phase, now)
            if isinstance(event, StepEvent) and not start.first_step:
                start.first_step = now
            if isinstance(event, FailedEvent):
                raise SystemExit(f"{event.message} {event.next_step}")
        start.began = {name: at for name, at in start.began.items() if at <= start.first_step}
        return start

    def events_of(self, recipe: dict[str, Any], base: Path, data: Path, *, cache: Path | None = None) -> Iterator[Any]:
        """Gives it a job and yields what it says until the job's end; what the job leaves is removed then."""
        out = Path(tempfile.mkdtemp(dir=self._folder))
        file = out / "recipe.json"
        file.write_text(json.dumps(recipe), "utf-8")
        arguments = [str(file), "--out", str(out), "--base-model-folder", str(base), "--dataset-file", str(data)]
        if cache is not None:
            arguments += ["--quantised-cache", str(cache)]
        message = {"job": {"arguments": arguments, "log": str(out / "trainer.log")}}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()
        for line in self._events:
            event = parse_event(line)
            yield event
            if isinstance(event, EndedEvent):
                shutil.rmtree(out)
                return
        raise SystemExit(f"The trainer ended with status {self._process.wait()} in the middle of a job.")


def _recipe(base: Path, precision: str, method: str, seed: int) -> dict[str, Any]:
    return {
        "name": "Start",
        "base_model": {"name": base.name},
        "dataset": {"name": "sounds", "format": "alpaca"},
        "method": method,
        "precision": precision,
        "training": {
            "learning_rate": 1e-4, "batch_size": 4, "micro_batch_size": 4, "max_length": 128, "packing": False,
            "max_steps": 2, "gradient_checkpointing": False, "seed": seed,
        },
        # The base is scored before the first step: a forward pass over 6 rows, nothing generated.
        "split": {"held_out_share": 0.1},
        "evaluation": {"num_generated": 0},
    }  # fmt: skip


# --- bases -----------------------------------------------------------------------------------------------------------


def make_base(folder: Path, shape: str | None, sizes: dict[str, int] | None = None) -> Path:
    """The tests' tiny base, or a Llama of a real size with random weights in bfloat16, in files as hubs have them.

    `sizes` are those of a shape that LLAMA_SHAPES does not have.
    """
    if shape is None:
        return make_tiny_base(folder / "tiny")
    made = folder / f"random-{shape}"
    if (made / "model.safetensors.index.json").is_file():
        return made
    import torch
    from safetensors.torch import save_file

    made.mkdir(parents=True, exist_ok=True)
    sizes = sizes or LLAMA_SHAPES[shape]
    config = sizes | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (made / "config.json").write_text(json.dumps(config), "utf-8")
    (made / "tokenizer.json").write_text(tokenizer_json(), "utf-8")
    (made / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    (made / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192}), "utf-8"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(17)
    num_shards, layers = 4, sizes["num_hidden_layers"]
    where: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        wanted = _tensors(sizes, range(shard * layers // num_shards, (shard + 1) * layers // num_shards), shard == 0)
        weights = {}
        for key, size in wanted.items():
            if len(size) == 1:
                weights[key] = torch.ones(size, dtype=torch.bfloat16)
                continue
            values = torch.empty(size, dtype=torch.bfloat16, device=device)
            weights[key] = values.normal_(0.0, 0.02, generator=generator).cpu()
        save_file(weights, made / name, metadata={"format": "pt"})
        where |= dict.fromkeys(weights, name)
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in made.glob("*.safetensors"))}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": where}), "utf-8")
    return made


def _tensors(sizes: dict[str, int], layers: range, has_embeddings: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    queries = sizes["num_attention_heads"] * sizes["head_dim"]
    keys = sizes["num_key_value_heads"] * sizes["head_dim"]
    found: dict[str, tuple[int, ...]] = {}
    if has_embeddings:
        found["model.embed_tokens.weight"] = found["lm_head.weight"] = (sizes["vocab_size"], hidden)
        found["model.norm.weight"] = (hidden,)
    for layer in layers:
        block = f"model.layers.{layer}"
        found |= {
            f"{block}.self_attn.q_proj.weight": (queries, hidden),
            f"{block}.self_attn.k_proj.weight": (keys, hidden),
            f"{block}.self_attn.v_proj.weight": (keys, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, queries),
            f"{block}.mlp.gate_proj.weight": (inner, hidden),
            f"{block}.mlp.up_proj.weight": (inner, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, inner),
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
        }
    return found


if __name__ == "__main__":
    main()

"""Tokens per second of our generation against transformers' `generate` with left padding, in one run.

    python -m tests.bench.generation --shape 8b --device cuda --sizes 16 64 128
    python -m tests.bench.generation --shape tiny --device cpu --prompts 60

Both write the same tokens: a model with random weights never stops by itself, so each prompt has a length of its own
at which its answer ends. Left padding is measured with the prompts in the order in which they came, as one would call
it, at each number of rows at once that fits; the best of them counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.bench.workload import LLAMA_SHAPES, TINY
from workers.generation import generate
from workers.methods import get_method

PAD, END = 0, 2
NUM_CHECKED = 64


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.generation", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--shape", choices=[*sorted(LLAMA_SHAPES), "tiny"], default="tiny", help="random weights of this size"
    )
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="a base model folder instead of a shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--method", help="attach this method with its defaults")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--most", type=int, default=256, help="tokens of the longest answer")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="rows at once for generate")
    parser.add_argument("--ours", type=int, nargs="+", default=[0], help="rows at once for ours; 0: its own choice")
    options = parser.parse_args()
    model = make_model(options.shape, options.base, options.device)
    if options.method:
        method = get_method(options.method)
        torch.manual_seed(17)
        model = method.attach(model, method.read_settings({}))
    model.eval()
    prompts, limits = workload(options.prompts, options.most, model.config.get_text_config().vocab_size)
    print(f"{options.prompts} prompts of {sum(map(len, prompts)):,} tokens, answers of {sum(limits):,} tokens")
    # A few rows first, so that neither pays for what is loaded at first use.
    ours(model, prompts[:4], [2] * 4, None)
    theirs(model, prompts[:4], [2] * 4, 4)
    peer = [run(f"transformers, {size} rows", theirs, model, prompts, limits, size, options) for size in options.sizes]
    mine = [run(f"ours, {size or 'its'} rows", ours, model, prompts, limits, size, options) for size in options.ours]
    (peer_rate, peer_answers), (rate, answers) = (max(one, key=lambda found: found[0]) for one in (peer, mine))
    equal = sum(a == b for a, b in zip(answers, peer_answers, strict=True))
    print(f"ratio {rate / peer_rate:.2f}; {equal} of {len(prompts)} answers are equal")
    for name, found in (("transformers", peer_answers), ("ours", answers)):
        worst, mean = shortfall(model, prompts[:NUM_CHECKED], found)
        print(f"{name}: tokens fall short of the most probable one by {mean:.5f} deviations, {worst:.4f} at most")


def make_model(shape: str, base: Path | None, device: str) -> Any:
    """A model of the folder, or one with random weights made on the device itself; bfloat16 on a GPU."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if base is not None:
        return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).to(device)
    config = LlamaConfig(
        **(TINY if shape == "tiny" else LLAMA_SHAPES[shape]), max_position_embeddings=8192, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(17)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def workload(num_prompts: int, most: int, num_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of lognormal length around 120 tokens, 16 to 1024, and how long each answer is: seeded."""
    random = np.random.default_rng(17)
    lengths = np.clip(random.lognormal(np.log(120), 0.8, num_prompts), 16, 1024).astype(int)
    limits = np.clip(random.lognormal(np.log(most / 4), 0.8, num_prompts), 1, most).astype(int)
    return [random.integers(3, num_tokens, length).tolist() for length in lengths], limits.tolist()


def shortfall(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> tuple[float, float]:
    """How far written tokens are from the most probable ones of a plain pass over the row, in standard deviations of
    the logits: at most and on average. With random weights many are nearly equal, and rounding decides."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=False):
        ids_T = torch.tensor([prompt + answer], device=model.device)
        with torch.no_grad():
            logits_TV = model(input_ids=ids_T, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        chosen_T = logits_TV.gather(1, torch.tensor(answer, device=model.device)[:, None])[:, 0]
        found.append((logits_TV.max(dim=1).values - chosen_T) / logits_TV.std(dim=1))
    all_T = torch.cat(found)
    return float(all_T.max()), float(all_T.mean())


def ours(model: Any, prompts: list[list[int]], limits: list[int], size: int | None) -> list[list[int]]:
    return generate(model, prompts, max_new_tokens=limits, stop_ids=[], batch_size=size or None)


def theirs(model: Any, prompts: list[list[int]], limits: list[int], size: int) -> list[list[int]]:
    """transformers' `generate`, one static batch after another; a row's end token is planted at its limit."""
    device = next(model.parameters()).device
    answers: list[list[int]] = []
    for start in range(0, len(prompts), size):
        batch, wanted = prompts[start : start + size], limits[start : start + size]
        longest = max(map(len, batch))
        ids_BT = torch.tensor([[PAD] * (longest - len(row)) + row for row in batch], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device)
        limits_B = torch.tensor(wanted, device=device)

        def plant(
            ids_BT: torch.Tensor, scores_BV: torch.Tensor, longest: int = longest, limits_B: Any = limits_B
        ) -> Any:
            is_over_B = ids_BT.shape[1] - longest >= limits_B
            scores_BV[:, END] = torch.where(is_over_B, torch.inf, -torch.inf)
            return scores_BV

        found_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, do_sample=False, max_new_tokens=max(wanted) + 1,
            eos_token_id=END, pad_token_id=PAD, logits_processor=[plant],
        )  # fmt: skip
        found = found_BT[:, longest:].tolist()
        answers += [row[:limit] for row, limit in zip(found, wanted, strict=True)]
    return answers


def run(
    name: str,
    write: Callable[..., list[list[int]]],
    model: Any,
    prompts: list[list[int]],
    limits: list[int],
    size: int,
    options: argparse.Namespace,
) -> tuple[float, list[list[int]]]:
    """Tokens per second and the answers; a size that does not fit gives 0 and none."""
    is_gpu = options.device.startswith("cuda")
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        answers = write(model, prompts, limits, size)
    except torch.OutOfMemoryError:
        print(f"{name}: does not fit")
        return 0.0, []
    if is_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    rate = sum(map(len, answers)) / seconds
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if is_gpu else ""
    print(f"{name}: {rate:,.0f} tokens/s, {seconds:.1f} s{peak}", flush=True)
    return rate, answers


if __name__ == "__main__":
    main()

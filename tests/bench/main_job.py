"""The whole main job on real rows, through the browser of a running studio, with a control.

    python -m tests.bench.main_job LOGIN_LINK ROWS.jsonl BASE_MODEL_FOLDER --out DIR [--rows 560]

LOGIN_LINK is what `make run` prints; ROWS.jsonl has a question and an answer per line (GSM8K's form), of which the
shortest `--rows` are taken. Uploads them, trains LoRA, QLoRA, prefix tuning, bottleneck adapters and prompt tuning, and
LoRA on shuffled answers, and downloads each adapter into DIR. Then prints one line per adapter; scores the LoRA adapter
again in plain transformers + peft; and compares it with the control on the same true held-out rows, paired, with a 95 %
interval.

It can be started again after an interruption: what DIR has already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from tests.bench.rescore import TOLERANCE, held_out_lines, read_rows, row_losses, said_loss
from tests.end_to_end.browsing import SECOND, Browser, open_browser

TRUE, SHUFFLED = "true", "shuffled"
JOBS = {
    "lora": (TRUE, "lora"),
    "shuffled-control": (SHUFFLED, "lora"),
    "qlora": (TRUE, "qlora"),
    "prefix-tuning": (TRUE, "prefix_tuning"),
    "bottleneck": (TRUE, "bottleneck"),
    "prompt-tuning": (TRUE, "prompt_tuning"),
}
SETTINGS = {"evaluation.num_generated": "16", "evaluation.max_new_tokens": "80", "training.max_length": "512"}
PATIENCE_SECONDS = 4 * 3600


def write_datasets(source: Path, out: Path, num_rows: int) -> dict[str, Path]:
    """The shortest rows in their own order, and the same questions with the answers of other rows."""
    rows = read_rows(source)
    short = sorted(range(len(rows)), key=lambda i: len(rows[i]["question"]) + len(rows[i]["answer"]))[:num_rows]
    chosen = [rows[i] for i in sorted(short)]
    answers = [row["answer"] for row in chosen]
    random.Random(3).shuffle(answers)
    files = {TRUE: out / "true.jsonl", SHUFFLED: out / "shuffled.jsonl"}
    files[TRUE].write_text("".join(json.dumps(row) + "\n" for row in chosen))
    wrong = [{"question": row["question"], "answer": answer} for row, answer in zip(chosen, answers, strict=True)]
    files[SHUFFLED].write_text("".join(json.dumps(row) + "\n" for row in wrong))
    return files


def train(browser: Browser, out: Path, files: dict[str, Path]) -> None:
    """Queue every job that has no adapter in `out` yet, then wait for each and download it."""
    dataset_urls: dict[str, str] = {}
    job_urls: dict[str, str] = {}
    for name, (dataset, method) in JOBS.items():
        if (out / name).exists():
            continue
        if dataset not in dataset_urls:
            browser.upload(files[dataset], f"{out.name}-{dataset}")
            dataset_urls[dataset] = browser.page.url
        browser.page.goto(dataset_urls[dataset])
        browser.fill_new_job(name, method, **SETTINGS)
        job_urls[name] = browser.start_job()
        print(f"{name}: {job_urls[name]}", flush=True)
    for name, url in job_urls.items():
        browser.page.goto(url)
        browser.wait_until_done(seconds=PATIENCE_SECONDS)
        browser.page.get_by_role("link", name="Open the adapter").click()
        with browser.page.expect_download(timeout=60 * SECOND) as downloading:
            browser.page.get_by_role("link", name="Download").first.click()
        archive = out / f"{name}.zip"
        downloading.value.save_as(archive)
        aside = out / f".{name}"
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(aside)
        next(aside.rglob("adapter_config.json")).parent.rename(out / name)
        print(describe(out, name), flush=True)


def describe(out: Path, name: str) -> str:
    """One line of the table."""
    result = json.loads((out / name / "result.json").read_text())
    made = result["provenance"]
    loss = next(score for score in result["scores"] if score["evaluation"] == "loss")
    return (
        f"{name}: wall {made['wall_seconds']:.0f} s, {made['tokens_per_second']:.0f} tokens/s,"
        f" held-out loss {loss['base_value']:.4f} -> {loss['value']:.4f}, difference {loss['difference']:+.4f}"
        f" [{loss['difference_low']:+.4f}, {loss['difference_high']:+.4f}], n = {loss['num_rows']},"
        f" peak {made['peak_memory_bytes'] / 2**30:.2f} GiB, adapter {made['num_adapter_bytes'] / 1e6:.2f} MB"
    )


def check(out: Path, base: Path, files: dict[str, Path]) -> bool:
    """Score again by other means, and compare with the control; whether both come out as they must."""
    rows, lines = read_rows(files[TRUE]), held_out_lines(out / "lora")
    lora = row_losses(out / "lora", base, rows, lines, "question", "answer")
    control = row_losses(out / "shuffled-control", base, rows, lines, "question", "answer")
    counts = np.array([count for _, count in lora])
    sums = {name: np.array([loss for loss, _ in found]) for name, found in (("lora", lora), ("control", control))}
    again = sums["lora"].sum() / counts.sum()
    print(f"lora again in plain transformers + peft: {again:.6f}, the studio said {said_loss(out / 'lora'):.6f}")

    def difference(worse: np.ndarray, better: np.ndarray, tokens: np.ndarray) -> float:
        return float((worse.sum() - better.sum()) / tokens.sum())

    interval = bootstrap(
        (sums["control"], sums["lora"], counts), difference, paired=True, vectorized=False, n_resamples=5000, rng=17
    ).confidence_interval  # fmt: skip
    print(
        f"control minus lora on the true rows: {difference(sums['control'], sums['lora'], counts):+.4f}"
        f" [{interval.low:+.4f}, {interval.high:+.4f}] nats per token, n = {len(lines)}"
    )
    return abs(again - said_loss(out / "lora")) <= TOLERANCE and interval.low > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("link")
    parser.add_argument("rows", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", dest="num_rows", type=int, default=560)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = write_datasets(options.rows, options.out, options.num_rows)
    if any(not (options.out / name).exists() for name in JOBS):
        root, _, rest = options.link.partition("/login/link/")
        with open_browser(root) as browser:
            browser.sign_in(rest.strip("/"))
            train(browser, options.out, files)
    for name in JOBS:
        print(describe(options.out, name))
    return 0 if check(options.out, options.base, files) else 1


if __name__ == "__main__":
    sys.exit(main())

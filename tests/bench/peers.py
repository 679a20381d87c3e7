"""Tokens per second and peak memory of other trainers on the rows of `tests.bench.training`: one JSON line per run.

    python -m tests.bench.peers unsloth --shape 8b --method lora --rows DIR
    python -m tests.bench.training merge DIR     (these lines and ours, with ratios)

Contenders are transformers' Trainer with peft as its documentation shows it (`naive`), TRL's SFTTrainer and Unsloth,
each in the settings that it prefers: the first pads 8 rows at a time and recomputes activations; the others pack rows
to as many tokens as ours take in a step, with flash attention, and TRL with Liger's kernels. A shape's random weights
are written once, into the folder that `--base` names.

The peers live in an environment of their own: Python 3.12, torch 2.11, transformers 5.17, peft 0.21, accelerate 1.15,
trl 1.15.0, unsloth and unsloth_zoo 2026.10.9, liger-kernel 0.8.5, bitsandbytes 0.50.2, datasets 4.8.5, torchao 0.18.0,
cut-cross-entropy 25.1.1. On a machine that reaches no package index they travel as wheels, unpacked into a folder that
PYTHONPATH names. Where flash-attn is missing, `tests/bench/stand_ins` gives its names to torch's own kernels.

Several may be started at once with the same `--lock`: they import their libraries side by side and then train one
after another.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.bench.workload import (
    ALL_SHAPES,
    ALPHA,
    BATCH,
    BEGIN,
    END,
    LEARNING_RATE,
    MAX_LENGTH,
    PAD,
    RANK,
    STEPS,
    WARM,
    row_lengths,
    row_tokens,
    sizes_of,
)

STAND_INS = Path(__file__).with_name("stand_ins")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "trl", "unsloth", "liger-kernel", "bitsandbytes", "flash-attn",
)  # fmt: skip
SEED = 17
NAIVE_ROWS = 8
"""Rows that the plain trainer has in memory at once."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("contender", choices=("naive", "trl", "unsloth"))
    parser.add_argument("--shape", choices=sorted(ALL_SHAPES), default="tiny")
    parser.add_argument("--model", type=Path, help="folder of a model with weights of its own, instead of a shape")
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--checkpointing", choices=("on", "off", "default"), default="default")
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of a step")
    parser.add_argument("--micro", type=int, help="rows that padding trainers have in memory at once")
    parser.add_argument("--length", type=int, help="every row has this many tokens; nothing is packed then")
    parser.add_argument("--padded", action="store_true", help="also those that can pack pad instead")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--warm", type=int, default=WARM, help="steps before the clock runs")
    parser.add_argument("--base", type=Path, help="folder that keeps the random weights; by default a temporary one")
    parser.add_argument("--lock", type=Path, help="file that one process at a time holds from loading to its end")
    parser.add_argument("--rows", type=Path, help="folder of the JSON lines; by default they are printed alone")
    options = parser.parse_args()
    if not 0 < options.warm < options.steps:
        parser.error("--warm must be above 0 and below --steps")
    if options.batch % rows_at_once(options):
        parser.error(f"--batch must be a multiple of the {rows_at_once(options)} rows in memory at once; see --micro")
    together = "packed" if can_pack(options) else f"padded{rows_at_once(options)}"
    name = "-".join(
        str(one)
        for one in (
            options.contender, shape_name(options), options.method, options.batch, options.length or "mixed", together,
            f"checkpointing_{options.checkpointing}",
        )
    )  # fmt: skip
    path = None if options.rows is None else (options.rows / f"{name}.json").resolve()
    if path is not None and path.exists():
        print(f"{name} is measured already.")
        return
    for given in ("base", "lock", "model"):
        if getattr(options, given) is not None:
            setattr(options, given, getattr(options, given).resolve())
    began, before = time.monotonic(), Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        # Unsloth writes what it compiles, and trainers their output, where they are.
        os.chdir(temporary)
        try:
            line = json.dumps({"name": name} | measure(options, Path(temporary)))
        finally:
            os.chdir(before)
    print(line)
    print(f"{name}: {time.monotonic() - began:.0f} s in all", file=sys.stderr)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n", "utf-8")


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Trains and gives what came out: rates over the steps behind the warm ones."""
    prepare_process(scratch)
    import_libraries(options)
    with alone(options.lock):
        import torch
        from datasets import Dataset

        lengths = row_lengths(options.batch * options.steps, options.length)
        sizes = ALL_SHAPES[options.shape] if options.model is None else sizes_of(options.model)
        rows = [row_tokens(number, length, sizes["vocab_size"]) for number, length in enumerate(lengths, 1)]
        dataset = Dataset.from_dict(
            {
                "input_ids": [ids for ids, _ in rows],
                "labels": [[-100] * masked + ids[masked:] for ids, masked in rows],
            }
        )
        base = options.model or random_base(options.base or scratch, options.shape)
        meter = meter_class()(options.warm)
        arguments = common_arguments(options, scratch)
        if can_pack(options):
            arguments |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "packing": True,
                          "max_length": round(sum(lengths) / options.steps)}  # fmt: skip
        build = {"naive": naive_trainer, "trl": trl_trainer, "unsloth": unsloth_trainer}[options.contender]
        trainer, how = build(options, base, dataset, arguments)
        trainer.add_callback(meter)
        count_tokens(trainer, meter, padding_of(base))
        trainer.train()
        return {
            "contender": options.contender, "shape": shape_name(options), "method": options.method,
            "precision": "nf4" if options.method == "qlora" else dtype_of_frozen(trainer.model),
            # What it says itself: without flash attention some peers switch packing off again.
            "blocks": ", ".join(["packed" if getattr(trainer.args, "packing", False) else "padded", *how]),
            "checkpointing": options.checkpointing,
            "batch": options.batch, "length": options.length, **meter.found(),
            "num_trainable": sum(one.numel() for one in trainer.model.parameters() if one.requires_grad),
            "device": device_name(), "versions": versions(), "torch_threads": torch.get_num_threads(),
        }  # fmt: skip


def shape_name(options: argparse.Namespace) -> str:
    return str(options.shape if options.model is None else options.model.resolve().name)


def can_pack(options: argparse.Namespace) -> bool:
    """Whether rows shall be packed: by those that can, where their lengths differ."""
    return options.contender != "naive" and options.length is None and not options.padded


def rows_at_once(options: argparse.Namespace) -> int:
    """Rows of a batch with padding."""
    usual = NAIVE_ROWS if options.contender == "naive" else options.batch
    return int(min(options.micro or usual, options.batch))


def prepare_process(scratch: Path) -> None:
    """Asks no hub and reports to nobody; puts the stand-in for flash-attn on the path where there is none."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(scratch / "hub"), "WANDB_DISABLED": "true",
        "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth_compiled_cache"),
    }  # fmt: skip
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if importlib.util.find_spec("flash_attn") is None:
        sys.path.append(str(STAND_INS))


def import_libraries(options: argparse.Namespace) -> None:
    """What takes long: before the lock, and in the order that Unsloth demands, itself first."""
    if options.contender == "unsloth":
        importlib.import_module("unsloth")
    importlib.import_module("transformers")
    importlib.import_module("peft")
    if options.contender != "naive":
        importlib.import_module("trl")
    if options.contender == "trl" and has_gpu():
        importlib.import_module("liger_kernel.transformers")
    if options.method == "qlora":
        importlib.import_module("bitsandbytes")


@contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Holds the file against every other process that asks for it."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- the trainers ----------------------------------------------------------------------------------------------------


def common_arguments(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What is the same for all; nothing is logged, so that no peer waits for its device more than it must."""
    rows = rows_at_once(options)
    return {
        "output_dir": str(scratch / "out"), "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": options.batch // rows, "learning_rate": LEARNING_RATE,
        "max_steps": options.steps, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused",
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": SEED,
        "bf16": has_gpu(), "use_cpu": not has_gpu(),
    }  # fmt: skip


def naive_trainer(
    options: argparse.Namespace, base: Path, dataset: Any, arguments: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Trainer with peft: padded batches, activations recomputed unless that is off."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    recomputes = options.checkpointing != "off"
    model = load(base, options.method, "sdpa")
    if options.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recomputes)
    elif recomputes:
        model.enable_input_require_grads()
    trainer = Trainer(
        model=get_peft_model(model, lora()),
        args=TrainingArguments(**arguments, gradient_checkpointing=recomputes),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(base), label_pad_token_id=-100),
    )
    return trainer, [attention_of(trainer), recomputing(recomputes)]


def trl_trainer(
    options: argparse.Namespace, base: Path, dataset: Any, arguments: dict[str, Any]
) -> tuple[Any, list[str]]:
    """SFTTrainer: flash attention and Liger's kernels on a GPU; activations are recomputed by default."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    recomputes = options.checkpointing != "off"
    arguments = {"max_length": MAX_LENGTH} | arguments
    trainer = SFTTrainer(
        model=load(base, options.method, "flash_attention_2" if has_gpu() else "sdpa"),
        args=SFTConfig(**arguments, gradient_checkpointing=recomputes, use_liger_kernel=has_gpu()),
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=dataset,
        peft_config=lora(),
    )
    return trainer, [attention_of(trainer), *["Liger"] * has_gpu(), recomputing(recomputes)]


def unsloth_trainer(
    options: argparse.Namespace, base: Path, dataset: Any, arguments: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Unsloth's model in its SFTTrainer; by default it recomputes activations and moves what it keeps to the host."""
    import torch
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    arguments = {"max_length": MAX_LENGTH} | arguments
    recomputes: bool | str = {"default": "unsloth", "on": True, "off": False}[options.checkpointing]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=max(MAX_LENGTH, arguments["max_length"]), dtype=torch.bfloat16,
        load_in_4bit=options.method == "qlora", use_gradient_checkpointing=recomputes,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=recomputes, random_state=SEED,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        args=SFTConfig(**arguments),
    )
    # Only now: on a CPU, where it has another way in, nobody has imported its GPU half.
    dispatch = sys.modules.get("unsloth.utils.attention_dispatch")
    has_flash = dispatch is not None and dispatch.HAS_FLASH_ATTENTION
    attention = "flash_attention_2" if has_flash else "without flash attention"
    return trainer, [attention, "recomputing, offloaded" if recomputes == "unsloth" else recomputing(bool(recomputes))]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


def load(base: Path, method: str, attention: str) -> Any:
    """The base as peers load one: bfloat16 on a GPU and float32 on a CPU, or NF4 with quantised scales."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = dtype_of_base()
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, attn_implementation=attention, device_map={"": 0 if has_gpu() else "cpu"},
        quantization_config=quantisation if method == "qlora" else None,
    )  # fmt: skip
    model.config.use_cache = False
    return model


def padding_of(base: Path) -> int:
    from transformers import AutoTokenizer

    return int(AutoTokenizer.from_pretrained(base).pad_token_id)


def dtype_of_base() -> Any:
    import torch

    return torch.bfloat16 if has_gpu() else torch.float32


def dtype_of_frozen(model: Any) -> str:
    return str(next(one.dtype for one in model.parameters() if not one.requires_grad)).removeprefix("torch.")


def recomputing(is_on: bool) -> str:
    return "recomputing" if is_on else "without recomputing"


def attention_of(trainer: Any) -> str:
    return str(trainer.model.config._attn_implementation)


# --- what is measured ------------------------------------------------------------------------------------------------


def meter_class() -> type:
    """The callback's class, made when its base can be imported."""
    import torch
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        """Counts tokens that are no padding, and the time behind the warm steps between waits for the device."""

        def __init__(self, num_warm: int) -> None:
            self.num_warm = num_warm
            self.began = self.ended = (0.0, 0.0)
            self.last_step = 0
            # One entry per micro-batch: its step, tokens, those with loss, tokens with padding, loss.
            self.counts: list[tuple[int, Any, Any, int, Any]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if has_gpu():
                torch.cuda.reset_peak_memory_stats()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.last_step = state.global_step
            if state.global_step in (self.num_warm, state.max_steps):
                if has_gpu():
                    torch.cuda.synchronize()
                self.began, self.ended = self.ended, (time.monotonic(), time.process_time())

        def found(self) -> dict[str, Any]:
            """The measured fields of a row."""
            timed = [one for one in self.counts if one[0] >= self.num_warm]
            tokens, trained, places = (sum(int(one[which]) for one in timed) for which in (1, 2, 3))
            steps = self.last_step - self.num_warm
            seconds, processor_seconds = (end - begin for begin, end in zip(self.began, self.ended, strict=True))
            losses = [sum(float(one[4]) for one in self.counts if one[0] == step) for step in (0, self.last_step - 1)]
            return {
                "tokens_per_second": round(tokens / seconds, 1), "tokens_per_step": round(tokens / steps),
                "steps": steps,
                "seconds": round(seconds, 2), "processor_seconds": round(processor_seconds, 2),
                "padding_share": round(1 - tokens / places, 3),
                "trained_share": round(trained / tokens, 3), "peak_gib": round(peak_gib(), 2),
                "first_loss": round(losses[0], 4), "last_loss": round(losses[1], 4),
            }  # fmt: skip

    return Meter


def count_tokens(trainer: Any, meter: Any, padding: int) -> None:
    """Has every micro-batch counted on its device, without waiting for it; no row has the token of padding."""
    assert padding <= END, "rows may have the token that pads them"
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids, labels = inputs["input_ids"], inputs["labels"]
        counts = (trainer.state.global_step, (ids != padding).sum(), (labels != -100).sum(), ids.numel())
        loss = step(model, inputs, *args, **kwargs)
        meter.counts.append((*counts, loss.detach()))
        return loss

    trainer.training_step = counted


def peak_gib() -> float:
    import torch

    from workers.devices import choose_device, peak_memory_bytes

    return (torch.cuda.max_memory_allocated() if has_gpu() else peak_memory_bytes(choose_device())) / 2**30


def device_name() -> str:
    from workers.devices import choose_device
    from workers.devices import device_name as name_of

    return name_of(choose_device())


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def versions() -> dict[str, str]:
    """Versions of what is there; the stand-in for flash-attn has one of its own."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- the base --------------------------------------------------------------------------------------------------------


def random_base(folder: Path, shape: str) -> Path:
    """A folder with random weights of a shape and a tokenizer whose vocabulary is the model's; made unless there."""
    from tests.bench.start import make_base

    made = folder / f"random-{shape}"
    finished = made / "tokenizer_config.json"
    if finished.is_file() and (made / "generation_config.json").is_file():
        return made
    make_base(folder, shape, ALL_SHAPES[shape])
    write_tokenizer(made, ALL_SHAPES[shape]["vocab_size"])
    special = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    (made / "generation_config.json").write_text(json.dumps(special), "utf-8")
    return made


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """One word for each token of the model: peers compare the two sizes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {PAD: "<pad>", BEGIN: "<begin>", END: "<end>"}
    words = {names.get(token, f"w{token}"): token for token in range(num_tokens)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{END + 1}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=names[BEGIN], eos_token=names[END], pad_token=names[PAD],
        unk_token=f"w{END + 1}", model_max_length=8192,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()

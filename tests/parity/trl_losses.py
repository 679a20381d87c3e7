"""Trains an adapter by TRL's SFTTrainer and peft alone; runs in an environment of its own and imports nothing of ours.

    python trl_losses.py JOB.json STEPS.json

JOB.json names the folders, the rows in their order and the settings (`tests/parity/jobs.py` writes it); where its
`trainable` is null, the adapter begins as peft makes it from the seed. STEPS.json becomes a list with one object for
each optimizer step: loss, learning_rate and grad_norm.
"""

import json
import math
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer


class Recorder(TrainerCallback):
    """What the trainer logs of each step, and the learning rate that the step was taken with."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, *, optimizer, **kwargs):
        self.steps.append({"learning_rate": optimizer.param_groups[0]["lr"]})

    def on_log(self, args, state, control, *, logs, **kwargs):
        if "loss" in logs:
            self.steps[state.global_step - 1] |= {"loss": logs["loss"], "grad_norm": float(logs["grad_norm"])}


def main(job):
    base = AutoModelForCausalLM.from_pretrained(
        job["base_model"], dtype=torch.float32, quantization_config=quantization(job["precision"])
    )
    # Not PeftModel.from_pretrained: it refuses to train a saved prompt further.
    config = PeftConfig.from_pretrained(job["adapter"])
    config.inference_mode = False
    set_seed(job["seed"])
    model = get_peft_model(base, config)
    ids = [row["ids"] for row in job["rows"]]
    labels = [
        [token if trained else -100 for token, trained in zip(row["ids"], row["trained"], strict=True)]
        for row in job["rows"]
    ]
    recorder = Recorder()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=job["scratch"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=job["micro_batch_size"],
            gradient_accumulation_steps=job["batch_size"] // job["micro_batch_size"],
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            max_length=None,
            learning_rate=job["learning_rate"],
            lr_scheduler_type=job["schedule"],
            warmup_steps=0,
            weight_decay=job["weight_decay"],
            max_grad_norm=job["max_grad_norm"],
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=job["seed"],
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=AutoTokenizer.from_pretrained(job["base_model"]),
        callbacks=[recorder],
        optimizers=optimizers(model, job),
    )
    # Only now: TRL 1.16.0 rounds the adapter of a quantised base to bfloat16, and what we compare with is float32.
    if job["trainable"] is not None:
        begin(model, load_file(job["trainable"]))
    trainer.train()
    return recorder.steps


def begin(model, start):
    """Gives every trainable parameter its first value."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable.keys() == start.keys()
    for name, parameter in trainable.items():
        assert parameter.shape == start[name].shape
        parameter.data = start[name]


def quantization(precision):
    """How the base is held: None for float32, else bitsandbytes' NF4 as in the QLoRA paper, computing in float32."""
    if precision == "float32":
        return None
    assert precision == "nf4", precision
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def optimizers(model, job):
    """An optimizer and a schedule where the trainer's own settings cannot say what is wanted; else (None, None)."""
    if job["learning_rate_ratio"] is not None:
        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=job["learning_rate"],
            loraplus_lr_ratio=job["learning_rate_ratio"],
            loraplus_weight_decay=job["weight_decay"],
            weight_decay=job["weight_decay"],
        )
        return optimizer, None
    warmup = job["num_warmup_steps"]
    if not warmup:
        return None, None
    # transformers' own warm-up begins at zero and so wastes its first step; ours begins above it.
    num_steps = math.ceil(len(job["rows"]) / job["batch_size"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=job["weight_decay"])

    def factor(done):
        if done < warmup:
            return (done + 1) / (warmup + 1)
        progress = (done - warmup) / (num_steps - warmup)
        return {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[
            job["schedule"]
        ]

    return optimizer, LambdaLR(optimizer, factor)


if __name__ == "__main__":
    _, job_file, steps_file = sys.argv
    steps = main(json.loads(Path(job_file).read_text("utf-8")))
    Path(steps_file).write_text(json.dumps(steps), "utf-8")

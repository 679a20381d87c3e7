"""Trains an adapter by peft and a loop of a few lines; runs in an environment of its own and imports nothing of ours.

    python hand_loop_losses.py JOB.json STEPS.json

As trl_losses.py, but every row goes through the model alone: no padding, no packing, no masks to get wrong.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, get_scheduler


def main(job):
    assert (job["precision"], job["num_warmup_steps"], job["learning_rate_ratio"]) == ("float32", 0, None)
    model = load(job).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = [job["rows"][at : at + job["batch_size"]] for at in range(0, len(job["rows"]), job["batch_size"])]
    optimizer = torch.optim.AdamW(parameters, lr=job["learning_rate"], weight_decay=job["weight_decay"])
    schedule = get_scheduler(job["schedule"], optimizer, num_warmup_steps=0, num_training_steps=len(steps))
    done = []
    for rows in steps:
        num_trained = sum(sum(row["trained"][1:]) for row in rows)
        loss = 0.0
        for row in rows:
            ids, trained = torch.tensor(row["ids"]), torch.tensor(row["trained"])
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -len(ids) :]
            row_loss = cross_entropy(logits[:-1], ids[1:].where(trained[1:], -100), reduction="sum") / num_trained
            row_loss.backward()
            loss += row_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, job["max_grad_norm"])
        done.append({"loss": loss, "learning_rate": schedule.get_last_lr()[0], "grad_norm": norm.item()})
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return done


def load(job):
    """The base with the adapter as it begins."""
    base = AutoModelForCausalLM.from_pretrained(job["base_model"], dtype=torch.float32)
    # Not PeftModel.from_pretrained: it refuses to train a saved prefix further, and the networks are not saved.
    config = PeftConfig.from_pretrained(job["adapter"])
    config.inference_mode = False
    model = get_peft_model(base, config)
    start = load_file(job["trainable"])
    assert start.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.load_state_dict(start, strict=False)
    return model


if __name__ == "__main__":
    _, job_file, steps_file = sys.argv
    done = main(json.loads(Path(job_file).read_text("utf-8")))
    Path(steps_file).write_text(json.dumps(done), "utf-8")

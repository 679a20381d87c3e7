"""The `adapters` library's side of the comparison; runs in that library's own environment, without our code.

    python bottleneck_in_adapters.py REQUEST.json ANSWER.safetensors

The request names a base model's folder, our saved adapter, a configuration class of the library with arguments, and
token ids. The answer holds the logits, the loss and the gradients of the adapter, by the names of our file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
model = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32, attn_implementation="sdpa")
adapters.init(model)
model.add_adapter("ours", config=getattr(adapters, request["config"])(**request["arguments"]))
model.train_adapter("ours")
model.set_active_adapters("ours")

PLACES = {"self_attn": "attention_adapters", "mlp": "output_adapters"}
theirs: dict[str, torch.nn.Parameter] = {}
for index, layer in enumerate(model.model.layers):
    for ours, name in PLACES.items():
        found = getattr(layer, name).adapters
        if "ours" in found:
            for part, linear in (("down", found["ours"].adapter_down[0]), ("up", found["ours"].adapter_up)):
                prefix = f"base_model.model.model.layers.{index}.{ours}.bottleneck_{part}"
                theirs |= {f"{prefix}.weight": linear.weight, f"{prefix}.bias": linear.bias}

saved = load_file(request["adapter"])
assert saved.keys() == theirs.keys(), sorted(saved.keys() ^ theirs.keys())
trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
assert trained == {id(parameter) for parameter in theirs.values()}, "the library trains something else besides"
with torch.no_grad():
    for key, parameter in theirs.items():
        parameter.copy_(saved[key])

ids_BT = torch.tensor(request["ids"])
logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
loss.backward()
answer = {"logits": logits_BTV.detach(), "loss": loss.detach()[None]}
save_file(answer | {key: parameter.grad for key, parameter in theirs.items()}, sys.argv[2])

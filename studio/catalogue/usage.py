"""How to use an adapter elsewhere: snippets that run as they are pasted beside the unzipped folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from studio.catalogue.bundles import folder_name
from studio.catalogue.models import Adapter
from workers.errors import UnknownPluginError
from workers.methods import Method, get_method

# The values that vLLM's --max-lora-rank takes.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

_PEFT = """\
# pip install transformers peft
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = {base!r}  # a model hub's name, or a folder
ADAPTER = {folder!r}  # the folder in the zip
{companion}
tokenizer = AutoTokenizer.from_pretrained(BASE)
model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
model = PeftModel.from_pretrained(model, ADAPTER).eval()

{inputs}
output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
_COMPANION = """
import sys

sys.path.insert(0, ADAPTER)
import {module}  # lies in that folder and teaches peft this method

"""
_TRANSFORMERS = """\
# pip install transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = {folder!r}  # the folder in the zip

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL).eval()

{inputs}
output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
_CHAT_INPUTS = """\
messages = [{"role": "user", "content": "Hello! What can you do?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
_PLAIN_INPUTS = 'inputs = tokenizer("Hello! What can you do?\\n", return_tensors="pt")'


@dataclass(frozen=True)
class Usage:
    """One program that runs the adapter: a snippet, or a sentence that says why there is none."""

    key: str
    program: str
    language: str = ""
    code: str = ""
    note: str = ""


def usages(adapter: Adapter) -> list[Usage]:
    """What to paste where, one entry per program."""
    method = _method(adapter)
    if method is not None and method.product.is_whole_model:
        return [_transformers(adapter), _vllm_whole(adapter)]
    return [_peft(adapter), _vllm(adapter)]


def base_reference(adapter: Adapter) -> str:
    """How other programs find the base: its name on a hub, else its folder."""
    return adapter.base_model.hub_id or adapter.base_model.folder


def _method(adapter: Adapter) -> Method | None:
    try:
        return get_method(adapter.method)
    except UnknownPluginError:
        return None


def _peft(adapter: Adapter) -> Usage:
    method = _method(adapter)
    companion = method.companion_module if method else None
    teaching = _COMPANION.format(module=companion) if companion else ""
    code = _PEFT.format(base=base_reference(adapter), companion=teaching, **_shared(adapter))
    return Usage("peft", "PEFT", "Python", code)


def _transformers(adapter: Adapter) -> Usage:
    return Usage("transformers", "Transformers", "Python", _TRANSFORMERS.format(**_shared(adapter)))


def _shared(adapter: Adapter) -> dict[str, object]:
    """What every Python snippet is filled in with."""
    return {
        "folder": folder_name(adapter),
        "inputs": _CHAT_INPUTS if adapter.base_model.has_chat_template else _PLAIN_INPUTS,
        "max_new_tokens": int(adapter.recipe.get("evaluation", {}).get("max_new_tokens", 128)),
    }


def _vllm_whole(adapter: Adapter) -> Usage:
    # The weights are stored in float32; without the flag a server may choose float16, whose range is too small for
    # the activations of models that were trained in bfloat16.
    name = folder_name(adapter)
    code = f"vllm serve {shlex.quote(f'./{name}')} --served-model-name {shlex.quote(name)} --dtype bfloat16\n"
    return Usage("vllm", "vLLM", "Shell", code)


def _vllm(adapter: Adapter) -> Usage:
    method, rank = _method(adapter), adapter.recipe.get("settings", {}).get("rank")
    if method is None or "vllm" not in method.runs_in or not isinstance(rank, int):
        label, programs = (method.label, ", ".join(method.runs_in)) if method else (adapter.method, "peft")
        return Usage(
            "vllm", "vLLM", note=f"vLLM does not load {label} adapters. These programs load it as it is: {programs}."
        )
    largest = next((allowed for allowed in VLLM_RANKS if rank <= allowed), None)
    if largest is None:
        return Usage("vllm", "vLLM", note=f"vLLM takes ranks up to {VLLM_RANKS[-1]}; this adapter has rank {rank}.")
    name = folder_name(adapter)
    code = (
        f"vllm serve {shlex.quote(base_reference(adapter))} \\\n"
        f"  --enable-lora --max-lora-rank {largest} \\\n"
        f"  --lora-modules {shlex.quote(f'{name}=./{name}')}\n"
    )
    return Usage("vllm", "vLLM", "Shell", code)

"""Base models in memory: loaded by transformers from a folder that was checked first, frozen, at a precision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from workers.base_folders import read_base_folder
from workers.cpu import cpu_has_fast_bfloat16
from workers.device_errors import is_gpu_failure, is_out_of_memory
from workers.errors import BaseModelError, first_line
from workers.quantised import QuantisedCache
from workers.recipe import Precision
from workers.shapes import SOFT_CAPPED_FAMILIES

LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError)

COMPUTE_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "nf4": torch.bfloat16,
    "int8": torch.bfloat16,
}
"""Type of activations, and of what stays unquantised, by the precision of the base. QLoRA computes in bfloat16
(Dettmers et al. 2023, section 3)."""


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model, and its tokenizer for whoever asks: training reads tokenizer.json by itself."""

    model: Any
    folder: Path

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the folder; raises BaseModelError."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except LOAD_ERRORS as error:
            raise _cannot_load(error) from error


def load(
    folder: Path,
    precision: Precision,
    device: torch.device | str,
    *,
    compute_dtype: torch.dtype | None = None,
    checked: bool = False,
    cache: QuantisedCache | None = None,
    revision: str = "",
    say: Callable[[str], None] = lambda sentence: None,
) -> LoadedBase:
    """The base model of a folder, in eval mode, without any parameter that requires a gradient.

    Nothing is fetched and no code of the folder is run. On a CPU without fast bfloat16, nf4 and int8 compute in
    float32, which is faster there and loses nothing.

    Args:
        precision: how the weights are held: float32, bfloat16, nf4 (bitsandbytes, double quantisation) or int8.
        compute_dtype: overrides the type of activations for nf4 and int8.
        checked: the folder's files were checked in this process already; skips hashing them again.
        cache: where nf4 and int8 weights of this `revision` of the folder are kept; the same bits with and without.
        say: takes a sentence when the cache could not be used.

    Raises:
        BaseModelError: the folder is unsafe or incomplete, transformers does not know the model, the weights do not
            match its configuration or contain values that are not finite.
    """
    if not checked:
        revision = read_base_folder(folder).revision
    device = torch.device(device)
    if compute_dtype is None:
        compute_dtype = COMPUTE_DTYPES[precision]
        if precision in ("nf4", "int8") and device.type == "cpu" and not cpu_has_fast_bfloat16():
            compute_dtype = torch.float32
    prepare_process()
    quantisation = _quantisation(precision, compute_dtype)
    entry: Path | None = None
    model = None
    if cache is not None and quantisation is not None and revision:
        entry = cache.folder_of(
            revision,
            {
                "precision": precision, "quantisation": quantisation.to_dict(), "compute": str(compute_dtype),
                "device": device.type,
            },
        )  # fmt: skip
        if cache.find(entry, say=say):
            try:
                model = _from_folder(entry, compute_dtype, device, None)
                _pretend_from(model, folder)
            except (*LOAD_ERRORS, BaseModelError) as error:
                if is_out_of_memory(error) or is_gpu_failure(error):
                    raise
                cache.drop(entry, say=say)
    is_fresh = model is None
    if model is None:
        try:
            model = _from_folder(folder, compute_dtype, device, quantisation)
        except BaseModelError:
            raise
        except LOAD_ERRORS as error:
            if is_out_of_memory(error) or is_gpu_failure(error):
                raise
            raise _cannot_load(error) from error
    if precision == "nf4":
        _keep_autograd(model)
    model.requires_grad_(False)
    model.eval()
    _check_finite(model)
    if is_fresh and cache is not None and entry is not None:
        cache.store(model, entry, base_folder=folder, say=say)
    return LoadedBase(model, folder)


def prepare_process() -> None:
    """Sets what loading sets for the whole process; a process that has the model already needs no more."""
    # Its int8 kernel warns at every matrix product on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # torch 2.11 to 2.13 asks cuDNN for attention first on Hopper, which plans anew, slowly, for every shape that it has
    # not seen: with rows of all lengths, at nearly every step and for every written token.
    torch.backends.cuda.enable_cudnn_sdp(False)


def _from_folder(
    folder: Path, compute_dtype: torch.dtype, device: torch.device, quantisation: BitsAndBytesConfig | None
) -> Any:
    # Weights that were quantised before say so in their config.json, which a None here would overrule.
    named = {} if quantisation is None else {"quantization_config": quantisation}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=compute_dtype,
        device_map={"": device},
        **named,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation=_attention_of(folder),
        output_loading_info=True,
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise BaseModelError(
            f"The weights lack {len(missing)} of the model's parameters, among them {missing[0]}.",
            next_step="Copy the folder again; config.json and the weights do not belong together.",
        )
    return model


def _attention_of(folder: Path) -> str:
    """torch's fused attention, or transformers' own where scores are capped before the softmax, as Gemma 2 has it."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    # Of these families transformers offers the fused one for none, capped or not.
    return "eager" if is_capped or config.model_type in SOFT_CAPPED_FAMILIES else "sdpa"


def _pretend_from(model: Any, folder: Path) -> None:
    """Names the base's own folder as the model's: tokenizers and configuration are read there."""
    model.name_or_path = str(folder)
    model.config._name_or_path = str(folder)


def _cannot_load(error: Exception) -> BaseModelError:
    return BaseModelError(
        f"transformers cannot load the base model: {first_line(error)}",
        next_step="Choose a causal language model of a family that transformers supports.",
    )


def _keep_autograd(model: Any) -> None:
    """Keeps bitsandbytes from packing 4-bit layers for inference on a CPU.

    bitsandbytes 0.50.2: on a CPU with AVX512-BF16 the first forward in eval mode repacks each Linear4bit for a
    kernel that has no autograd, and it stays repacked in train mode: gradients are then silently wrong.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _quantisation(precision: Precision, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def _check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise BaseModelError(
                f"The weights contain values that are not finite, in {name}.",
                next_step="Copy the folder again, or choose another precision if the model was saved in float32.",
            )

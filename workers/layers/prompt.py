"""Prompt tuning and P-tuning: trained embeddings stand before every row, and the frozen base reads them as tokens.

The adapters' files are peft's (PROMPT_TUNING and P_TUNING, `prompt_embeddings`), and so are their numbers: plain peft
gives the same logits and answers for what is saved here. peft 0.21.2 puts the embeddings in front of the whole tensor
and forgets the rows in it, which this module answers (tests/workers/methods/test_prompt_tuning.py holds a test for
each that fails once peft is mended):

- packed rows share one prompt and see one another: position ids are thrown away, and with them where a row begins;
- a row that is padded on the left gets other answers than alone, because its position ids are thrown away too: the
  padding moves it away from its prompt;
- logits of virtual tokens come out in front of the row's own, so that positions in the batch no longer fit;
- text initialisation asks AutoTokenizer, adds its special tokens to the prompt, and leaves a local path in the file.

Here the embeddings join before the decoder and their hidden states leave behind it, so that neither the caller nor
the output layer ever meets them. Each packed row has its own copy: positions 0..P-1 are the prompt, the row's own
begin at P, and transformers' mask sees one row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from peft import PromptEncoderConfig, PromptTuningConfig, TaskType
from torch import Tensor, nn
from transformers.masking_utils import find_packed_sequence_indices

from workers.layers.virtual_tokens import VirtualTokenModel, load_virtual_tokens, read_tokenizer, text_ids

# B rows, T tokens of a row's own, P virtual tokens, S both together, H hidden, V vocabulary.

NUM_COMMON = 5000
"""Ids that a random prompt is drawn from: the most common ones (Lester et al. 2021, section 3.2). Vocabularies
that are built by merging begin with them."""


class PromptTunedModel(VirtualTokenModel):
    """A base with a trained prompt of embeddings."""

    def __init__(self, model: Any, peft_config: Any, adapter_name: str = "default", **kwargs: Any):
        super().__init__(model, peft_config, adapter_name, **kwargs)
        decoder = model.get_decoder()
        self._own: _Own | None = None
        self._hooks = (
            decoder.register_forward_pre_hook(self._join, with_kwargs=True),
            decoder.register_forward_hook(self._leave),
        )

    def prompt(self) -> Tensor:
        """The trained embeddings: (P, H), float32."""
        encoder: Any = self.prompt_encoder[self.active_adapter]
        weight: Tensor = encoder.embedding.weight
        config: Any = self.active_peft_config
        if config.inference_mode:
            return weight
        tokens_P = self.prompt_tokens[self.active_adapter].to(weight.device)
        prompt_PH: Tensor = encoder(tokens_P[None])[0]
        return prompt_PH

    def _join(self, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Puts the prompt before every row that begins in this pass, and moves masks and positions behind it."""
        self._own = None
        if self._adapters_disabled:
            return None
        if args:
            (ids,) = args
            kwargs = kwargs | {"input_ids": ids}
        inputs = dict(kwargs)
        own_BTH = inputs.pop("inputs_embeds", None)
        ids = inputs.pop("input_ids", None)
        if own_BTH is None:
            base: Any = self.base_model
            own_BTH = base.get_input_embeddings()(ids)
        config: Any = self.active_peft_config
        size: int = config.num_virtual_tokens
        mask = inputs.get("attention_mask")
        positions_BT = inputs.get("position_ids")
        cache = inputs.get("past_key_values")
        begun = cache is not None and cache.get_seq_length() > 0
        has_made_mask = isinstance(mask, dict) or (mask is not None and mask.dim() != 2)
        if (cache is not None and cache.is_compileable) or (has_made_mask and not begun):
            raise ValueError(
                "A static cache, or a mask made for one, has no room for a trained prompt. Generate with the default "
                "cache and give the mask as rows by tokens."
            )
        if mask is not None and not has_made_mask:
            inputs["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], size), mask], dim=1)
        if begun:
            # The prompt is in the cache already.
            if positions_BT is not None:
                inputs["position_ids"] = positions_BT + size
            return (), inputs | {"inputs_embeds": own_BTH}
        prompt_PH = self.prompt().to(own_BTH.device, own_BTH.dtype)
        if positions_BT is not None:
            positions_BT = positions_BT.expand(own_BTH.shape[:2])
            # As transformers has it: with a mask, a row of the tensor is one row, whatever its positions.
            packed_BT = find_packed_sequence_indices(positions_BT) if mask is None else None
            if packed_BT is not None:
                joined_BSH, joined_BS, places_BT = _join_packed(prompt_PH, own_BTH, positions_BT, packed_BT)
                self._own = _Own(size, places_BT)
                # A cache of packed rows cannot be continued, and transformers masks packed rows only without one.
                return (), inputs | {"inputs_embeds": joined_BSH, "position_ids": joined_BS, "use_cache": False}
            front_BP = torch.arange(size, device=positions_BT.device).expand(own_BTH.shape[0], -1)
            inputs["position_ids"] = torch.cat([front_BP, positions_BT + size], dim=1)
        self._own = _Own(size, None)
        prompt_BPH = prompt_PH.expand(own_BTH.shape[0], -1, -1)
        return (), inputs | {"inputs_embeds": torch.cat([prompt_BPH, own_BTH], dim=1)}

    def _leave(self, _decoder: nn.Module, _args: Any, output: Any) -> Any:
        """Takes the hidden states of the prompt out again."""
        own, self._own = self._own, None
        if own is not None:
            output["last_hidden_state"] = own.take(output["last_hidden_state"])
            if output.get("hidden_states") is not None:
                output["hidden_states"] = tuple(map(own.take, output["hidden_states"]))
        return output

    def unload(self) -> Any:
        """The base as it was before the prompt was attached."""
        for hook in self._hooks:
            hook.remove()
        return self.base_model


class _Own:
    """Where the tokens of the rows' own stand among the joined ones."""

    def __init__(self, num_virtual_tokens: int, places_BT: Tensor | None) -> None:
        self._num_virtual_tokens = num_virtual_tokens
        self._places_BT = places_BT

    def take(self, joined_BSH: Tensor) -> Tensor:
        """The hidden states of the rows' own tokens, (B, T, H)."""
        if self._places_BT is None:
            return joined_BSH[:, self._num_virtual_tokens :]
        return joined_BSH.gather(1, self._places_BT[:, :, None].expand(-1, -1, joined_BSH.shape[-1]))


def _join_packed(
    prompt_PH: Tensor, own_BTH: Tensor, positions_BT: Tensor, packed_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings and positions with a prompt before every packed row, and the places of the rows' own tokens.

    `packed_BT` numbers the packed rows from 0. Where one tensor row holds fewer of them than another, it is filled up
    at its end; a filled place has position 0 and so is a row of its own.
    """
    size = prompt_PH.shape[0]
    front_P = torch.arange(size, device=positions_BT.device)
    joined, positions = [], []
    for own_TH, positions_T, packed_T in zip(own_BTH, positions_BT, packed_BT, strict=True):
        lengths = packed_T.unique_consecutive(return_counts=True)[1].tolist()
        parts = zip(own_TH.split(lengths), positions_T.split(lengths), strict=True)
        pairs = [([prompt_PH, own], [front_P, place + size]) for own, place in parts]
        joined.append(torch.cat([part for embeddings, _ in pairs for part in embeddings]))
        positions.append(torch.cat([part for _, places in pairs for part in places]))
    places_BT = torch.arange(packed_BT.shape[1], device=packed_BT.device) + (packed_BT + 1) * size
    pad = nn.utils.rnn.pad_sequence
    return pad(joined, batch_first=True), pad(positions, batch_first=True), places_BT


def attach_prompt(
    model: Any, *, num_virtual_tokens: int, init: Literal["random", "text"], init_text: str
) -> PromptTunedModel:
    """The base with a prompt that begins as the embeddings of real tokens: of a text, or drawn from the vocabulary.

    Drawn tokens beat uniform noise by far below a few billion parameters (Lester et al. 2021, section 3.2 and figure
    3b); peft's own comparison has 0.39 against 0.25. peft's format keeps the weights alone, so its configuration says
    RANDOM in either case: TEXT would ask for a tokenizer and its path.

    Raises:
        RecipeError: the starting text has no tokens.
    """
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens)
    adapted = PromptTunedModel(model, config)
    ids = text_ids(model, init_text, num_virtual_tokens) if init == "text" else _common_ids(model, num_virtual_tokens)
    embeddings = model.get_input_embeddings()
    with torch.no_grad():
        # What the layer gives, not its weight: Gemma's multiplies by the root of its width; the prompt joins behind it.
        start_PH = embeddings(torch.tensor(ids, device=embeddings.weight.device))
    encoder: Any = adapted.prompt_encoder["default"].float()
    with torch.no_grad():
        encoder.embedding.weight.copy_(start_PH)
    return adapted


def attach_prompt_encoder(
    model: Any, *, num_virtual_tokens: int, encoder: Literal["MLP", "LSTM"], encoder_size: int
) -> PromptTunedModel:
    """The base with a prompt that a small network makes from trained embeddings (P-tuning); the saved file holds only
    what it makes."""
    config = PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=num_virtual_tokens,
        encoder_reparameterization_type=encoder,
        encoder_hidden_size=encoder_size,
    )
    adapted = PromptTunedModel(model, config)
    adapted.prompt_encoder["default"].float()
    return adapted


def load_prompt(model: Any, folder: Path) -> PromptTunedModel:
    """The base with a saved prompt of prompt tuning, not trainable."""
    return load_virtual_tokens(PromptTunedModel, PromptTuningConfig, model, folder)


def load_prompt_encoder(model: Any, folder: Path) -> PromptTunedModel:
    """The base with a saved prompt of P-tuning, not trainable."""
    return load_virtual_tokens(PromptTunedModel, PromptEncoderConfig, model, folder)


def _common_ids(model: Any, count: int) -> list[int]:
    """`count` ids drawn from the most common ones, none of them special, each once while there are enough."""
    special = read_tokenizer(model).get_added_tokens_decoder()
    size = model.get_input_embeddings().num_embeddings
    common = [token for token in range(min(size, NUM_COMMON + len(special))) if token not in special]
    order = [token for _ in range(count // len(common) + 1) for token in torch.randperm(len(common)).tolist()]
    return [common[token] for token in order[:count]]

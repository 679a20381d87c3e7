"""P-tuning: a trained prompt that a small network makes while training (Liu et al. 2021)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from workers.methods import MethodSettings
from workers.methods._virtual_tokens import VirtualTokenMethod
from workers.shapes import ModelShape

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PTuningSettings(MethodSettings):
    """Settings of P-tuning."""

    num_virtual_tokens: int = Field(
        20,
        ge=1,
        le=1024,
        title="Virtual tokens",
        description="Length of the trained prompt. More can hold more, and takes as many tokens of the context.",
        json_schema_extra={
            "unit": "tokens",
            "source": "peft's method comparison: 0.37 with 20, no better with 50",
        },
    )
    encoder: Literal["MLP", "LSTM"] = Field(
        "MLP",
        title="Encoder",
        description="The network that makes the prompt: three linear layers, or the paper's bidirectional LSTM of two "
        "layers and two linear ones, which is larger and slower. It is dropped when saving.",
        json_schema_extra={"source": "peft's method comparison: 0.37 with the MLP, 0.34 with the LSTM"},
    )
    encoder_size: int = Field(
        0,
        ge=0,
        le=8192,
        title="Encoder size",
        description="Width of the encoder's hidden layers. 0 takes the width of the base: the whole of it for the MLP, "
        "half of it for each direction of the LSTM.",
        json_schema_extra={"unit": "features", "source": "the code of Liu et al. 2021; peft's method comparison"},
    )


class PTuning(VirtualTokenMethod):
    name = "p_tuning"
    label = "P-tuning"
    order = 62
    summary = "A trained prompt made by a small network: steadier than prompt tuning, and as small once trained."
    choose_when = (
        "Prompt tuning whose virtual tokens come out of a small network while training, which makes the early "
        "steps steadier. The network is dropped when saving, so the adapter is as small as a prompt."
    )
    source = "Liu et al. 2021, GPT Understands, Too"
    Settings: type[MethodSettings] = PTuningSettings
    # peft's method comparison on MetaMathQA (Llama-3.2-3B), MLP: 0.367 with 1e-3, 0.371 with 1e-4, 0.355 with 5e-3;
    # after 250 of 5000 steps 1e-3 is far ahead of 1e-4. Our own 15 steps on SmolLM2 and GSM8K: held-out loss from 1.98
    # to 1.88 with 1e-3, to 1.99 with 1e-4.
    learning_rate = 1e-3
    has_hand_written_blocks = True
    lengthens_rows = True
    peft_type = "P_TUNING"

    def attach(self, model: PreTrainedModel, settings: Any) -> PeftModel:
        """The base with a prompt and its encoder in float32."""
        from workers.layers.prompt import attach_prompt_encoder

        embeddings: Any = model.get_input_embeddings()
        return attach_prompt_encoder(
            model,
            num_virtual_tokens=settings.num_virtual_tokens,
            encoder=settings.encoder,
            encoder_size=_encoder_size(settings, embeddings.embedding_dim),
        )

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """The base with a saved prompt, in our own forward pass instead of peft's."""
        from workers.layers.prompt import load_prompt_encoder

        return load_prompt_encoder(model, folder)

    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """The encoder's inputs, one for every virtual token, and the encoder itself."""
        width = shape.hidden_size
        size = _encoder_size(settings, width)
        inputs = settings.num_virtual_tokens * width
        if settings.encoder == "MLP":
            return int(inputs + _linear(width, size) + _linear(size, size) + _linear(size, width))
        lstm = _lstm_direction(width, size) * 2 + _lstm_direction(2 * size, size) * 2
        return int(inputs + lstm + _linear(2 * size, 2 * size) + _linear(2 * size, width))


def _encoder_size(settings: Any, width: int) -> int:
    """Features of the encoder's hidden layers, for a base of this width."""
    return int(settings.encoder_size) or (width if settings.encoder == "MLP" else width // 2)


def _linear(size_in: int, size_out: int) -> int:
    """Parameters of a linear layer with a bias."""
    return (size_in + 1) * size_out


def _lstm_direction(size_in: int, size: int) -> int:
    """Parameters of one direction of one LSTM layer: four gates that read input and state, with two biases each."""
    return 4 * size * (size_in + size + 2)


PLUGIN = PTuning()

"""Prompt tuning: trained embeddings before every row (Lester et al. 2021)."""

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


class PromptTuningSettings(MethodSettings):
    """Settings of prompt tuning."""

    num_virtual_tokens: int = Field(
        20,
        ge=1,
        le=1024,
        title="Virtual tokens",
        description="Length of the trained prompt. More can hold more, and takes as many tokens of the context.",
        json_schema_extra={
            "unit": "tokens",
            "source": "Lester et al. 2021, section 3.2: beyond 20 tokens little is gained",
        },
    )
    init: Literal["random", "text"] = Field(
        "random",
        title="Start",
        description='"random" begins with the embeddings of tokens drawn from the vocabulary, "text" with those of the '
        "starting text.",
        json_schema_extra={"source": "peft's method comparison: 0.39 with drawn tokens, 0.25 with noise"},
    )
    init_text: str = Field(
        "Read the request with care and give a correct, complete and helpful answer in the form that is asked for.",
        min_length=1,
        max_length=4000,
        title="Starting text",
        description='The task in words, repeated or cut to length. Counts only when the start is "text".',
        json_schema_extra={"source": "Lester et al. 2021, section 3.2: words of the task are a good start"},
    )


class PromptTuning(VirtualTokenMethod):
    name = "prompt_tuning"
    label = "Prompt tuning"
    order = 60
    summary = "A trained prompt before every row: the fewest parameters, best on large bases and narrow tasks."
    choose_when = (
        "A few thousand numbers in front of the request, for the smallest adapter of all and large bases (billions "
        "of parameters), where it comes close to full fine-tuning. On small bases and with few steps it learns "
        "least of all methods here."
    )
    source = "Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning"
    Settings: type[MethodSettings] = PromptTuningSettings
    # peft's method comparison on MetaMathQA (Llama-3.2-3B): 0.391 with AdamW at 1e-3 and tokens drawn from the
    # vocabulary, over 5000 steps. The paper's 0.3 is for Adafactor. Short runs on small bases with large embeddings
    # want more: on SmolLM2 and GSM8K our held-out loss went from 2.01 to 1.93 in 15 steps with 1e-2, to 1.98 in 25
    # with 1e-3.
    learning_rate = 1e-3
    has_hand_written_blocks = True
    lengthens_rows = True
    peft_type = "PROMPT_TUNING"

    def attach(self, model: PreTrainedModel, settings: Any) -> PeftModel:
        """The base with a prompt in float32.

        Raises:
            RecipeError: the starting text has no tokens.
        """
        from workers.layers.prompt import attach_prompt

        return attach_prompt(
            model,
            num_virtual_tokens=settings.num_virtual_tokens,
            init=settings.init,
            init_text=settings.init_text,
        )

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        """The base with a saved prompt, in our own forward pass instead of peft's."""
        from workers.layers.prompt import load_prompt

        return load_prompt(model, folder)

    def num_trainable(self, settings: Any, shape: ModelShape) -> int:
        """One embedding for every virtual token."""
        return int(settings.num_virtual_tokens * shape.hidden_size)


PLUGIN = PromptTuning()

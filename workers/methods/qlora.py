"""QLoRA: LoRA on a base held in 4 bits (Dettmers et al. 2023)."""

from __future__ import annotations

from pydantic import Field

from workers.methods import MethodSettings
from workers.methods.lora import Lora, LoraSettings


class QloraSettings(LoraSettings):
    """Settings of QLoRA: those of LoRA with the paper's defaults."""

    rank: int = Field(
        64,
        ge=1,
        le=512,
        title="Rank",
        description="Size of the update's bottleneck. Too low: it cannot hold what is to be learned. Too high: memory "
        "and time for nothing. 8, 16, 32, 64 and 128 are the ranks that vLLM serves without rounding up.",
        json_schema_extra={"source": "QLoRA (Dettmers et al. 2023), appendix B.2"},
    )
    alpha: float = Field(
        16.0,
        gt=0,
        le=4096,
        title="Alpha",
        description="The update is multiplied by alpha / rank. Too low: little is learned. Too high: the loss jumps.",
        json_schema_extra={"source": "QLoRA (Dettmers et al. 2023), appendix B.2"},
    )
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        title="Dropout",
        description="Share of an adapter's inputs that is dropped while training; 0 is fastest. Too low: a small "
        "dataset is memorised. Too high: little is learned.",
        json_schema_extra={"source": "QLoRA (Dettmers et al. 2023), appendix B.2, for models up to 13B"},
    )


class Qlora(Lora):
    name = "qlora"
    label = "QLoRA"
    order = 20
    summary = "LoRA on a base held in 4 bits: a quarter of the memory, a little slower and less exact."
    choose_when = (
        "The base does not fit into the GPU in 16 bits. It needs a quarter of the memory for the base and learns "
        "nearly the same; each step is a little slower, and the 4-bit base itself is slightly worse. Where the "
        "base fits in 16 bits, LoRA is faster and more exact."
    )
    source = "Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs"
    Settings: type[MethodSettings] = QloraSettings
    precisions = ("nf4", "int8")
    # Dettmers et al. 2023, table 9, for 7B and 13B.
    learning_rate = 2e-4
    # On the base reloaded in full precision (workers.merging): written into 4-bit weights, most of the adapter would be
    # rounded away. What is merged is then a little different from what was scored, for the base's own weights are.
    can_merge = True


PLUGIN = Qlora()

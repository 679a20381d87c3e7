"""Shapes of a base model, read from its config.json without torch: what estimates and formulas need."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

SOFT_CAPPED_FAMILIES = frozenset({"gemma2", "vaultgemma"})
"""Those whose attention scores are capped before the softmax: s becomes cap x tanh(s / cap) (Gemma 2, 2024, section 2).
torch's fused attention cannot do it, so that the scores of all pairs of tokens are in memory."""


class LinearShape(BaseModel):
    """One kind of linear layer in a block: its name's last part, and its sizes in features."""

    model_config = ConfigDict(frozen=True)
    name: str
    in_features: int
    out_features: int


class ModelShape(BaseModel):
    """A decoder-only transformer as numbers. Sizes are in features, counts in layers, heads or tokens."""

    model_config = ConfigDict(frozen=True)
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocabulary_size: int
    context_length: int
    tied_embeddings: bool
    num_parameters: int
    linears: tuple[LinearShape, ...]

    @property
    def key_value_size(self) -> int:
        """Features of one layer's keys (or values) for one token."""
        return self.num_key_value_heads * self.head_size

    @property
    def caps_attention(self) -> bool:
        """Whether its attention scores are capped, and so all of them held."""
        return self.family in SOFT_CAPPED_FAMILIES

    def linear_names(self) -> list[str]:
        """Names a person may choose target modules from."""
        return [linear.name for linear in self.linears]

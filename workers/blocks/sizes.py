"""Sizes that estimates share with the blocks: no torch."""

from __future__ import annotations

PAD = 64
"""Columns beside a frozen weight: a multiple of what matrix products like, and enough for queries, keys and values at
rank 16 and for two layers at rank 32."""
MAX_HEAD_FEATURES = 256
"""Features of a head that flash attention takes."""

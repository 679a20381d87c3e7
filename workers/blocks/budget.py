"""The bytes of a block as it is, for the rules in `keeping`."""

from __future__ import annotations

from workers.blocks.function import Block
from workers.blocks.keeping import BlockBytes, bytes_of_block


def block_bytes(block: Block, element: int, *, has_adapter: bool = False) -> BlockBytes:
    """Bytes for one token of a block whose numbers take `element` bytes; with a bottleneck adapter behind it or not."""
    bodies = [sublayer.kept_features() for sublayer in block.sublayers]
    drops = any(group.dropout > 0 for group in block.groups())
    hidden = block.sublayers[0].inputs.num_inputs
    return bytes_of_block(bodies, hidden, element, has_adapter=has_adapter, drops=drops)

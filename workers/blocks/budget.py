"""The bytes of a block as it is, for the rules in `keeping`."""

from __future__ import annotations

from workers.blocks.function import Block
from workers.blocks.keeping import BlockBytes, bytes_of_block, flash_features
from workers.blocks.sizes import drops_within_products, takes_rows
from workers.blocks.sublayers import Attention


def block_bytes(
    block: Block,
    element: int,
    *,
    has_adapter: bool = False,
    has_prefix: bool = False,
    on_gpu: bool = False,
    drops_in_products: bool = True,
) -> BlockBytes:
    """Bytes for one token of a block whose numbers take `element` bytes; with a bottleneck adapter behind it or not,
    and with a prefix before its keys or not. What attention's kernel works with is that of the one which was chosen on
    a GPU, and elsewhere of that which would do. `drops_in_products` says whether thin branches drop within their
    products, so that their inputs are not copied."""
    bodies = [sublayer.kept_features() for sublayer in block.sublayers]
    dropping = [group.num_ranks for group in block.groups() if group.dropout > 0]
    copies_dropped = not all(drops_in_products and drops_within_products(num_ranks) for num_ranks in dropping)
    first = block.sublayers[0]
    features = 0
    if isinstance(first, Attention):
        chosen = first.sight.kernel if on_gpu else "rows"
        if chosen != "rows" or not takes_rows(first.head_size, has_prefix=has_prefix):
            features = flash_features(first.inputs.num_outputs, first.outputs.num_inputs, has_prefix=has_prefix)
    return bytes_of_block(
        bodies, first.inputs.num_inputs, element, has_adapter=has_adapter, copies_dropped=copies_dropped,
        attention_features=features,
    )  # fmt: skip

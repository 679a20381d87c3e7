"""Seconds of a training step with hand-written blocks on a GPU.

The frozen products, attention and the output layer take time by their FLOPs; what stands between them, low-rank
branches, weights in 4 bits and the optimizer by the bytes that they move; and small models by the kernels that the host
has to launch. Letters as in `workers.hand_written`; sums as in the measured limits of such a step: 4 FLOPs for each
frozen weight and token, 2 more where it is computed again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from workers.blocks.keeping import Keeping, keeps_bodies
from workers.blocks.launching import HALF_FEATURES, LAUNCH_SECONDS, MICRO_SECONDS, RECORDED_SECONDS
from workers.blocks.sizes import drops_within_products
from workers.gpus import Gpu
from workers.hand_written import Blocks
from workers.hand_written_memory import Held


@dataclass(frozen=True)
class Pace:
    """Which shares of a GPU's peaks training reaches, and what the host needs, in seconds, as a run's own choices have
    it (`workers.blocks.launching`). Fitted by `tests.bench.estimate_error fit` on ten recipes."""

    products: float = 0.69
    """Of the peak FLOP/s, by the large products of a model of billions of parameters."""
    half_features: float = HALF_FEATURES
    attention: float = 0.314
    """Of the peak FLOP/s, by attention."""
    bandwidth: float = 1.13
    """Of the memory's bandwidth, by what stands between the products: above 1, as some of it never leaves the cache."""
    host_per_block: float = LAUNCH_SECONDS
    recorded_per_block: float = RECORDED_SECONDS
    host_per_micro: float = MICRO_SECONDS
    host_per_step: float = 3.3e-3
    """Seconds for a step: the optimizer, clipping, reports."""


PACE = Pace()
LINK_BANDWIDTH = 25e9
"""Bytes a second between a GPU and its host, each way: the slower of the links that large GPUs have."""


@dataclass(frozen=True)
class StepWork:
    """What a step does, whatever the device: FLOPs, bytes, and launches."""

    product_flops: float
    attention_flops: float
    moved_bytes: float
    num_blocks: float
    """Passes through blocks, forward and back, by their launches."""
    num_micro: int
    hidden_size: int
    is_recorded: bool
    copied_bytes: float = 0
    """To the host and back, while blocks compute."""

    def seconds(self, gpu: Gpu, pace: Pace) -> float:
        """How long it takes: the device's time, the host's, or that of copies between them, whichever is longest."""
        fill = self.hidden_size / (self.hidden_size + pace.half_features)
        device = (
            self.product_flops / (gpu.flops * pace.products * fill)
            + self.attention_flops / (gpu.flops * pace.attention)
            + self.moved_bytes / (gpu.bandwidth * pace.bandwidth)
        )
        per_block = pace.recorded_per_block if self.is_recorded else pace.host_per_block
        host = self.num_blocks * per_block + self.num_micro * pace.host_per_micro
        return max(device, host, self.copied_bytes / LINK_BANDWIDTH) + pace.host_per_step


def step_work(
    blocks: Blocks,
    held: Held,
    *,
    num_trainable: int,
    loss_share: float,
    weighted_length: float,
    is_quantised: bool,
    element: int = 2,
) -> StepWork:
    """The work of a usual step.

    Args:
        loss_share: of all tokens those that carry loss.
        weighted_length: tokens of the row in which a token usually stands.
    """
    shape = blocks.shape
    tokens = held.tokens * held.num_micro
    layers = shape.num_layers
    counts = Counter(held.keeping)
    again = sum(num * _again(blocks, keeping) for keeping, num in counts.items()) / len(held.keeping) * layers
    attended_again = 1 - held.kept_share
    # On the way forward and back; the gradient of frozen weights is nobody's.
    products = 4 * blocks.num_weights + 2 * again
    head = 4 * shape.vocabulary_size * shape.hidden_size * loss_share
    heads = shape.num_heads * shape.head_size
    # Scores and their sum, causal: half of what is there; two and a half times as much on the way back.
    attention = 2 * weighted_length * heads * layers * (3.5 + attended_again)
    adapter = 6 * num_trainable if any(blocks.adapters) else 0
    moved = tokens * layers * element * _moved_features(blocks, held.kept_share)
    # A feed-forward network that goes in pieces uses its weights for each.
    _, _, gate_up, down = (group.num_weights for group in blocks.groups)
    more = (held.pieces - 1) * attended_again * layers * (3 * gate_up + 2 * down)
    # Half a byte is read and two are written for each weight in 4 bits, each time that it is used.
    each = 2.5 if is_quantised and not held.has_copies else 2
    moved += held.num_micro * each * (2 * blocks.num_weights + again + more)
    moved += 50 * num_trainable
    launches = blocks.layer_work(is_quantised=is_quantised).launches(
        again=attended_again, has_copies=held.has_copies, in_pieces=held.in_pieces
    )
    return StepWork(
        product_flops=tokens * (products + head + adapter),
        attention_flops=tokens * attention,
        moved_bytes=moved,
        num_blocks=held.num_micro * layers * launches,
        num_micro=held.num_micro,
        hidden_size=shape.hidden_size,
        is_recorded=held.is_recorded,
        copied_bytes=2 * tokens * element * shape.hidden_size * held.keeping.count("offload"),
    )


def _again(blocks: Blocks, keeping: Keeping) -> float:
    """Weights of a layer whose products are computed once more on the way back: the last sublayer's result is not."""
    joined, out, gate_up, _ = (group.num_weights for group in blocks.groups)
    if keeps_bodies(keeping):
        return 0
    return gate_up if keeping == "attention" else joined + (0 if any(blocks.adapters) else out) + gate_up


def _moved_features(blocks: Blocks, kept_share: float) -> float:
    """Numbers for one token of a layer that go to and from memory beside the frozen products.

    Norms, rotations, attention's own, the activation and their gradients; the thin products of branches read the
    layer's input on the way forward, twice on the way back, and add to its gradient. With dropout they draw numbers
    for each, and the gradient is gone over once more, which together takes as long as moving six; wide ones copy the
    input twice, and its gradient.
    """
    joined, out, _, down = blocks.groups
    hidden, inner = blocks.shape.hidden_size, down.num_inputs
    forward = 10 * hidden + 4 * joined.num_outputs + out.num_inputs + 3 * inner
    backward = 16 * hidden + 8 * joined.num_outputs + 4 * out.num_inputs + 8 * inner
    moved = forward * (2 - kept_share) + backward
    for group in blocks.groups:
        if group.num_ranks:
            moved += 5 * group.num_inputs + group.num_outputs
            if blocks.has_dropout:
                moved += (6 if drops_within_products(group.num_ranks) else 9) * group.num_inputs
    if any(blocks.adapters):
        moved += sum(blocks.adapters) * 2 * (10 * hidden + 4 * blocks.bottleneck)
    return moved

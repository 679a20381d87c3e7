"""Bytes and seconds of a recipe, before it is queued: arithmetic on shapes, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from workers.cpu import cpu_words
from workers.facts import DatasetFacts, DeviceFacts
from workers.gpus import gpu_named
from workers.hand_written_run import HandWrittenRun, blocks_of, room_beside_weights, run_of
from workers.measured_memory import NO_CORRECTION, Basis, MemoryParts, shape_key
from workers.methods import get_method
from workers.recipe import Precision, Recipe
from workers.shapes import ModelShape

GIB = 2**30
TIGHT_SHARE = 0.85
"""From this share of a device's memory on, a run may fail by what the arithmetic does not see."""

NF4_BITS = 4.127
"""Bits per weight with blocks of 64 and double quantisation (Dettmers et al. 2023, section 3)."""

CPU_BASELINE_BYTES = int(0.5 * GIB)
"""Resident memory of a trainer process without weights: a run on a model of 0.1 M parameters peaked at 0.48 GiB."""
CUDA_BASELINE_BYTES = int(0.9 * GIB)
"""CUDA context, cuBLAS workspaces and fragmentation of the allocator."""
FRAGMENTATION = 0.10
"""Share of activations on top, for buffers that live side by side during the backward pass."""

LOGIT_BYTES = {"cpu": 3 * 2**26, "cuda": 3 * 2**28}
"""One chunk of float32 logits, their exponentials and their gradient (workers.losses computes chunk by chunk)."""

# FLOP/s per thread that LoRA training reaches on SmolLM2-135M, rows of 256 tokens, micro-batch 4: 207 tokens/s in
# float32 and 336 in bfloat16 on two Zen 4 cores with AVX512-BF16, at 4 FLOP per parameter and token.
CPU_FLOPS_PER_THREAD = {"float32": 56e9, "bfloat16": 90e9}
# The same on two Zen cores without AVX-512: 79 tokens/s.
CPU_FLOPS_PER_THREAD_AVX2 = 22e9
CPU_SLOW_BFLOAT16 = 12e9
"""The same where bfloat16 is emulated."""

GPU_UTILISATION = 0.30
"""Share of the peak that training with adapters reaches on models of billions of parameters."""
GPU_LAUNCH_SECONDS = 28e-6
"""What launching a kernel of transformers' own layers takes the host, which bounds small models: on an H200 IA3 took 37
us for each, and DoRA no more than 31; the middle of WIDE_RANGE lies a fifth above what is expected."""
GPU_LAUNCHES = (38, 61)
"""Kernels of such a layer without an adapter, there and back; counted."""
GPU_WRITING_SECONDS = 12e-6
"""The same for each of the kernels of a layer, about 40, where text is generated and launches are recorded."""

LEAST_SAID = 0.02
"""By how much longer a step takes for want of memory before that is said."""
WIDE_RANGE = (0.6, 1.8)
"""From the least to the most of what is expected, where a device's speed is guessed from its data sheet."""
NARROW_RANGE = (0.8, 1.2)
"""The same of steps whose arithmetic was held to measured ones."""

FLOAT32_SHARE = 1 / 29
"""Of a GPU's peak in 16 bits, what products in float32 reach without its tensor cores: fitted on DoRA on an H200."""
FLOAT32_WEIGHT_BYTES = 50
"""What goes to and from memory for each weight that DoRA holds in float32: B A, its sum with the weight, the norm of
that, and the copy for products, each written and read."""
PRECISION_SLOWDOWN: dict[Precision, float] = {"float32": 1.0, "bfloat16": 1.0, "nf4": 1.35, "int8": 1.6}
"""Against computing on unquantised weights."""


@dataclass(frozen=True)
class Estimate:
    """What a run will need. Bytes at the peak of training; seconds from loading the base to the last score.

    `optimizer_bytes` holds the gradients and both moments of AdamW, `adapter_bytes` the trained weights in float32.
    `weights_bytes` are those that are not trained: of the base that full fine-tuning trains, none. The parts are
    arithmetic; `total_bytes` is their sum as `num_measured` finished runs correct it, which are those that `measured`
    says (workers.measured_memory).
    """

    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    runtime_bytes: int
    total_bytes: int
    num_steps: int
    num_trainable: int
    trainable_share: float
    seconds_low: float
    seconds_high: float
    verdict: Literal["fits", "tight", "too_large"]
    measured: Basis = "arithmetic"
    num_measured: int = 0
    least_bytes: int | None = None
    """Where the run chooses by the memory there is what it keeps for the way back: the least with which it works."""
    enough_bytes: int | None = None
    """There, too: with which it starts, as with more it would not be much faster (`workers.hand_written_run`)."""
    kept_share: float | None = None
    """Of its blocks, those that will keep what they computed; the others compute it again."""
    slowdown: float | None = None
    """How many times as long its steps take as with memory to keep everything at once."""
    rows_at_once: int | None = None
    """Rows in memory at once, where they are found by the memory there is."""

    @property
    def computes_again(self) -> bool:
        """Whether blocks compute once more on the way back what they had no memory to keep."""
        return self.kept_share is not None and self.kept_share < 1

    @property
    def is_held_back(self) -> bool:
        """Whether the run would be faster with more memory, by enough to be said."""
        return self.computes_again or (self.slowdown or 1) > 1 + LEAST_SAID

    @property
    def starting_bytes(self) -> int:
        """What must be free of a device's memory for the run to start there."""
        return self.total_bytes if self.enough_bytes is None else self.enough_bytes

    @property
    def arithmetic_bytes(self) -> int:
        """The sum of the parts, without what finished runs correct."""
        return (
            self.weights_bytes + self.adapter_bytes + self.optimizer_bytes + self.activations_bytes + self.runtime_bytes
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Size on disk of one checkpoint: the trained weights and both moments."""
        return 12 * self.num_trainable


def estimate(recipe: Recipe, shape: ModelShape, dataset: DatasetFacts, device: DeviceFacts) -> Estimate:
    """Memory and time of a recipe whose "auto" values are resolved (workers.resolving).

    Raises:
        RecipeError: the method or one of its settings does not exist.
    """
    method = get_method(recipe.method)
    settings = method.read_settings(recipe.settings)
    num_trainable = method.num_trainable(settings, shape)
    training = recipe.training
    precision: Precision = "float32" if recipe.precision == "auto" else recipe.precision
    micro_batch = training.batch_size if training.micro_batch_size == "auto" else training.micro_batch_size
    micro_batch = min(micro_batch, training.batch_size)
    compute_bytes = compute_bytes_of(precision, device)
    is_whole = method.product.is_whole_model
    blocks = blocks_of(method, settings, precision, shape, device.kind)
    training_precision = method.training_precision(settings, precision, has_bfloat16=device.computes_bfloat16())
    training_bytes = compute_bytes_of(training_precision, device)

    float32_weights = method.float32_weights(settings, shape) if compute_bytes < 4 else 0

    parts = dataset.parts_of(recipe)
    num_scored, num_train = parts.num_scored, max(1, parts.num_train)
    num_steps = math.ceil(max(1, math.ceil(num_train * training.epochs)) / training.batch_size)
    num_steps = num_steps if training.max_steps is None else min(num_steps, training.max_steps)

    weights = weights_bytes(shape, precision, compute_bytes)
    adapter = 4 * num_trainable
    optimizer = 12 * num_trainable
    if is_whole:
        weights -= compute_bytes * num_trainable  # counted as the trained weights
    else:
        weights += room_beside_weights(shape, precision, device)
    checkpointing = training.gradient_checkpointing is True
    by_hand: HandWrittenRun | None = None
    if blocks is not None:
        take_turns = device.kind == "cuda" and blocks.hides_copies(compute_bytes)
        branches = blocks.branch_bytes(
            compute_bytes, kind=device.kind, is_quantised=precision == "nf4", take_turns=take_turns
        )
        fixed_least = weights + adapter + optimizer + branches
        by_hand = run_of(
            recipe, blocks, dataset, device, num_steps=num_steps, num_trainable=num_trainable, element=compute_bytes,
            has_virtual_tokens=method.num_virtual_tokens(settings) > 0, precision=precision, fixed_bytes=fixed_least,
            branch_bytes=branches,
        )  # fmt: skip
        optimizer += branches * (shape.num_layers if take_turns and not by_hand.held.takes_turns else 1)
        weights += by_hand.held.weights_bytes
        activations = by_hand.held.activations_bytes
    else:
        activations = activations_bytes(
            settings,
            shape,
            adapted_features=method.adapted_features(settings, shape),
            tokens=_tokens_at_once(recipe, dataset, micro_batch, num_steps),
            compute_bytes=training_bytes,
            residual_bytes=compute_bytes,
            checkpointing=checkpointing,
            device_kind=device.kind,
            weight_inputs_bytes=weight_inputs_bytes(shape, training_bytes) if is_whole else 0,
        )
        activations += 4 * float32_weights // (shape.num_layers if checkpointing else 1)
        activations += score_bytes(
            shape,
            rows=1 if training.packing is True else micro_batch,
            length=dataset.longest_after_cut(training.max_length) * (micro_batch if training.packing is True else 1),
            checkpointing=checkpointing,
        )
    if training_bytes < compute_bytes:
        # The backward pass multiplies by the same 16-bit copies of the weights as the forward pass; the output
        # layer's has a gradient beside it.
        activations += training_bytes * num_linear_parameters(shape) // (shape.num_layers if checkpointing else 1)
        activations += 2 * training_bytes * shape.vocabulary_size * shape.hidden_size
    runtime = CPU_BASELINE_BYTES if device.kind == "cpu" else CUDA_BASELINE_BYTES
    sums = MemoryParts(fixed=weights + adapter + optimizer, activations=activations, runtime=runtime)
    correction = NO_CORRECTION
    if device.measured is not None:
        correction = device.measured.correction(shape_key(shape), recipe.method, precision)
    total = correction.total(sums)
    least: int | None = None
    enough: int | None = None
    if by_hand is not None and by_hand.least is not None and by_hand.enough is not None:
        least = min(total, correction.total(MemoryParts(fixed_least, by_hand.least, runtime)))
        enough = min(total, correction.total(MemoryParts(fixed_least, by_hand.enough, runtime)))
        # Of a device that is small for it, the desktop's part and the like are not waited for.
        enough = max(least, min(enough, int(TIGHT_SHARE * device.memory_bytes)))
        # What is kept is chosen by the memory that there is, whatever the arithmetic is off by.
        total = min(total, max(least, device.memory_bytes))
    needed = total if least is None else least
    share = needed / device.memory_bytes if device.memory_bytes else math.inf
    verdict: Literal["fits", "tight", "too_large"] = (
        "too_large" if share > 1 else "tight" if share >= TIGHT_SHARE else "fits"
    )
    train_seconds, other_seconds = _seconds(
        recipe, shape, dataset, device, precision, training_precision, num_steps, num_scored, micro_batch,
        num_trainable, is_whole=is_whole, by_hand=by_hand, float32_weights=float32_weights,
        adapter_launches=method.num_launches(settings, shape),
    )  # fmt: skip
    train_range = NARROW_RANGE if by_hand is not None and by_hand.work is not None else WIDE_RANGE
    return Estimate(
        weights_bytes=weights,
        adapter_bytes=adapter,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        runtime_bytes=runtime,
        total_bytes=total,
        num_steps=num_steps,
        num_trainable=num_trainable,
        trainable_share=num_trainable / shape.num_parameters,
        seconds_low=train_seconds * train_range[0] + other_seconds * WIDE_RANGE[0],
        seconds_high=train_seconds * train_range[1] + other_seconds * WIDE_RANGE[1],
        verdict=verdict,
        measured=correction.basis,
        num_measured=correction.num_runs,
        least_bytes=least,
        enough_bytes=enough,
        kept_share=None if least is None or by_hand is None else by_hand.held.kept_share,
        slowdown=None if least is None or by_hand is None else by_hand.slowdown(device),
        rows_at_once=None if by_hand is None else by_hand.rows_at_once,
    )


def _tokens_at_once(recipe: Recipe, dataset: DatasetFacts, micro_batch: int, num_steps: int) -> int:
    """Tokens of the largest micro-batch with the model's own blocks: rows one behind the other, or filled up to the
    longest."""
    training = recipe.training
    longest = dataset.longest_after_cut(training.max_length)
    if training.packing is not True:
        return micro_batch * longest
    num_micro = num_steps * math.ceil(training.batch_size / micro_batch)
    return max(longest, math.ceil(dataset.largest_step(micro_batch, training.max_length, num_micro)))


def compute_bytes_of(precision: Precision, device: DeviceFacts) -> int:
    """Bytes of one activation: 2 in bfloat16, 4 in float32, which quantised bases use on a CPU without bfloat16."""
    if precision == "float32":
        return 4
    return 2 if precision == "bfloat16" or device.kind == "cuda" or device.computes_bfloat16() else 4


def num_linear_parameters(shape: ModelShape) -> int:
    """Weights of the linear layers inside the blocks: what quantisation shrinks."""
    return shape.num_layers * sum(linear.in_features * linear.out_features for linear in shape.linears)


def weights_bytes(shape: ModelShape, precision: Precision, compute_bytes: int) -> int:
    """The frozen base. Embeddings, output head and norms stay at the compute type when the rest is quantised."""
    linear = num_linear_parameters(shape)
    rest = max(0, shape.num_parameters - linear)
    if precision == "nf4":
        return round(linear * NF4_BITS / 8) + rest * compute_bytes
    if precision == "int8":
        rows = shape.num_layers * sum(layer.out_features for layer in shape.linears)
        return linear + 4 * rows + rest * compute_bytes
    return shape.num_parameters * compute_bytes


def activations_bytes(
    settings: object,
    shape: ModelShape,
    *,
    adapted_features: int,
    tokens: int,
    compute_bytes: int,
    residual_bytes: int,
    checkpointing: bool,
    device_kind: Literal["cuda", "cpu"],
    weight_inputs_bytes: int = 0,
) -> int:
    """What the backward pass keeps for `tokens` tokens of one micro-batch, and the logits of one chunk of the loss.

    Features kept per token and layer:
        residual stream and the two norms, whose inputs are kept in float32 too   6 x hidden
        queries and the attention's output, keys and values                       2 x heads x head + 2 x key-value
        gate, its activation, and the up projection                                3 x intermediate
        inputs of adapters, once as they are and once dropped out, in float32      2 x inputs of the targeted layers
        what other adapters keep, in float32                                       adapted_features
        inputs of trained layers that are not counted above                        weight_inputs_bytes
    With checkpointing each layer keeps its input alone, and one layer at a time everything.
    """
    per_token = (
        6 * shape.hidden_size
        + 2 * shape.num_heads * shape.head_size
        + 2 * shape.key_value_size
        + 3 * shape.intermediate_size
    ) * compute_bytes
    adapted_inputs = _adapted_inputs(settings, shape)
    per_token += (2 * adapted_inputs + adapted_features) * 4 + weight_inputs_bytes
    if checkpointing:
        blocks = tokens * (shape.num_layers * shape.hidden_size * residual_bytes + per_token)
    else:
        blocks = tokens * shape.num_layers * per_token
    logits = min(tokens * shape.vocabulary_size * 4 * 3, LOGIT_BYTES[device_kind])
    return round((blocks + logits) * (1 + FRAGMENTATION))


def score_bytes(shape: ModelShape, *, rows: int, length: int, checkpointing: bool) -> int:
    """What attention keeps for each head and pair of tokens where it is not fused: 8 bytes a layer.

    These are tanh's output and the softmax's in float32, which in 16 bits is kept in both types. While one layer is
    computed the scores before and behind them are there too, and as many gradients on the way back.
    """
    if not shape.caps_attention:
        return 0
    of_layer = rows * shape.num_heads * length**2 * 8
    return round(of_layer * ((1 if checkpointing else shape.num_layers) + 2) * (1 + FRAGMENTATION))


def weight_inputs_bytes(shape: ModelShape, training_bytes: int) -> int:
    """Bytes per token and layer that are kept because the layers' own weights are trained.

    In float32 these are the inputs of the down projection; the others are the norms' outputs and the attention's,
    which are kept anyway. In mixed precision each layer keeps its own input in 16 bits.
    """
    if training_bytes == 4:
        return 4 * shape.intermediate_size
    return training_bytes * sum(linear.in_features for linear in shape.linears)


def _adapted_inputs(settings: object, shape: ModelShape) -> int:
    """Features per token and layer that enter targeted linear layers; 0 for methods without them."""
    targets = getattr(settings, "target_modules", None)
    if targets is None:
        return 0
    return sum(linear.in_features for linear in shape.linears if targets == "all-linear" or linear.name in targets)


def _seconds(
    recipe: Recipe,
    shape: ModelShape,
    dataset: DatasetFacts,
    device: DeviceFacts,
    precision: Precision,
    training_precision: Precision,
    num_steps: int,
    num_scored: int,
    micro_batch: int,
    num_trainable: int,
    *,
    is_whole: bool,
    by_hand: HandWrittenRun | None,
    float32_weights: int,
    adapter_launches: tuple[int, int],
) -> tuple[float, float]:
    """Expected seconds of training, and of everything else from loading to the last score."""
    training = recipe.training
    mean = dataset.mean_after_cut(training.max_length)
    rows = min(num_steps * training.batch_size, max(1, dataset.num_rows) * training.epochs)
    padded = mean if training.packing is True else (mean + dataset.longest_after_cut(training.max_length)) / 2
    rate = flops_per_second(device, precision)
    # Multiply-adds, of the causal half; where attention is not fused, of all pairs of a packed or padded batch.
    packed = micro_batch * mean if training.packing is True else dataset.longest_after_cut(training.max_length)
    seen = 2 * packed if shape.caps_attention else mean
    attention = 2 * seen * shape.num_heads * shape.head_size * shape.num_layers
    # A frozen layer has a forward product and one for the gradient of its input, none for its weights.
    passes = 3 if training.gradient_checkpointing is True else 2
    # An adapter has all three beside it; a weight of the base that is trained has one more.
    per_token = 2 * passes * shape.num_parameters + (2 if is_whole else 6) * num_trainable + 3 * 2 * attention
    train = rows * padded * per_token / flops_per_second(device, training_precision)
    num_micro = num_steps * math.ceil(training.batch_size / micro_batch)
    if device.kind == "cuda":
        gpu = gpu_named(device.name)
        train += rows * padded * 4 * float32_weights / (gpu.flops * FLOAT32_SHARE)
        train += num_micro * FLOAT32_WEIGHT_BYTES * float32_weights / gpu.bandwidth
        there, back = (sum(both) for both in zip(GPU_LAUNCHES, adapter_launches, strict=True))
        launches = (passes - 1) * there + back
        train = max(train, num_micro * shape.num_layers * launches * GPU_LAUNCH_SECONDS)
        if by_hand is not None:
            train = num_steps * by_hand.step_seconds(device)
    # Base and adapter both read the held-out rows and write their answers.
    scoring = 2 * num_scored * mean * (2 * shape.num_parameters + 2 * attention) / rate
    evaluation = recipe.evaluation
    num_generated = min(evaluation.num_generated * dataset.num_sources, num_scored)
    generated = 2 * num_generated * evaluation.max_new_tokens
    # The base and each checkpoint answer the fixed prompts, all of them in one batch.
    num_shown = min(evaluation.num_samples_shown, num_scored)
    num_times = 1 + math.ceil(num_steps / training.steps_between_checkpoints(num_steps))
    shown_steps = num_times * evaluation.num_shown_tokens if num_shown else 0
    # Writing goes one token at a time in small batches: about a fifth of the rate of reading.
    writing = (generated + shown_steps * num_shown) * 2 * shape.num_parameters * 5 / rate
    if device.kind == "cuda":
        steps = math.ceil(generated / 16) + shown_steps
        writing = max(writing, steps * shape.num_layers * 40 * GPU_WRITING_SECONDS)
    loading = 12 + 2 * shape.num_parameters / 1e9
    return train, scoring + writing + loading


def flops_per_second(device: DeviceFacts, precision: Precision) -> float:
    """FLOP/s that training reaches on the device at a precision."""
    if device.kind == "cpu":
        two_bytes = compute_bytes_of(precision, device) == 2
        if two_bytes and not device.computes_bfloat16():
            per_thread = CPU_SLOW_BFLOAT16
        elif not two_bytes and "avx2" in cpu_words() and "avx512f" not in cpu_words():
            per_thread = CPU_FLOPS_PER_THREAD_AVX2
        else:
            per_thread = CPU_FLOPS_PER_THREAD["bfloat16" if two_bytes else "float32"]
        return per_thread * max(1, device.num_threads) / PRECISION_SLOWDOWN[precision]
    peak = gpu_named(device.name).flops
    if precision == "float32":
        peak /= 4  # TF32 is off, and half of what tensor cores do in 16 bits at best.
    return peak * GPU_UTILISATION / PRECISION_SLOWDOWN[precision]

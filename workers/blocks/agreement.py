"""Whether hand-written blocks compute what a model's own do, on this machine, with this adapter.

Layer by layer: rounding in 16 bits grows from layer to layer, and a deep model's gradients as a whole may differ by as
much as a small mistake would make them. Within one layer, given the same input, there is little rounding; and where
there is much, as in the gradients of a bottleneck adapter that reads what attention gave, the model's own layer shows
it, too: its results differ as much once its input is rounded again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.batching import Batch
from workers.blocks.distance import distance, finite
from workers.blocks.engine import Engine


@dataclass(frozen=True)
class Tolerance:
    """How far apart the two may be, as relative errors: `layer` of a layer's result and gradients, `loss` of the loss,
    and `whole` of all gradients of the model as one vector, where layers cannot be compared one by one."""

    layer: float
    loss: float
    whole: float


TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-3, 1e-3),
    torch.float16: Tolerance(0.05, 0.05, 0.5),
    torch.bfloat16: Tolerance(0.05, 0.05, 0.5),
}
"""By the type of activations: rounding alone, with room. A kernel that goes wrong on a device or in a version of its
library that nobody tried is off by more."""
ROUNDED_AGAIN = 1.5
"""What a layer may be off by whatever the tolerance, in what its own results differ by once its input is rounded again.
Roundings inside a layer are several, and yet made it 0.3 to 0.8 with bottleneck adapters of all kinds."""


@dataclass(frozen=True)
class Difference:
    """How far apart two ways are: relative errors; infinite where one of them is no number. `layer` is of the layer
    that is off most by more than its rounding, None where layers were not compared one by one."""

    layer: float | None
    loss: float
    whole: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether none is larger than what is tolerated; where each layer is near, the whole may be off by rounding
        that has grown, and is only not to be another direction."""
        if self.layer is None:
            return self.loss <= tolerance.loss and self.whole <= tolerance.whole
        return self.layer <= tolerance.layer and self.loss <= tolerance.loss and self.whole < 1.0

    def __str__(self) -> str:
        if not all(math.isfinite(one) for one in (self.layer or 0.0, self.loss, self.whole)):
            return "no numbers, unlike"
        of_layer = "" if self.layer is None else f"{self.layer:.1%} off in a layer, "
        return f"{of_layer}{self.whole:.0%} off in all and {self.loss:.1%} in the loss from"


def compare(engine: Engine, model: Any, batch: Batch, loss: Callable[[Any, Batch], Tensor]) -> Difference:
    """How far hand-written blocks are from the model's own on a small packed batch.

    What an adapter begins with at zero is another number meanwhile, for through zeros nothing of its branch would show.
    Blocks of a whole pass keep their inputs alone, all but one, so that a run that fits only so may be compared, too;
    of layers one by one, every other keeps all. No gradient is left behind, no weight is changed, and no random number
    is used up.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training, keeping = model.training, engine.keeping
    num_blocks = len(keeping)
    devices = [batch.input_ids.device] if batch.input_ids.is_cuda else []
    model.eval()  # a mask of dropout would differ
    zeros = [parameter for parameter in parameters if not bool(parameter.detach().any())]
    try:
        # cuDNN has no backward pass for recurrent layers in eval mode, which some prompt encoders have.
        with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(enabled=False):
            for parameter in zeros:
                torch.nn.init.normal_(parameter, 0.0, 0.02)
            with engine.compared(), _inputs_of_layers(engine) as inputs:
                plain_loss, plain = _loss_and_gradients(loss(model, batch), parameters)
            # As many numbers as are trained: a run of little memory has no room for them twice.
            plain = [one.cpu() for one in plain]
            engine.refresh()
            engine.keeping = ["input" if place + 1 < num_blocks else "all" for place in range(num_blocks)]
            with engine.rows(batch):
                own_loss, own = _loss_and_gradients(loss(model, batch), parameters)
            worst: float | None = None
            if not engine.has_prefix:  # which a layer is given only inside a pass of the whole model
                engine.keeping = ["input" if place % 2 else "all" for place in range(num_blocks)]
                worst = max(_of_layer(engine, batch, *one) for one in inputs)
    finally:
        model.train(was_training)
        engine.keeping = keeping
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
    # Against a tenth of a nat a token, where there is less to lose: a row known by heart has a loss near zero.
    off = abs(own_loss - plain_loss) / max(abs(plain_loss), 0.1 * batch.num_loss_tokens)
    return Difference(worst, finite(off), distance(own, plain))


@contextmanager
def _inputs_of_layers(engine: Engine) -> Iterator[list[tuple[Any, Tensor, dict[str, Any]]]]:
    """The list of (layer, hidden states, what it is given by name) of a forward pass inside."""
    found: list[tuple[Any, Tensor, dict[str, Any]]] = []

    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        found.append((layer, hidden.detach(), named))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in engine.layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _of_layer(engine: Engine, batch: Batch, layer: Any, hidden_BTH: Tensor, kwargs: dict[str, Any]) -> float:
    """How far a layer's result and its gradients by hidden states and parameters are off, the largest of those that are
    not by rounding alone; 0 where all are."""
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    gradient_BTH = torch.randn(hidden_BTH.shape, device=hidden_BTH.device).to(hidden_BTH.dtype)

    def run(hidden_BTH: Tensor) -> list[Tensor]:
        given = hidden_BTH.clone().requires_grad_()
        result = layer(given, **kwargs)
        result = result[0] if isinstance(result, tuple) else result
        by_input, *others = torch.autograd.grad(result, [given, *parameters], gradient_BTH)
        # Without the residual stream, which goes past the layer and would hide it.
        return [result.detach().float() - hidden_BTH.float(), by_input.float() - gradient_BTH.float(), *others]

    # Each sum was rounded with the stream in it, once or, around an adapter, several times.
    rounded = [0.3 * float(one.float().norm()) for one in (hidden_BTH, gradient_BTH)]
    plain = run(hidden_BTH)

    def off(found: list[Tensor]) -> list[float]:
        streams = [distance([found[at]], [plain[at]], beside=rounded[at]) for at in range(2)]
        return [*streams, distance(found[2:], plain[2:]) if parameters else 0.0]

    with engine.rows(batch, reads_all=True):
        own = off(run(hidden_BTH))
    again = off(run(_rounded_again(hidden_BTH)))
    beyond = (one for one, by in zip(own, again, strict=True) if not one <= min(1.0, ROUNDED_AGAIN * by))
    return max(beyond, default=0.0)


def _rounded_again(hidden_BTH: Tensor) -> Tensor:
    """The values with errors of at most half of what separates two neighbours, rounded."""
    errors_BTH = torch.rand(hidden_BTH.shape, device=hidden_BTH.device) - 0.5
    return (hidden_BTH.float() * (1.0 + torch.finfo(hidden_BTH.dtype).eps * errors_BTH)).to(hidden_BTH.dtype)


def _loss_and_gradients(loss: Tensor, parameters: list[torch.nn.Parameter]) -> tuple[float, list[Tensor]]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [
        torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float()
        for gradient, parameter in zip(found, parameters, strict=True)
    ]
    return float(loss.detach()), gradients

"""Where a run gets its base model from: anew from its folder, or out of the hands of a process that has kept one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from workers import base_models, devices
from workers.base_folders import BaseFolder, Stamps, file_stamps, read_with_stamps
from workers.blocks.families import make_room
from workers.quantised import QuantisedCache
from workers.recipe import Precision

Say = Callable[[str], None]


class Bases:
    """Reads and loads a base model for one run, each time anew."""

    def __init__(self) -> None:
        self.prepare()

    def prepare(
        self,
        *,
        read: Callable[[Path], tuple[Stamps, BaseFolder]] = read_with_stamps,
        cache: QuantisedCache | None = None,
    ) -> None:
        """What the next run is given.

        Args:
            read: gives what is known of the folder, where reading it was begun earlier.
            cache: where quantised weights are kept from run to run; None quantises each time.
        """
        self._read_folder, self._cache = read, cache

    def read(self, folder: Path) -> BaseFolder:
        """The checked folder; raises BaseModelError."""
        return self._read_folder(folder)[1]

    def load(
        self, base: BaseFolder, precision: Precision, device: torch.device, *, say: Say, is_wide: bool = False
    ) -> Any:
        """The frozen model of a folder that was read, in eval mode; raises BaseModelError.

        `say` takes a sentence about the cache, for the job's event list. With `is_wide` there is room beside the
        weights for low-rank branches (`workers.blocks`).
        """
        model = base_models.load(
            base.folder, precision, device, checked=True, cache=self._cache, revision=base.revision, say=say
        ).model
        if is_wide:
            make_room(model)
            free(device)  # what the weights lay in before
        return model


class HeldBases(Bases):
    """Keeps the last base that was loaded, untouched, and gives every run a model of its own on the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: tuple[Path, Stamps, BaseFolder] | None = None
        self._held: tuple[str, Precision, torch.device, bool] | None = None
        self._model: Any = None
        self._digest = 0

    def read(self, folder: Path) -> BaseFolder:
        """The checked folder; hashed again only when a file's size, times or inode are not what they were."""
        if self._seen is None or self._seen[:2] != (folder, file_stamps(folder)):
            self._seen = (folder, *self._read_folder(folder))
        return self._seen[2]

    def load(
        self, base: BaseFolder, precision: Precision, device: torch.device, *, say: Say, is_wide: bool = False
    ) -> Any:
        """A model of the run's own, on weights that are shared with the untouched one; raises BaseModelError."""
        wanted = (base.revision, precision, device, is_wide)
        if self._held != wanted:
            self._held, self._model = None, None
            free(device)
            self._model = super().load(base, precision, device, say=say, is_wide=is_wide)
            self._held, self._digest = wanted, weights_digest(self._model)
        else:
            base_models.prepare_process()
        return share(self._model)

    def is_untouched(self) -> bool:
        """Whether the held weights are bit for bit those that were loaded."""
        return self._model is None or weights_digest(self._model) == self._digest

    @property
    def holds_a_model(self) -> bool:
        return self._model is not None


def share(model: Any) -> Any:
    """A model whose weights lie in the same memory as those of `model`; nothing else is common to the two.

    Modules, parameters, buffers, hooks and configuration are copies, so that whatever a run attaches, replaces or
    converts stays with its own model. Only what writes into the frozen weights themselves could reach the other one.
    """
    memo: dict[int, Any] = {}
    pairs = []
    for parameter in model.parameters():
        own = torch.Tensor._make_subclass(type(parameter), parameter.data, False)
        memo[id(parameter)] = own
        # Statistics of quantised weights are only read, and larger than is worth copying.
        memo |= {id(tensor): tensor for tensor in _statistics(parameter)}
        pairs.append((parameter, own))
    copied = copy.deepcopy(model, memo)
    for parameter, own in pairs:
        # After the modules: bitsandbytes' weights know the module that they are in.
        vars(own).update({name: copy.deepcopy(value, memo) for name, value in vars(parameter).items()})
    return copied


def weights_digest(model: Any) -> int:
    """A sum over all bits of the frozen weights, exact whatever the order of additions.

    Not for an adversary: it tells that nothing wrote into the weights, at the speed of reading them once.
    """
    digest = 0
    for parameter in model.parameters():
        for tensor in (parameter, *_statistics(parameter)):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            if flat.storage_offset() % 8:  # as a file had it that was mapped into memory
                flat = flat.clone()
            words = flat[: flat.numel() // 8 * 8].view(torch.int64)
            total = flat[words.numel() * 8 :].sum()
            for place, chunk in enumerate(words.split(1 << 24)):
                total += chunk.sum() * (2 * place + 1)
            digest = (digest * 1_000_003 + int(total)) % 2**64
    return digest


def free(device: torch.device) -> None:
    """Gives memory of what is no longer reachable back to the device, and page-locked memory to the host."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        devices.free_page_locked_memory()


def _statistics(parameter: Any) -> Iterator[torch.Tensor]:
    """The tensors beside a quantised weight from which it is computed back."""
    state = vars(parameter).get("quant_state")
    while state is not None:
        yield from (one for one in (state.absmax, state.code, state.offset) if isinstance(one, torch.Tensor))
        state = state.state2
    for name in ("CB", "SCB"):
        if isinstance(value := vars(parameter).get(name), torch.Tensor):
            yield value

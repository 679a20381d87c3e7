from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny_base
from workers import base_models
from workers.device_errors import is_gpu_failure, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_every_way_to_say_that_memory_ran_out_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_gpu_failure(error)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_a_failing_gpu_is_known(text: str) -> None:
    assert is_gpu_failure(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA error in the name of a column"),
        OSError(errno.EIO, "Input/output error"),
    ],
)
def test_what_fails_on_every_device_is_neither(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert not is_gpu_failure(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: uncorrectable ECC error encountered"), RuntimeError("DefaultCPUAllocator: no")]
)
def test_a_base_whose_loading_a_device_stops_is_not_called_unusable(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(base_models.AutoModelForCausalLM, "from_pretrained", failing)
    with pytest.raises(RuntimeError) as caught:
        base_models.load(make_tiny_base(tmp_path), "float32", torch.device("cpu"), checked=True)
    assert caught.value is error

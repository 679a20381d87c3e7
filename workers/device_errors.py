"""What an error that a device or the machine raised means: memory ran out, or the GPU failed."""

from __future__ import annotations

import errno

import torch

# What torch, cuBLAS, cuDNN and the C++ library say when memory runs out; not all of it is a torch.OutOfMemoryError.
_OUT_OF_MEMORY = (
    "out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation", "std::bad_alloc", "not enough memory",
)  # fmt: skip
_GPU_FAILED = (
    "CUDA error", "CUDA driver error", "cuDNN error", "CUDNN_STATUS_", "CUBLAS_STATUS_", "NCCL error",
    "uncorrectable ECC", "GPU is lost",
)  # fmt: skip
# A failed assertion in a kernel is a wrong number in the program or the data, and fails on every GPU.
_SOFTWARE = ("device-side assert", "_INVALID_VALUE", "_NOT_SUPPORTED", "_BAD_PARAM")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_gpu_failure(error: BaseException) -> bool:
    """Whether an error says that the GPU or its driver failed, so that another GPU may do better."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    text = str(error)
    return any(words in text for words in _GPU_FAILED) and not any(words in text for words in _SOFTWARE)

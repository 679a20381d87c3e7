"""The names of flash-attn on the FlashAttention-2 kernels that torch carries.

flash-attn has no wheel in the package index, and building it takes an hour. Peers that ask for it would run a slower
path without, which is not what a benchmark should hold them to. Only what they call in training is here: dropout,
soft capping and ALiBi raise NotImplementedError.
"""

from .flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
__version__ = "2.8.3"

"""How far micro-batches are filled up whose launches are recorded, so that few shapes return. No torch: the form's
estimate counts what is filled up, too.
"""

from __future__ import annotations

ROW_STEP = 16
"""Numbers of rows are multiples of it."""
TOKEN_STEP = 64
"""Numbers of tokens are multiples of it at least."""


def filled_rows(num_rows: int) -> int:
    """Rows of a shape with room for so many, and for one of padding at least."""
    return rounded_up(num_rows + 1, ROW_STEP)


def filled_tokens(num_tokens: int) -> int:
    """Tokens of a shape with room for so many: the next larger of eight sizes between each two powers of two."""
    return rounded_up(num_tokens, _step(num_tokens))


def usual_filling(num_tokens: float) -> float:
    """Tokens by which shapes are larger than micro-batches of about so many, on average."""
    return _step(int(num_tokens)) / 2


def rounded_up(size: int, step: int) -> int:
    """The least multiple of `step` that is no less."""
    return -(-size // step) * step


def _step(num_tokens: int) -> int:
    return max(TOKEN_STEP, 2 ** (num_tokens.bit_length() - 4))

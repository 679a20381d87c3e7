"""What time on devices costs: stretches of it, each at the price that held when it began."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

CENT = Decimal("0.01")
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
MAX_CURRENCY_CHARACTERS = 8


@dataclass(frozen=True)
class Stretch:
    """Devices held for a while. `price` is for one device and hour; None where the team had set none by then."""

    seconds: float
    num_gpus: int = 1
    price: Decimal | None = None
    currency: str = ""

    @property
    def gpu_hours(self) -> float:
        return self.num_gpus * self.seconds / 3600


@dataclass(frozen=True)
class Cost:
    """What stretches came to. `amounts` has one sum per currency, unrounded; none where nothing had a price.

    `unpriced_hours` of the `gpu_hours` were held without a price, and are in no sum.
    """

    gpu_hours: float = 0.0
    amounts: tuple[tuple[str, Decimal], ...] = ()
    unpriced_hours: float = 0.0

    @property
    def words(self) -> str:
        """The sums for people, "1.20 EUR"; those of several currencies side by side; empty without any."""
        return " + ".join(money(amount, currency) for currency, amount in self.amounts)

    @property
    def is_partial(self) -> bool:
        """Whether a part of the time had a price and another part had none."""
        return bool(self.amounts) and self.unpriced_hours > 0

    def __add__(self, other: Cost) -> Cost:
        sums = dict(self.amounts)
        for currency, amount in other.amounts:
            sums[currency] = sums.get(currency, Decimal(0)) + amount
        return Cost(
            self.gpu_hours + other.gpu_hours, tuple(sorted(sums.items())), self.unpriced_hours + other.unpriced_hours
        )


def cost_of(stretches: Iterable[Stretch]) -> Cost:
    """The cost of stretches: the sum of seconds / 3600 x devices x price, by currency."""
    total = Cost()
    for one in stretches:
        if one.price is None:
            total += Cost(one.gpu_hours, (), one.gpu_hours)
        else:
            total += Cost(one.gpu_hours, ((one.currency, Decimal(one.gpu_hours) * one.price),))
    return total


def money(amount: Decimal, currency: str) -> str:
    """An amount with its currency: "1.20 EUR", "< 0.01 EUR" for what rounds to nothing and is something."""
    behind = f"{NO_BREAK_SPACE}{currency}" if currency else ""
    rounded = amount.quantize(CENT, ROUND_HALF_UP)
    return f"<{NO_BREAK_SPACE}0.01{behind}" if amount > 0 and not rounded else f"{rounded:,}{behind}"


def money_range(low: Decimal, high: Decimal, currency: str) -> str:
    """ "0.60 to 1.80 EUR"; one amount where both round to the same."""
    if (most := money(high, currency)) == money(low, currency):
        return most
    return f"{money(low, '')} to {most}"


def plain_price(price: Decimal) -> str:
    """A price as it was written: "2.5", "0.0004", "100"."""
    return f"{price.normalize():f}"


def money_per_hour(price: Decimal, currency: str) -> str:
    """ "2.50 EUR an hour", with all decimal places that the price has."""
    text = plain_price(price)
    exact = f"{price.quantize(CENT):f}" if price == price.quantize(CENT) else text
    return f"{exact}{NO_BREAK_SPACE}{currency} an hour" if currency else f"{exact} an hour"

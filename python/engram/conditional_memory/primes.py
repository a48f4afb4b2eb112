"""Prime numbers from a point upwards: the sizes of the heads."""

from __future__ import annotations

from collections.abc import Set

# With these bases the test is exact below 3.3e24 (Sorenson and Webster 2015).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(number: int) -> bool:
    """Whether ``number``, below 3.3e24, is prime (Miller-Rabin with fixed bases)."""
    if number < 2:
        return False
    for base in _BASES:
        if number % base == 0:
            return number == base
    twos = ((number - 1) & -(number - 1)).bit_length() - 1
    odd = (number - 1) >> twos
    return all(_passes(number, pow(base, odd, number), twos) for base in _BASES)


def next_prime(start: int, taken: Set[int] = frozenset()) -> int:
    """The smallest prime at or above ``start`` that is not in ``taken``."""
    while start in taken or not is_prime(start):
        start += 1
    return start


def _passes(number: int, power: int, twos: int) -> bool:
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False

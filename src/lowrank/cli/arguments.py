"""Numbers on a command line, refused with a sentence that says which ones are meant."""

import argparse
import math
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """Whole numbers of `least` or more."""

    def number(word: str) -> int:
        try:
            if int(word) >= least:
                return int(word)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{word} is not a whole number of at least {least}")

    return number


def share(word: str) -> float:
    """Above 0 and at most 1."""
    value = _float(word)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{word} is not a share above 0 and at most 1")
    return value


def part(word: str) -> float:
    """A share that is not the whole: above 0 and below 1."""
    value = _float(word)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a share between 0 and 1")
    return value


def finite(word: str) -> float:
    value = _float(word)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{word} is not a finite number")
    return value


def not_negative(word: str) -> float:
    value = _float(word)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not a number of at least 0")
    return value


def _float(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan

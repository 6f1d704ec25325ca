"""Bytes and times for people."""

from collections.abc import Callable
from fractions import Fraction

# (name, bytes, digits after the point): a tenth of a GB is too coarse to compare peaks with
_SCALE = (("B", 1, 0), ("kB", 10**3, 1), ("MB", 10**6, 1), ("GB", 10**9, 3), ("TB", 10**12, 3))


def format_nbytes(nbytes: int, *, up: bool = False) -> str:
    """`nbytes` for people, in powers of ten: "884.0 MB", "1.200 GB".

    Rounds to nearest; with `up`, never below `nbytes`, for amounts that a reader will hand back as a budget.
    """
    sign, size = ("-", -nbytes) if nbytes < 0 else ("", nbytes)
    for name, unit, digits in _SCALE:
        scaled = Fraction(size, unit) * 10**digits
        ticks = -(-scaled.numerator // scaled.denominator) if up else round(scaled)
        if ticks < 1000 * 10**digits or name == _SCALE[-1][0]:
            break
    whole, rest = divmod(ticks, 10**digits)
    return f"{sign}{whole}.{rest:0{digits}} {name}" if digits else f"{sign}{whole} {name}"


def format_us(us: int) -> str:
    """A time for people, to three or four digits: "850 us", "92.0 ms", "1.077 s", "131.5 s"."""
    if us < 1000:
        return f"{us} us"
    if us < 999_500:
        return f"{us / 1e3:.1f} ms" if us < 99_950 else f"{us / 1e3:.0f} ms"
    return f"{us / 1e6:.3f} s" if us < 9_999_500 else f"{us / 1e6:.2f} s" if us < 99_995_000 else f"{us / 1e6:.1f} s"


def format_change(change: int, form: Callable[[int], str]) -> str:
    """`change` with its sign, its size as `form` writes it: "+1.200 GB", "-92.0 ms"."""
    return f"{'-' if change < 0 else '+'}{form(abs(change))}"

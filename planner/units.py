"""Bytes for people."""

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

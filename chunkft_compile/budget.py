"""Bytes as people write them: `parse_budget("14GB", device)` reads, `format_nbytes(884_000_000)` writes "884.0 MB"."""

import os
import re
from fractions import Fraction

import torch

from chunkft_compile.planner.units import format_nbytes

__all__ = ["FORMS", "budgets_between", "device_nbytes", "format_nbytes", "parse_amount", "parse_budget"]

FORMS = 'write "14GB" (10^9 bytes), "13.5GiB" (2^30 bytes), "80%" of the device\'s memory, or an integer of bytes'

_AMOUNTS = 'write "14GB" (10^9 bytes) or "13.5GiB" (2^30 bytes)'

_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS = _DECIMAL | _BINARY
_PATTERN = re.compile(rf"\s*([0-9]+(?:\.[0-9]+)?)\s*({'|'.join(_UNITS)}|%)\s*", re.IGNORECASE)


def parse_amount(text: str, what: str, *, whole_nbytes: int | None = None) -> int:
    """Bytes of `text` for the option `what`, rounded down; "80%" is of `whole_nbytes`. Raises `ValueError` with the accepted forms."""
    match = _PATTERN.fullmatch(text)
    forms = FORMS if whole_nbytes is not None else _AMOUNTS
    if match is None or (match[2] == "%" and (whole_nbytes is None or Fraction(match[1]) > 100)):
        raise ValueError(f"{what} {text!r} is not an amount of memory: {forms}")
    unit = Fraction(whole_nbytes or 0, 100) if match[2] == "%" else Fraction(_UNITS[match[2].lower()])
    nbytes = int(Fraction(match[1]) * unit)
    if nbytes <= 0:
        raise ValueError(f"{what} {text!r} leaves no memory at all: {forms}")
    return nbytes


def parse_budget(budget: str | int, device: torch.device) -> int:
    """Bytes of `budget` on `device`, rounded down. Raises `ValueError` with the accepted forms.

    >>> parse_budget("13.5 GiB", torch.device("cpu"))
    14495514624
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        return _positive(budget, budget)
    match = _PATTERN.fullmatch(budget) if isinstance(budget, str) else None
    if match is None:
        raise ValueError(f"budget {budget!r} is not an amount of memory: {FORMS}")
    number, unit = Fraction(match[1]), match[2].lower()
    if unit != "%":
        return _positive(int(number * _UNITS[unit]), budget)
    if number > 100:
        raise ValueError(f"budget {budget!r} is more than all of the device's memory: {FORMS}")
    return _positive(int(device_nbytes(device) * number / 100), budget)


def _positive(nbytes: int, budget: str | int) -> int:
    if nbytes <= 0:
        raise ValueError(f"budget {budget!r} leaves no memory at all: {FORMS}")
    return nbytes


def device_nbytes(device: torch.device) -> int:
    """Total memory of an accelerator; for the CPU, the machine's physical memory."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _, total = torch.accelerator.get_memory_info(device)
    return total


def budgets_between(smallest: int, largest: int, points: int) -> list[int]:
    """`points` budgets from the smallest to the largest, each by the same factor above the one before."""
    if largest <= smallest:
        return [smallest]
    factor = (largest / smallest) ** (1 / (points - 1))
    inner = [round(smallest * factor**i) for i in range(1, points - 1)]
    return sorted({smallest, *inner, largest})

"""`parse_budget` and `format_nbytes`: exact answers, every refusal with its message, and that the two agree."""

import os
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft_compile.budget import device_nbytes, format_nbytes, parse_budget

CPU = torch.device("cpu")
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@pytest.mark.parametrize(
    ("budget", "nbytes"),
    [
        ("14GB", 14 * 10**9),
        ("14 GB", 14 * 10**9),
        ("14gb", 14 * 10**9),
        (" 14GB\n", 14 * 10**9),
        ("13.5GiB", 14_495_514_624),
        ("1.5kB", 1500),
        ("884000000B", 884_000_000),
        ("0.1GB", 10**8),  # exact: 0.1 as a float would lose a byte
        ("1TiB", 2**40),
        (14_000_000_000, 14 * 10**9),
    ],
)
def test_accepted_forms(budget: str | int, nbytes: int) -> None:
    assert parse_budget(budget, CPU) == nbytes


@pytest.mark.parametrize(
    "budget",
    [
        "",
        "GB",
        "14",
        "fourteen GB",
        "14 G B",
        "14GB!",
        "1e3MB",
        "-1GB",
        "+1GB",
        "nan",
        "nanGB",
        "infGB",
        "14,5GB",
        ".5GB",
        "5.GB",
        "%",
        "-5%",
        "٣GB",
    ],
)
def test_a_malformed_budget_shows_the_value_and_the_forms(budget: str) -> None:
    with pytest.raises(ValueError, match=r'is not an amount of memory: write "14GB"') as caught:
        parse_budget(budget, CPU)
    assert repr(budget) in str(caught.value)


@pytest.mark.parametrize("budget", [True, False, 1.5, float("nan"), None, b"14GB"])
def test_other_types_are_refused(budget: object) -> None:
    with pytest.raises(ValueError, match="is not an amount of memory"):
        parse_budget(budget, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, -1, "0GB", "0%", "0.2B"])
def test_nothing_is_refused(budget: str | int) -> None:
    with pytest.raises(ValueError, match="leaves no memory at all"):
        parse_budget(budget, CPU)


def test_percent_of_a_cpu_is_of_physical_memory() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert device_nbytes(CPU) == total
    assert parse_budget("100%", CPU) == total
    assert parse_budget("12.5 %", CPU) == total // 8
    with pytest.raises(ValueError, match="more than all of the device's memory"):
        parse_budget("101%", CPU)


def test_percent_of_an_accelerator_is_of_its_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (1_000, 16_000_000_000))
    assert parse_budget("50%", torch.device("cuda", 0)) == 8_000_000_000


@settings(deadline=None)  # the machine may be busy
@given(number=st.integers(1, 10**6), digits=st.integers(0, 6), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " "]))
def test_every_decimal_number_is_exact(number: int, digits: int, unit: str, space: str) -> None:
    exact = Fraction(number, 10**digits) * UNITS[unit]
    whole, rest = divmod(number, 10**digits)
    text = f"{whole}.{rest:0{digits}}" if digits else str(whole)
    if exact >= 1:
        assert parse_budget(f"{text}{space}{unit}", CPU) == int(exact)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (884_000_000, "884.0 MB"),
        (999_960_000, "1.000 GB"),  # not "1000.0 MB"
        (1_204_000_000, "1.204 GB"),
        (14_000_000_000_000, "14.000 TB"),
        (2_500_000 * 10**12, "2500000.000 TB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_format(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 10**16))
def test_rounded_up_it_can_be_handed_back_as_a_budget(nbytes: int) -> None:
    back = parse_budget(format_nbytes(nbytes, up=True), CPU)
    assert nbytes <= back <= nbytes + max(nbytes // 100, 10**7)

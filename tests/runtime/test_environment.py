"""Environment variables: defaults, values, and a bad value is an error that names the variable."""

import pytest

from chunkft_compile.runtime import environment


@pytest.mark.parametrize(("value", "level"), [(None, 0), ("", 0), ("0", 0), ("1", 1), ("2", 2)])
def test_debug_levels(monkeypatch: pytest.MonkeyPatch, value: str | None, level: int) -> None:
    monkeypatch.delenv("CHUNKFT_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("CHUNKFT_DEBUG", value)
    assert environment.debug_level() == level


def test_the_guard_is_on_unless_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHUNKFT_GUARD", raising=False)
    assert environment.guard_wanted()
    monkeypatch.setenv("CHUNKFT_GUARD", "0")
    assert not environment.guard_wanted()


@pytest.mark.parametrize(("name", "value"), [("CHUNKFT_DEBUG", "3"), ("CHUNKFT_DEBUG", "yes"), ("CHUNKFT_GUARD", "off")])
def test_a_bad_value_names_the_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    read = environment.debug_level if name == "CHUNKFT_DEBUG" else environment.guard_wanted
    with pytest.raises(ValueError, match=f"{name} is '{value}'; it can be"):
        read()

"""Every environment variable that the library reads, and nothing else reads one.

| variable          | values                      | what it does                                                                   |
|-------------------|-----------------------------|--------------------------------------------------------------------------------|
| `CHUNKFT_CACHE`   | a directory; `0`            | keeps measured operators and the built allocator hook there; `0` keeps nothing |
| `XDG_CACHE_HOME`  | a directory                 | parent of the default cache, `chunkft_compile` (unset: `~/.cache`)             |
| `CHUNKFT_DEBUG`   | `0` (default), `1`, `2`     | on stderr, 1: a line per step; 2: also a line per instruction                  |
| `CHUNKFT_GUARD`   | `1` (default), `0`          | `0` does not hold running steps to the bytes that their plan promised          |

`CHUNKFT_DEBUG=2` resets the accelerator's peak statistics (`torch.accelerator.max_memory_allocated`) at every instruction; nothing else
does. An unset or empty variable has its default. Anything else is a `ValueError` that names the variable.
"""

import os
from pathlib import Path


def cache_directory() -> Path | None:
    """`$CHUNKFT_CACHE`, else `user_cache()`; None where `CHUNKFT_CACHE` is "0"."""
    chosen = os.environ.get("CHUNKFT_CACHE")
    if chosen == "0":
        return None
    return Path(chosen) if chosen else user_cache()


def user_cache() -> Path | None:
    """`chunkft_compile` under `$XDG_CACHE_HOME` or `~/.cache`; None where there is no home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "chunkft_compile"
    except RuntimeError:  # no home directory
        return None


def debug_level() -> int:
    """`$CHUNKFT_DEBUG`."""
    return _one_of("CHUNKFT_DEBUG", {"0": "nothing", "1": "a line per step", "2": "also a line per instruction"}, "0")


def guard_wanted() -> bool:
    """`$CHUNKFT_GUARD`."""
    return bool(_one_of("CHUNKFT_GUARD", {"1": "hold steps to their promise", "0": "do not"}, "1"))


def _one_of(name: str, meanings: dict[str, str], default: str) -> int:
    value = os.environ.get(name) or default
    if value not in meanings:
        allowed = ", ".join(f"{number} ({meaning})" for number, meaning in meanings.items())
        raise ValueError(f"the environment variable {name} is {value!r}; it can be {allowed}, or unset ({default})")
    return int(value)

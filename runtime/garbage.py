"""Python's cyclic collector, kept out of what must not be disturbed or slowed down by it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage collection inside."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def collected_once() -> Iterator[None]:
    """What the block leaves in cycles is gone when it ends, without a visit to what was there before.

    Nothing is collected inside, so all that it makes is of the youngest generation. A full collection goes through every object of
    the process (a third of a second once transformers is imported), and beside a growing graph Python begins several of them.
    """
    with uncollected():
        try:
            yield
        finally:
            gc.collect(0)

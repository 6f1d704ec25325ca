"""The allocator hook for tests, which are skipped where it cannot be built."""

import pytest

from chunkft_compile.runtime.allocators import Allocator, install
from chunkft_compile.runtime.native import BuildError

__all__ = ["Allocator", "allocator_or_skip"]


def allocator_or_skip() -> Allocator:
    """`install()`, or skip the running test with the reason."""
    try:
        return install()
    except BuildError as error:
        pytest.skip(str(error))

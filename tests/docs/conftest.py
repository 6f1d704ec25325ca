"""What the tests of pages share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.building.warm import warm_commands


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Commands that start at once, and measure each operator once for all pages."""
    directory = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHUNKFT_CACHE", str(directory / "cache"))
        with warm_commands(directory) as found:
            yield found

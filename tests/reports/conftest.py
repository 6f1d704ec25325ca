"""A plan that was lowered on this machine."""

import pytest

from chunkft_compile.planner import Plan
from tests.conftest import Workshop
from tests.reports.plans import lowered_plan


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory, captures_once: Workshop) -> Plan:
    """Several steps, and state that comes and goes."""
    planned = lowered_plan(tmp_path_factory.mktemp("lowered"), 52_000)
    assert planned.lowered
    assert len(planned.schedule.steps) > 1
    return planned

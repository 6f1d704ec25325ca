import gc
import weakref

import pytest

from chunkft_compile.runtime.garbage import collected_once, uncollected


class _Cycle:
    def __init__(self) -> None:
        self.me = self


def test_what_a_block_leaves_in_cycles_is_gone_and_nothing_older_was_visited() -> None:
    old = weakref.ref(_Cycle())
    gc.collect(0)
    assert old() is None
    cycle = _Cycle()
    gc.collect(1)  # it is of the oldest generation now
    old = weakref.ref(cycle)
    del cycle
    with collected_once():
        young = [weakref.ref(_Cycle()) for _ in range(10 * gc.get_threshold()[0])]
        assert all(ref() is not None for ref in young)
    assert not any(ref() is not None for ref in young)
    assert old() is not None
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        for block in (uncollected, collected_once):
            seen = []
            with pytest.raises(ZeroDivisionError), block():
                seen.append(gc.isenabled() or 1 // 0)
            assert (seen, gc.isenabled()) == ([], enabled)
    finally:
        (gc.enable if was else gc.disable)()

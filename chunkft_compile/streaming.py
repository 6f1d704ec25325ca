"""Where the weights of segments come and go in the program of a step, if they live beside the device."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from chunkft_compile.planner.program import Instruction, Op


@dataclass(frozen=True)
class Streams:
    """Weights that are away: the segment of each by name, its bytes and the time to fetch it.

    `evict_us` is the time to write the rows of a chunk back.
    """

    names: Mapping[str, int] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)
    fetch_us: Mapping[str, int] = field(default_factory=dict)
    evict_us: Mapping[int, int] = field(default_factory=dict)

    def homes(self, params: Mapping[int, str]) -> dict[int, int]:
        """The segment that each chunk is in, of those whose weights are away. `params` are their parameters."""
        return {chunk: self.names[param] for chunk, param in params.items() if param in self.names}

    def by_segment(self, values: Mapping[int, str]) -> dict[int, tuple[int, ...]]:
        """The values that lie in the weights of each segment. `values` are all that do, with the name of the weight."""
        found: dict[int, tuple[int, ...]] = defaultdict(tuple)
        for value, name in values.items():
            found[self.names[name]] += (value,)
        return dict(found)

    def nbytes_of(self, values: Mapping[int, str]) -> dict[int, int]:
        """Bytes that come with the weights of each segment, as far as calls read them."""
        by_segment = self.by_segment(values)
        return {segment: sum(self.nbytes[name] for name in {values[v] for v in inside}) for segment, inside in by_segment.items()}


NO_STREAMS = Streams()


def with_weights(steps: Sequence[Instruction], streams: Streams, values: Mapping[int, str], homes: Mapping[int, int]) -> list[Instruction]:
    """The instructions of a step with weights fetched for every call that needs them, and freed after it.

    `values` are the weights that calls read, by name. `homes` are chunks that IMMEDIATE updates change there: their segment's backward
    needs the weights even if it does not read them, and the rows are written back before the bytes go.
    """
    lies_in = streams.by_segment(values)
    last_update = {
        homes[chunk]: number for number, step in enumerate(steps) if step.op is Op.UPDATE for chunk in step.chunks if chunk in homes
    }
    found: list[Instruction] = []
    waiting: dict[int, list[Instruction]] = defaultdict(list)  # what comes after the update of that number
    for number, step in enumerate(steps):
        segment = step.segment
        changed = step.op is Op.BACKWARD and segment in last_update
        inside = lies_in.get(segment, ()) if step.op in (Op.FORWARD, Op.BACKWARD) else ()
        if not inside or not (changed or set(inside) & set(step.reads)):
            found += [step, *waiting.pop(number, ())]
            continue
        us = sum(streams.fetch_us[name] for name in {values[value] for value in inside})
        found.append(Instruction(Op.FETCH, segment, writes=inside, weights=(segment,), us=us))
        found.append(replace(step, weights=(segment,)))
        free = Instruction(Op.FREE, segment, frees=inside, weights=(segment,))
        if changed:
            us = sum(streams.evict_us[chunk] for chunk, home in homes.items() if home == segment)
            waiting[last_update[segment]] += [Instruction(Op.EVICT, segment, weights=(segment,), us=us), free]
        else:
            found.append(free)
    assert not waiting, f"weights of segments {sorted(last_update)} are updated before the call that reads them"
    return found

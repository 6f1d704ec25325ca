"""What was captured, planned and lowered, for `TORCH_TRACE`: artifacts beside those of Dynamo and Inductor, which `tlparse` shows.

Nothing is written, or even made, unless structured tracing is on. Logs need nothing of this: `TORCH_LOGS="+chunkft_compile"` names the
package's loggers as it would those of any module.
"""

from collections.abc import Callable, Sequence

from torch import fx, nn
from torch._logging._internal import trace_structured  # Private (2.13.0): the only way into the trace

from chunkft_compile.assembly import Assembled
from chunkft_compile.capture import Capture
from chunkft_compile.planner import Plan, to_json
from chunkft_compile.readable import readable


def trace_capture(found: Capture) -> None:
    """The joint graph as code, with shapes."""

    def code() -> str:
        root = nn.Module()
        for node, tensor in found.constants.items():
            root.register_buffer(str(node.target), tensor)
        return fx.GraphModule(root, found.graph).print_readable(print_output=False, include_stride=True)

    _trace("chunkft_joint_graph", "string", code)


def trace_plan(plan: Callable[[], Plan]) -> None:
    """The plan that `plan()` gives, as `save_schedule` writes it."""
    _trace("chunkft_plan", "json", lambda: to_json(plan()))


def trace_program(assembled: Assembled, segments: Sequence[str]) -> None:
    """The instructions of a step, one a line, and the codes that they call."""

    _trace("chunkft_program", "string", lambda: readable(assembled, segments))


def _trace(name: str, encoding: str, payload: Callable[[], str]) -> None:
    # not of one of Dynamo's frames: there may be none
    trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=payload, expect_trace_id=False)

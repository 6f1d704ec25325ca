"""What the end-to-end tests share: an allocator hook, and captures, lowered codes and measured costs that are made once."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from chunkft_compile.capture import Capture, capture_symbolic
from chunkft_compile.costs import OperatorCosts
from chunkft_compile.lowering import Lowering
from chunkft_compile.planner import cpsat
from chunkft_compile.runtime.allocators import install
from chunkft_compile.runtime.native import BuildError
from chunkft_compile.segments import Segment
from chunkft_compile.shallow import capture_shallow
from chunkft_compile.sizes import Symbols
from chunkft_compile.twins import Twin
from tests.support.allocator import Allocator, allocator_or_skip


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -k zoo` runs all of the zoo, slow models too."""
    if config.option.keyword == "zoo" and config.option.markexpr == "not slow":
        config.option.markexpr = ""


class Workshop:
    """Stands where the compiler captures, lowers and measures, and does each only once per model structure and batch shape.

    A capture holds names and shapes, no weights, so copies of a model can share it.
    """

    def __init__(self) -> None:
        self.costs = OperatorCosts(torch.device("cpu"))
        self._costs = {self.costs.device: self.costs}
        self.captured = 0
        self._captures: dict[str, Capture] = {}
        self._symbolic: dict[str, tuple[Capture, Symbols]] = {}
        self._lowerings: dict[int, Lowering] = {}
        self._twins: dict[int, Twin] = {}

    def capture(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, loss_only: bool = True) -> Capture:
        """As `shallow.capture_shallow`."""
        key = _key(model, args, kwargs, loss_only=loss_only)
        if key not in self._captures:
            self.captured += 1
            self._captures[key] = capture_shallow(model, args, kwargs, loss_only=loss_only)
        return self._captures[key]

    def capture_symbolic(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        named: Sequence[Sequence[object]],
        like: fx.Graph,
        *,
        loss_only: bool = True,
    ) -> tuple[Capture, Symbols]:
        """As `capture.capture_symbolic`, which keeps the model: one on another device than the CPU is to be freed."""
        if any(parameter.device.type != "cpu" for parameter in model.parameters()):
            return capture_symbolic(model, args, kwargs, named, like, loss_only=loss_only)
        key = f"{_key(model, args, kwargs, loss_only=loss_only)} {named}"
        if key not in self._symbolic:
            self._symbolic[key] = capture_symbolic(model, args, kwargs, named, like, loss_only=loss_only)
        return self._symbolic[key]

    def lower(self, found: Capture, segments: Sequence[Segment]) -> Lowering:
        """As `Lowering`."""
        return self._lowerings.setdefault(id(found), Lowering(found, segments))

    def twin(self, found: Capture, symbols: Symbols) -> Twin:
        """As `Twin`."""
        if all(found is not kept for kept, _ in self._symbolic.values()):
            return Twin(found, symbols)
        if id(found) not in self._twins:  # a twin adds symbols of its own
            self._twins[id(found)] = Twin(found, symbols)
        return self._twins[id(found)]

    def measured(self, device: torch.device) -> OperatorCosts:
        """As `OperatorCosts`."""
        return self._costs.setdefault(device, OperatorCosts(device))

    def open(self, patch: pytest.MonkeyPatch) -> None:
        """From now on compiling goes through here."""
        patch.setattr("chunkft_compile.making.capture_shallow", self.capture)
        patch.setattr("chunkft_compile.making.capture_symbolic", self.capture_symbolic)
        patch.setattr("chunkft_compile.signatures.Twin", self.twin)
        patch.setattr("chunkft_compile.session.OperatorCosts", self.measured)
        patch.setattr("chunkft_compile.compiled.Lowering", self.lower)


def _key(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, loss_only: bool) -> str:
    """What a capture depends on."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    shapes = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    trained = [(parameter.requires_grad, parameter.dtype, parameter.device) for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return repr((model, getattr(model, "config", None), trained, modes, shapes, spec, loss_only, autocast))


@pytest.fixture(scope="session", autouse=True)
def _no_cache_on_disk() -> Iterator[None]:
    """Tests neither read nor write the user's cache; those of the cache name a directory of their own.

    Only the allocator hook comes from there: it is built once per machine, not once per session.
    """
    with suppress(BuildError):
        install()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHUNKFT_CACHE", "0")
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_clock_in_searches() -> Iterator[None]:
    """A search ends by the work done: how busy the machine is does not decide what a test sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpsat, "WALL_FACTOR", 50.0)
        yield


@pytest.fixture(autouse=True)
def _young_collector() -> None:
    """Collections visit only what the test at hand makes: planning and measuring collect many times in each.

    What is older (imports, captures, compiled code: millions of objects) would make that longer than the rest of the test.
    `gc.get_objects` does not show it either, by which the runtime finds optimizers: make them in the test, not in a fixture of the module.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def workshop() -> Workshop:
    """The one of the session."""
    return Workshop()


@pytest.fixture(scope="module")
def captures_once(workshop: Workshop) -> Iterator[Workshop]:
    """Compiling in this module goes through the workshop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        workshop.open(patch)
        yield workshop
    torch.set_num_threads(threads)


@pytest.fixture
def allocator() -> Iterator[Allocator]:
    """The hook, with no garbage about and no cap afterwards."""
    hook = allocator_or_skip()
    gc.collect()
    hook.reset()
    yield hook
    hook.cap(None)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before counts, and a recompilation is an error unless a test allows it."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


WITH_DYNAMO = [
    pytest.mark.usefixtures("captures_once", "fresh_dynamo"),
    # torch's own (2.13.0): when Dynamo imports its distributions, and when it looks at an input or a loss (hidden elsewhere)
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
"""For tests of what `torch.compile` makes of compiled models."""

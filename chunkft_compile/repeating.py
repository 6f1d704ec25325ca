"""The capture of a deep model from that of a shallow one: equal blocks are traced once, and the nodes of a middle one repeated.

NOTE [which nodes are repeated]
Of the blocks that were traced, the third is the *pattern*. It must be the same as its predecessor, node by node: what is called with
what, as seen from the block, and in which storages results lie. A node of a copy reads what that of the pattern reads: its own block, the
block before (forward) or behind (backward), its own weights, or what stands outside. Everything else keeps its place, so that nodes come in
the order in which tracing all blocks would give them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from itertools import repeat as repeat_value
from typing import Any, TypeVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from chunkft_compile.capture import Capture
from chunkft_compile.fakes import Made
from chunkft_compile.segments import is_forward
from chunkft_compile.stacks import Stack
from chunkft_compile.traced import MODEL

_PATTERN = 2
_UP, _DOWN = "up", "down"
_T = TypeVar("_T")
_SMALL = 16  # elements of a constant that is compared by value
_MODULES = ("nn_module_stack", "fwd_nn_module_stack")


class _IrregularError(Exception):
    """The graph is not one that can be repeated, and why."""


def repeat(shallow: Capture, stack: Stack, kept: int) -> Capture | str:
    """`shallow`, which has the first `kept` blocks of `stack`, with all of them; or why its pattern cannot be repeated."""
    try:
        blocks = _Blocks(shallow, stack, kept)
        return _Repeater(blocks, blocks.check()).run()
    except _IrregularError as error:
        return str(error)


class _Blocks:
    """Which block every node of the shallow capture belongs to; None for those outside. Blocks are seen to be regular by `check`."""

    def __init__(self, shallow: Capture, stack: Stack, kept: int) -> None:
        self.capture = shallow
        self.stack = stack
        self.last = kept - 1
        self.copied = stack.depth - kept
        self.path = re.compile(rf"^(L\['self'\]\.{re.escape(MODEL + stack.path)}\.)(\d+)(?=\.|$)")
        self.of: dict[fx.Node, int | None] = {}
        names = shallow.params | shallow.buffers
        known: dict[bool, int | None] = {True: None, False: None}
        self._operations: dict[object, int | None] = {}
        self._last_operation = max(node.meta.get("seq_nr", 0) for node in shallow.graph.nodes)
        for node in shallow.graph.nodes:
            self.of[node] = stack.block_of(names[node])[0] if node in names else None
            if node.op == "get_attr":
                self.of[node] = self._named(node.meta.get(_MODULES[0]) or {})
            if node.op == "call_function":
                self.of[node] = known[is_forward(node)] = self._find(node, known[is_forward(node)])
        self.members = [[node for node, block in self.of.items() if block == i] for i in range(kept)]
        self.position = {node: i for members in self.members for i, node in enumerate(members)}
        self.owners = _owners(shallow.graph)
        self.gradient_of: dict[fx.Node, list[str]] = {}
        for name, node in shallow.gradients.items():
            self.gradient_of.setdefault(node, []).append(name)

    def check(self) -> int:
        """How far sequence numbers of a block are from those of its predecessor. Raises `_IrregularError`."""
        calls = [node for node in self.of if node.op == "call_function"]
        for forward, stretch in ((True, _UP), (False, _DOWN)):
            order = [block for block, _ in groupby(self.of[node] for node in self.of if _stretch(node) == stretch) if block is not None]
            if order != list(range(self.last + 1))[:: 1 if forward else -1]:
                raise _IrregularError(f"the {'forward' if forward else 'backward'} of blocks is in the order {order}")
        for node in calls:
            near = {self.of[source] for source in (*node.all_input_nodes, *(owner for owner, _ in self.owners[node]))}
            self._check_near(node, near - {None})
        if any(self.of[leaf] not in (None, self.last) for leaf in self.capture.outputs if isinstance(leaf, fx.Node)):
            raise _IrregularError("the model gives what a middle block made")
        if any(self.stack.block_of(name)[0] is not None for name in self.capture.mutations):
            raise _IrregularError("blocks change their buffers")
        if any(self.stack.block_of(name)[0] != self.of[node] for name, node in self.capture.gradients.items()):
            raise _IrregularError("a gradient is not made by the block that has its weight")
        one, other = self.members[_PATTERN - 1], self.members[_PATTERN]
        for a, b in zip(one, other, strict=False):
            if self._row(a) != self._row(b):
                raise _IrregularError(f"{b.name} is not like {a.name}")
        steps = {b.meta["seq_nr"] - a.meta["seq_nr"] for a, b in zip(one, other, strict=True) if self.is_numbered(a)}
        if len(one) != len(other) or len(steps) != 1:
            raise _IrregularError("blocks have different numbers of calls")
        return int(steps.pop())

    def _check_near(self, node: fx.Node, near: Iterable[int | None]) -> None:
        own = self.of[node]
        for block in near:
            assert block is not None, "what is outside is near to all"
            if block not in ((0, self.last) if own is None else (own - 1, own, own + 1)):
                raise _IrregularError(f"{node.name} reads a value of block {block}")
        for source in node.all_input_nodes:
            if source.op == "placeholder" and self.of[source] not in (None, own):
                raise _IrregularError(f"{node.name} reads a weight of another block")

    def is_numbered(self, node: fx.Node) -> bool:
        """Whether the sequence number is that of an operation of the forward. Sums of gradients have the number of the last one."""
        known = any(node.meta.get(kind) for kind in _MODULES) or node.meta.get("seq_nr") != self._last_operation
        return "seq_nr" in node.meta and known

    def _find(self, node: fx.Node, before: int | None) -> int | None:
        """The block of a call: that of its module, or of its operation, or that of the call `before` it, as for sums of gradients."""
        modules, number = node.meta.get(_MODULES[0] if is_forward(node) else _MODULES[1]), node.meta.get("seq_nr")
        if modules:
            found = self._named(modules)
        else:
            found = self._operations.get(number, before) if self.is_numbered(node) and not is_forward(node) else before
        if is_forward(node) and number is not None:
            self._operations.setdefault(number, found)
        return found

    def _named(self, modules: Mapping[str, tuple[str, Any]]) -> int | None:
        found = (self.path.match(path) for path, _ in modules.values())
        return next((int(match[2]) for match in found if match), None)

    def _row(self, node: fx.Node) -> object:
        """All that a node says, as seen from its block."""
        own = self.of[node]
        assert own is not None, "rows are compared of blocks"

        def seen(source: fx.Node) -> str:
            block = self.of[source]
            return source.name if block is None else f"{block - own} {self.position[source]}"

        values = [
            (tuple(leaf.shape), leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device, leaf.requires_grad)
            if isinstance(leaf, torch.Tensor)
            else repr(leaf)
            for leaf in pytree.tree_leaves(node.meta.get("val"))
        ]
        name = self.capture.params.get(node) or self.capture.buffers.get(node)
        inner = [self.stack.block_of(each)[1] for each in (name, *self.gradient_of.get(node, [])) if each is not None]
        modules = [[self.path.sub("", path) for path, _ in node.meta.get(kind, {}).values()] for kind in _MODULES]
        call: tuple[object, ...] = ()
        if node.op == "call_function":
            call = (str(node.target), repr(fx.node.map_arg((node.args, node.kwargs), seen)), is_forward(node))
        if node.op == "get_attr":
            call = (str(self.capture.constants[node].tolist()),) if self.capture.constants[node].numel() <= _SMALL else (node.name,)
        return node.op, call, values, [(seen(owner), leaf) for owner, leaf in self.owners[node]], inner, modules


class _Repeater:
    """Writes the deep graph. What it makes is a node of the shallow graph at a block of the deep model, which is called `deep`."""

    def __init__(self, blocks: _Blocks, step: int) -> None:
        self._blocks = blocks
        self._old = blocks.capture
        self._stack = blocks.stack
        self._step = step
        self._graph = fx.Graph()
        self._made: dict[tuple[fx.Node, int | None], fx.Node] = {}
        self._modules: dict[object, Mapping[str, tuple[str, Any]]] = {}
        self._behind = _behind(blocks)

    def run(self) -> Capture:
        """The deep capture."""
        old, of = self._old, self._blocks.of
        named: dict[str, dict[fx.Node, Any]] = {field: {} for field in ("params", "buffers", "inputs", "tangents", "constants")}
        for node, deep in self._spread((node for node in of if node.op != "output"), of.__getitem__, _stretch):
            new = self._write(node, deep)
            for field, found in named.items():
                if node in getattr(old, field):
                    name = getattr(old, field)[node]
                    found[new] = self._renamed(name, deep) if isinstance(name, str) else name
                    if field == "constants" and self._is_copy(deep):  # in bytes of its own, as if traced
                        found[new] = name.clone()
        self._write_output()
        gradients = self._spread(old.gradients, lambda name: self._stack.block_of(name)[0], lambda _: None)
        return replace(
            old,
            graph=self._graph,
            params=named["params"],
            buffers=named["buffers"],
            inputs=named["inputs"],
            tangents=named["tangents"],
            constants=named["constants"],
            outputs=tuple(self._from_outside(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in old.outputs),
            gradients={self._renamed(name, deep): self._made[old.gradients[name], deep] for name, deep in gradients},
            mutations={name: self._from_outside(node) for name, node in old.mutations.items()},
            copied=self._blocks.copied,
        )

    def _spread(
        self, items: Iterable[_T], block_of: Callable[[_T], int | None], stretch_of: Callable[[_T], object]
    ) -> Iterator[tuple[_T, int | None]]:
        """Every item with its block in the deep model, those of the pattern for each copy, too, behind each other.

        Items of one stretch stay together. In the stretch `_DOWN`, blocks come from the last to the first.
        """
        for (block, stretch), group in groupby(items, lambda item: (block_of(item), stretch_of(item))):
            found = list(group)
            blocks = [self._deep(block)]
            if block == _PATTERN:
                blocks += range(_PATTERN + 1, _PATTERN + 1 + self._blocks.copied)
            for deep in reversed(blocks) if stretch == _DOWN else blocks:
                yield from ((item, deep) for item in found)

    def _write(self, node: fx.Node, deep: int | None) -> fx.Node:
        """One node of the deep graph."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._read(source, node, deep))
        target = f"primals_{len(self._made) + 1}" if node.name.startswith("primals_") else node.target
        if node.op == "get_attr" and self._is_copy(deep):
            target = f"{node.target}_{deep}"
        new = self._graph.create_node(node.op, target)
        # Private (2.13.0): given to `create_node` they would be searched for raw symbols, and each attribute that is set takes the node out
        # of the graph's index and puts it back. That was a quarter of the time of a copy.
        new._update_args_kwargs(args, kwargs)
        meta = new.meta
        meta.update(node.meta)
        if deep is not None and deep != self._blocks.of[node]:
            meta |= {kind: self._renamed_modules(meta[kind], deep) for kind in _MODULES if meta.get(kind)}
            if "desc" in meta:
                meta["desc"] = self._described(meta["desc"], deep)
        if "seq_nr" in meta:
            meta["seq_nr"] += self._later(node, deep)
        self._made[node, deep] = new
        if deep is not None:
            meta["val"] = self._value(node, deep)
        return new

    def _write_output(self) -> None:
        output = self._old.graph.output_node()
        results: Any = output.args[0]
        # results are the outputs of the model, then one for each of its inputs, weights first: its gradient, or nothing
        inputs = [self._blocks.of[node] for node in self._old.graph.find_nodes(op="placeholder") if node not in self._old.tangents]
        blocks = [*repeat_value(None, len(results) - len(inputs)), *inputs]
        triples = list(zip(results, output.meta["desc"], blocks, strict=True))
        values, descriptions = [], []
        for (value, desc, _), deep in self._spread(triples, lambda triple: triple[2], lambda _: None):
            if isinstance(value, fx.Node):
                value = self._made[value, deep] if deep is not None else self._from_outside(value)
            values.append(value)
            descriptions.append(self._described(desc, deep))
        self._graph.output(type(results)(values)).meta = output.meta | {"desc": descriptions}

    def _is_copy(self, deep: int | None) -> bool:
        return deep is not None and _PATTERN < deep <= _PATTERN + self._blocks.copied

    def _read(self, source: fx.Node, reader: fx.Node, deep: int | None) -> fx.Node:
        """What stands for an argument where `reader` is written for a block."""
        block, own = self._blocks.of[source], self._blocks.of[reader]
        if block is None or own is None or deep is None:
            return self._from_outside(source)
        place = deep + block - own
        return self._made[self._at(source, place), place]

    def _at(self, node: fx.Node, deep: int) -> fx.Node:
        """The node of the shallow graph that stands in block `deep` where `node` stands in its own."""
        block = max(min(deep, _PATTERN), deep - self._blocks.copied)
        if block == self._blocks.of[node]:
            return node
        found = self._blocks.members[block][self._blocks.position[node]]
        if found.target != node.target and node.op != "placeholder":
            raise _IrregularError(f"{found.name} stands where {node.name} should")
        return found

    def _from_outside(self, node: fx.Node) -> fx.Node:
        return self._made[node, self._deep(self._blocks.of[node])]

    def _deep(self, block: int | None) -> int | None:
        """Where a block of the shallow model stands in the deep one."""
        return block if block is None or block <= _PATTERN else block + self._blocks.copied

    def _value(self, node: fx.Node, deep: int) -> Any:
        """Fake values in storages of their own, or in those of the nodes whose views they are."""
        owners = iter(self._blocks.owners[node])
        made: list[torch.Tensor] = []
        is_copy = self._is_copy(deep)

        def fake(old: torch.Tensor) -> torch.Tensor:
            owner, number = next(owners)
            if owner is not node:
                storage = _tensors(self._read(owner, node, deep).meta["val"])[number].untyped_storage()
            elif number < len(made):
                storage = made[number].untyped_storage()
            elif is_copy:
                storage = torch.UntypedStorage(old.untyped_storage().nbytes(), device="meta")  # type: ignore[no-untyped-call]
            else:
                storage = old.untyped_storage()
            same = not is_copy and storage._cdata == old.untyped_storage()._cdata
            made.append(old if same else Made.like(old).inside(self._old.fake_mode, storage))
            return made[-1]

        value = node.meta["val"]
        return fake(value) if isinstance(value, torch.Tensor) else pytree.tree_map_only(torch.Tensor, fake, value)

    def _later(self, node: fx.Node, deep: int | None) -> int:
        """How much later the operation of a node runs than in the shallow model."""
        block = self._blocks.of[node]
        if not self._blocks.is_numbered(node) or (block is None and node in self._behind):
            return self._step * self._blocks.copied
        return 0 if block is None or deep is None else self._step * (deep - block)

    def _renamed(self, name: str, deep: int | None) -> str:
        """The name of a weight, in another block."""
        block, own = self._stack.block_of(name)
        return name if block is None else f"{self._stack.path}.{deep}.{own}"

    def _renamed_modules(self, modules: Mapping[str, tuple[str, Any]], deep: int) -> Mapping[str, tuple[str, Any]]:
        key = (tuple(modules), deep)
        if key not in self._modules:
            self._modules[key] = {each: (self._blocks.path.sub(rf"\g<1>{deep}", path), kind) for each, (path, kind) in modules.items()}
        return self._modules[key]

    def _described(self, desc: Any, deep: int | None) -> Any:
        """What AOTAutograd says of an input or output that belongs to a weight, for the weight of another block."""
        if self._stack.block_of(_target(desc))[0] is None:
            return desc
        if hasattr(desc, "grad_of"):
            return replace(desc, grad_of=self._described(desc.grad_of, deep))
        return replace(desc, target=MODEL + self._renamed(_target(desc), deep))


def _stretch(node: fx.Node) -> object:
    if node.op in ("call_function", "get_attr"):
        return _UP if is_forward(node) else _DOWN
    return node.op


def _target(desc: Any) -> str:
    """The weight that a description of AOTAutograd speaks of, or nothing."""
    return str(getattr(getattr(desc, "grad_of", desc), "target", "")).removeprefix(MODEL)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):  # as almost always
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _owners(graph: fx.Graph) -> dict[fx.Node, list[tuple[fx.Node, int]]]:
    """For every tensor of every node the first tensor in the same storage: its node, and its number there."""
    first: dict[int, tuple[fx.Node, int]] = {}
    return {
        node: [
            first.setdefault(tensor.untyped_storage()._cdata, (node, number))
            for number, tensor in enumerate(_tensors(node.meta.get("val")))
        ]
        for node in graph.nodes
        if node.op != "output"
    }


def _behind(blocks: _Blocks) -> set[fx.Node]:
    """The calls between the forward of the last block and its backward."""
    calls = [node for node in blocks.of if node.op == "call_function"]
    last = [i for i, node in enumerate(calls) if blocks.of[node] == blocks.last]
    start = max(i for i in last if is_forward(calls[i])) + 1
    return set(calls[start : min(i for i in last if not is_forward(calls[i]))])

"""Gradient slices: re-emit the operators that produce a gradient so that they produce only some of its rows.

A rule takes the rows it must produce and says which rows of its inputs it needs; the walk ends at values that already exist
(saved tensors, arriving gradients), of which it takes a view. The dense gradient is never made. Where no rule applies, the
node is computed whole and cut afterwards, and `Slicer.dense` records it.
"""

from collections.abc import Mapping
from typing import Any

from torch import fx

from chunkft_compile.slicing.arithmetic import ARITHMETIC, is_pointwise, pointwise
from chunkft_compile.slicing.gathers import GATHERS
from chunkft_compile.slicing.items import CALLS, ITEMS
from chunkft_compile.slicing.slicer import Rows, Rule, Slicer
from chunkft_compile.slicing.views import VIEWS

__all__ = ["ITEMS", "RULES", "Rows", "Slicer", "rule_of"]

RULES: Mapping[Any, Rule] = {**VIEWS, **ARITHMETIC, **GATHERS, **CALLS}


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for a node's operator; every elementwise operator has one."""
    return RULES.get(node.target) or (pointwise if is_pointwise(node) else None)

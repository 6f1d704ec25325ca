"""The zoo: tiny models of many architectures, each trained in chunks and held against autograd.

python -m benchmarks.zoo
"""

from benchmarks.zoo.decoders import DECODERS
from benchmarks.zoo.entries import Entry
from benchmarks.zoo.others import OTHERS
from benchmarks.zoo.plain import PLAIN

ZOO: tuple[Entry, ...] = (*DECODERS, *OTHERS, *PLAIN)

__all__ = ["ZOO", "Entry"]

"""Machines to plan for that are not here: what they hold, how fast they are, and where each figure comes from.

Nothing in this file was measured on a GPU. Peaks are the vendor's, dense (without sparsity); what software reaches of them is a
factor with a reason. The figures of "cpu" were measured on the machine that the benchmarks ran on.

NOTE [roofline]
S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52(4), 2009: a kernel is bound by arithmetic or by memory traffic, whichever takes longer. With the time
to start a kernel, which dominates small ones:

    us = launch_us + max(flops / (peak x efficiency), nbytes / (bandwidth x bandwidth_efficiency))

Efficiencies of GPUs: large bf16 products reach 0.65 to 0.75 of the data-centre cards' peak (A800 PCIe: 215 of 312 TFLOP/s at
n = 8192; H100 about 0.7), whose clock falls under load, and nearly all of the GeForce cards' (4090: 159 to 167 of 165, RTX 3090
similar), whose peak is stated at their base boost clock; 0.85 leaves room for shapes that do not fill them. Copies reach 0.89 of
the bandwidth (A800: 1727 of 1935 GB/s); operators that also compute somewhat less, 0.85. Source of both: the public measurements in
github.com/mli/transformers-benchmarks (issue 4). Attention is slower than products: flash attention 2 reaches up to 0.73 forward and
0.63 backward on an A100 (T. Dao, 2023, arXiv 2307.08691), kernels that take a mask less; 0.4 for all.

NOTE [reserve]
What a process needs outside the budget: the CUDA context (public reports say 290 to 470 MiB, by driver and how many kernels are
loaded); two cuBLAS workspaces (torch 2.13: 8,519,680 bytes before Hopper, 32 MiB from it on; one per thread that calls it, and
backward has its own); and what the caching allocator cannot hand out. The last was simulated on captured traces of Llama
shapes: 2 to 4 % for most, up to 9.5 % with few layers and long sequences. 1/25 of the memory is set aside for it.

NOTE [links]
Pinned copies reach about 25 GB/s over PCIe 4.0 x16 (31.5 GB/s on paper, less packet headers), twice that over 5.0, half of it over
x8. The disk is a fast consumer SSD: 7.0 GB/s read on paper (Samsung 980 PRO data sheet); written 2.0 GB/s once its cache is full,
which optimizer state, written at every switch, soon achieves. 5.0 GB/s is kept for reads through a file system.
`overlaps` says what the hardware can do; offline planning counts on it only where it is told to (`offline.Choices.overlap`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from chunkft_compile.planner.problem import Link, Placement

_GIB = 2**30
_MIB = 2**20
_FRAGMENTS = 25  # one part in so many, see NOTE [reserve]
_BEFORE_HOPPER_NBYTES = 8_519_680
_HOPPER_NBYTES = 32 * _MIB


@dataclass(frozen=True, slots=True)
class Device:
    """One machine. `memory_nbytes` is what torch reports as the total of the device.

    `flops_per_s` are dense matrix peaks by how torch computes: "float32" without TF32, its default for products; "tf32", which
    `torch.set_float32_matmul_precision("high")` allows; "bfloat16", float16 too, with float32 sums. `links` lead to the places
    beside it, fastest first. Sizes are allocated in multiples of `block_nbytes`.
    """

    name: str
    title: str
    memory_nbytes: int
    flops_per_s: Mapping[str, float] = field(repr=False)
    bandwidth_bytes_per_s: float
    matmul_efficiency: float
    attention_efficiency: float
    bandwidth_efficiency: float
    launch_us: float
    links: tuple[Link, ...]
    block_nbytes: int
    reserve_nbytes: int
    accelerator: bool
    source: str

    def __post_init__(self) -> None:
        positive = (self.memory_nbytes, self.bandwidth_bytes_per_s, self.launch_us, self.block_nbytes, *self.flops_per_s.values())
        if min(positive) <= 0 or not 0 <= self.reserve_nbytes < self.memory_nbytes:
            raise ValueError(f"{self.name}: sizes and speeds must be positive, the reserve less than the memory")
        efficiencies = (self.matmul_efficiency, self.attention_efficiency, self.bandwidth_efficiency)
        if not all(0 < efficiency <= 1 for efficiency in efficiencies):
            raise ValueError(f"{self.name}: efficiencies lie in (0, 1]: {efficiencies}")
        if set(self.flops_per_s) != {"float32", "tf32", "bfloat16"}:
            raise ValueError(f"{self.name}: needs the peaks of float32, tf32 and bfloat16, got {sorted(self.flops_per_s)}")

    @property
    def budget_nbytes(self) -> int:
        """The most that a budget can be: the memory less its reserve."""
        return self.memory_nbytes - self.reserve_nbytes

    def us(self, flops: float, nbytes: float, precision: str, *, attention: bool = False) -> float:
        """Microseconds of one operator that runs as a kernel of its own, see NOTE [roofline]."""
        efficiency = self.attention_efficiency if attention else self.matmul_efficiency
        arithmetic = flops / (self.flops_per_s[precision] * efficiency)
        traffic = nbytes / (self.bandwidth_bytes_per_s * self.bandwidth_efficiency)
        return self.launch_us + max(arithmetic, traffic) * 1e6

    def allocated_nbytes(self, nbytes: int) -> int:
        """What its allocator counts for `nbytes`."""
        return -(-nbytes // self.block_nbytes) * self.block_nbytes


def _links(host_bytes_per_s: int) -> tuple[Link, ...]:
    """To pinned host memory and to a disk behind it, see NOTE [links]."""
    host = Link(Placement.HOST, host_bytes_per_s, host_bytes_per_s, overlaps=True)
    return host, Link(Placement.DISK, min(5_000_000_000, host_bytes_per_s), 2_000_000_000)


def _gpu(
    name: str,
    title: str,
    *,
    memory_gib: float,
    tflops: tuple[float, float, float],
    bandwidth_gb: float,
    pcie_gb: float,
    efficiency: float,
    workspace_nbytes: int,
    source: str,
) -> Device:
    """`tflops` are float32, TF32 and bfloat16, dense."""
    memory = int(memory_gib * _GIB)
    return Device(
        name,
        title,
        memory,
        MappingProxyType({key: value * 1e12 for key, value in zip(("float32", "tf32", "bfloat16"), tflops, strict=True)}),
        bandwidth_gb * 1e9,
        efficiency,
        0.4,
        0.85,
        # A kernel starts in 2 to 3 us after the one before; an operator of torch is dispatched in about 5, mostly hidden behind it.
        4.0,
        _links(int(pcie_gb * 1e9)),
        512,  # kMinBlockSize of torch's CUDA caching allocator
        450 * _MIB + 2 * workspace_nbytes + memory // _FRAGMENTS,
        accelerator=True,
        source=source,
    )


# Memory is the total in torch's own out-of-memory messages on these cards, which is less than on the box. That of the laptop differs by
# system (7.6 to 8.0 GiB); the least is taken.
_ALL = (
    _gpu(
        "rtx4090",
        "NVIDIA GeForce RTX 4090 (24 GB)",
        memory_gib=23.6,
        tflops=(82.6, 82.6, 165.2),
        bandwidth_gb=1008,
        pcie_gb=25,
        efficiency=0.85,
        workspace_nbytes=_BEFORE_HOPPER_NBYTES,
        source="NVIDIA Ada GPU Architecture whitepaper, appendix A (dense, FP32 accumulate)",
    ),
    _gpu(
        "rtx3090",
        "NVIDIA GeForce RTX 3090 (24 GB)",
        memory_gib=23.68,
        tflops=(35.6, 35.6, 71.0),
        bandwidth_gb=936,
        pcie_gb=25,
        efficiency=0.85,
        workspace_nbytes=_BEFORE_HOPPER_NBYTES,
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper, table 2 (dense, FP32 accumulate)",
    ),
    _gpu(
        "a100-80",
        "NVIDIA A100 SXM (80 GB)",
        memory_gib=79.15,
        tflops=(19.5, 156.0, 312.0),
        bandwidth_gb=2039,
        pcie_gb=25,
        efficiency=0.7,
        workspace_nbytes=_BEFORE_HOPPER_NBYTES,
        source="NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM, dense)",
    ),
    _gpu(
        "h100",
        "NVIDIA H100 SXM (80 GB)",
        memory_gib=79.1,
        tflops=(66.9, 494.7, 989.4),
        bandwidth_gb=3350,
        pcie_gb=50,
        efficiency=0.7,
        workspace_nbytes=_HOPPER_NBYTES,
        source="NVIDIA H100 Tensor Core GPU Architecture whitepaper and datasheet (SXM5, dense)",
    ),
    _gpu(
        "h800",
        "NVIDIA H800 SXM (80 GB)",
        memory_gib=79.1,
        tflops=(66.9, 494.7, 989.4),
        bandwidth_gb=3350,
        pcie_gb=50,
        efficiency=0.7,
        workspace_nbytes=_HOPPER_NBYTES,
        source="as H100 SXM; it differs in NVLink and FP64, which one device in bf16 or fp32 does not use",
    ),
    _gpu(
        "rtx4060-laptop",
        "NVIDIA GeForce RTX 4060 Laptop (8 GB)",
        memory_gib=7.6,
        tflops=(14.6, 14.6, 29.1),
        bandwidth_gb=256,
        pcie_gb=12.5,
        efficiency=0.85,
        workspace_nbytes=_BEFORE_HOPPER_NBYTES,
        source="3072 cores x 2 x 2.37 GHz boost (NVIDIA product page), tensor ratios of Ada; 128 bit x 16 Gbit/s; PCIe 4.0 x8. "
        "A laptop limited to less power than 115 W is slower",
    ),
    Device(
        "cpu",
        "the CPU of the benchmarks (AMD EPYC with avx512_bf16, one thread)",
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        # Best of several runs of 1024^3 to 2048 x 4096 x 1024 products, 2026-11-24, shared machine; there is no TF32 on a CPU.
        MappingProxyType({"float32": 65e9, "tf32": 65e9, "bfloat16": 145e9}),
        # Between a copy into old memory (27 GB/s) and results in fresh pages (3 to 4 GB/s read and written): see docs/log.md.
        10e9,
        1.0,  # the peaks are what products reach
        0.5,  # 0.3 to 0.8 of it, forward and backward, bf16 and fp32
        1.0,
        2.5,
        (Link(Placement.DISK, 1_000_000_000, 1_000_000_000),),
        1,
        0,
        accelerator=False,
        source="measured, see docs/log.md",
    ),
)

DEVICES: Mapping[str, Device] = MappingProxyType({device.name: device for device in _ALL})
"""Every machine by its name."""


def find_device(name: str) -> Device:
    """The device of that name, upper or lower case. Raises `ValueError` with the names there are."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise ValueError(f"device {name!r} is not known: {', '.join(DEVICES)}")
    return found

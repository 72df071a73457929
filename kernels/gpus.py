"""GPUs by name: what bounds a kernel on each, and how many programs fit on one multiprocessor.

Sources
    H100, H200  NVIDIA H100 and H200 data sheets (SXM5; dense rates); CUDA C Programming Guide,
                compute capability 9.0
    A100        NVIDIA A100 data sheet (SXM4 80 GB); compute capability 8.0
    B200        NVIDIA HGX B200 data sheet (dense rates, one GPU); compute capability 10.0
    RTX 4090    NVIDIA Ada GPU architecture whitepaper, table 2 (bf16 with fp32 accumulation);
                compute capability 8.9
    MI300X      AMD Instinct MI300X data sheet; AMD CDNA 3 instruction set architecture guide
Links: NVLink 3, 4, 5 (half of 600, 900, 1800 GB/s), seven xGMI links of 64 GB/s, PCIe 4.0 x16.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one streaming multiprocessor (NVIDIA) or compute unit (AMD)."""

    warp_size: int
    warps: int  # resident at once
    programs: int  # resident at once
    registers: int  # 32-bit, all lanes together
    register_unit: int  # registers are given to a warp in multiples of it
    warp_unit: int  # warps are spread over this many partitions
    shared: int  # bytes
    shared_unit: int
    shared_reserved: int  # bytes the system takes from every program
    issue: int  # warp instructions a clock


# CUDA C Programming Guide, "Compute Capabilities"; AMD CDNA 3 ISA guide, "Kernel state".
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(32, 64, 32, 65536, 256, 4, 167936, 128, 1024, 4),
    "sm_89": Multiprocessor(32, 48, 24, 65536, 256, 4, 102400, 128, 1024, 4),
    "sm_90": Multiprocessor(32, 64, 32, 65536, 256, 4, 233472, 128, 1024, 4),
    "sm_100": Multiprocessor(32, 64, 32, 65536, 256, 4, 233472, 128, 1024, 4),
    "gfx942": Multiprocessor(64, 32, 32, 131072, 512, 4, 65536, 512, 0, 4),
}
TENSOR_MEMORY_COLUMNS = 512  # sm_100, per multiprocessor; PTX ISA, "Tensor Memory"


@dataclass(frozen=True)
class GPU:
    """One product. Rates are dense and per second; `tensor_rate` maps a dtype to FLOP/s."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    tensor_rate: dict[str, float]
    memory: float  # bytes
    link: float  # bytes/s to its peers, one direction

    @property
    def issue_rate(self) -> float:
        """Warp instructions a second, every scheduler issuing each clock."""
        return self.multiprocessors * MULTIPROCESSORS[self.arch].issue * self.clock


def _rates(half: float, tf32: float, fp32: float) -> dict[str, float]:
    """FLOP/s by dtype, from TFLOP/s."""
    rates = {"bfloat16": half, "float16": half, "tf32": tf32, "float32": fp32}
    return {dtype: rate * 1e12 for dtype, rate in rates.items()}


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", "sm_80", 108, 1.41e9, 2.04e12, _rates(312, 156, 19.5), 80e9, 300e9),
        GPU("RTX4090", "sm_89", 128, 2.52e9, 1.01e12, _rates(165, 82.6, 82.6), 24e9, 32e9),
        GPU("H100", "sm_90", 132, 1.83e9, 3.35e12, _rates(989, 494, 67), 80e9, 450e9),
        GPU("H200", "sm_90", 132, 1.83e9, 4.80e12, _rates(989, 494, 67), 141e9, 450e9),
        GPU("B200", "sm_100", 148, 1.965e9, 8e12, _rates(2250, 1125, 75), 180e9, 900e9),
        GPU("MI300X", "gfx942", 304, 2.1e9, 5.3e12, _rates(1307, 654, 163), 192e9, 448e9),
    )
}


def product(device_name: str) -> str:
    """The key of GPUS that a driver's name of a device means, e.g. "NVIDIA H200"; else the name."""
    for name in GPUS:
        if re.search(rf"\b{re.sub('(?<=[A-Z])(?=[0-9])', ' ?', name)}\b", device_name):
            return name
    return device_name


def occupancy(
    arch: str, warps: int, registers: int, shared: int, tensor_memory: int = 0
) -> tuple[int, str]:
    """Programs resident on one multiprocessor and what limits them.

    Args:
        arch: a key of MULTIPROCESSORS.
        warps, registers, shared: of one program, one thread and one program (bytes).
        tensor_memory: columns a program allocates (sm_100).
    Returns: (programs, "registers" | "shared" | "warps" | "programs" | "tensor memory").
    Source: CUDA occupancy calculator; AMD CDNA 3 ISA guide.
    """
    sm = MULTIPROCESSORS[arch]

    def round_up(value: int, unit: int) -> int:
        return -(-value // unit) * unit

    per_warp = round_up(max(1, registers) * sm.warp_size, sm.register_unit)
    by_registers = sm.registers // sm.warp_unit // per_warp * sm.warp_unit // warps
    limits = {
        "registers": by_registers,
        "warps": sm.warps // warps,
        "programs": sm.programs,
    }
    if shared + sm.shared_reserved:
        limits["shared"] = sm.shared // round_up(shared + sm.shared_reserved, sm.shared_unit)
    if tensor_memory:
        limits["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_memory
    limiter = min(limits, key=lambda name: limits[name])
    return limits[limiter], limiter

"""What the compiler made of every kernel, on any machine: no GPU is needed.

An op is called on meta tensors inside `backend.recording`, so its launches are seen exactly as
they are shipped; each is specialised as Triton specialises it, compiled for the architecture
asked for, disassembled and counted.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kernels import backend
from kernels.disassembly import Loop, count, find_loops, read_amdgcn, read_sass
from kernels.gpus import MULTIPROCESSORS, occupancy

ARCHES = tuple(MULTIPROCESSORS)


@dataclass(frozen=True)
class Launch:
    """One launch as `backend.launch` received it; tensors are meta tensors."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Bytes that must move if every tensor argument crosses the memory bus once."""
        values = (*self.args, *self.kwargs.values())
        return sum(_distinct_bytes(v) for v in values if isinstance(v, torch.Tensor))


@dataclass(frozen=True)
class Report:
    """One kernel compiled for one architecture."""

    kernel: str
    arch: str
    grid: tuple[int, ...]
    constants: dict[str, Any]  # constexpr arguments
    warps: int
    stages: int
    registers: int  # of one thread
    spills: int  # loads and stores of thread-local memory
    stack: int  # bytes of one thread
    shared: int  # bytes of one program
    tensor_memory: int  # columns of one program (sm_100)
    occupancy: int  # programs on one multiprocessor
    limiter: str
    tensor_core: dict[str, int]  # opcode -> count
    global_loads: dict[str, int]  # "LDG.128" -> count
    transcendental: int
    instructions: int
    loops: tuple[Loop, ...]
    bytes: int

    @property
    def threads(self) -> int:
        """Threads of one program."""
        return self.warps * MULTIPROCESSORS[self.arch].warp_size

    @property
    def hottest_loop(self) -> Loop | None:
        """The innermost loop with the most instructions; None in straight-line code."""
        return max(
            (loop for loop in self.loops if loop.innermost),
            key=lambda loop: loop.instructions,
            default=None,
        )

    def instructions_per_element(self, *tile: str) -> float:
        """Thread instructions of the hottest loop, or of all code, per element of one tile.

        `tile` names the constexpr arguments whose product is the elements that one iteration (or,
        without a loop, one program) covers, e.g. "BLOCK_M", "BLOCK_N".
        """
        elements = 1
        for name in tile:
            elements *= self.constants[name]
        loop = self.hottest_loop
        instructions = loop.instructions if loop else self.instructions
        return instructions * self.threads / elements


def record(function: Callable[[], Any], arch: str) -> list[Launch]:
    """The launches that `function`, which calls ops on meta tensors, makes on `arch`."""
    launches: list[Launch] = []
    with backend.recording(lambda *launch: launches.append(Launch(*launch)), arch):
        function()
    return launches


def compile_launch(kernel: Any, grid: tuple[int, ...], args, kwargs, arch: str) -> Report:
    """Compile one launch for `arch` and count what came out.

    Args:
        kernel: a `triton.jit` function; grid, args, kwargs: as given to `backend.launch`.
        arch: one of ARCHES.
    Raises: ValueError for an unknown architecture; RuntimeError if Triton is interpreting.
    """
    # Private names of triton.runtime.jit, the same in 3.6 and 3.7: the argument binder decides
    # what a launch is specialised on, and only it can be right about that.
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as triton_compile
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = _target(arch)
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            "compile_launch: kernel must be a triton.jit function, so TRITON_INTERPRET must be "
            f"unset before kernels are imported; got {type(kernel).__name__}"
        )
    compiler = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    knobs = backend.triton.knobs
    kwargs = {
        **kwargs,
        "debug": kwargs.get("debug", kernel.debug) or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        compiler, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton_compile(source, target=target, options=options.__dict__)
    metadata = compiled.metadata
    if target.backend == "cuda":
        code, resources = read_sass(compiled.asm["cubin"], knobs.nvidia.cuobjdump.path)
        # The driver's share is part of SHARED from sm_90 on; `occupancy` adds it for all.
        reserved = MULTIPROCESSORS[arch].shared_reserved
        shared = metadata.shared + max(0, resources.shared - reserved)
    else:
        code, resources = read_amdgcn(compiled.asm["amdgcn"])
        shared = max(metadata.shared, resources.shared)
    tensor_memory = getattr(metadata, "tmem_size", 0)
    programs, limiter = occupancy(
        arch, metadata.num_warps, resources.registers, shared, tensor_memory
    )
    return Report(
        kernel=kernel.__name__,
        arch=arch,
        grid=tuple(grid),
        constants={
            p.name: bound[p.name] for p in kernel.params if p.is_constexpr and p.name in bound
        },
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=resources.registers,
        spills=resources.spills,
        stack=resources.stack,
        shared=shared,
        tensor_memory=tensor_memory,
        occupancy=programs,
        limiter=limiter,
        tensor_core=dict(count([i for i in code if i.tensor_core])),
        global_loads=dict(Counter(i.global_load for i in code if i.global_load)),
        transcendental=sum(i.transcendental for i in code),
        instructions=count(code).total(),
        loops=tuple(find_loops(code)),
        bytes=Launch(kernel, grid, args, kwargs).bytes,
    )


def _target(arch: str):
    """Triton's name of an architecture."""
    from triton.backends.compiler import GPUTarget

    if arch not in ARCHES:
        raise ValueError(f"codegen: arch must be one of {', '.join(ARCHES)}; got {arch!r}")
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, MULTIPROCESSORS[arch].warp_size)


def _distinct_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that an expanded or plain tensor really has."""
    sizes = (n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s != 0)
    elements = 1 if tensor.numel() else 0
    for size in sizes:
        elements *= size
    return elements * tensor.element_size()

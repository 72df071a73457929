"""The only place that decides where an op runs and that starts a Triton kernel.

`resolve` maps backend="auto"|"triton"|"eager" and the tensors of a call to "triton" or "eager".
`launch` starts a kernel; `recording` makes it note the launch instead, which is how
`kernels.codegen` sees every kernel exactly as it is shipped, without a GPU.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Windows, macOS: the eager backend is all there is
    triton, tl = None, types.SimpleNamespace(constexpr=int)
    HAS_TRITON = False

BACKENDS = ("auto", "triton", "eager")

_recorder: Callable[..., None] | None = None
_recorded_architecture: str | None = None


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product of x would have: autocast's where autocast is on, else x's."""
    eligible = x.is_floating_point() and x.dtype != torch.float64 and not x.is_meta
    if eligible and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def jit(function: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`; without triton the function itself, which then nobody calls."""
    if function is None:
        return functools.partial(jit, **options)
    return triton.jit(function, **options) if HAS_TRITON else function


# `triton.jit` looks once, when kernels are imported; so does this, and torch.compile can read it.
_INTERPRETING = HAS_TRITON and bool(triton.knobs.runtime.interpret)
if _INTERPRETING:
    from kernels import interpreter

    interpreter.repair()


def interpreting() -> bool:
    """True when Triton executes kernels on the CPU (TRITON_INTERPRET=1)."""
    return _INTERPRETING


def transforming() -> bool:
    """Whether torch.func runs: its tensors have no memory of their own, only ops may touch them."""
    return torch._C._are_functorch_transforms_active()


def faking() -> bool:
    """Whether new tensors are fake ones, that must not outlive this."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def traced() -> bool:
    """Whether torch.compile or torch.func looks on, to which an op shows its plain form."""
    return torch.compiler.is_compiling() or transforming()


def once_differentiable(op: str) -> Callable[[Callable], Callable]:
    """For the backward of `op`, which returns a tuple: to differentiate it again raises.

    torch's decorator of this name raises only where the incoming gradient needs a derivative; what
    flows through saved tensors alone it takes for 0. This one raises at once, for create_graph=True
    asks for nothing else, but for torch.func, which always asks for it.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def call(ctx, *gradients):
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            if not transforming():
                raise RuntimeError(_no_second_derivative(op))
            with torch.no_grad():
                results = backward(ctx, *gradients)
            origins = [x for x in (*gradients, *ctx.saved_tensors) if x is not None]
            return tuple(x if x is None else _Final.apply(op, x, *origins) for x in results)

        return call

    return decorate


def _no_second_derivative(op):
    return (
        f"{op}: second derivatives are not implemented; call backward without create_graph=True, "
        "or compute this in plain PyTorch"
    )


class _Final(torch.autograd.Function):
    """x itself, whose derivative by `origins`, which it was computed from, is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, x, *origins):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(_no_second_derivative(ctx.op))


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def resolve(op: str, backend: str, *tensors: torch.Tensor | None) -> str:
    """The backend, "triton" or "eager", that `op` runs on for these tensors.

    "auto" is "triton" on a GPU and "eager" elsewhere.
    Raises: ValueError for an unknown backend or tensors on several devices; RuntimeError if the
    backend cannot run here. There is no silent fallback.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{op}: all tensors must be on one device; got {names}")
    device_type = next(iter(devices)).type
    if backend == "eager":
        return "eager"
    if _recorder is not None and device_type == "meta":
        return "triton"
    if backend == "auto" and device_type != "cuda":
        return "eager"
    if not HAS_TRITON:
        raise RuntimeError(
            f"{op}: backend {backend!r} needs the triton package on {device_type}; pip install "
            "triton, or take the backend 'eager'"
        )
    if device_type != "cuda" and not (device_type == "cpu" and interpreting()):
        raise RuntimeError(
            f"{op}: backend 'triton' needs CUDA or ROCm tensors, or CPU tensors with "
            f"TRITON_INTERPRET=1 set before Python starts; got tensors on {device_type}"
        )
    return "triton"


def has_storage(tensor: torch.Tensor) -> bool:
    """False for fake and meta tensors, on which nothing is computed."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


OPERATORS: dict[str, Callable] = {}  # by full name, what each of them runs


def operator(name: str, function: Callable) -> Any:
    """`function` as the operator kernels::name, its own fake: fake tensors launch nothing."""
    op = torch.library.custom_op(f"kernels::{name}", function, mutates_args=())
    op.register_fake(function)
    OPERATORS[f"kernels::{name}"] = function
    return op


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is n or more."""
    return 1 << max(0, n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Start `kernel` on `grid`; a grid with no programs starts nothing.

    Nor do tensors without storage, fake or meta, so that the function that allocates the outputs
    of an op and launches its kernel is also the op's fake, and its shape rules are stated once.
    """
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    device = tensor.device
    if isinstance(tensor, FakeTensor) or 0 in grid:
        return
    if _recorder is not None:
        _recorder(kernel, grid, args, kwargs)
    if not has_storage(tensor):
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **kwargs)
    else:
        kernel[grid](*args, **kwargs)


@contextlib.contextmanager
def recording(recorder: Callable[..., None], architecture: str | None = None) -> Iterator[None]:
    """Within it, each launch is handed to `recorder(kernel, grid, args, kwargs)`.

    On meta tensors nothing else happens; on a device the kernel also runs. Launch plans see
    `architecture`, e.g. "sm_90" or "gfx942", instead of this machine's, unless it is None.
    """
    global _recorder, _recorded_architecture
    _recorder, _recorded_architecture = recorder, architecture
    try:
        yield
    finally:
        _recorder = _recorded_architecture = None


def architecture(device: torch.device) -> str:
    """What a launch plan is chosen by: "sm_90", "gfx942", ..., or "interpreter"."""
    if _recorded_architecture is not None:
        return _recorded_architecture
    return _device_architecture(device.index or 0) if device.type == "cuda" else "interpreter"


@functools.cache
def _device_architecture(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def product_precision(x: torch.Tensor) -> str:
    """`input_precision` of `tl.dot`: PyTorch's own setting decides how float32 is multiplied.

    This is the one of its names that can be read whichever of them was written. Of AMD's GPUs
    Triton knows TF32 on gfx942 alone.
    """
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    gpu = architecture(x.device)
    return "ieee" if gpu.startswith("gfx") and gpu != "gfx942" else "tf32"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; a plausible 132 where there is no device."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count

"""The competition: what each peer needs, and how to get hold of it.

A peer that cannot run raises Skip with the reason. `PEERS` is every name the command line knows;
a name stands for its family too ("sdpa" for all SDPA backends).
"""

import functools
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import Options, Skip

# SDPA warns, once for each reason, about every backend that it does not choose.
SDPA_WARNINGS = r".*([Aa]ttention|fused kernels|CuDNN|cuDNN).*"

PEERS = {
    "naive": "the seeds' Head/MultiHead model: one head after the other",
    "eager": "the same formula, heads batched, plain PyTorch, F.dropout",
    "sdpa": "F.scaled_dot_product_attention as torch chooses, and with each backend",
    "compile": "torch.compile of eager, mode default and max-autotune",
    "mha": "nn.MultiheadAttention with a causal mask",
    "flex": "FlexAttention, compiled, causal block mask",
    "torch": "torch.optim's own",
    "linear_act": "linear_act by the library, and by its own kernel with other tiles; on a GPU",
    "liger": "Liger-Kernel (pip install liger-kernel)",
    "transformers": "transformers' GPT-2 (pip install transformers)",
    "nanogpt": "nanoGPT's model.py, from --nanogpt DIR",
}
SDPA_BACKENDS = {
    "sdpa": None,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
NANOGPT = ("nanogpt", "nanogpt-compile", "nanogpt-autocast")
COMPILE_MODES = {"compile-default": "default", "compile-max": "max-autotune"}


def require_compiler(options: Options, peer: str, mode: str = "default") -> None:
    """Skip peers that torch.compile builds, unless they are worth it here.

    On the CPU one compilation takes longer than a whole case, so there it must be asked for; and
    everywhere a search for the fastest kernels.
    """
    if mode == "max-autotune" and options.peers is None and not options.full:
        raise Skip("searches for a minute a case; ask for it: --full or --peers compile-max")
    if options.device.type == "cpu":
        if options.peers is None:
            raise Skip(f"compiles for long on a CPU; ask for it: --peers {peer.split('-')[0]}")
        if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
            raise Skip("torch.compile needs a C++ compiler")
    elif options.quick and options.peers is None:
        raise Skip("left out by --quick")


def compiled(function: Callable, mode: str, options: Options) -> Callable:
    """`function` through torch.compile, one shape.

    Ops use max-autotune without CUDA graphs of its own: they are replayed from one as all are.
    """
    require_compiler(options, "compile", mode)
    mode = {"max-autotune": "max-autotune-no-cudagraphs"}.get(mode, mode)
    return torch.compile(function, dynamic=False, mode=mode)


def sdpa(q, k, v, backend: SDPBackend | None, *, scale, dropout_p):
    """Causal SDPA by one backend, or by torch's choice."""
    attention = functools.partial(
        F.scaled_dot_product_attention, is_causal=True, scale=scale, dropout_p=dropout_p
    )
    if backend is None:
        return attention(q, k, v)
    try:
        with sdpa_kernel([backend]):
            return attention(q, k, v)
    except RuntimeError as error:
        if not str(error).startswith(("No available kernel", "No viable backend")):
            raise
        reason = "with dropout " if dropout_p else ""
        raise Skip(
            f"this SDPA backend has no kernel {reason}for {q.device.type} {q.dtype}"
        ) from None


def flex(options: Options, T: int, *, scale: float) -> Callable:
    """FlexAttention with a causal block mask, compiled: (q, k, v) -> o."""
    require_compiler(options, "flex")
    if options.device.type == "cpu":
        raise Skip("FlexAttention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b, h, row, column):
        return row >= column

    mask = create_block_mask(causal, None, None, T, T, device=options.device)
    return torch.compile(
        functools.partial(flex_attention, block_mask=mask, scale=scale), dynamic=False
    )


def liger(options: Options, module: str, name: str):
    """Something of Liger-Kernel's ops, e.g. ("layer_norm", "LigerLayerNormFunction")."""
    if options.device.type != "cuda":
        raise Skip("Liger-Kernel needs a GPU")
    if importlib.util.find_spec("liger_kernel") is None:
        raise Skip("liger-kernel is not installed")
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def nanogpt(options: Options) -> ModuleType:
    """nanoGPT's model.py from the folder that the user named."""
    if options.nanogpt is None:
        raise Skip("no folder named: --nanogpt DIR")
    return _load(options.nanogpt / "model.py")


@functools.cache
def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def transformers(options: Options) -> ModuleType:
    """The package of Hugging Face."""
    if options.quick and options.peers is None:
        raise Skip("left out by --quick: its import takes seconds")
    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed")
    return importlib.import_module("transformers")

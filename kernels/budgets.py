"""The shipped configurations that `kernels.codegen` compiles, and what each kernel may use there.

A `Case` is an op at a size somebody trains at; calling it runs forward and backward on meta
tensors. `WORK` says how many elements a kernel computes, from which follow instructions per
element and the bounds on time. `BUDGETS` is the table that `--check` holds; a kernel without a
row in it is a breach, and so is a row without a kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import kernels
from kernels.backend import triton

NVIDIA = ("sm_80", "sm_90", "sm_100")
ALL = (*NVIDIA, "gfx942")
_DTYPES = {
    **{"bf16": torch.bfloat16, "fp16": torch.float16},
    **{"fp32": torch.float32, "tf32": torch.float32},
}


@dataclass(frozen=True)
class Case:
    """One op at one size; `sizes` are the letters of the project's shapes."""

    op: str
    name: str
    call: Callable[["Case"], None]
    sizes: dict[str, int]
    dtype: torch.dtype
    dropout_p: float
    arches: tuple[str, ...]
    tf32: bool = False
    device: str = "meta"

    def __call__(self) -> None:
        """Run forward and backward."""
        settings = torch.backends.cuda.matmul
        before = settings.fp32_precision
        try:
            if self.tf32:
                settings.fp32_precision = "tf32"
            self.call(self)
        finally:
            settings.fp32_precision = before

    def tensor(self, *shape: int) -> torch.Tensor:
        """Normal numbers, differentiable."""
        return torch.randn(shape, dtype=self.dtype, device=self.device, requires_grad=True)

    def tokens(self, *shape: int) -> torch.Tensor:
        """int64 in [0, V)."""
        return torch.randint(self.sizes["V"], shape, device=self.device)

    @property
    def dropout(self) -> dict[str, Any]:
        """Keyword arguments of an op's dropout."""
        if not self.dropout_p:
            return {}
        key = torch.zeros(3, dtype=torch.int64, device=self.device)
        return {"dropout_p": self.dropout_p, "key": key, "site": 16}


def _backward(outputs, *inputs: torch.Tensor) -> None:
    """Every gradient of `inputs`, from gradients laid out as the outputs are."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    torch.autograd.grad(outputs, inputs, [torch.randn_like(o) for o in outputs])


def _attention(case: Case) -> None:
    B, T, H, D = (case.sizes[name] for name in "BTHD")
    qkv = case.tensor(B, T, 3, H, D)
    _backward(kernels.causal_attention_qkv(qkv, **case.dropout), qkv)


def _layer_norm(case: Case) -> None:
    M, C = case.sizes["M"], case.sizes["C"]
    x, weight, bias = case.tensor(M, C), case.tensor(C), case.tensor(C)
    _backward(kernels.layer_norm(x, weight, bias), x, weight, bias)


def _dropout_add_layer_norm(case: Case) -> None:
    M, C = case.sizes["M"], case.sizes["C"]
    x, residual = case.tensor(64, M // 64, C), case.tensor(64, M // 64, C)
    weight, bias, x_bias = case.tensor(C), case.tensor(C), case.tensor(C)
    options = {"x_bias": x_bias, **case.dropout}
    outputs = kernels.dropout_add_layer_norm(x, residual, weight, bias, **options)
    _backward(outputs, x, residual, weight, bias, x_bias)


def _linear_act(case: Case) -> None:
    M, K, N = case.sizes["M"], case.sizes["K"], case.sizes["N"]
    x, weight, bias = case.tensor(M, K), case.tensor(N, K), case.tensor(N)
    activation = case.name.rsplit("-", 1)[1]
    _backward(kernels.linear_act(x, weight, bias, activation=activation), x, weight, bias)


def _cross_entropy(case: Case) -> None:
    M, V = case.sizes["M"], case.sizes["V"]
    logits, targets = case.tensor(M, V), case.tokens(M)
    _backward(kernels.cross_entropy(logits, targets), logits)


def _linear_cross_entropy(case: Case) -> None:
    M, C, V = case.sizes["M"], case.sizes["C"], case.sizes["V"]
    x, weight, targets = case.tensor(M, C), case.tensor(V, C), case.tokens(M)
    _backward(kernels.linear_cross_entropy(x, weight, None, targets), x, weight)


def _embed(case: Case) -> None:
    B, T, C, V = (case.sizes[name] for name in "BTCV")
    idx, token, position = case.tokens(B, T), case.tensor(V, C), case.tensor(T, C)
    _backward(kernels.embed(idx, token, position, **case.dropout), token, position)


def _rotary_qkv(case: Case) -> None:
    B, T, H, D = (case.sizes[name] for name in "BTHD")
    qkv, table = case.tensor(B, T, 3, H, D), kernels.rotary_table(T, D, device=case.device)
    _backward(kernels.rotary_qkv(qkv, table, normalize=True), qkv)


_CALLS = {
    "causal_attention": _attention,
    "layer_norm": _layer_norm,
    "dropout_add_layer_norm": _dropout_add_layer_norm,
    "linear_act": _linear_act,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "embed": _embed,
    "rotary_qkv": _rotary_qkv,
}


def _case(op: str, name: str, arches: tuple[str, ...] = NVIDIA) -> Case:
    """Read "B64-T256-H6-D64-bf16-p0.2": sizes, dtype, and dropout if there is any."""
    sizes, dtype, dropout_p = {}, None, 0.0
    for word in name.split("-"):
        if word in _DTYPES:
            dtype = _DTYPES[word]
        elif word[0] == "p" and word[1].isdigit():
            dropout_p = float(word[1:])
        elif word[0].isupper():
            sizes[word[0]] = int(word[1:])
    return Case(op, name, _CALLS[op], sizes, dtype, dropout_p, arches, "tf32" in name)


# The notebook's size (64 x 256 tokens, 6 heads of 64, C = 384, V = 65), GPT-2's, long contexts,
# the second seed's head size of 85 and others that are no multiple of 16.
CASES = (
    _case("causal_attention", "B64-T256-H6-D64-bf16-p0.2", ALL),
    _case("causal_attention", "B64-T256-H6-D64-bf16"),
    _case("causal_attention", "B4-T4096-H12-D64-bf16", ("sm_90",)),
    _case("causal_attention", "B4-T4096-H12-D128-bf16", ALL),
    _case("causal_attention", "B4-T4096-H12-D128-bf16-p0.2"),
    _case("causal_attention", "B4-T4096-H12-D256-bf16", (*ALL, "sm_89")),
    _case("causal_attention", "B4-T4096-H12-D256-bf16-p0.2", ("sm_90",)),
    _case("causal_attention", "B4-T4096-H12-D256-fp32", ("sm_89",)),
    _case("causal_attention", "B64-T256-H6-D40-bf16-p0.2", ("sm_90",)),
    _case("causal_attention", "B64-T256-H6-D50-bf16-p0.2", ("sm_90",)),
    _case("causal_attention", "B64-T256-H6-D85-bf16-p0.2", ("sm_90",)),
    _case("causal_attention", "B64-T256-H6-D88-bf16-p0.2", ("sm_90",)),
    _case("causal_attention", "B64-T256-H6-D64-fp32-p0.2", ("sm_90", "sm_100")),
    _case("causal_attention", "B64-T256-H6-D64-tf32-p0.2", (*NVIDIA, "sm_89")),
    _case("causal_attention", "B4-T4096-H12-D128-tf32-p0.2", ("sm_89", "sm_90", "sm_100")),
    _case("layer_norm", "M16384-C384-bf16", ALL),
    _case("layer_norm", "M16384-C768-bf16", ("sm_90",)),
    _case("layer_norm", "M16384-C1024-bf16", ("sm_90",)),
    _case("layer_norm", "M16384-C4096-bf16"),
    _case("layer_norm", "M16384-C16384-bf16", ALL),
    _case("dropout_add_layer_norm", "M16384-C384-bf16-p0.2", ALL),
    _case("dropout_add_layer_norm", "M16384-C768-bf16", ("sm_90",)),
    _case("dropout_add_layer_norm", "M16384-C1024-bf16-p0.2"),
    _case("dropout_add_layer_norm", "M16384-C4096-bf16-p0.2", ("sm_90",)),
    _case("dropout_add_layer_norm", "M16384-C8192-fp32-p0.2", ("sm_89",)),
    _case("linear_act", "M16384-K384-N1536-bf16-relu", ALL),
    _case("linear_act", "M16384-K768-N3072-bf16-gelu", ALL),
    _case("linear_act", "M16384-K384-N1536-bf16-relu2"),
    _case("cross_entropy", "M16384-V65-bf16", ALL),
    _case("cross_entropy", "M16384-V50257-bf16", ALL),
    _case("linear_cross_entropy", "M16384-C384-V65-bf16", ("sm_90",)),
    _case("linear_cross_entropy", "M16384-C768-V50257-bf16", ("sm_90",)),
    _case("embed", "B64-T256-C384-V65-bf16-p0.2", ALL),
    _case("embed", "B12-T1024-C768-V50304-bf16", ALL),
    _case("rotary_qkv", "B64-T256-H6-D64-bf16", ALL),
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))


Numbers = dict[str, int]  # sizes of a case, or constexpr arguments of a kernel


@dataclass(frozen=True)
class Work:
    """How much a kernel does; c: its constants, s: the sizes of the case.

    tile(c, s): elements that one iteration, or one program of straight code, computes.
    elements(c, s, programs): elements of a launch.
    flop(c, s): FLOP of matrix products per element.
    passes: loops that each element goes through.
    """

    tile: Callable[[Numbers, Numbers], int]
    elements: Callable[[Numbers, Numbers, int], float]
    flop: Callable[[Numbers, Numbers], float] = lambda c, s: 0
    passes: int = 1


def _attention_work(products: int) -> Work:
    """Elements are query-key pairs on or below the diagonal."""
    return Work(
        tile=lambda c, s: c["BLOCK_M"] * c["BLOCK_N"],
        elements=lambda c, s, programs: s["B"] * s["H"] * s["T"] * (s["T"] + 1) / 2,
        flop=lambda c, s: 2 * products * s["D"],
    )


_ROWS = Work(
    tile=lambda c, s: c["BLOCK_M"] * s["C"], elements=lambda c, s, programs: s["M"] * s["C"]
)

# Kernels that are not here move bytes and little else.
WORK = {
    "_attention_forward_kernel": _attention_work(products=2),
    "_attention_dq_kernel": _attention_work(products=3),
    "_attention_dkdv_kernel": _attention_work(products=4),
    "_layer_norm_forward_kernel": _ROWS,
    "_layer_norm_backward_kernel": _ROWS,
    "_linear_act_kernel": Work(  # an output, for each tile of K
        tile=lambda c, s: c["BLOCK_M"] * c["BLOCK_N"],
        elements=lambda c, s, programs: s["M"] * s["N"] * -(-s["K"] // c["BLOCK_K"]),
        flop=lambda c, s: 2 * c["BLOCK_K"],
    ),
    "_cross_entropy_kernel": Work(
        tile=lambda c, s: c["BLOCK_M"] * s["V"],
        elements=lambda c, s, programs: programs * c["BLOCK_M"] * s["V"],
    ),
    "_long_cross_entropy_kernel": Work(
        tile=lambda c, s: c["LANES"] * 8,
        elements=lambda c, s, programs: programs * -(-s["V"] // c["LANES"] // 8) * c["LANES"] * 8,
        passes=2,  # the maximum and sum, then the gradient
    ),
    "_embed_kernel": Work(
        tile=lambda c, s: c["BLOCK_M"] * min(c["BLOCK_C"], s["C"]),
        elements=lambda c, s, programs: s["B"] * s["T"] * s["C"],
    ),
    "_rotary_kernel": Work(
        tile=lambda c, s: c["BLOCK_M"] * s["D"],
        elements=lambda c, s, programs: s["B"] * s["T"] * 3 * s["H"] * s["D"],
    ),
}


@dataclass(frozen=True)
class Budget:
    """What one kernel may use in one case on one architecture; with spills 0, no stack either."""

    op: str
    case: str
    kernel: str
    arch: str
    registers: int  # at most, of one thread
    spills: int  # at most, loads and stores of thread-local memory; 0 but for stated exceptions
    shared: int  # at most, bytes of one program
    programs: int  # at least, on one multiprocessor
    per_element: float | None  # at most, thread instructions of the loop per element
    tensor_core: str | None  # "HGMMA+HMMA": all kinds that occur, as opcodes begin; None: none

    def breaches(self, row: dict[str, Any]) -> list[str]:
        """The rules a row of the report breaks."""
        rules = [
            (row["spills"] <= self.spills, f"spills <= {self.spills}", "spills"),
            (self.spills > 0 or row["stack"] == 0, "stack = 0", "stack"),
            (row["registers"] <= self.registers, f"registers <= {self.registers}", "registers"),
            (row["shared"] <= self.shared, f"shared <= {self.shared}", "shared"),
            (row["occupancy"] >= self.programs, f"programs >= {self.programs}", "occupancy"),
        ]
        if self.per_element is not None:
            value = row["per_element"]
            held = value is not None and value <= self.per_element
            rules.append((held, f"instructions per element <= {self.per_element}", "per_element"))
        if self.tensor_core is None:  # in IEEE float32 a tensor core would round to TF32
            rules.append((not row["tensor_core"], "tensor core must be none", "tensor_core"))
        else:
            kinds, found = self.tensor_core.split("+"), row["tensor_core"]
            held = all(any(code.startswith(kind) for code in found) for kind in kinds)
            held = held and all(code.startswith(tuple(kinds)) for code in found)
            rules.append((held, f"tensor core must be {self.tensor_core}", "tensor_core"))
        if self.tensor_core == "HGMMA":  # where ptxas waits for each before the next, none overlap
            wgmma = sum(row["tensor_core"].values())
            held = row["wgmma_waits"] < wgmma
            rules.append((held, f"waits for {wgmma} wgmma < {wgmma}", "wgmma_waits"))
        return [f"{rule}; got {row[name]}" for held, rule, name in rules if not held]


def _read_budgets(text: str) -> dict[tuple[str, str, str, str], Budget]:
    """A line "op case", then for each kernel an indented line with the rest of `Budget`'s fields.

    "-" stands for None.
    """
    budgets = {}
    for line in filter(None, text.splitlines()):
        if not line.startswith(" "):
            op, case = line.split()
            continue
        kernel, arch, *limits, per_element, tensor_core = line.split()
        budgets[op, case, kernel, arch] = Budget(
            *(op, case, kernel, arch),
            *map(int, limits),
            None if per_element == "-" else float(per_element),
            None if tensor_core == "-" else tensor_core,
        )
    return budgets


# kernel, arch: registers, spills, shared, programs, instructions per element, tensor core.
# Written by `python -m kernels.codegen --print-budgets`: what Triton 3.7.1 makes of the kernels,
# with 8 registers and a tenth of the instructions to spare; no register where that would cost a
# program that the plan counts on.
BUDGETS = _read_budgets("""
causal_attention B64-T256-H6-D64-bf16-p0.2
  _attention_forward_kernel sm_80 176 0 16384 2 28.1 HMMA
  _attention_dq_kernel sm_80 176 0 24576 2 26.7 HMMA
  _attention_dkdv_kernel sm_80 255 0 29184 2 48.1 HMMA
  _attention_forward_kernel sm_90 128 0 40960 4 19.8 HGMMA
  _attention_dq_kernel sm_90 168 0 32768 3 17.9 HGMMA
  _attention_dkdv_kernel sm_90 255 0 40960 2 18.9 HGMMA
  _attention_forward_kernel sm_100 255 0 41984 2 24.3 UTCHMMA
  _attention_dq_kernel sm_100 184 0 58368 2 23.5 UTCHMMA
  _attention_dkdv_kernel sm_100 240 0 40968 2 20.1 UTCHMMA
  _attention_forward_kernel gfx942 168 0 16384 3 29.8 v_mfma
  _attention_dq_kernel gfx942 176 0 16384 2 28.1 v_mfma
  _attention_dkdv_kernel gfx942 152 0 8192 3 76.5 v_mfma
causal_attention B64-T256-H6-D64-bf16
  _attention_forward_kernel sm_80 152 0 16384 3 18.5 HMMA
  _attention_dq_kernel sm_80 176 0 24576 2 16.5 HMMA
  _attention_dkdv_kernel sm_80 176 0 29184 2 28.5 HMMA
  _attention_forward_kernel sm_90 136 0 40960 3 13.9 HGMMA
  _attention_dq_kernel sm_90 160 0 49152 3 12.0 HGMMA
  _attention_dkdv_kernel sm_90 255 0 58368 2 14.9 HGMMA
  _attention_forward_kernel sm_100 160 0 41984 3 18.3 UTCHMMA
  _attention_dq_kernel sm_100 136 0 58368 2 16.4 UTCHMMA
  _attention_dkdv_kernel sm_100 136 0 40968 3 14.9 UTCHMMA
causal_attention B4-T4096-H12-D64-bf16
  _attention_forward_kernel sm_90 136 0 40960 3 13.9 HGMMA
  _attention_dq_kernel sm_90 160 0 49152 3 12.0 HGMMA
  _attention_dkdv_kernel sm_90 255 0 58368 2 14.9 HGMMA
causal_attention B4-T4096-H12-D128-bf16
  _attention_forward_kernel sm_80 224 0 36864 2 36.7 HMMA
  _attention_dq_kernel sm_80 248 0 53248 2 25.6 HMMA
  _attention_dkdv_kernel sm_80 232 0 53248 2 38.2 HMMA
  _attention_forward_kernel sm_90 216 0 81920 2 16.6 HGMMA
  _attention_dq_kernel sm_90 192 0 131072 1 13.7 HGMMA
  _attention_dkdv_kernel sm_90 255 0 114688 1 18.4 HGMMA
  _attention_forward_kernel sm_100 224 0 82944 2 22.7 UTCHMMA
  _attention_dq_kernel sm_100 112 0 115712 2 23.0 UTCHMMA
  _attention_dkdv_kernel sm_100 168 0 73736 1 28.7 UTCHMMA
  _attention_forward_kernel gfx942 208 0 32768 2 24.0 v_mfma
  _attention_dq_kernel gfx942 128 0 16384 4 48.1 v_mfma
  _attention_dkdv_kernel gfx942 200 0 16384 2 79.2 v_mfma
causal_attention B4-T4096-H12-D128-bf16-p0.2
  _attention_forward_kernel sm_80 248 0 36864 2 51.4 HMMA
  _attention_dq_kernel sm_80 255 0 53248 2 41.0 HMMA
  _attention_dkdv_kernel sm_80 255 0 53248 2 70.4 HMMA
  _attention_forward_kernel sm_90 255 0 81920 2 22.6 HGMMA
  _attention_dq_kernel sm_90 240 0 131072 1 20.2 HGMMA
  _attention_dkdv_kernel sm_90 255 0 114688 1 24.2 HGMMA
  _attention_forward_kernel sm_100 248 0 82944 2 29.1 UTCHMMA
  _attention_dq_kernel sm_100 136 0 115712 1 30.0 UTCHMMA
  _attention_dkdv_kernel sm_100 176 0 73736 1 36.6 UTCHMMA
causal_attention B4-T4096-H12-D256-bf16
  _attention_forward_kernel sm_80 240 0 73728 1 51.4 HMMA
  _attention_dq_kernel sm_80 232 0 65536 2 54.9 HMMA
  _attention_dkdv_kernel sm_80 255 2 67584 2 65.5 HMMA
  _attention_forward_kernel sm_89 208 0 73728 1 54.0 HMMA
  _attention_dq_kernel sm_89 224 0 65536 1 58.0 HMMA
  _attention_dkdv_kernel sm_89 255 0 67584 1 66.6 HMMA
  _attention_forward_kernel sm_90 255 0 196608 1 20.6 HGMMA
  _attention_dq_kernel sm_90 224 0 196608 1 23.2 HGMMA
  _attention_dkdv_kernel sm_90 255 0 131072 1 52.8 HGMMA+HMMA
  _attention_forward_kernel sm_100 255 0 86016 1 30.2 UTCHMMA
  _attention_dq_kernel sm_100 255 0 196616 1 23.5 UTCHMMA
  _attention_dkdv_kernel sm_100 248 0 139272 1 45.7 UTCHMMA
  _attention_forward_kernel gfx942 296 0 36864 1 63.7 v_mfma
  _attention_dq_kernel gfx942 224 0 32768 2 63.0 v_mfma
  _attention_dkdv_kernel gfx942 296 0 32768 1 124.0 v_mfma
causal_attention B4-T4096-H12-D256-bf16-p0.2
  _attention_forward_kernel sm_90 255 30 196608 1 27.0 HGMMA
  _attention_dq_kernel sm_90 240 0 196608 1 29.9 HGMMA
  _attention_dkdv_kernel sm_90 248 0 131072 1 58.9 HGMMA+HMMA
causal_attention B4-T4096-H12-D256-fp32
  _attention_forward_kernel sm_89 255 4 33792 1 950.4 -
  _attention_dq_kernel sm_89 255 37 57344 1 1402.5 -
  _attention_dkdv_kernel sm_89 255 38 74752 1 1731.4 -
causal_attention B64-T256-H6-D40-bf16-p0.2
  _attention_forward_kernel sm_90 176 0 40960 2 20.0 HGMMA
  _attention_dq_kernel sm_90 208 0 32768 2 17.5 HGMMA
  _attention_dkdv_kernel sm_90 255 0 40960 2 19.9 HGMMA
causal_attention B64-T256-H6-D50-bf16-p0.2
  _attention_forward_kernel sm_90 200 0 20480 1 25.8 HGMMA
  _attention_dq_kernel sm_90 216 0 40960 1 23.0 HGMMA
  _attention_dkdv_kernel sm_90 255 0 40960 1 39.7 HGMMA+HMMA
causal_attention B64-T256-H6-D85-bf16-p0.2
  _attention_forward_kernel sm_90 255 0 40960 1 30.9 HGMMA
  _attention_dq_kernel sm_90 248 0 81920 1 27.5 HGMMA
  _attention_dkdv_kernel sm_90 255 52 77824 1 57.3 HGMMA+HMMA
causal_attention B64-T256-H6-D88-bf16-p0.2
  _attention_forward_kernel sm_90 255 0 81920 2 22.9 HGMMA
  _attention_dq_kernel sm_90 255 0 131072 1 20.4 HGMMA
  _attention_dkdv_kernel sm_90 255 12 114688 1 26.2 HGMMA
causal_attention B64-T256-H6-D64-fp32-p0.2
  _attention_forward_kernel sm_90 255 0 20480 2 214.2 -
  _attention_dq_kernel sm_90 152 0 22528 3 306.4 -
  _attention_dkdv_kernel sm_90 176 0 40960 2 378.4 -
  _attention_forward_kernel sm_100 255 0 20480 2 197.6 -
  _attention_dq_kernel sm_100 152 0 22528 3 316.8 -
  _attention_dkdv_kernel sm_100 176 0 40960 2 304.8 -
causal_attention B64-T256-H6-D64-tf32-p0.2
  _attention_forward_kernel sm_80 216 0 24576 2 38.2 HMMA
  _attention_dq_kernel sm_80 255 0 43008 2 39.9 HMMA
  _attention_dkdv_kernel sm_80 176 0 81920 2 63.7 HMMA
  _attention_forward_kernel sm_89 216 0 24576 2 38.2 HMMA
  _attention_dq_kernel sm_89 255 0 43008 2 40.7 HMMA
  _attention_dkdv_kernel sm_89 176 0 81920 1 67.1 HMMA
  _attention_forward_kernel sm_90 176 0 24576 2 33.2 HGMMA
  _attention_dq_kernel sm_90 216 0 57344 2 32.9 HGMMA
  _attention_dkdv_kernel sm_90 232 0 81920 2 51.4 HGMMA+HMMA
  _attention_forward_kernel sm_100 136 0 24584 3 32.5 UTCHMMA
  _attention_dq_kernel sm_100 152 0 57352 3 36.0 UTCHMMA
  _attention_dkdv_kernel sm_100 232 0 82944 2 66.0 HMMA+UTCHMMA
causal_attention B4-T4096-H12-D128-tf32-p0.2
  _attention_forward_kernel sm_89 240 0 45056 2 128.7 HMMA
  _attention_dq_kernel sm_89 224 0 49152 2 138.3 HMMA
  _attention_dkdv_kernel sm_89 255 0 98304 1 80.4 HMMA
  _attention_forward_kernel sm_90 248 0 40960 2 56.8 HGMMA
  _attention_dq_kernel sm_90 232 0 49152 2 124.3 HMMA
  _attention_dkdv_kernel sm_90 255 0 98304 2 67.0 HGMMA+HMMA
  _attention_forward_kernel sm_100 192 0 40968 2 54.5 UTCHMMA
  _attention_dq_kernel sm_100 232 0 49152 2 127.9 HMMA
  _attention_dkdv_kernel sm_100 176 0 98304 2 69.9 HMMA+UTCHMMA
layer_norm M16384-C384-bf16
  _layer_norm_forward_kernel sm_80 72 0 0 28 19.1 -
  _layer_norm_backward_kernel sm_80 128 0 8256 4 33.5 -
  _sum_partials_kernel sm_80 48 0 1024 2 - -
  _layer_norm_forward_kernel sm_90 72 0 0 28 19.2 -
  _layer_norm_backward_kernel sm_90 128 0 8256 4 33.3 -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
  _layer_norm_forward_kernel sm_100 72 0 0 28 16.5 -
  _layer_norm_backward_kernel sm_100 120 0 4096 4 29.7 -
  _sum_partials_kernel sm_100 48 0 1024 2 - -
  _layer_norm_forward_kernel gfx942 48 0 0 32 32.8 -
  _layer_norm_backward_kernel gfx942 80 0 8192 6 33.2 -
  _sum_partials_kernel gfx942 40 0 1024 2 - -
layer_norm M16384-C768-bf16
  _layer_norm_forward_kernel sm_90 48 0 8 20 25.9 -
  _layer_norm_backward_kernel sm_90 128 0 8248 4 35.1 -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
layer_norm M16384-C1024-bf16
  _layer_norm_forward_kernel sm_90 48 0 8 20 18.9 -
  _layer_norm_backward_kernel sm_90 128 0 8248 4 26.2 -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
layer_norm M16384-C4096-bf16
  _layer_norm_forward_kernel sm_80 48 0 32 5 18.7 -
  _layer_norm_backward_kernel sm_80 64 0 16468 2 28.1 -
  _sum_partials_kernel sm_80 48 0 1024 2 - -
  _layer_norm_forward_kernel sm_90 48 0 32 5 19.5 -
  _layer_norm_backward_kernel sm_90 64 0 16468 2 28.5 -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
  _layer_norm_forward_kernel sm_100 48 0 32 5 18.0 -
  _layer_norm_backward_kernel sm_100 64 0 16384 2 25.3 -
  _sum_partials_kernel sm_100 48 0 1024 2 - -
layer_norm M16384-C16384-bf16
  _layer_norm_forward_kernel sm_80 72 0 64 1 16.3 -
  _layer_norm_wide_backward_kernel sm_80 88 0 32 2 - -
  _layer_norm_parameter_gradient_kernel sm_80 72 0 8192 3 - -
  _sum_partials_kernel sm_80 48 0 256 10 - -
  _layer_norm_forward_kernel sm_90 72 0 64 1 16.6 -
  _layer_norm_wide_backward_kernel sm_90 72 0 32 3 - -
  _layer_norm_parameter_gradient_kernel sm_90 72 0 8192 3 - -
  _sum_partials_kernel sm_90 48 0 256 10 - -
  _layer_norm_forward_kernel sm_100 96 0 64 1 15.5 -
  _layer_norm_wide_backward_kernel sm_100 88 0 32 2 - -
  _layer_norm_parameter_gradient_kernel sm_100 72 0 8192 3 - -
  _sum_partials_kernel sm_100 40 0 256 12 - -
  _layer_norm_forward_kernel gfx942 64 0 64 2 26.3 -
  _layer_norm_wide_backward_kernel gfx942 104 0 32 2 - -
  _layer_norm_parameter_gradient_kernel gfx942 56 0 8192 4 - -
  _sum_partials_kernel gfx942 40 0 256 8 - -
dropout_add_layer_norm M16384-C384-bf16-p0.2
  _layer_norm_forward_kernel sm_80 80 0 0 24 41.3 -
  _layer_norm_backward_kernel sm_80 152 0 12352 3 52.9 -
  _sum_partials_kernel sm_80 48 0 1024 2 - -
  _layer_norm_forward_kernel sm_90 80 0 0 24 41.7 -
  _layer_norm_backward_kernel sm_90 152 0 12352 3 53.3 -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
  _layer_norm_forward_kernel sm_100 96 0 0 20 37.1 -
  _layer_norm_backward_kernel sm_100 168 0 4096 3 48.3 -
  _sum_partials_kernel sm_100 48 0 1024 2 - -
  _layer_norm_forward_kernel gfx942 64 0 0 32 60.8 -
  _layer_norm_backward_kernel gfx942 104 0 8192 4 57.8 -
  _sum_partials_kernel gfx942 40 0 1024 2 - -
dropout_add_layer_norm M16384-C768-bf16
  _layer_norm_forward_kernel sm_90 48 0 8 20 39.4 -
  _layer_norm_backward_kernel sm_90 136 0 12344 3 41.7 -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
dropout_add_layer_norm M16384-C1024-bf16-p0.2
  _layer_norm_forward_kernel sm_80 48 0 8 20 37.6 -
  _layer_norm_backward_kernel sm_80 144 0 12344 3 40.8 -
  _sum_partials_kernel sm_80 48 0 1024 2 - -
  _layer_norm_forward_kernel sm_90 56 0 8 18 39.0 -
  _layer_norm_backward_kernel sm_90 168 0 12344 3 40.6 -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
  _layer_norm_forward_kernel sm_100 64 0 8 16 35.4 -
  _layer_norm_backward_kernel sm_100 160 0 4096 3 33.9 -
  _sum_partials_kernel sm_100 48 0 1024 2 - -
dropout_add_layer_norm M16384-C4096-bf16-p0.2
  _layer_norm_forward_kernel sm_90 56 0 32 4 39.3 -
  _layer_norm_backward_kernel sm_90 128 0 24660 1 43.0 -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
dropout_add_layer_norm M16384-C8192-fp32-p0.2
  _layer_norm_forward_kernel sm_89 72 0 16384 1 33.5 -
  _layer_norm_backward_kernel sm_89 128 0 16384 1 30.0 -
  _sum_partials_kernel sm_89 48 0 1024 2 - -
linear_act M16384-K384-N1536-bf16-relu
  _activation_backward_kernel sm_80 104 0 4096 4 - -
  _sum_partials_kernel sm_80 48 0 1024 2 - -
  _activation_backward_kernel sm_90 104 0 4096 4 - -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
  _activation_backward_kernel sm_100 104 0 4096 4 - -
  _sum_partials_kernel sm_100 48 0 1024 2 - -
  _activation_backward_kernel gfx942 80 0 4096 6 - -
  _sum_partials_kernel gfx942 40 0 1024 2 - -
linear_act M16384-K768-N3072-bf16-gelu
  _linear_act_kernel sm_80 128 0 49152 2 1.4 HMMA
  _activation_backward_kernel sm_80 136 0 4096 3 - -
  _sum_partials_kernel sm_80 48 0 256 10 - -
  _linear_act_kernel sm_90 120 0 65536 2 1.0 HGMMA
  _activation_backward_kernel sm_90 136 0 4096 3 - -
  _sum_partials_kernel sm_90 48 0 256 10 - -
  _linear_act_kernel sm_100 128 0 65552 2 1.3 UTCHMMA
  _activation_backward_kernel sm_100 136 0 4096 3 - -
  _sum_partials_kernel sm_100 40 0 256 12 - -
  _linear_act_kernel gfx942 88 0 32768 2 1.3 v_mfma
  _activation_backward_kernel gfx942 104 0 4096 4 - -
  _sum_partials_kernel gfx942 40 0 256 8 - -
linear_act M16384-K384-N1536-bf16-relu2
  _linear_act_kernel sm_80 128 0 49152 2 1.4 HMMA
  _activation_backward_kernel sm_80 120 0 4096 4 - -
  _sum_partials_kernel sm_80 48 0 1024 2 - -
  _linear_act_kernel sm_90 104 0 65536 2 1.0 HGMMA
  _activation_backward_kernel sm_90 120 0 4096 4 - -
  _sum_partials_kernel sm_90 48 0 1024 2 - -
  _linear_act_kernel sm_100 120 0 65552 2 1.3 UTCHMMA
  _activation_backward_kernel sm_100 104 0 4096 4 - -
  _sum_partials_kernel sm_100 48 0 1024 2 - -
cross_entropy M16384-V65-bf16
  _cross_entropy_kernel sm_80 64 0 128 8 35.3 -
  _reduce_losses_kernel sm_80 104 0 64 1 - -
  _scale_kernel sm_80 40 0 0 12 - -
  _cross_entropy_kernel sm_90 64 0 128 8 36.1 -
  _reduce_losses_kernel sm_90 104 0 64 1 - -
  _scale_kernel sm_90 40 0 0 12 - -
  _cross_entropy_kernel sm_100 64 0 128 8 35.5 -
  _reduce_losses_kernel sm_100 104 0 64 1 - -
  _scale_kernel sm_100 32 0 0 16 - -
  _cross_entropy_kernel gfx942 40 0 128 8 45.5 -
  _reduce_losses_kernel gfx942 64 0 64 2 - -
  _scale_kernel gfx942 32 0 0 8 - -
cross_entropy M16384-V50257-bf16
  _long_cross_entropy_kernel sm_80 48 0 64 2 20.8 -
  _reduce_losses_kernel sm_80 104 0 64 1 - -
  _scale_kernel sm_80 40 0 0 12 - -
  _long_cross_entropy_kernel sm_90 48 0 64 2 20.8 -
  _reduce_losses_kernel sm_90 104 0 64 1 - -
  _scale_kernel sm_90 40 0 0 12 - -
  _long_cross_entropy_kernel sm_100 48 0 64 2 18.2 -
  _reduce_losses_kernel sm_100 104 0 64 1 - -
  _scale_kernel sm_100 32 0 0 16 - -
  _long_cross_entropy_kernel gfx942 48 0 64 2 24.6 -
  _reduce_losses_kernel gfx942 64 0 64 2 - -
  _scale_kernel gfx942 32 0 0 8 - -
linear_cross_entropy M16384-C384-V65-bf16
  _cross_entropy_kernel sm_90 72 0 2048 7 28.6 -
  _reduce_losses_kernel sm_90 104 0 64 1 - -
  _scale_kernel sm_90 40 0 0 12 - -
linear_cross_entropy M16384-C768-V50257-bf16
  _long_cross_entropy_kernel sm_90 48 0 64 2 20.8 -
  _reduce_losses_kernel sm_90 104 0 64 1 - -
  _scale_kernel sm_90 40 0 0 12 - -
embed B64-T256-C384-V65-bf16-p0.2
  _embed_kernel sm_80 48 0 0 10 25.6 -
  _position_gradient_kernel sm_80 56 0 2048 9 - -
  _token_gradient_one_hot_kernel sm_80 192 0 20992 2 - HMMA
  _embed_kernel sm_90 56 0 0 9 26.1 -
  _position_gradient_kernel sm_90 56 0 2048 9 - -
  _token_gradient_one_hot_kernel sm_90 160 0 20992 3 - HGMMA
  _embed_kernel sm_100 48 0 0 10 25.0 -
  _position_gradient_kernel sm_100 56 0 2048 9 - -
  _token_gradient_one_hot_kernel sm_100 136 0 12864 3 - UTCHMMA
  _embed_kernel gfx942 40 0 0 8 33.6 -
  _position_gradient_kernel gfx942 48 0 2048 8 - -
  _token_gradient_one_hot_kernel gfx942 144 0 8192 3 - v_mfma
embed B12-T1024-C768-V50304-bf16
  _embed_kernel sm_80 40 0 0 12 9.9 -
  _position_gradient_kernel sm_80 48 0 2048 10 - -
  _token_gradient_sorted_kernel sm_80 48 0 12336 10 - -
  _embed_kernel sm_90 40 0 0 12 11.5 -
  _position_gradient_kernel sm_90 48 0 2048 10 - -
  _token_gradient_sorted_kernel sm_90 48 0 12336 10 - -
  _embed_kernel sm_100 40 0 0 12 10.5 -
  _position_gradient_kernel sm_100 48 0 2048 10 - -
  _token_gradient_sorted_kernel sm_100 56 0 12336 9 - -
  _embed_kernel gfx942 32 0 0 8 22.0 -
  _position_gradient_kernel gfx942 32 0 2048 8 - -
  _token_gradient_sorted_kernel gfx942 64 0 8192 8 - -
rotary_qkv B64-T256-H6-D64-bf16
  _rotary_kernel sm_80 56 0 0 9 26.1 -
  _rotary_kernel sm_90 56 0 0 9 26.3 -
  _rotary_kernel sm_100 64 0 0 8 25.8 -
  _rotary_kernel gfx942 48 0 0 8 35.8 -
""")

# Rows of kernels of which Triton 3.6 makes more.
if triton is not None and triton.__version__.startswith("3.6."):
    BUDGETS |= _read_budgets("""
causal_attention B64-T256-H6-D64-bf16-p0.2
  _attention_forward_kernel sm_90 200 0 40960 2 19.8 HGMMA
  _attention_dkdv_kernel sm_100 255 0 40968 2 21.6 UTCHMMA
  _attention_forward_kernel gfx942 208 0 16384 2 35.5 v_mfma
  _attention_dq_kernel gfx942 208 0 16384 2 30.9 v_mfma
causal_attention B64-T256-H6-D64-bf16
  _attention_dkdv_kernel sm_80 200 0 29184 2 31.8 HMMA
  _attention_dkdv_kernel sm_100 136 0 40968 3 16.4 UTCHMMA
causal_attention B4-T4096-H12-D128-bf16
  _attention_forward_kernel sm_80 240 0 36864 2 36.9 HMMA
  _attention_forward_kernel gfx942 288 0 32768 1 33.4 v_mfma
  _attention_dq_kernel gfx942 152 0 16384 3 50.1 v_mfma
  _attention_dkdv_kernel gfx942 184 0 16384 2 89.7 v_mfma
causal_attention B4-T4096-H12-D128-bf16-p0.2
  _attention_forward_kernel sm_80 255 0 36864 2 51.4 HMMA
  _attention_forward_kernel sm_100 255 0 82944 2 29.5 UTCHMMA
causal_attention B4-T4096-H12-D256-bf16
  _attention_forward_kernel sm_80 255 0 73728 1 51.4 HMMA
  _attention_dkdv_kernel sm_80 255 7 67584 2 64.5 HMMA
  _attention_forward_kernel sm_89 224 0 73728 1 53.8 HMMA
  _attention_forward_kernel gfx942 352 0 36864 1 81.8 v_mfma
  _attention_dq_kernel gfx942 280 0 32768 1 67.1 v_mfma
  _attention_dkdv_kernel gfx942 280 0 32768 1 140.8 v_mfma
causal_attention B4-T4096-H12-D256-fp32
  _attention_dq_kernel sm_89 255 52 57344 1 1358.5 -
causal_attention B64-T256-H6-D40-bf16-p0.2
  _attention_forward_kernel sm_90 208 0 40960 2 20.1 HGMMA
causal_attention B64-T256-H6-D50-bf16-p0.2
  _attention_forward_kernel sm_90 255 0 20480 1 27.4 HGMMA
  _attention_dq_kernel sm_90 255 0 40960 1 24.3 HGMMA
  _attention_dkdv_kernel sm_90 255 8 40960 1 44.7 HGMMA+HMMA
causal_attention B64-T256-H6-D85-bf16-p0.2
  _attention_forward_kernel sm_90 255 36 40960 1 38.9 HGMMA
  _attention_dq_kernel sm_90 255 391 81920 1 35.5 HGMMA
  _attention_dkdv_kernel sm_90 255 324 77824 1 69.0 HGMMA+HMMA
causal_attention B64-T256-H6-D64-tf32-p0.2
  _attention_dq_kernel sm_100 176 0 57352 2 36.8 UTCHMMA
layer_norm M16384-C384-bf16
  _layer_norm_forward_kernel sm_100 72 0 0 28 19.5 -
dropout_add_layer_norm M16384-C384-bf16-p0.2
  _layer_norm_forward_kernel sm_100 80 0 0 24 41.0 -
cross_entropy M16384-V65-bf16
  _cross_entropy_kernel sm_80 88 0 4096 5 57.6 -
  _cross_entropy_kernel sm_90 80 0 4096 6 57.7 -
  _cross_entropy_kernel sm_100 80 0 4096 6 56.4 -
  _cross_entropy_kernel gfx942 56 0 4096 8 61.5 -
linear_cross_entropy M16384-C384-V65-bf16
  _cross_entropy_kernel sm_90 64 0 4096 8 31.7 -
embed B64-T256-C384-V65-bf16-p0.2
  _token_gradient_one_hot_kernel sm_90 176 0 20992 2 - HGMMA
""")

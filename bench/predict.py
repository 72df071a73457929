"""python -m bench predict: a step's time, term by term, from FLOPs, bytes and kernel bounds.

Model
    step = products + attention + other kernels + optimizer + dispatch + exposed all-reduce
    Dispatch is what lies between a GPU's kernels, which are counted as forward and backward start
    them on meta tensors, or around a CPU's ops.
    Each kind of work takes max(FLOPs / rate, bytes / bandwidth), both as `gptcore.roofline` counts
    them. A fused kernel takes its measured time where bench/results has one, else the static bound
    of `kernels.codegen`, else its floor, over an assumed efficiency. A ring all-reduce over N GPUs
    moves 2 (N-1)/N of the gradients over one link and hides behind the last micro-batch's backward
    pass as far as that lasts. Memory is what `gptcore.memory` holds a run against.
    What is assumed is printed with the figures. The same model, with the rates measured at the
    time, predicts every step that is checked in, and the error is printed too.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import models, render
from bench import record as recording
from gptcore import memory
from gptcore.config import ConfigError, GPTConfig, TrainConfig
from gptcore.flags import split_fields
from gptcore.model import GPT
from gptcore.presets import PRESETS
from gptcore.roofline import ATTENTION, OPTIMIZER, OTHER, PRODUCTS, model_flops, work_of
from kernels import backend
from kernels.budgets import CASES, Case
from kernels.gpus import GPU, GPUS

VOCABULARY = {"char": 65, "bytes": 256, "gpt2": 50257}
MATMUL_FRACTION = 790 / 989  # of the data sheet; measured on one H200, bf16
COPY_FRACTION = 4.3 / 4.8  # likewise
PRODUCT_EFFICIENCY = 0.75  # of the rate of a large square product, shapes of a training step
KERNEL_EFFICIENCY = 0.7  # a kernel's static bound over its time; none measured here yet
GRAPH_GAP_S = 1.0e-6  # between kernels of a CUDA graph
# Beside forward and backward: batch 4, norm 4, clipping 4, check 7, AdamW 4, rounding 2, key 1.
UPDATE_KERNELS = 26
MUON_KERNELS = 100  # of an update by Muon beside AdamW's, however many layers
# Ops that start no kernel, views aside.
WITHOUT_KERNEL = ("empty", "new_empty", "empty_like", "_unsafe_view", "promote_types")
CPU_CALLS = (70, 90)  # dispatched operations of one layer and of the rest, autograd included
# What one of them costs with Python and autograd around it, in bare calls: between 4 and 9 in the
# steps of 64 to 256 channels on two AVX2 cores (bench/results/cpu.json).
CPU_CALL_COST = 6
# A mask element on two CPU cores, of the 25 million of this: python -m timeit
# -s "from kernels.rng import dropout_keep_mask, make_key"
# "dropout_keep_mask(make_key(0), 0, 1, 5000, 5000, 0.2)"
PHILOX_S = 4.4e-9
HOP_S = 5e-6  # latency of one hop of the ring
BACKWARD_SHARE = 2 / 3  # of the step without its optimizer


@dataclass(frozen=True)
class Machine:
    """What bounds a step. Rates a second.

    Attributes:
        calls: dispatched operations, or a GPU's kernels, of a layer and of the rest.
        update_calls: those that a step has once, however many its micro-batches.
    """

    name: str
    matmul: float
    bandwidth: float
    call_s: float
    calls: tuple[int, int]
    dtype: torch.dtype
    update_calls: int = 0
    philox_s: float = 0.0
    efficiency: float = 1.0  # of fused kernels


class _Counter(TorchDispatchMode):
    """Counts the ops that start a kernel on a GPU, in `kernels`' operators, too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name, kwargs or {}
        if name in backend.OPERATORS:
            with self:
                return backend.OPERATORS[name](*args, **kwargs)
        self.count += not (function.is_view or name.removeprefix("aten::") in WITHOUT_KERNEL)
        return function(*args, **kwargs)


def kernels_of(config: GPTConfig, sequences: int, arch: str) -> tuple[int, int]:
    """Kernels of one layer and of the rest of a model, forward and backward, in bfloat16.

    What a library starts beside a product, to split its sum, is not known here.
    """

    def count(layers: int) -> int:
        model = models.meta(config.replace(n_layer=layers, backend="triton")).bfloat16()
        idx = torch.zeros(sequences, config.block_size, dtype=torch.int64, device="meta")
        key = torch.zeros(3, dtype=torch.int64, device="meta")
        counter = _Counter()

        def launched(*_) -> None:  # keeps none: of a gradient that is held autograd takes a copy
            counter.count += 1

        with backend.recording(launched, arch), counter:
            _, loss = model(idx, idx, key, return_logits=False)
            loss.backward()
        return counter.count

    one, two = count(1), count(2)
    return two - one, 2 * one - two


def machine_of(gpu: GPU, config: GPTConfig, sequences: int) -> Machine:
    """A GPU at the fractions of its data sheet that one H200 was measured to reach.

    Args:
        sequences: of a micro-batch of `config`.
    """
    return Machine(
        name=gpu.name,
        matmul=gpu.tensor_rate["bfloat16"] * MATMUL_FRACTION * PRODUCT_EFFICIENCY,
        bandwidth=gpu.bandwidth * COPY_FRACTION,
        call_s=GRAPH_GAP_S,
        calls=kernels_of(config, sequences, gpu.arch),
        update_calls=UPDATE_KERNELS,
        dtype=torch.bfloat16,
        efficiency=KERNEL_EFFICIENCY,
    )


def measured_machine(record, question: str, case) -> Machine:
    """The machine of a record's case, at the rates measured just before `question` was asked."""
    ceilings = record["questions"][question]["ceilings"]
    cpu = record["environment"]["device_type"] == "cpu"
    calls, update_calls = CPU_CALLS, 0
    if not cpu:
        arch = "sm_" + record["environment"]["capability"].replace(".", "")
        calls = kernels_of(GPTConfig(**case["config"]), case["shape"]["B"], arch)
        update_calls = UPDATE_KERNELS
    return Machine(
        name=record["environment"]["device"],
        matmul=ceilings["matmul_tflops"] * 1e12 * PRODUCT_EFFICIENCY,
        bandwidth=ceilings["copy_gbps"] * 1e9,
        call_s=ceilings["dispatch_us"] * 1e-6 * CPU_CALL_COST if cpu else GRAPH_GAP_S,
        calls=calls,
        update_calls=update_calls,
        dtype=getattr(torch, case["dtype"]),
        philox_s=PHILOX_S if cpu else 0.0,
        efficiency=1.0 if cpu else KERNEL_EFFICIENCY,
    )


def dropped_elements(config: GPTConfig, sequences: int) -> float:
    """Mask elements of a step, attention's causal half; drawn again in the backward pass."""
    if not config.dropout:
        return 0.0
    T = config.block_size
    attention = config.n_head * T * (T + 1) / 2
    return 2 * config.n_layer * sequences * (attention + 2 * T * config.n_embd)


def terms(
    model: GPT, train: TrainConfig, machine: Machine, kernels: dict[str, float] | None = None
) -> dict[str, float]:
    """Seconds of each part of one step; `kernels` may hold ATTENTION and OTHER of a micro-batch."""
    config, micro_batches = model.config, train.gradient_accumulation_steps
    work = work_of(model, train, machine.dtype)

    def floor(kind, repeated=1.0):
        flops = repeated * work[kind].flops
        return max(flops / machine.matmul, work[kind].bytes / machine.bandwidth)

    found = {
        PRODUCTS: floor(PRODUCTS),
        # Backward computes the scores again: seven products of six.
        ATTENTION: floor(ATTENTION, repeated=7 / 6) / machine.efficiency,
        OTHER: floor(OTHER) / machine.efficiency,
    }
    found |= {kind: micro_batches * seconds for kind, seconds in (kernels or {}).items()}
    calls = machine.calls[0] * config.n_layer + machine.calls[1]
    once = machine.update_calls + (MUON_KERNELS if train.optimizer == "muon" else 0)
    found |= {
        "masks": dropped_elements(config, train.sequences) * machine.philox_s,
        "dispatch": (micro_batches * calls + once) * machine.call_s,
        OPTIMIZER: floor(OPTIMIZER),
    }
    return {name: seconds for name, seconds in found.items() if seconds}


def all_reduce(weights: int, gpus: int, link: float) -> float:
    """Seconds of a ring all-reduce of float32 gradients, one link's bandwidth in one direction."""
    if gpus == 1:
        return 0.0
    return 2 * (gpus - 1) / gpus * 4 * weights / link + 2 * (gpus - 1) * HOP_S


def fused_cases(config: GPTConfig, B: int, T: int, gpu: GPU) -> list[tuple[str, int, Case]]:
    """(kind, how many in a micro-batch, case) of the model's fused ops."""
    H, D, C, V = config.n_head, config.D, config.n_embd, config.vocab_size
    rows, p, heads = B * T, config.dropout, {"B": B, "T": T, "H": H, "D": D}
    rotations = config.n_layer * (config.position == "rotary")
    wanted = (
        (ATTENTION, config.n_layer, "causal_attention", heads, p),
        (OTHER, rotations, "rotary_qkv", heads, 0.0),
        (OTHER, 1, "embed", {"B": B, "T": T, "C": C, "V": V}, p * config.embedding_dropout),
        (OTHER, 1, "layer_norm", {"M": rows, "C": C}, 0.0),
        (OTHER, 2 * config.n_layer, "dropout_add_layer_norm", {"M": rows, "C": C}, p),
        (OTHER, config.n_layer, "linear_act", {"M": rows, "K": C, "N": 4 * C}, 0.0),
        (OTHER, 1, "cross_entropy", {"M": rows, "V": V}, 0.0),
    )
    found = []
    for kind, times, op, sizes, dropout_p in wanted:
        if not times:
            continue
        words = [*(f"{letter}{size}" for letter, size in sizes.items()), "bf16"]
        words += [f"p{dropout_p:g}"] if dropout_p else []
        words += [config.activation] if op == "linear_act" else []
        case = dataclasses.replace(
            next(case for case in CASES if case.op == op),
            name="-".join(words),
            sizes=sizes,
            dtype=torch.bfloat16,
            dropout_p=dropout_p,
            arches=(gpu.arch,),
        )
        found.append((kind, times, case))
    return found


# Launched by these cases, but not a kernel of OTHER: linear_act's is one of the products, and the
# model's loss scales no gradient of logits, for linear_cross_entropy holds none.
NOT_OTHER = ("_linear_act_kernel", "_scale_kernel")


def static_kernels(config: GPTConfig, B: int, T: int, gpu: GPU) -> tuple[dict[str, float], str]:
    """Seconds of ATTENTION and OTHER in a micro-batch by `kernels.codegen`, and a remark.

    Measured times of bench/results count as they are, static bounds over KERNEL_EFFICIENCY.
    """
    from kernels import codegen

    if not backend.HAS_TRITON or backend.interpreting():
        return {}, "bounds of fused kernels: their floors, for Triton cannot compile here"
    seconds, timed, kernels = {ATTENTION: 0.0, OTHER: 0.0}, 0, 0
    for kind, times, case in fused_cases(config, B, T, gpu):
        for row in codegen.examine([case], [gpu.arch], {gpu.arch: gpu}):
            if "error" in row:
                return {}, f"bounds of fused kernels: floors; {row['kernel']} breaks on {gpu.arch}"
            if row["kernel"] in NOT_OTHER:
                continue
            bound = (row["bound_us"] or row["floor_us"]) / KERNEL_EFFICIENCY
            seconds[kind] += times * (row["measured_us"] or bound) * 1e-6
            kernels, timed = kernels + 1, timed + (row["measured_us"] is not None)
    return seconds, (
        "bounds of fused kernels: of the code that Triton makes (kernels.codegen); "
        f"{timed} of {kernels} are times on record instead"
    )


def predict(*, gpu: str, model: str, gpus: int, results: Path) -> int:
    """Print the prediction and its validation; exit code 0.

    Raises: ConfigError for an unknown GPU or model.
    """
    names = {name.lower(): name for name in GPUS}
    if gpu.lower() not in names:
        raise ConfigError(f"unknown gpu {gpu!r}; known: {', '.join(names)}")
    known = [name for name, given in PRESETS.items() if given.get("model", "gpt") == "gpt"]
    if model not in known:
        raise ConfigError(f"unknown model {model!r}; known: {', '.join(known)}")
    chosen = GPUS[names[gpu.lower()]]
    train, config = preset(model)
    # GPUs share the step's sequences: first the micro-batches, then the sequences of one.
    shared = math.gcd(train.gradient_accumulation_steps, gpus)
    train = train.replace(
        batch_size=math.ceil(train.batch_size * shared / gpus),
        gradient_accumulation_steps=train.gradient_accumulation_steps // shared,
    )
    B, micro_batches = train.batch_size, train.gradient_accumulation_steps
    T, machine, built = config.block_size, machine_of(chosen, config, B), models.meta(config)
    parameters = built.num_parameters()
    kernels, remark = static_kernels(config, B, T, chosen)
    found = terms(built, train, machine, kernels)
    ring = all_reduce(parameters, gpus, chosen.link)
    last = (sum(found.values()) - found[OPTIMIZER]) / micro_batches
    found["all-reduce not hidden"] = max(0.0, ring - BACKWARD_SHARE * last)
    step = sum(found.values())
    tokens = train.sequences * T * gpus
    flops = sum(model_flops(built, train.sequences).values())
    mfu = flops / step / chosen.tensor_rate["bfloat16"]

    print(
        f"{model} ({parameters:,} parameters) on {gpus} x {chosen.name}: "
        f"{micro_batches} x {B} x {T} tokens a GPU and step, bf16"
    )
    rows = [["a step", "ms", "share"]]
    every = found | {"all": step}
    rows += [[n, render.quantity(1e3 * s), f"{s / step:.0%}"] for n, s in every.items()]
    print(render.align(rows))
    print(f"{tokens / step:,.0f} tokens/s, MFU {mfu:.0%} of the data sheet's rate")
    need = memory.need(train, config, "cuda", machine.dtype)
    held, fixed = need.bytes(B), need.fixed_bytes
    fits = "fits" if held < 0.95 * chosen.memory else "DOES NOT FIT"
    print(
        f"memory {held / 1e9:.2f} GB a GPU (weights, gradients, moments {fixed / 1e9:.2f}, "
        f"activations {(held - fixed) / 1e9:.2f}): {fits} in {chosen.memory / 1e9:.0f} GB"
    )
    print(
        "\nassumed\n"
        + "\n".join(f"- {line}" for line in [remark, *assumptions(chosen, machine, gpus, ring)])
    )
    print(validation_text(results))
    return 0


def preset(name: str) -> tuple[TrainConfig, GPTConfig]:
    """The configurations of a preset, without its data."""
    train, fields = split_fields(PRESETS[name])
    vocabulary = VOCABULARY[train.get("tokenizer", "char")]
    multiple = train.get("vocab_multiple", 1)
    config = GPTConfig(**fields, vocab_size=math.ceil(vocabulary / multiple) * multiple)
    return TrainConfig(**train), config


def assumptions(gpu: GPU, machine: Machine, gpus: int, ring: float) -> list[str]:
    """One line each."""
    lines = [
        f"fused kernels reach {KERNEL_EFFICIENCY:.0%} of their bound, where none is on record",
        f"matrix products reach {MATMUL_FRACTION * PRODUCT_EFFICIENCY:.0%} of "
        f"{gpu.tensor_rate['bfloat16'] / 1e12:,.0f} TFLOP/s, copies {COPY_FRACTION:.0%} of "
        f"{gpu.bandwidth / 1e12:.2f} TB/s (one H200: 790 of 989, 4.3 of 4.8; square products, "
        f"{PRODUCT_EFFICIENCY:.0%} of that for the step's shapes)",
        f"the step is one CUDA graph, {GRAPH_GAP_S * 1e6:g} us between two kernels: of a "
        f"micro-batch {machine.calls[0]} a layer and {machine.calls[1]} more (counted), of the "
        f"update {machine.update_calls}, another {MUON_KERNELS} under Muon",
    ]
    if gpus > 1:
        lines.append(
            f"ring all-reduce of float32 gradients over {gpu.link / 1e9:.0f} GB/s links: "
            f"{1e3 * ring:.2f} ms, {HOP_S * 1e6:g} us a hop, hidden behind the last backward pass"
        )
    return lines


def validation(results: Path) -> list[tuple[str, str, float, float]]:
    """(machine, case, predicted ms, measured ms) of every step of ours that is checked in."""
    found = []
    for path in sorted(results.glob("*.json")):
        try:
            record = recording.read(path)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for question in ("step", "scaling"):
            for case in record["questions"].get(question, {}).get("cases", ()):
                ours = render.timed(case, "gptcore")
                if ours is None:
                    continue
                machine = measured_machine(record, question, case)
                model = models.meta(GPTConfig(**case["config"]))
                train = TrainConfig(batch_size=case["shape"]["B"])
                predicted = 1e3 * sum(terms(model, train, machine).values())
                found.append((machine.name, case["case"], predicted, ours["median_ms"]))
    return found


def validation_text(results: Path) -> str:
    """The validation as a table, with the typical and the worst error."""
    found = validation(results)
    if not found:
        return f"\nvalidation: no step is on record in {results.name}/"
    rows = [["the same model on what was measured", "predicted ms", "measured", "error"]]
    errors = []
    for _, case, predicted, measured in found:
        errors.append(abs(predicted / measured - 1))
        cells = [render.quantity(predicted), render.quantity(measured)]
        rows.append([case, *cells, f"{predicted / measured - 1:+.0%}"])
    machines = ", ".join(dict.fromkeys(name for name, *_ in found))
    typical = sorted(errors)[len(errors) // 2]
    return (
        f"\nvalidation\n{render.align(rows)}\n"
        f"median error {typical:.0%}, worst {max(errors):.0%} over {len(found)} steps on {machines}"
    )

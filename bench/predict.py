"""python -m bench predict: a step's time, term by term, from FLOPs, bytes and kernel bounds.

Model
    step = products + attention + pointwise + optimizer + dispatch + exposed all-reduce
    Each product of matrices takes max(FLOPs / rate, bytes / bandwidth). A fused kernel takes its
    measured time where bench/results has one, else the static bound of `kernels.codegen`, else
    its floor, over an assumed efficiency. A ring all-reduce over N GPUs moves 2 (N-1)/N of the
    gradients over one link and hides behind the backward pass as far as that lasts.
    What is assumed is printed with the figures. The same model, with the rates measured at the
    time, predicts every step that is checked in, and the error is printed too.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import record as recording
from bench import render
from bench.work import attention_products, matrix_weights, parameters
from gptcore.config import ConfigError, GPTConfig
from gptcore.flags import split_fields
from gptcore.presets import PRESETS
from kernels.gpus import GPU, GPUS

VOCABULARY = {"char": 65, "bytes": 256, "gpt2": 50257}
MATMUL_FRACTION = 790 / 989  # of the data sheet; measured on one H200, bf16
COPY_FRACTION = 4.3 / 4.8  # likewise
PRODUCT_EFFICIENCY = 0.75  # of the rate of a large square product, shapes of a training step
KERNEL_EFFICIENCY = 0.7  # a kernel's static bound over its time; none measured here yet
GRAPH_GAP_S = 1.0e-6  # between kernels of a CUDA graph
KERNELS = (22, 14)  # of one layer and of the rest, forward, backward and optimizer; 146 in 6 layers
CPU_CALLS = (70, 90)  # dispatched operations of one layer and of the rest, autograd included
# What one of them costs with Python and autograd around it, in bare calls: between 4 and 9 in the
# steps of 64 to 256 channels on two AVX2 cores (bench/results/cpu.json).
CPU_CALL_COST = 6
PHILOX_S = 4.4e-9  # a mask element on two CPU cores (110 ms for 25M)
HOP_S = 5e-6  # latency of one hop of the ring
BACKWARD_SHARE = 2 / 3  # of the step without its optimizer


@dataclass(frozen=True)
class Machine:
    """What bounds a step. Rates a second; `calls` dispatched operations (a layer, the rest)."""

    name: str
    matmul: float
    bandwidth: float
    call_s: float
    calls: tuple[int, int]
    itemsize: int
    philox_s: float = 0.0
    gpu: GPU | None = None


def machine_of(gpu: GPU) -> Machine:
    """A GPU at the fractions of its data sheet that one H200 was measured to reach."""
    return Machine(
        name=gpu.name,
        matmul=gpu.tensor_rate["bfloat16"] * MATMUL_FRACTION * PRODUCT_EFFICIENCY,
        bandwidth=gpu.bandwidth * COPY_FRACTION,
        call_s=GRAPH_GAP_S,
        calls=KERNELS,
        itemsize=2,
        gpu=gpu,
    )


def measured_machine(record, question: str, dtype: str) -> Machine:
    """The machine of a record, at the rates measured just before `question` was asked."""
    ceilings = record["questions"][question]["ceilings"]
    cpu = record["environment"]["device_type"] == "cpu"
    return Machine(
        name=record["environment"]["device"],
        matmul=ceilings["matmul_tflops"] * 1e12 * PRODUCT_EFFICIENCY,
        bandwidth=ceilings["copy_gbps"] * 1e9,
        call_s=ceilings["dispatch_us"] * 1e-6 * CPU_CALL_COST if cpu else GRAPH_GAP_S,
        calls=CPU_CALLS if cpu else KERNELS,
        itemsize=4 if dtype == "float32" else 2,
        philox_s=PHILOX_S if cpu else 0.0,
    )


def products(config: GPTConfig, B: int, T: int) -> Iterator[tuple[int, int, int, int]]:
    """(how many, rows, inputs, outputs) of the matrix products of a forward pass."""
    rows, C, width = B * T, config.n_embd, config.n_head * config.D
    for inputs, outputs in ((C, 3 * width), (width, C), (C, 4 * C), (4 * C, C)):
        yield config.n_layer, rows, inputs, outputs
    yield 1, rows, C, config.vocab_size


def pointwise_bytes(config: GPTConfig, B: int, T: int, itemsize: int) -> float:
    """Of embedding, LayerNorm with its sum, and loss; forward and backward."""
    tensor = B * T * config.n_embd * itemsize
    return (18 * config.n_layer + 5 + 2) * tensor + 3 * B * T * config.vocab_size * itemsize


def attention_bytes(config: GPTConfig, B: int, T: int, itemsize: int) -> float:
    """q, k, v, o forward; those, do and dq, dk, dv backward."""
    return 12 * config.n_layer * B * T * config.n_head * config.D * itemsize


def dropped_elements(config: GPTConfig, B: int, T: int) -> float:
    """Mask elements of a step, attention's causal half; drawn again in the backward pass."""
    if not config.dropout:
        return 0.0
    attention = B * config.n_head * T * (T + 1) / 2
    return 2 * config.n_layer * (attention + 2 * B * T * config.n_embd)


def terms(
    config: GPTConfig, B: int, T: int, machine: Machine, kernels: dict[str, float] | None = None
) -> dict[str, float]:
    """Seconds of each part of one step; `kernels` may hold "attention" and "pointwise"."""
    kernels = kernels or {}
    size = machine.itemsize

    def bounded(flops, moved):
        return max(flops / machine.matmul, moved / machine.bandwidth)

    found = {
        "products": sum(
            3 * n * bounded(2 * rows * a * b, size * (rows * (a + b) + a * b))
            for n, rows, a, b in products(config, B, T)
        ),
        "attention": kernels.get("attention")
        or bounded(3.5 * attention_products(config, B, T), attention_bytes(config, B, T, size))
        / (KERNEL_EFFICIENCY if machine.gpu else 1),
        "pointwise": kernels.get("pointwise")
        or pointwise_bytes(config, B, T, size)
        / machine.bandwidth
        / (KERNEL_EFFICIENCY if machine.gpu else 1),
        "masks": dropped_elements(config, B, T) * machine.philox_s,
        # AdamW in float32; with half precision also the copy of weights and gradients.
        "optimizer": (28 if size == 4 else 40) * parameters(config) / machine.bandwidth,
        "dispatch": (machine.calls[0] * config.n_layer + machine.calls[1]) * machine.call_s,
    }
    return {name: seconds for name, seconds in found.items() if seconds}


def all_reduce(weights: int, gpus: int, link: float) -> float:
    """Seconds of a ring all-reduce of float32 gradients, one link's bandwidth in one direction."""
    if gpus == 1:
        return 0.0
    return 2 * (gpus - 1) / gpus * 4 * weights / link + 2 * (gpus - 1) * HOP_S


def memory_bytes(config: GPTConfig, B: int, T: int, itemsize: int) -> dict[str, float]:
    """What a step holds at its peak; dropout masks are drawn again, logits are never held."""
    C, width, n = config.n_embd, config.n_head * config.D, parameters(config)
    wide = 4 * C * (2 if config.activation == "gelu" else 1)
    saved = config.n_layer * B * T * (itemsize * (4 * C + 4 * width + wide) + 4 * config.n_head)
    return {
        "weights, gradients, moments": 16.0 * n + (4.0 * n if itemsize == 2 else 0.0),
        "activations": float(saved),
    }


def static_kernels(config: GPTConfig, B: int, T: int, gpu: GPU) -> tuple[dict[str, float], str]:
    """Seconds of attention and of the pointwise kernels by `kernels.codegen`, and a remark.

    Measured times of bench/results count as they are, static bounds over KERNEL_EFFICIENCY.
    """
    from kernels import backend

    if not backend.HAS_TRITON or backend.interpreting():
        return {}, "bounds of fused kernels: their floors, for Triton cannot compile here"
    import torch

    from kernels.budgets import CASES
    from kernels.codegen import examine

    H, D, C, V = config.n_head, config.D, config.n_embd, config.vocab_size
    half, p = torch.bfloat16, config.dropout
    wanted = (
        ("causal_attention", {"B": B, "T": T, "H": H, "D": D}, p, config.n_layer),
        ("dropout_add_layer_norm", {"M": B * T, "C": C}, p, 2 * config.n_layer),
        ("embed", {"B": B, "T": T, "C": C, "V": V}, 0.0, 1),
        ("cross_entropy", {"M": B * T, "V": V}, 0.0, 1),
    )
    seconds = {"attention": 0.0, "pointwise": 0.0}
    for op, sizes, dropout_p, times in wanted:
        shipped = next(case for case in CASES if case.op == op)
        name = "-".join(f"{letter}{size}" for letter, size in sizes.items()) + "-bf16"
        name += f"-p{dropout_p:g}" if dropout_p else ""
        case = dataclasses.replace(
            shipped,
            name=name,
            sizes=sizes,
            dtype=half,
            dropout_p=dropout_p,
            arches=(gpu.arch,),
        )
        for row in examine([case], [gpu.arch], {gpu.arch: gpu}):
            if "error" in row:
                return {}, f"bounds of fused kernels: floors; {row['kernel']} breaks on {gpu.arch}"
            bound = (row["bound_us"] or row["floor_us"]) / KERNEL_EFFICIENCY
            part = "attention" if op == "causal_attention" else "pointwise"
            seconds[part] += times * (row["measured_us"] or bound) * 1e-6
    return seconds, "bounds of fused kernels: of the code that Triton makes (kernels.codegen)"


def predict(*, gpu: str, model: str, gpus: int, results: Path) -> int:
    """Print the prediction and its validation; exit code 0.

    Raises: ConfigError for an unknown GPU or model.
    """
    names = {name.lower(): name for name in GPUS}
    if gpu.lower() not in names:
        raise ConfigError(f"unknown gpu {gpu!r}; known: {', '.join(names)}")
    if model not in PRESETS:
        raise ConfigError(f"unknown model {model!r}; known: {', '.join(PRESETS)}")
    chosen = GPUS[names[gpu.lower()]]
    config, B, micro_batches = preset(model)
    # GPUs share the step's sequences: first the micro-batches, then the sequences of one.
    shared = math.gcd(micro_batches, gpus)
    B, micro_batches = math.ceil(B * shared / gpus), micro_batches // shared
    T, machine = config.block_size, machine_of(chosen)
    kernels, remark = static_kernels(config, B, T, chosen)
    found = terms(config, B, T, machine, kernels)
    optimizer = found.pop("optimizer")
    compute = micro_batches * sum(found.values())
    ring = all_reduce(parameters(config), gpus, chosen.link)
    exposed = max(0.0, ring - BACKWARD_SHARE * sum(found.values()))
    step = compute + optimizer + exposed
    flops = 3 * (2 * matrix_weights(config) * B * T + attention_products(config, B, T))
    tokens = B * T * micro_batches * gpus
    mfu = micro_batches * flops / step / chosen.tensor_rate["bfloat16"]
    memory = memory_bytes(config, B, T, machine.itemsize)

    print(
        f"{model} ({parameters(config):,} parameters) on {gpus} x {chosen.name}: "
        f"{micro_batches} x {B} x {T} tokens a GPU and step, bf16"
    )
    rows = [["a step", "ms", "share"]]
    every = {name: micro_batches * seconds for name, seconds in found.items()}
    every |= {"optimizer": optimizer, "all-reduce not hidden": exposed, "all": step}
    rows += [[n, render.quantity(1e3 * s), f"{s / step:.0%}"] for n, s in every.items()]
    print(render.align(rows))
    print(f"{tokens / step:,.0f} tokens/s, MFU {mfu:.0%} of the data sheet's rate")
    held = sum(memory.values())
    fits = "fits" if held < 0.95 * chosen.memory else "DOES NOT FIT"
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in memory.items())
    print(f"memory {held / 1e9:.2f} GB a GPU ({parts}): {fits} in {chosen.memory / 1e9:.0f} GB")
    print(
        "\nassumed\n"
        + "\n".join(f"- {line}" for line in [remark, *assumptions(chosen, gpus, ring)])
    )
    print(validation_text(results))
    return 0


def preset(name: str) -> tuple[GPTConfig, int, int]:
    """The model of a preset, its batch and micro-batches."""
    train, fields = split_fields(PRESETS[name])
    vocabulary = VOCABULARY[train.get("tokenizer", "char")]
    multiple = train.get("vocab_multiple", 1)
    config = GPTConfig(**fields, vocab_size=math.ceil(vocabulary / multiple) * multiple)
    return config, train.get("batch_size", 64), train.get("gradient_accumulation_steps", 1)


def assumptions(gpu: GPU, gpus: int, ring: float) -> list[str]:
    """One line each."""
    lines = [
        f"fused kernels reach {KERNEL_EFFICIENCY:.0%} of their bound (none timed yet)",
        f"matrix products reach {MATMUL_FRACTION * PRODUCT_EFFICIENCY:.0%} of "
        f"{gpu.tensor_rate['bfloat16'] / 1e12:,.0f} TFLOP/s, copies {COPY_FRACTION:.0%} of "
        f"{gpu.bandwidth / 1e12:.2f} TB/s (one H200: 790 of 989, 4.3 of 4.8; square products, "
        f"{PRODUCT_EFFICIENCY:.0%} of that for the step's shapes)",
        f"the step is one CUDA graph: {KERNELS[0]} kernels a layer and {KERNELS[1]} more, "
        f"{GRAPH_GAP_S * 1e6:g} us between two",
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
                machine = measured_machine(record, question, case["dtype"])
                config = GPTConfig(**case["config"])
                shape = case["shape"]
                predicted = 1e3 * sum(terms(config, shape["B"], shape["T"], machine).values())
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

"""Out of memory: which batch fits, and the accumulation that keeps the result the same.

What a step holds, for P parameters, R sequences of T tokens in a micro-batch, L layers, width C,
H heads of D and V tokens in the vocabulary:

    P * 4 * (weights + gradients + slots of the optimizer + their copies for the checkpoint)
    (sequences of a step) * T * 16, its tokens and targets
    R * T * itemsize * (L * (11 C + 4 H D + (4 C unless ReLU) + (2 C with dropout)) + 3 V)

Muon keeps one slot, not two, of the matrices of blocks, and works with five copies of them, when
the last line is free again. Copies for the checkpoint are a CPU's alone. A bfloat16 copy of weights
and gradients adds 4 P; the naive models keep H T more a layer, with dropout 3 H T; the Triton
kernels hold V / 3, not 3 V. Of logits that `linear_cross_entropy` takes in chunks a CPU holds four
chunks instead of 3 V. The last line is fitted to the peaks of the CPU's allocator (`python -m bench
memory`): eleven settings of nanogpt-cpu, within a quarter.

On a CPU a micro-batch has at most `largest_micro_batch` sequences, whatever batch_size is. Batches
and dropout masks follow from a sequence's place in the step's whole batch: however it is split,
batch_size times gradient_accumulation_steps decides the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gptcore import machine
from gptcore.config import ConfigError, GPTConfig, RunError, TrainConfig
from gptcore.distributed import ALONE, World
from gptcore.model import build_model
from gptcore.step import largest_micro_batch, may_be_half
from kernels.cross_entropy import CHUNK_BYTES

TOLERANCE = 0.75  # a run is refused only if so much of its estimate does not fit
DRAWN_TOKEN_BYTES = 112  # peak of generation.uniforms on a CPU, the words of Philox above all
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs: whatever the batch, and for each sequence of a micro-batch.

    Attributes:
        sequences: of a micro-batch, at most; a CPU takes no more at once, whatever batch_size is.
        update_bytes: what an update works with; the sequences' are free then.
    """

    fixed_bytes: int
    sequence_bytes: int
    sequences: int
    update_bytes: int = 0

    def bytes(self, batch_size: int) -> int:
        """Of a run with this batch_size."""
        of_sequences = min(batch_size, self.sequences) * self.sequence_bytes
        return self.fixed_bytes + max(self.update_bytes, of_sequences)


def need(config: TrainConfig, model: GPTConfig, device_type: str, dtype: torch.dtype) -> Need:
    """An estimate of what a run needs on its device; nothing is allocated.

    Raises: ConfigError if no tensor can be as large as the model's.
    """
    P = parameter_count(config.model, model)
    L, C, HD, T = model.n_layer, model.n_embd, model.n_head * model.D, model.block_size
    blocks = config.model in ("gpt", "naive")
    matrices = 4 * L * C * (HD + 2 * C) if blocks and config.optimizer == "muon" else 0
    slots = P if config.optimizer == "sgd" else 2 * P - matrices  # numbers: the moments
    on_cpu = device_type == "cpu"
    fixed = 4 * (2 * P + slots + (P + slots if on_cpu else 0))
    if dtype == torch.bfloat16:
        fixed += 4 * P
    fixed += 16 * config.sequences * model.block_size
    a_layer = 11 * C + 4 * HD + 4 * C * (model.activation != "relu") + 2 * C * (model.dropout > 0)
    if config.model == "naive":
        a_layer += model.n_head * T * (3 if model.dropout else 1)
    sequences = largest_micro_batch(config, model, device_type)
    a_token = 3 * model.vocab_size if on_cpu else model.vocab_size // 3
    chunked = on_cpu and config.model == "gpt"
    if chunked and sequences * T * a_token * dtype.itemsize > 4 * CHUNK_BYTES:
        fixed, a_token = fixed + 4 * CHUNK_BYTES, 0
    if blocks:
        a_token += L * a_layer
    return Need(fixed, T * dtype.itemsize * a_token, sequences, update_bytes=20 * matrices)


def parameter_count(name: str, model: GPTConfig) -> int:
    """How many parameters such a model has; layers beyond two are counted, not built.

    Raises: ConfigError if no tensor can be as large as the model's.
    """
    name = "gpt" if name == "naive" else name  # as many, without a module a head

    def count(layers: int) -> int:
        with torch.device("meta"):
            built = build_model(name, model.replace(n_layer=layers))
        return sum(parameter.numel() for parameter in built.parameters())

    try:
        one, two = count(1), count(2)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes that no tensor can have
        raise ConfigError(
            f"no machine has memory for this model; got n_embd {model.n_embd}, block_size "
            f"{model.block_size}, n_head {model.n_head}"
        ) from error
    return one + (two - one) * (model.n_layer - 1)


def device_bytes(device: torch.device) -> tuple[float, float]:
    """(free, all) memory of the device; infinite where that cannot be known.

    The processes of torchrun on one machine have equal parts of its memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held, total
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free, total = machine.memory_bytes()
    return free / processes, total / processes


def fitting(sequences: int, most: int, needed: Need, free: float) -> int | None:
    """The largest batch size up to `most` that divides a step's sequences and fits; None: none."""
    room = free - needed.fixed_bytes
    if room < max(needed.sequence_bytes, needed.update_bytes):
        return None
    if room < needed.sequences * needed.sequence_bytes:  # not one by one from what was asked for
        most = min(most, int(room // needed.sequence_bytes))
    for size in range(min(most, sequences), 0, -1):
        if sequences % size == 0:
            return size
    return None


def check(
    config: TrainConfig, model: GPTConfig, device: torch.device, world: World = ALONE
) -> None:
    """Refuse a run that surely does not fit, before anything is allocated.

    Raises: ConfigError, naming the batch size that fits.
    """
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and may_be_half(device))
    needed = need(config, model, device.type, torch.bfloat16 if half else torch.float32)
    rows, (free, _) = world.rows(config), device_bytes(device)
    wanted = needed.bytes(rows)
    if TOLERANCE * wanted > free:
        raise ConfigError(
            f"about {wanted / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free: "
            + _advice(config, fitting(config.sequences, rows, needed, free))
        )


def check_sampling(
    model: GPTConfig, device: torch.device, texts: int, tokens: int, flags: str
) -> None:
    """Refuse to write texts that surely do not fit, before anything is allocated.

    Args:
        tokens: of each text, with its start.
        flags: which of them set how much is written.
    Raises: ConfigError.
    """
    cache = 8 * model.n_layer * model.n_head * model.D * model.block_size  # keys, values: float32
    wanted = texts * (DRAWN_TOKEN_BYTES * tokens + cache)
    free, _ = device_bytes(device)
    if TOLERANCE * wanted > free:
        raise ConfigError(
            f"about {wanted / 1e9:,.1f} GB needed, {free / 1e9:,.1f} GB free: "
            f"give a smaller {flags}"
        )


@contextlib.contextmanager
def advised(
    config: TrainConfig,
    model: GPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    command: str,
    world: World = ALONE,
) -> Iterator[None]:
    """Running out of memory inside becomes one line with a batch size that fits.

    Args:
        command: how to go on, but for the batch size.
        world: the processes that share a step's sequences and, with FSDP, the weights.
    Raises: RunError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        needed, (_, total) = need(config, model, device.type, dtype), device_bytes(device)
        if world.parallel == "fsdp":
            needed = dataclasses.replace(needed, fixed_bytes=needed.fixed_bytes // world.size)
        # What did not fit did not, whatever the estimate says: at most half of it.
        half = min(world.rows(config), needed.sequences) // 2
        size = fitting(config.sequences, half, needed, total)
        raise RunError(
            f"out of memory with batch_size {config.batch_size}: {_advice(config, size)}; "
            f"to go on, add that to: {command}"
        ) from error


def _advice(config: TrainConfig, batch_size: int | None) -> str:
    if batch_size is None:
        return (
            "not even one sequence at a time fits; give a smaller --n_layer, --n_embd, "
            "--block_size or --batch_size"
        )
    return (
        f"give --batch_size {batch_size} --gradient_accumulation_steps "
        f"{config.sequences // batch_size}: the same {config.sequences} sequences a step, with "
        "the same masks and result"
    )

"""One update of the weights: batch, forward, backward, clipping, optimizer.

What an update reads that changes from one to the next is the step, in the key, and the learning
rate. On a GPU both live there, so that after a few eager updates the whole of one is captured in
a CUDA graph and replayed from then on: one launch instead of hundreds, the same bits. On a CPU a
small model's forward and backward are replayed likewise, as a list of ops (`gptcore.replay`).

In bfloat16 the optimizer holds float32 master weights; a bfloat16 copy of the model computes, and
gradients of micro-batches add up in float32.
"""

import contextlib
import copy
import functools
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from gptcore.checkpoint import named_weights
from gptcore.config import GPTConfig, TrainConfig
from gptcore.data import BatchStream, Corpus
from gptcore.distributed import ALONE, Rounded, World, engine, gather, synchronised
from gptcore.guard import Guard
from gptcore.model import build_model
from gptcore.optim import apply_schedule
from gptcore.replay import Replay
from kernels.backend import multiplies_bfloat16
from kernels.rng import make_key

EAGER_UPDATES = 3  # before capture: lazy initialisation, autotuning, allocator
_WARM_UPS = EAGER_UPDATES + 2  # and those that record, or capture, and prove what is replayed
CPU_ELEMENTS = 16 * 256 * 384  # tokens * n_embd in a micro-batch on a CPU
# A CPU replays where the probabilities of a layer, its largest activation and the logits have at
# most so many elements each. Beyond, Python is little of the time, and the one thread that issues
# a replay's ops would lose.
REPLAY_ELEMENTS = 1 << 18


class HalfCopy:
    """The bfloat16 copy of a float32 model, and the way of gradients and weights between them.

    Attributes:
        model: the copy; its parameters are what forward and backward use.
    """

    def __init__(self, master: nn.Module, dtype: torch.dtype):
        self.model = copy.deepcopy(master).to(dtype)
        pairs = zip(master.parameters(), self.model.parameters(), strict=True)
        self.pairs = [(m, h) for m, h in pairs if m.requires_grad]
        self.masters = [m for m, _ in self.pairs]
        self.halves = [h for _, h in self.pairs]

    @torch.no_grad()
    def move_gradients(self) -> None:
        """Add the copy's gradients to the masters', in float32, and forget them."""
        halves = [h.grad for h in self.halves]
        if self.masters[0].grad is None:
            for master in self.masters:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([m.grad for m in self.masters], halves)
        else:
            torch._foreach_add_([m.grad for m in self.masters], halves)
        for half in self.halves:
            half.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the copy."""
        torch._foreach_copy_(self.halves, self.masters)


class Step:
    """Runs updates `step`, `step + 1`, ... of `model`, one a call.

    Args:
        model: float32; in training mode.
        optimizer: over the parameters of `model`.
        corpus: has batch(key, size, block_size) -> idx, targets.
        dtype: of the computation, float32 or bfloat16.
        step: updates done so far.
        world: the processes that share each update; with FSDP `model` is sharded.
    Attributes:
        compute: the module that forward runs: `model`, or what computes it in `dtype`.
        eager_reason: why updates are not replayed, None if they are.
        warm_ups: updates until each takes as long as the next.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        corpus,
        config: TrainConfig,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        step: int = 0,
        world: World = ALONE,
    ):
        self.model, self.optimizer, self.corpus, self.config = model, optimizer, corpus, config
        self.device, self.dtype, self.step, self.world = device, dtype, step, world
        self.half, self.sampled, self.compute = None, None, model
        if dtype != torch.float32 and world.parallel is None:
            self.half = HalfCopy(model, dtype)
            self.compute = self.half.model
        elif dtype != torch.float32 and world.parallel == "ddp":
            self.compute = Rounded(model, dtype)
        self.engine = engine(compiled(self.compute, config), world)
        self.forward = loss_function(self.engine, config)
        self.block_size = model.config.block_size
        self.key = make_key(config.seed, step, 0, device)
        most = largest_micro_batch(config, model.config, device.type)
        self.micro_batches = world.micro_batches(config, most)
        self.offsets = {
            first: torch.tensor([0, 0, first], device=device)
            for first, _ in self.micro_batches
            if first
        }
        self.stream, self.fetched = None, {}
        if isinstance(corpus, Corpus) and corpus.train.device.type == "cpu":
            self.stream = BatchStream(corpus, config.seed, config.sequences, self.block_size)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        halves = {id(m): h for m, h in self.half.pairs} if self.half else {}
        self.computing = [halves.get(id(p), p) for p in self.parameters]  # in `dtype`
        self.eager_reason = eager_reason(config, model.config, device, world)
        self.warm_ups = 1 if self.eager_reason else _WARM_UPS
        self.guard = Guard(optimizer, device, step)
        self.updates, self.graph, self.loss, self.replay = 0, None, None, None
        # One for all warm-ups: for each stream the allocator and cuBLAS keep memory of its own.
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def how(self) -> str:
        """How updates run, in words."""
        how = "captured in one CUDA graph"
        if self.device.type == "cpu":
            how = "forward and backward replayed as a list of ops"
        if self.eager_reason is not None:
            how = f"eager, because {self.eager_reason}"
        if len(self.micro_batches) > 1:
            largest = max(rows for _, rows in self.micro_batches)
            how += f"; in {len(self.micro_batches)} micro-batches of up to {largest} sequences"
        return how

    def whole_model(self) -> nn.Module | None:
        """A model to sample from, on rank 0; every rank calls this."""
        if self.world.parallel != "fsdp":
            if not isinstance(self.compute, Rounded) or self.world.rank:
                return self.compute
            # One for all samples, so that the graph that writes text is captured once.
            self.sampled = self.sampled or HalfCopy(self.model, self.dtype)
            self.sampled.refresh()
            return self.sampled.model
        weights = gather(named_weights(self.model), self.model)
        if self.world.rank:
            return None
        with torch.random.fork_rng(devices=[]):
            model = build_model(self.config.model, self.model.config)
        with torch.no_grad():
            for name, weight in named_weights(model).items():
                weight.copy_(weights[name])
        return model.to(self.device, self.dtype)

    def __call__(self) -> torch.Tensor:
        """One update; returns the mean loss before it, on the device.

        With a CUDA graph the returned tensor is overwritten by the next call.
        """
        apply_schedule(self.optimizer, self.step, self.config)
        if self.stream is not None and self.device.type != "cpu":
            self._fetch()
        if self.eager_reason is None and self.device.type != "cpu":
            loss = self._on_gpu()
        else:
            loss = self._update()
        self.step += 1
        self.updates += 1
        return loss

    def rewind(self, step: int) -> None:
        """Go on from `step`, whose weights and optimizer state have just been loaded."""
        self.step = self.guard.looked = step
        self.key.copy_(make_key(self.config.seed, step, 0, self.device))
        # What was captured holds the state of before.
        self.updates, self.graph, self.replay = 0, None, None
        if self.half:
            self.half.refresh()

    def _on_gpu(self) -> torch.Tensor:
        """An update on a side stream, as capture wants it, or the captured one."""
        if self.graph is not None:
            self.graph.replay()
            return self.loss
        if self.updates < EAGER_UPDATES:
            current = torch.cuda.current_stream(self.device)
            self.side.wait_stream(current)
            with torch.cuda.stream(self.side):
                loss = self._update()
            current.wait_stream(self.side)
            return loss
        if (failure := self._capture()) is not None:  # it ran nothing, so nothing is lost
            self.eager_reason = f"its capture failed: {failure}"
            warnings.warn(f"updates run eagerly, because {self.eager_reason}", stacklevel=2)
            return self._update()
        self.graph.replay()  # capturing ran nothing
        return self.loss

    def _capture(self) -> str | None:
        """Capture an update; why it failed, in one line, with all as before, or None."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        # A checkpoint may be waiting for its copies in another thread: only this one is watched.
        # Nor is torch's own stream for captures taken, which is the first device's.
        mode = {"stream": self.side, "capture_error_mode": "thread_local"}
        broke = None
        try:
            with torch.cuda.graph(graph, **mode):
                try:
                    self.loss = self._update()
                except BaseException as error:
                    broke = error
                    raise
        except RuntimeError as error:
            broke = broke or error  # the end of a capture that broke raises an error of its own
            if isinstance(broke, torch.OutOfMemoryError) or not isinstance(broke, RuntimeError):
                raise broke from None
            torch.cuda.set_stream(current)  # which that error has kept from being done
            self.loss = None
            self.optimizer.zero_grad(set_to_none=True)
            for computing in self.computing:  # into memory of the graph, which nothing has written
                computing.grad = None
            return str(broke).splitlines()[0]
        self.graph = graph
        return None

    def _update(self) -> torch.Tensor:
        """The update itself; nothing in it waits for the device."""
        config, micro_batches = self.config, []
        for first, rows in self.micro_batches:
            key = self.key + self.offsets[first] if first else self.key
            micro_batches.append((*self._batch(key, first, rows), key))
        if (
            self.device.type == "cpu"
            and self.eager_reason is None
            and self.updates >= EAGER_UPDATES
        ):
            total = self._replayed(*micro_batches[0])
        else:
            total = self._backward(micro_batches)
        if self.world.size > 1:  # the engines average gradients; so is the loss
            total = self.world.sum(total) / self.world.size
        with torch.inference_mode(self.replay is not None):  # which its gradients were made in
            self.guard.inspect(self.parameters, total, self.key[1:2], config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.half:
            self.half.refresh()
        self.key[1] += 1
        return total

    def _backward(self, micro_batches) -> torch.Tensor:
        """The mean loss, by autograd, which leaves the gradients with the parameters."""
        total, shares = None, self._shares(micro_batches)
        for micro_batch, share in zip(micro_batches, shares, strict=True):
            with synchronised(self.engine, self.world, last=micro_batch is micro_batches[-1]):
                _, loss = self.forward(*micro_batch)
                if share is not None:
                    loss = loss * share
                loss.backward()
            if self.half:
                self.half.move_gradients()
            total = loss.detach() if total is None else total + loss.detach()
        return total

    def _replayed(self, idx, targets, key) -> torch.Tensor:
        """`_backward` without autograd: the first time recorded, the second compared with it."""
        batch = idx, targets, key
        try:
            if self.replay is None:
                recorded = Replay.record(self.forward, self.computing, *batch)
                self.replay, loss, gradients = recorded
                self._hand_over(gradients)
            else:
                loss, gradients = self.replay(*batch)
                self._hand_over(gradients)
                if not self.replay.proven:
                    replayed = [p.grad for p in self.parameters]
                    self.optimizer.zero_grad(set_to_none=True)
                    known = self._backward([batch])
                    self.replay.prove(loss, replayed, known, [p.grad for p in self.parameters])
        except (RuntimeError, TypeError) as error:  # a model, or a torch, that it cannot do
            self.replay, self.eager_reason = None, str(error).splitlines()[0]
            self.optimizer.zero_grad(set_to_none=True)
            return self._backward([batch])
        return loss

    def _hand_over(self, gradients: list[torch.Tensor | None]) -> None:
        """Leave gradients of what computes with the parameters, as `_backward` does."""
        for parameter, gradient in zip(self.computing, gradients, strict=True):
            parameter.grad = gradient
        if self.half:
            self.half.move_gradients()

    def _fetch(self) -> None:
        """Bring this update's batches from the host to where a captured update reads them."""
        for first, rows in self.micro_batches:
            batch = self.stream.batch(self.step, first, rows)
            if first not in self.fetched:
                self.fetched[first] = tuple(x.contiguous() for x in batch)
            for buffer, x in zip(self.fetched[first], batch, strict=True):
                buffer.copy_(x)

    def _batch(self, key, first, rows):
        """idx, targets of one micro-batch."""
        if self.fetched:
            return self.fetched[first]
        if self.stream is not None:
            return self.stream.batch(self.step, first, rows)
        return self.corpus.batch(key, rows, self.block_size)

    def _shares(self, micro_batches) -> list[torch.Tensor | None]:
        """Each micro-batch's part of the step's targets that count, times the processes.

        A mean of means would be another loss.
        """
        if len(micro_batches) == self.world.size == 1:
            return [None]
        counts = torch.stack([(targets != -100).sum() for _, targets, _ in micro_batches])
        total = self.world.sum(counts.sum())
        return list((counts * self.world.size / total).unbind())


def largest_micro_batch(config: TrainConfig, model: GPTConfig, device_type: str) -> int:
    """Sequences that forward and backward take at once, at most batch_size.

    On a CPU larger ones only leave the caches, and hold more memory.
    """
    if device_type != "cpu":
        return config.batch_size
    return max(1, min(config.batch_size, CPU_ELEMENTS // (model.block_size * model.n_embd)))


def compiled(model: nn.Module, config: TrainConfig) -> nn.Module:
    """`model` through torch.compile where --compile says so."""
    return torch.compile(model) if config.compile else model


def loss_function(forward: nn.Module, config: TrainConfig) -> Callable:
    """(idx, targets, key) -> (_, loss); the GPT then never holds all logits."""
    if config.model == "gpt":
        return functools.partial(forward, return_logits=False)
    return forward


def eager_reason(
    config: TrainConfig, model: GPTConfig, device: torch.device, world: World = ALONE
) -> str | None:
    """Why updates are not replayed; None if they are."""
    if world.parallel is not None:
        return f"what --parallel {world.parallel} sends between processes is not captured"
    if config.model != "gpt":
        return f"--model {config.model} reads its dropout key on the host"
    if not config.cuda_graph:
        return "of --cuda_graph false"
    if device.type == "cpu":
        if config.compile or model.backend == "triton":
            return "a CPU replays neither --compile nor interpreted kernels"
        if len(world.micro_batches(config, largest_micro_batch(config, model, "cpu"))) > 1:
            return "a CPU replays one micro-batch only"
        tokens = config.batch_size * model.block_size
        widest = max(model.n_head * model.block_size, model.n_embd, model.vocab_size)
        if tokens * widest > REPLAY_ELEMENTS:
            return "the ops of a model this large outlast Python's part in them"
        return None
    if config.optimizer == "sgd":
        return "--optimizer sgd reads its learning rate on the host"
    if config.cycle_momentum and config.schedule in ("cyclic", "onecycle"):
        return "a cycled momentum is a number of the host"
    return None


def may_be_half(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    return device.type != "cpu" or multiplies_bfloat16()


def pick_dtype(
    model: nn.Module, corpus, config: TrainConfig, device: torch.device, world: World = ALONE
) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why.

    "auto" is bfloat16 on a GPU. On a CPU it is bfloat16 only where the CPU multiplies it in
    hardware (AMX, AVX512-BF16) and forward and backward on a batch of the run, replayed if updates
    will be, are then faster by a tenth, which the copies between the two take of small models:
    both are timed, in turns.
    """
    if config.dtype != "auto":
        reason = f"--dtype {config.dtype}"
        if config.dtype == "bfloat16" and not may_be_half(device):
            reason += ", which this CPU does not multiply: float32 would be many times as fast"
        return getattr(torch, config.dtype), reason
    if device.type != "cpu":
        return torch.bfloat16, "a GPU multiplies it fastest"
    if not may_be_half(device):
        return torch.float32, "this CPU has no bfloat16 products"
    key = make_key(config.seed, 0, 0, device)
    size = largest_micro_batch(config, model.config, device.type)
    batch = *corpus.batch(key, size, model.config.block_size), key
    replays = eager_reason(config, model.config, device, world) is None
    contestants = {
        torch.float32: _gradients_of(model, config, batch, replays),
        torch.bfloat16: _gradients_of(
            HalfCopy(model, torch.bfloat16).model, config, batch, replays
        ),
    }
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(10 if replays else 3):
        for dtype, gradients in contestants.items():
            start = time.perf_counter()
            gradients()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    float32_ms, bfloat16_ms = (1e3 * best[dtype] for dtype in contestants)
    return (
        torch.bfloat16 if bfloat16_ms < 0.9 * float32_ms else torch.float32,
        f"forward and backward took {float32_ms:.1f} ms in float32, {bfloat16_ms:.1f} in bfloat16",
    )


def _gradients_of(model: nn.Module, config: TrainConfig, batch, replays: bool) -> Callable:
    """() -> None: forward and backward of `model` on (idx, targets, key), kept nowhere."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    forward = loss_function(compiled(model, config), config)
    if replays:
        with contextlib.suppress(RuntimeError, TypeError):  # as an update would, do without
            replay, *_ = Replay.record(forward, parameters, *batch)
            return lambda: replay(*batch)
    return lambda: torch.autograd.grad(forward(*batch)[1], parameters, allow_unused=True)

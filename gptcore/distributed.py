"""Several processes, one run: who computes what, and how they stay together.

    torchrun --nproc_per_node=N train.py ... [--parallel ddp|fsdp]

Rank r of N takes the rows from S r // N to S (r + 1) // N of a step's S sequences. Batches and
dropout masks follow from a row's place in the global batch, so N processes draw what one draws.
Gradients are averaged over the ranks by torch's own engines, DistributedDataParallel or FSDP2
(`fully_shard`); the loss of a micro-batch counts N times its part of all targets of the step, so
that the average is the gradient of the mean over the global batch, however uneven the parts are.

A checkpoint is the same whoever writes it: torch.distributed.checkpoint gathers on rank 0 what is
sharded, tensor by tensor, and any number of processes reads it, each taking its part. It gives an
optimizer without state some first, by a step of learning rate 0: so the state of such a one is not
asked for when saving, and loading replaces all of it.

What a rank has to tell the others while training is one flag a step, whether it was asked to
stop. A rank that dies takes the job with it: torchrun ends the others.
"""

import contextlib
import datetime
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from gptcore import machine
from gptcore.config import ConfigError, RunError, TrainConfig

TIMEOUT_S = 600.0  # for the slowest rank to come to a collective: others save, plot or sample
# In what gloo and NCCL say when a rank is gone; whatever else NCCL raises is its own failure.
LOST = ("by peer", "remote worker", "Timed out waiting", "remote process exited", "crash on rank 0")

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them; `World()` is a process on its own.

    Attributes:
        rank: of this process, below `size`; rank 0 prints and writes.
        parallel: the engine, "ddp" or "fsdp"; None without torchrun.
        device: of this process; None if that is for --device alone to say.
    """

    rank: int = 0
    size: int = 1
    parallel: str | None = None
    device: torch.device | None = None

    def check(self, config: TrainConfig) -> None:
        """Raises: ConfigError on settings that do not go with these processes."""
        if self.parallel is None:
            if config.parallel != "auto":
                raise ConfigError(
                    f"--parallel {config.parallel} needs the processes of torchrun: torchrun "
                    f"--nproc_per_node=N train.py --parallel {config.parallel}; or leave it out"
                )
            return
        if self.parallel == "fsdp" and config.compile:
            raise ConfigError("--compile does not go with --parallel fsdp; leave one of them out")
        # torch's fused SGD takes no shards, Muon needs whole matrices.
        if self.parallel == "fsdp" and config.optimizer != "adamw":
            raise ConfigError(
                f"--optimizer {config.optimizer} does not go with --parallel fsdp; take --parallel "
                "ddp, or for a new run adamw"
            )
        if config.sequences // self.size < self.rounds(config):
            enough = max(2, -(-self.size // config.gradient_accumulation_steps))
            raise ConfigError(
                f"{self.size} processes cannot share {config.sequences} sequences a step "
                f"(batch_size {config.batch_size} x gradient_accumulation_steps "
                f"{config.gradient_accumulation_steps}); give --batch_size {enough} or more"
            )

    def rounds(self, config: TrainConfig, most: int | None = None) -> int:
        """Micro-batches of a step, the same for every rank.

        Args:
            most: sequences in one, batch_size if None.
        """
        return -(-config.sequences // (self.size * (most or config.batch_size)))

    def rows(self, config: TrainConfig) -> int:
        """Sequences in the largest micro-batch of any rank; at most batch_size."""
        return -(-config.sequences // (self.size * self.rounds(config)))

    def micro_batches(self, config: TrainConfig, most: int | None = None) -> list[tuple[int, int]]:
        """(first row in the global batch, rows) of each micro-batch of this rank, none empty."""
        S = config.sequences
        rounds = min(self.rounds(config, most), S // self.size)
        start, stop = (S * r // self.size for r in (self.rank, self.rank + 1))
        edges = [start + (stop - start) * i // rounds for i in range(rounds + 1)]
        return [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_rank_0(self, make) -> Any:
        """What make() returns on rank 0, which calls it when all ranks have come here.

        Raises: ConfigError or RunError if make() does, on every rank.
        """
        if self.size == 1:
            return make()
        dist.all_reduce(torch.zeros(1))  # on the CPU; a barrier would need a device
        box = [None]
        if self.rank == 0:
            try:
                box = [make()]
            except (ConfigError, RunError) as error:
                box = [error]
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], (ConfigError, RunError)):
            raise box[0]
        return box[0]

    def check_same(self, what: str, fingerprint: str) -> None:
        """Raises: ConfigError on all ranks unless all come with rank 0's fingerprint."""
        differs = torch.tensor([int(fingerprint != self.from_rank_0(lambda: fingerprint))])
        if number := int(self.sum(differs)):
            raise ConfigError(
                f"{number} of {self.size} processes have another {what} than the first one; give "
                "all of them the same --data"
            )

    def shard(self, batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Every size-th of `batches`, and whether it counts.

        All ranks get equally many, since a sharded model computes only when all of them do: at
        the end some get a batch that is another rank's, which does not count.
        """
        batches = iter(batches)
        while first := list(zip(range(self.size), batches, strict=False)):
            mine = self.rank < len(first)
            yield first[self.rank if mine else 0][1], mine


ALONE = World()


class Vote:
    """Whether any rank wants something: all get the same answer, in the same step.

    The flags are summed beside the step that follows and read after it, so that nobody waits:
    with several processes the answer is about the call before.
    """

    def __init__(self, world: World):
        self.world, self.votes, self.work = world, None, None

    def __call__(self, wanted: bool) -> bool:
        """Give this rank's vote; every rank calls this equally often."""
        if self.world.size == 1:
            return wanted
        decided = False
        if self.work is not None:
            self.work.wait()
            decided = bool(self.votes.item())
        self.votes = torch.tensor([int(wanted)])
        self.work = dist.all_reduce(self.votes, async_op=True)
        return decided


# ---- joining and leaving ---------------------------------------------------------------------


@contextlib.contextmanager
def join(given: dict[str, Any]) -> Iterator[World]:
    """The world this process belongs to, by torchrun's environment variables.

    Inside, ranks above 0 print nothing to stdout.

    Args:
        given: settings; "parallel" and "device" matter.
    Raises: ConfigError if the device cannot be had; RunError if another process is gone.
    """
    parallel = given.get("parallel", "auto")
    size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if "RANK" not in os.environ or (size == 1 and parallel == "auto"):
        yield ALONE
        return
    device = _device_of_rank(given.get("device", "auto"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S)
    )
    engine = "ddp" if parallel == "auto" else parallel
    world = World(dist.get_rank(), size, engine, device)
    try:
        with contextlib.ExitStack() as stack:
            if world.rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            try:
                yield world
            except KeyboardInterrupt:  # agreed upon: all ranks are here
                world.from_rank_0(lambda: None)
                raise
            world.from_rank_0(lambda: None)
    except RuntimeError as error:
        lost = any(words in str(error) for words in LOST)
        if isinstance(error, dist.DistBackendError) and not lost:
            raise RunError(f"the processes cannot talk to each other: {error}") from error
        if not isinstance(error, dist.DistError) and not lost:
            raise
        raise RunError(
            "another process of the job is gone; what was saved is whole: go on with --resume "
            f"({str(error).splitlines()[0]})"
        ) from error
    dist.destroy_process_group()  # not after an error, when it could wait for the dead


def _device_of_rank(name: str) -> torch.device:
    """The GPU of torchrun's LOCAL_RANK, or the CPU."""
    device = machine.pick_device(name)
    if device.type == "cpu":
        return device
    local, GPUs = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if device.index is not None:
        raise ConfigError(
            f"device must be auto, cpu or cuda under torchrun, which numbers the GPUs; got {name!r}"
        )
    if processes > GPUs:  # on all of them alike, so that none waits for the others
        raise ConfigError(
            f"torchrun started {processes} processes for {GPUs} GPUs; give it "
            f"--nproc_per_node={GPUs}, or train.py --device cpu"
        )
    return torch.device("cuda", local)


# ---- engines ---------------------------------------------------------------------------------


class Rounded(nn.Module):
    """`model` computed in `dtype`, while its parameters, and their gradients, stay float32.

    What gptcore.step.HalfCopy computes, with autograd between masters and copies, so that DDP
    sees float32 gradients: they add up over micro-batches and ranks unrounded.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *args, **kwargs):
        """As `model`."""
        weights = {name: p.to(self.dtype) for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, weights, args, kwargs)


def fully_shard(model: nn.Module, dtype: torch.dtype, world: World) -> nn.Module:
    """`model` on the world's device, in pieces (FSDP2): float32 shards, computation in `dtype`.

    The matrices of a block are one group, gathered when its first one is called; whatever else
    there is (embeddings, LayerNorms, head) is used across blocks and stays whole during a step.
    Gradients are reduced in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It warns of writing into what a linear layer returns, which nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    options = {
        "mesh": dist.init_device_mesh(world.device.type, (world.size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
    }
    model.fuses_biases = False
    for block in getattr(model, "blocks", ()):
        linears = [module for module in block.children() if isinstance(module, nn.Linear)]
        fully_shard(linears or block, **options)
    fully_shard(model, **options)

    def reshard(module, args, result):
        if not torch.is_grad_enabled():  # else backward does it
            module.reshard()

    model.register_forward_hook(reshard)
    return model


def engine(module: nn.Module, world: World) -> nn.Module:
    """What runs the forward of a step: DDP around `module`; with FSDP, or alone, `module`."""
    if world.parallel != "ddp":
        return module
    DDP = nn.parallel.DistributedDataParallel
    ids = [world.device.index] if world.device.type == "cuda" else None
    known = inspect.signature(DDP).parameters  # torch 2.13 renamed one
    buffers = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
    return DDP(module, device_ids=ids, gradient_as_bucket_view=True, **{buffers: False})


def synchronised(engine: nn.Module, world: World, last: bool):
    """A context for one micro-batch; gradients go round with the last of a step, once."""
    if world.parallel == "fsdp":
        engine.set_requires_gradient_sync(last)
    if world.parallel == "ddp" and not last:
        return engine.no_sync()
    return contextlib.nullcontext()


# ---- from shards to whole tensors and back ----------------------------------------------------
# torch.distributed.checkpoint is imported where something is sharded; others need not wait for it.


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has cut the parameters of `model`."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def gather(
    tensors: dict[str, torch.Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, torch.Tensor]:
    """`tensors`, of `model` or else of `optimizer`; if sharded, gathered on the CPU of rank 0.

    Every rank calls this; where they are sharded, the others get none.
    """
    if not tensors or not is_sharded(model):  # torch would take a step with an empty optimizer
        return tensors
    from torch.distributed.checkpoint import state_dict as sharded

    options = {"full_state_dict": True, "cpu_offload": True, "flatten_optimizer_state_dict": True}
    options = sharded.StateDictOptions(**options)
    if optimizer is None:
        found, prefix = sharded.get_model_state_dict(model, options=options), ""
    else:
        found = sharded.get_optimizer_state_dict(model, optimizer, options=options)
        prefix = "state."
    return {name: found[prefix + name.replace("/", ".")] for name in tensors if found}


def scatter(
    tensors: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Give each rank's shards of `model`, or else of `optimizer`, their part of `tensors`.

    Args:
        tensors: by parameter (of an optimizer, whose options stay, then by slot); all of
            them on every rank.
    """
    from torch.distributed.checkpoint import state_dict as sharded

    options = sharded.StateDictOptions(full_state_dict=True)
    if optimizer is None:
        sharded.set_model_state_dict(model, tensors, options=options)
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{"params": [names[p] for p in g["params"]]} for g in optimizer.param_groups]
    # Counts are kept as they come: views of a mapped file would hold it for the whole run.
    own = {
        name: {slot: x if x.ndim else x.clone() for slot, x in kept.items()}
        for name, kept in tensors.items()
    }
    state = {"state": own, "param_groups": groups}
    sharded.set_optimizer_state_dict(model, optimizer, state, options=options)

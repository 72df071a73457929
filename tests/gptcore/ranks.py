"""Runs of train.py in several processes, forked from one that has imported everything.

    python ranks.py SCENARIOS.json

SCENARIOS.json is a list of {"folder", "flags", "processes"}, perhaps with "damage", one of DAMAGES,
and "goes_on_from", a run folder. With 0 processes there is one, without torchrun's environment.
Rank r writes into the folder: r.out and r.err (what it printed), r.pt (what it saw: batches, masks,
collectives, the step it left at). half is the run folder as it was at step 2; codes.json holds the
exit codes.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # before forking: three seconds
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from gptcore import checkpoint, distributed, evaluation, log, machine, model, step, trainer
from gptcore.config import ConfigError
from kernels import attention_eager, layer_norm, rng

DEADLINE_S = 300  # generous: the machine may be shared


def main(path: str) -> None:
    """Run the scenarios one after the other."""
    evaluation.EVALUATION_TOKENS = 64  # several batches even of a small text
    machine.matmul_rate = lambda device, dtype: 1e10  # takes longer than these runs
    log.plot_losses = lambda metrics, image: None
    for scenario in json.loads(Path(path).read_text()):
        folder, before = Path(scenario.pop("folder")), scenario.pop("goes_on_from", None)
        folder.mkdir(parents=True)
        if before:
            shutil.copytree(before, folder / "run")
        codes = run(folder, **scenario)
        (folder / "codes.json").write_text(json.dumps(codes))


def run(folder: Path, flags: list[str], processes: int, damage: str = "") -> list[int]:
    """Exit codes of the ranks; below 0 the signal that ended one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(max(1, processes)):
        child = os.fork()
        if child == 0:
            if processes:
                os.environ |= {
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
                }
            os._exit(rank_main(folder, flags, rank, damage))
        children.append(child)
    codes, deadline = {}, time.monotonic() + DEADLINE_S
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[child] for child in children]


def rank_main(folder: Path, flags: list[str], rank: int, damage: str) -> int:
    """One rank, from its flags to its exit code."""
    seen = {"batches": {}, "masks": {}, "gradient_collectives": 0, "left_whole": set()}
    with (
        open(folder / f"{rank}.out", "w") as out,
        open(folder / f"{rank}.err", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            watch(seen)
            keep_half(folder / "half")
            if damage:
                DAMAGES[damage](rank)
            code = train.main([*flags, f"--out_dir={folder / 'run'}"])
        except BaseException:
            traceback.print_exc()
            code = 70
    torch.save(seen, folder / f"{rank}.pt")
    return code


def watch(seen: dict) -> None:
    """Note in `seen` what batches, masks and collectives of gradients there are."""
    draw = step.Step._batch

    def batch(self, key, first, rows):
        idx, targets = draw(self, key, first, rows)
        for row in range(rows):
            window = idx[row].tolist(), targets[row].tolist()
            seen["batches"][self.step, first + row] = window
        return idx, targets

    step.Step._batch = batch
    real_mask = rng.dropout_keep_mask

    def mask(key, site, planes, rows, cols, p, device=None):
        keep = real_mask(key, site, planes, rows, cols, p, device)
        planes, rows = (rng._positions(x, keep.device).tolist() for x in (planes, rows))
        for plane, of_plane in zip(planes, keep.numpy(), strict=True):
            for row, of_row in zip(rows, of_plane, strict=True):
                at, drawn = (int(key[1]), site, plane, row), of_row.tobytes()
                known = seen["masks"].setdefault(at, drawn)
                assert known.startswith(drawn) or drawn.startswith(known)  # the backward's: again
                seen["masks"][at] = max(known, drawn, key=len)
        return keep

    layer_norm.dropout_keep_mask = attention_eager.dropout_keep_mask = mask
    wrap = distributed.engine

    def counted(module, world):
        engine = wrap(module, world)
        if engine is not module:

            def hook(state, bucket):
                seen["gradient_collectives"] += 1
                return allreduce_hook(None, bucket)

            engine.register_comm_hook(None, hook)
        return engine

    step.engine = counted
    name = "reduce_scatter_single"  # of FSDP2 in torch 2.13
    name = name if hasattr(dist, name) else "reduce_scatter_tensor"
    scatter = getattr(dist, name)

    def counted_scatter(*args, **kwargs):
        seen["gradient_collectives"] += 1
        return scatter(*args, **kwargs)

    setattr(dist, name, counted_scatter)
    train_ = trainer._train

    def train_and_note(run):
        if run.world.parallel == "fsdp" and run.config.model == "gpt":
            first, *_, last = run.model.blocks

            def note(module, args):
                for name, weight in first.named_parameters():
                    if not name.startswith("ln") and not hasattr(weight, "placements"):
                        seen["left_whole"].add(name)

            last.mlp_out.register_forward_pre_hook(note)
        try:
            return train_(run)
        finally:
            seen["step"], seen["rolled_back"] = run.step, run.rolled_back
            seen["learning_rate"] = run.config.learning_rate
            state = run.optimizer.state.values()
            seen["updates"] = {int(slots["step"].item()) for slots in state if "step" in slots}
            if run.world.parallel != "fsdp":
                seen["weights"] = [p.detach().clone() for p in run.model.parameters()]

    trainer._train = train_and_note


def keep_half(folder: Path) -> None:
    """Have the run folder of step 2 copied to `folder`."""
    real = trainer.save

    def save(run, *names):
        real(run, *names)
        if run.world.rank == 0 and run.step == 2 and not folder.exists():
            run.writer.wait()
            shutil.copytree(run.folder, folder)

    trainer.save = save


# ---- what can go wrong -----------------------------------------------------------------------


def damaged(function):
    """A damage for every rank."""
    return lambda rank: function()


@damaged
def offset_forgotten():
    """Every rank takes the first rows."""
    real = distributed.World.micro_batches

    def forgetful(self, *arguments):
        found = real(self, *arguments)
        return [(first - found[0][0], rows) for first, rows in found]

    distributed.World.micro_batches = forgetful


@damaged
def dropout_offset_forgotten():
    """Every rank draws the masks of the first rows."""
    draw = step.Step._batch

    def batch(self, key, first, rows):
        key[2] = 0
        return draw(self, key, first, rows)

    step.Step._batch = batch


@damaged
def mean_of_means():
    """Ranks and micro-batches weigh the same, whatever they hold."""
    step.Step._shares = lambda self, batches: [torch.tensor(1 / len(batches))] * len(batches)


@damaged
def never_synchronised():
    """Every rank follows its own gradient."""
    step.synchronised = lambda engine, world, last: engine.no_sync()


@damaged
def synchronised_always():
    """Gradients go round with every micro-batch."""
    step.synchronised = lambda engine, world, last: contextlib.nullcontext()


@damaged
def clipped_locally():
    """The norm of a shard is taken for that of the gradient."""
    real = torch.nn.utils.get_total_norm
    torch.nn.utils.get_total_norm = lambda gradients: real([g.to_local() for g in gradients])


@damaged
def judged_locally():
    """As if every rank looked at its own part of the gradient alone."""
    real = torch.nn.utils.get_total_norm

    def local(gradients):
        gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        return real([g for g in gradients if g.numel()])

    torch.nn.utils.get_total_norm = local
    infinite_once(0)


@damaged
def shard_dropped():
    """What the last of two ranks holds does not come to rank 0."""
    real = trainer.gather

    def gather(tensors, *of):
        found = {name: tensor.clone() for name, tensor in real(tensors, *of).items()}
        for tensor in found.values():
            tensor[(len(tensor) + 1) // 2 :].zero_() if tensor.ndim else None
        return found

    trainer.gather = gather


@damaged
def evaluation_not_summed():
    """Every rank believes its own part of the evaluation."""
    real = evaluation.evaluate
    evaluation.evaluate = lambda model, batches, world: real(
        model, (batch for batch, counts in world.shard(batches) if counts)
    )


def refused_by_rank_0(*names: str):
    """Rank 0 finds these checkpoints damaged; no other rank may look at them."""

    def damage(rank):
        real = checkpoint._verify

        def verify(folder):
            if folder.name in names:
                raise ConfigError(f"{folder.name}: damaged") if rank == 0 else AssertionError
            return real(folder)

        checkpoint._verify = verify

    return damage


def another_text(rank):
    """Rank 1 comes with a text of its own, of the same characters."""
    real = trainer.load_data

    def load_data(name):
        text = real(name)
        return dataclasses.replace(text, content=text.content[::-1])

    if rank == 1:
        trainer.load_data = load_data


def infinite_once(number: int) -> None:
    """On the last rank, one row of both embeddings gets an infinite gradient in update `number`.

    The loss stays what it is, and so do the other gradients: all in the shard of a rank of two,
    as both rows are in the same half of their table.
    """
    if int(os.environ.get("RANK", 0)) + 1 < int(os.environ.get("WORLD_SIZE", 1)):
        return
    real_step, real_embed, due = trainer.training_step, model.embed, []

    def training_step(run):
        if run.step == number and not run.rolled_back:
            due.append(True)
        return real_step(run)

    def embed(idx, weight, positions, **options):
        x = real_embed(idx, weight, positions, **options)
        if due and x.requires_grad:
            due.clear()
            upper = 2 * idx[0] >= len(weight), 2 * torch.arange(idx.shape[1]) >= len(positions)
            row = int((upper[0] == upper[1]).nonzero()[0])
            infinite = torch.zeros(x.shape)
            infinite[0, row, 0] = math.inf
            x.register_hook(lambda gradient: gradient + infinite)
        return x

    trainer.training_step, model.embed = training_step, embed


def at_step(number: int, act, only: int):
    """`act` on rank `only` before update `number`."""

    def damage(rank):
        real = trainer.training_step

        def training_step(run):
            if rank == only and run.step == number:
                act()
            return real(run)

        trainer.training_step = training_step

    return damage


def fail():
    """A bug on one rank."""
    raise ZeroDivisionError("a bug")


DAMAGES = {
    "offset forgotten": offset_forgotten,
    "dropout offset forgotten": dropout_offset_forgotten,
    "mean of means": mean_of_means,
    "never synchronised": never_synchronised,
    "always synchronised": synchronised_always,
    "clipped locally": clipped_locally,
    "judged locally": judged_locally,
    "infinite gradient": lambda rank: infinite_once(3),
    "infinite gradient at first": lambda rank: infinite_once(0),
    "shard dropped": shard_dropped,
    "evaluation not summed": evaluation_not_summed,
    "last refused by rank 0": refused_by_rank_0("last"),
    "all refused by rank 0": refused_by_rank_0("last", "best"),
    "SIGTERM to rank 1": at_step(2, functools.partial(signal.raise_signal, signal.SIGTERM), 1),
    "SIGKILL to rank 1": at_step(2, functools.partial(signal.raise_signal, signal.SIGKILL), 1),
    "exception on rank 1": at_step(2, fail, 1),
    "another text on rank 1": another_text,
}

if __name__ == "__main__":
    main(sys.argv[1])

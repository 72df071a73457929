"""One training step, data to optimizer: how many tokens a second, against whom?

Question
    How long is a step of gptcore as `train.py` runs it, beside the models people would use?
Method
    Every contestant trains its own copy of a model of the same size, interleaved step by step.
    gptcore runs its trainer's step, batches included; peers get one batch for free. Before that
    the logits of each (dropout off) are held against the naive model in float64, peers in their
    own wiring. nanoGPT's and transformers' models are wired differently (tied head, GELU) and
    are compared for their size; on a GPU nanoGPT's also compiled, as its train.py does by itself.
    On a CPU "naive" and "nanogpt" train in plain Python processes of their own, so that what
    gptcore asks of this one's allocator cannot help them, and in float32, as they are written;
    with --dtype bfloat16 "nanogpt-autocast" shows what that would give nanoGPT.
Formula
    FLOPs: 6 a matrix weight and token, plus three times the causal half of attention's products.
    bytes: AdamW's traffic alone, 28 a parameter; activations depend on who computes.
"""

import dataclasses
import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bench import models, peers
from bench.harness import OURS, Case, Check, Contestant, Options, Work, check_tensors
from bench.timing import SelfTimed
from bench.worker import worker_of
from gptcore.config import GPTConfig, TrainConfig
from gptcore.flags import Settings
from gptcore.trainer import flops_per_step
from kernels.rng import make_key

CORPUS_VOCABULARY = 65
ADAMW_BYTES = 28  # a parameter: read it, its gradient and both moments, write all but the gradient
PEERS = ("naive", "eager", *peers.COMPILE_MODES, "transformers", *peers.NANOGPT)


@dataclasses.dataclass(frozen=True)
class Size:
    """A preset with some fields changed; `vocab_size` pads the character vocabulary."""

    name: str
    preset: str
    given: dict[str, Any]
    vocab_size: int = CORPUS_VOCABULARY

    def settings(self, options: Options, out_dir: str | None) -> Settings:
        """What train.py would be told."""
        dtype = str(options.dtype).removeprefix("torch.")
        return Settings(
            self.preset,
            {
                **self.given,
                "tokenizer": "char",
                "vocab_multiple": self.vocab_size,
                "data": options.data,
                "device": str(options.device),
                "dtype": dtype,
                "out_dir": out_dir,
            },
        )

    def configs(self, options: Options) -> tuple[TrainConfig, GPTConfig]:
        """The configurations, without reading any data."""
        train, model = self.settings(options, None).merged(options.device.type)
        return train, GPTConfig(**model | {"vocab_size": self.vocab_size})


class _Bench:
    """What the contestants of one case share: the trainer's run, its model, one batch."""

    def __init__(self, size: Size, options: Options):
        from gptcore import trainer

        self.options = options
        folder = tempfile.mkdtemp(prefix="bench-step-")
        weakref.finalize(self, shutil.rmtree, folder)
        self.run = trainer.prepare(size.settings(options, folder))
        self.train, self.source = self.run.config, self.run.model
        key = make_key(self.train.seed, 0, 0, options.device)
        block_size = self.source.config.block_size
        batch = self.run.corpus.batch(key, self.train.batch_size, block_size)
        self.batch = tuple(tensor.long().contiguous() for tensor in batch)

    def ours(self) -> Callable[[], Any]:
        from gptcore.trainer import training_step

        return functools.partial(training_step, self.run)

    def wired(self, wiring: dict[str, Any]) -> models.GPT:
        """A gptcore model of this size, wired as a peer is."""
        from gptcore.model import GPT

        torch.manual_seed(self.train.seed)
        with torch.device(self.options.device):
            return GPT(self.source.config.replace(**wiring, init="gpt2"))

    def check(self, model: nn.Module, source: models.GPT, ours: bool = False) -> Check:
        """Logits of `model` against the naive model with the weights of `source`."""
        idx, dtype = self.batch[0][:4], self.options.dtype
        plain, exact = models.reference_logits(source, idx, dtype)
        with models.autocast(source, dtype):
            actual = models.logits_of(model, idx)
        return check_tensors({"logits": actual}, {"logits": plain}, {"logits": exact}, ours=ours)

    def adamw(self, model: nn.Module, **extra) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            model.parameters(),
            lr=self.train.learning_rate,
            betas=(self.train.beta1, self.train.beta2),
            weight_decay=self.train.weight_decay,
            **extra,
        )

    def step(self, model, optimizer, forward=None) -> Callable[[], None]:
        clip = self.train.grad_clip
        return models.plain_step(
            model, optimizer, self.batch, self.options.dtype, grad_clip=clip, forward=forward
        )


def _open(size: Size, options: Options, only: tuple[str, ...] | None) -> Iterator[Contestant]:
    bench = _Bench(size, options)
    source, update = bench.source, bench.run.update
    check = functools.partial(bench.check, update.compute, update.compute, ours=True)
    yield Contestant(OURS, bench.ours, check, update.warm_ups)

    def peer(name, build, step):
        """`build()` -> (model, source of its weights), once, for the check and for the step."""
        built = functools.cache(build)
        return Contestant(name, start=lambda: step(built()[0]), check=lambda: bench.check(*built()))

    def fused(model):
        return bench.step(model, bench.adamw(model, fused=True))

    def compiled(mode, model):
        peers.require_compiler(options, "compile")
        forward = torch.compile(lambda i, t: models.loss_of(model, i, t), dynamic=False, mode=mode)
        return bench.step(model, bench.adamw(model, fused=True), forward)

    def nanogpt():
        wired = bench.wired(models.NANOGPT_WIRING)
        return models.to_nanogpt(wired, options), wired

    def compiled_nanogpt(model):
        peers.require_compiler(options, "compile")
        return models.nanogpt_step(model, bench.train, bench.batch, options, torch.compile(model))

    def transformers():
        wired = bench.wired(models.GPT2_WIRING)
        return models.to_transformers(wired, options).train(), wired

    def stepping(name, wiring, dtype=torch.float32):
        """Times the step of a model: on a CPU of its twin, in a process of its own, in `dtype`."""

        def start(model):
            if options.device.type != "cpu":
                return models.STEPS[name](model, bench.train, bench.batch, options)
            worker, twin = worker_of(f"{name} {dtype}"), dataclasses.replace(options, dtype=dtype)
            worker.begin(name, source.config.replace(**wiring), bench.train, twin)
            return SelfTimed(worker.step_ms)

        return start

    contestants = [
        peer("naive", lambda: (models.to_naive(source), source), stepping("naive", {})),
        peer("eager", lambda: (models.batched(source), source), fused),
        *(
            peer(n, lambda: (models.batched(source), source), functools.partial(compiled, m))
            for n, m in peers.COMPILE_MODES.items()
        ),
        peer("transformers", transformers, fused),
        peer("nanogpt", nanogpt, stepping("nanogpt", models.NANOGPT_WIRING)),
    ]
    if options.device.type == "cuda":  # where its train.py compiles unless told not to
        contestants.append(peer("nanogpt-compile", nanogpt, compiled_nanogpt))
    elif options.dtype != torch.float32:
        autocast = stepping("nanogpt", models.NANOGPT_WIRING, options.dtype)
        contestants.append(peer("nanogpt-autocast", nanogpt, autocast))
    for contestant in contestants:
        if options.wants(contestant.name) and (only is None or contestant.name in only):
            yield contestant


def sizes(options: Options) -> list[tuple[Size, dict[str, Any]]]:
    """Sizes with what Case is told about each, the most telling first."""
    cuda = options.device.type == "cuda"
    gpt2 = {"gradient_accumulation_steps": 1}
    if cuda:
        return [
            (Size("notebook", "notebook", {}), {"quick": True}),
            (Size("notebook p=0", "notebook", {"dropout": 0.0}), {}),
            (Size("gpt2-124m B12", "gpt2-124m", gpt2, 50304), {"quick": True}),
            (Size("gpt2-124m B32", "gpt2-124m", gpt2 | {"batch_size": 32}, 50304), {"full": True}),
            (Size("nanogpt-cpu", "nanogpt-cpu", {}), {}),
            (Size("baby-gpu", "baby-gpu", {}), {}),
        ]
    return [
        (Size("nanogpt-cpu", "nanogpt-cpu", {}), {"quick": True}),
        (Size("baby-cpu", "baby-cpu", {}), {"quick": True}),
        (Size("notebook B8", "notebook", {"batch_size": 8}), {}),
        (Size("notebook", "notebook", {}), {"full": True}),
        (Size("notebook p=0", "notebook", {"dropout": 0.0}), {"full": True}),
    ]


def step_case(size: Size, options: Options, *, only: tuple[str, ...] | None = None, **rest) -> Case:
    """The case of one size; `only` these peers may compete."""
    train, config = size.configs(options)
    B, T, model = train.sequences, config.block_size, models.meta(config)
    work = Work(flops_per_step(model, B), ADAMW_BYTES * model.num_parameters(), B * T)
    shape = {
        "B": B,
        "T": T,
        "C": config.n_embd,
        "L": config.n_layer,
        "H": config.n_head,
        "V": config.vocab_size,
        "p": config.dropout,
    }
    return Case(
        name=f"{size.name} B{B}-T{T}-L{config.n_layer}-H{config.n_head}-C{config.n_embd}",
        shape=shape | rest.pop("shape", {}),
        dtype=str(options.dtype).removeprefix("torch."),
        work=work,
        unit="tokens/s",
        open=functools.partial(_open, size, options, only),
        contestants=(OURS, *(only or PEERS)),
        phase="step",
        flush=False,
        config=dataclasses.asdict(config),
        **rest,
    )


def cases(options: Options) -> list[Case]:
    """The presets."""
    return [step_case(size, options, **rest) for size, rest in sizes(options)]

"""One training step, data to optimizer: how many tokens a second, against whom?

Question
    How long is a step of gptcore as `train.py` runs it, beside the models people would use?
Method
    Every contestant trains its own copy of a model of the same size, interleaved step by step.
    gptcore runs its trainer's step, batches included; peers get one batch for free. Characters are
    drawn by Zipf's law, so that no text is needed and there is something to learn: of noise, whose
    gradients cancel, little but rounding would be compared. A larger vocabulary is drawn evenly.
    Before that an update of each, dropout off, is held against the naive model in float64, peers in
    their own wiring: the clipped gradients that the optimizer is given, which must then change
    every weight; of gptcore it is an update after the warm-ups, replayed where the timed ones are.
    For that, biases keep a ReLU's units on or off: near 0 rounding would decide, and one unit of a
    million that is on here and off there changes a float32 gradient by more than all its rounding.
    nanoGPT's and transformers' models are wired differently (tied head, GELU) and are compared for
    their size; on a GPU nanoGPT's also compiled, as its train.py does by itself.
    "naive" computes in float32, as it is written, and so does "nanogpt" on a CPU, where with
    --dtype bfloat16 "nanogpt-autocast" shows what that would give it. There both train in plain
    Python processes of their own, so that what gptcore asks of this one's allocator cannot help
    them.
Formula
    FLOPs: 6 a matrix weight and token, plus three times the causal half of attention's products.
    bytes: AdamW's traffic alone, 28 a parameter; activations depend on who computes.
"""

import copy
import dataclasses
import functools
import shutil
import string
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import models, peers
from bench.harness import OURS, Case, Check, Contestant, Options, Work, check_tensors
from bench.timing import SelfTimed
from bench.worker import worker_of
from gptcore.config import GPTConfig, TrainConfig
from gptcore.flags import Settings
from gptcore.roofline import model_flops
from kernels.checks import Measured, draws_of
from kernels.rng import make_key

CHARACTERS = (string.ascii_letters + string.digits + " .\n").encode()  # as many as the notebook's
CORPUS = 1 << 20  # tokens
JUDGED_ROWS = 8  # of the batch, on a CPU: float64 takes it minutes
ADAMW_BYTES = 28  # a parameter: read it, its gradient and both moments, write all but the gradient
PEERS = ("naive", "eager", *peers.COMPILE_MODES, "transformers", *peers.NANOGPT)


@dataclasses.dataclass(frozen=True)
class Size:
    """A preset with some fields changed; `vocab_size` is that of the characters, or more."""

    name: str
    preset: str
    given: dict[str, Any]
    vocab_size: int = len(CHARACTERS)

    def settings(self, options: Options, folder: Path | None) -> Settings:
        """What train.py would be told; text and run are in `folder`."""
        dtype = str(options.dtype).removeprefix("torch.")
        return Settings(
            self.preset,
            {
                **self.given,
                "tokenizer": "char",
                "vocab_multiple": self.vocab_size,
                **(
                    {"data": str(folder / "text"), "out_dir": str(folder / "run")} if folder else {}
                ),
                "device": str(options.device),
                "dtype": dtype,
            },
        )

    def configs(self, options: Options) -> tuple[TrainConfig, GPTConfig]:
        """The configurations, without reading any data."""
        train, model = self.settings(options, None).merged(options.device.type)
        return train, GPTConfig(**model | {"vocab_size": self.vocab_size})


def decided(model):
    """`model`, a GPT, with biases that have every unit of its ReLUs on or off, by turns, for good.

    A pre-activation has the spread of its row's norm, since LayerNorm's outputs have that of 1.
    """
    for block in model.blocks:
        if model.config.activation == "relu" and block.mlp_in.bias is not None:
            with torch.no_grad():
                block.mlp_in.bias.copy_(8 * block.mlp_in.weight.norm(dim=1))
                block.mlp_in.bias[1::2] *= -1
    return model


class _Bench:
    """What the contestants of one case share: the trainer's run, its model, one batch."""

    def __init__(self, size: Size, options: Options):
        from gptcore import trainer

        self.options = options
        folder = Path(tempfile.mkdtemp(prefix="bench-step-"))
        weakref.finalize(self, shutil.rmtree, folder)
        often = 1 / np.arange(1, len(CHARACTERS) + 1)
        places = np.random.default_rng(0).choice(len(often), CORPUS, p=often / often.sum())
        text = np.frombuffer(CHARACTERS, dtype=np.uint8)[places]
        (folder / "text").write_bytes(text.tobytes())
        self.run = trainer.prepare(size.settings(options, folder))
        self.train, self.source = self.run.config, self.run.model
        key, config = make_key(self.train.seed, 0, 0, options.device), self.source.config
        if config.vocab_size > len(CHARACTERS):  # they would meet few rows of the tables
            text = self.run.corpus.train
            ids = torch.randint(config.vocab_size, text.shape, device=text.device)
            object.__setattr__(self.run.corpus, "train", ids.to(torch.uint16))  # Step holds it too
        block_size = config.block_size
        batch = self.run.corpus.batch(key, self.train.batch_size, block_size)
        self.batch = tuple(tensor.long().contiguous() for tensor in batch)
        rows = JUDGED_ROWS if options.device.type == "cpu" else None
        self.judged = tuple(tensor[:rows] for tensor in self.batch)

    def ours(self) -> Callable[[], Any]:
        from gptcore.trainer import training_step

        return functools.partial(training_step, self.run)

    def wired(self, seed: int | None = None, **wiring) -> models.GPT:
        """A gptcore model of this size, wired as a peer is."""
        from gptcore.model import GPT

        torch.manual_seed(self.train.seed if seed is None else seed)
        with torch.device(self.options.device):
            return GPT(self.source.config.replace(**wiring, init="gpt2"))

    def check_ours(self) -> Check:
        """An update after the warm-ups, of the one batch."""
        from gptcore.optim import make_optimizer
        from gptcore.step import Step

        timed = self.run.update
        sizes = {"batch_size": len(self.judged[0]), "gradient_accumulation_steps": 1}
        config = self.train.replace(**sizes)

        def step(model, batch):
            where = {"device": self.options.device, "dtype": timed.dtype}
            optimizer = make_optimizer(model, config, timed.dtype)
            update = Step(model, optimizer, None, config, **where)
            update.fetched = {
                first: tuple(tensor[first : first + rows] for tensor in batch)
                for first, rows in update.micro_batches
            }
            return update

        return self.check(lambda gpt: gpt, step, {}, timed.dtype, config.grad_clip, timed.warm_ups)

    def check(self, build, step, wiring, dtype, clip, warm_ups: int | None = None) -> Check:
        """The gradients that the optimizer is given, dropout off, against the naive model's.

        Args:
            build: source -> model with its weights. step: model, batch -> what updates it.
            warm_ups: of ours, whose model is its source, before the update that is judged.
        """
        ours = warm_ups is not None

        def measured(seed: int) -> Measured:
            source = decided(self.wired(**wiring, dropout=0.0, seed=seed))
            model = build(source)
            update = step(model, self.judged)
            with models.handed_over(model) as found:
                for _ in range(warm_ups or 0):
                    update()
                source = copy.deepcopy(source)
                update()
            for name, weight in model.named_parameters():
                if name not in found or torch.equal(found[name][1], weight):
                    raise RuntimeError(f"step: an update must change every weight; got {name}")
            references = models.reference_gradients(source, self.judged, dtype, ours=ours)
            plain, exact = (
                models.clipped({n: w.detach() for n, w in build(gpt).named_parameters()}, clip)
                for gpt in references
            )
            exact = {name: gradient.double() for name, gradient in exact.items()}
            return {name: gradient for name, (gradient, _) in found.items()}, plain, exact

        first = measured(self.train.seed)
        others = (measured(self.train.seed + i) for i in range(1, draws_of(first[0])))
        return check_tensors(*first, ours=ours, others=others)

    def step(self, model, batch, forward=None) -> Callable[[], None]:
        """`plain_step` under a fused AdamW."""
        train, dtype = self.train, self.options.dtype
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
            fused=True,
        )
        clip = train.grad_clip
        return models.plain_step(model, optimizer, batch, dtype, grad_clip=clip, forward=forward)


def _open(size: Size, options: Options, only: tuple[str, ...] | None) -> Iterator[Contestant]:
    bench = _Bench(size, options)
    yield Contestant(OURS, bench.ours, bench.check_ours, bench.run.update.warm_ups)
    on_cpu, clip = options.device.type == "cpu", bench.train.grad_clip

    def peer(name, build, step, wiring, *, dtype=options.dtype, clip=clip, start=None):
        """`build(source)` -> model; `step(model, batch)` -> its update; `start(model)`: timed."""
        check = functools.partial(bench.check, build, step, wiring, dtype, clip)

        def here():
            return step(build(bench.wired(**wiring)), bench.batch)

        other = None if dtype == options.dtype else dtype
        if start is None:
            return Contestant(name, here, check, dtype=other)

        def there():
            return start(build(bench.wired(**wiring)))

        return Contestant(name, there, check, here=here, dtype=other)

    def compiled(mode, model, batch):
        peers.require_compiler(options, "compile", mode)
        forward = torch.compile(lambda i, t: models.loss_of(model, i, t), dynamic=False, mode=mode)
        return bench.step(model, batch, forward)

    def nanogpt(source):
        return models.to_nanogpt(source, options)

    def compiled_nanogpt(model, batch):
        peers.require_compiler(options, "compile")
        return models.nanogpt_step(model, bench.train, batch, options, torch.compile(model))

    def transformers(source):
        return models.to_transformers(source, options).train()

    def alone(name, build, wiring, *, of, dtype, clip=clip):
        """Times the step `of`: on a CPU of its twin, in a process of its own."""
        twin = dataclasses.replace(options, dtype=dtype)

        def step(model, batch):
            return models.STEPS[of](model, bench.train, batch, twin)

        def start(model):
            worker = worker_of(f"{of} {dtype}")
            worker.begin(of, bench.source.config.replace(**wiring), bench.train, twin)
            return SelfTimed(worker.step_ms)

        start = start if on_cpu else None
        return peer(name, build, step, wiring, dtype=dtype, clip=clip, start=start)

    # nanoGPT's GELU is by the error function.
    erf = models.NANOGPT_WIRING | {"activation": "gelu_erf"}
    written = torch.float32 if on_cpu else options.dtype
    contestants = [
        alone("naive", models.to_naive, {}, of="naive", dtype=torch.float32, clip=0.0),
        peer("eager", models.batched, bench.step, {}),
        *(
            peer(name, models.batched, functools.partial(compiled, mode), {})
            for name, mode in peers.COMPILE_MODES.items()
        ),
        peer("transformers", transformers, bench.step, models.GPT2_WIRING),
        alone("nanogpt", nanogpt, erf, of="nanogpt", dtype=written),
    ]
    if not on_cpu:  # where its train.py compiles unless told not to
        contestants.append(peer("nanogpt-compile", nanogpt, compiled_nanogpt, erf))
    elif options.dtype != torch.float32:
        autocast = alone("nanogpt-autocast", nanogpt, erf, of="nanogpt", dtype=options.dtype)
        contestants.append(autocast)
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
    flops = sum(model_flops(model, B).values())
    work = Work(flops, ADAMW_BYTES * model.num_parameters(), B * T)
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

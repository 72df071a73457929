"""Training, top to bottom: prepare a run, then step, evaluate and save until it is done.

A run folder holds config.json, metrics.jsonl, loss.png, best/ and last/ (gptcore.checkpoint).
`step` counts finished updates; everything random in update `step` is a function of (seed, step),
so that weights, optimizer state and step are all that resuming needs.
"""

import contextlib
import dataclasses
import math
import os
import platform
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from gptcore import distributed, finetune, machine, memory, profiling
from gptcore.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Content,
    Progress,
    named_weights,
    open_checkpoint,
    optimizer_tensors,
    set_aside,
)
from gptcore.config import ConfigError, GPTConfig, RunError, TrainConfig, to_json
from gptcore.data import NAMES, Corpus, Prepared, load_data
from gptcore.distributed import ALONE, Vote, World, gather
from gptcore.evaluation import Stopped, evaluate_exactly, evaluate_splits
from gptcore.files import CAN_LOCK, disk_errors, lock, replace_text
from gptcore.flags import Settings
from gptcore.generation import generate
from gptcore.log import Log, announce, looks_after, resume_command, trim_metrics
from gptcore.model import build_model
from gptcore.optim import make_optimizer
from gptcore.recovery import look, recover
from gptcore.resume import begun_settings, checkpoint_to_resume, resumed_settings
from gptcore.roofline import model_flops
from gptcore.step import Step, pick_dtype
from gptcore.tasks import Arithmetic, task_of
from gptcore.trackers import check_tracker


@dataclass
class Run:
    """Everything a run holds; `elapsed_s` and the best loss move as it goes on, as `step` does."""

    folder: Path
    config: TrainConfig
    corpus: Corpus | Arithmetic
    model: nn.Module
    optimizer: torch.optim.Optimizer
    update: Step
    device: torch.device
    world: World
    dtype_reason: str
    config_json: str
    elapsed_s: float = 0.0
    best_val_loss: float = math.inf
    best_step: int = 0
    evaluated_step: int = -1
    saved: tuple[int, int] | None = None  # step and evaluated_step in `last`
    rolled_back: list[int] = field(default_factory=list)  # the steps it went back to
    stop: threading.Event = field(default_factory=threading.Event)  # save and leave, said a signal
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)
    unlock: Callable[[], None] = lambda: None  # lets others train in `folder`

    def __post_init__(self):
        self.vote = Vote(self.world)

    def asked_to_stop(self) -> bool:
        """Whether to save and leave; all processes call this equally often and agree."""
        return self.vote(self.stop.is_set())

    @property
    def step(self) -> int:
        """Updates done."""
        return self.update.step


# ---- preparing -------------------------------------------------------------------------------


def prepare(settings: Settings, world: World = ALONE) -> Run:
    """Everything up to the first step; the run folder is made last, when nothing can fail.

    Args:
        world: the processes that call this together.
    Raises: ConfigError on anything wrong with the settings, the data or the folder.
    """
    device = world.device or machine.pick_device(settings.given.get("device", "auto"))
    config, model_fields = settings.merged(device.type)
    checkpoint, damaged = checkpoint_to_resume(config, world)
    if checkpoint is None and config.resume:
        settings = world.from_rank_0(lambda: begun_settings(settings, device.type))
        device = world.device or machine.pick_device(settings.given.get("device", "auto"))
        config, model_fields = settings.merged(device.type)
    preset = settings.resolved_preset(device.type)
    if checkpoint is not None:
        config, model_fields = resumed_settings(checkpoint, settings)
        preset = checkpoint.config.get("preset", preset)
        device = world.device or machine.pick_device(config.device)
    if config.device == "cpu" != device.type:  # torchrun's was taken before the run was read
        raise ConfigError(
            f"--resume: {config.out_dir} trains on the CPU; give --device cpu again, or --device "
            "cuda to go on with GPUs"
        )
    if device.type == "cpu":
        machine.keep_freed_memory()
        machine.limit_threads()
    origin = None
    if config.init_from is not None and checkpoint is None:
        origin = open_checkpoint(config.init_from)
        config, model_fields = finetune.adopt(origin, config, settings.given)
    if checkpoint is not None and config.max_iters < checkpoint.progress.step:
        raise ConfigError(
            f"--resume: {checkpoint.folder} is at step {checkpoint.progress.step}; give as many "
            f"--max_iters or more; got {config.max_iters}"
        )
    world.check(config)
    machine.check_backend(model_fields.get("backend", "auto"), device)
    world.from_rank_0(lambda: check_tracker(config.log))
    config, model_config, corpus = _load(settings, config, model_fields, checkpoint, device, world)
    update, dtype_reason = _build(config, model_config, corpus, checkpoint, origin, device, world)
    if config.profile:
        profiling.first_step(config, update.step, world)
    folder = world.from_rank_0(lambda: _make_folder(config, preset))
    dtype = str(update.dtype).removeprefix("torch.")  # timed once: resumed, it is the same
    config = config.replace(out_dir=str(folder), resume=False, parallel="auto", dtype=dtype)
    progress = Progress() if checkpoint is None else checkpoint.progress
    run = Run(
        folder=Path(config.out_dir),
        config=config,
        corpus=corpus,
        model=update.model,
        optimizer=update.optimizer,
        update=update,
        device=device,
        world=world,
        dtype_reason=dtype_reason,
        config_json=_config_json(config, model_config, preset, corpus, world),
        elapsed_s=progress.elapsed_s,
        best_val_loss=progress.best_val_loss,
        best_step=progress.best_step,
        evaluated_step=progress.evaluated_step,
    )
    if checkpoint is not None and checkpoint.folder.name == "last":
        run.saved = run.step, run.evaluated_step
    if world.rank:
        return run
    with (
        disk_errors(run.folder, lambda: resume_command(run)),
        contextlib.ExitStack() as on_error,
    ):
        on_error.callback(lambda: run.unlock())
        _lock(run)
        if damaged:
            told = [f"{why}, set aside as {set_aside(path)}" for path, why in damaged.items()]
            where = f"going on from {checkpoint.folder}, step {run.step}"
            print(f"WARNING: {'; '.join(told)}; {where}")
        replace_text(run.folder / "config.json", run.config_json)
        _lock(run)  # the file is another one now
        step = -1 if checkpoint is None else run.step
        trim_metrics(run.folder / "metrics.jsonl", step, run.evaluated_step)
        on_error.pop_all()
    return run


def _lock(run: Run) -> None:
    """Lock config.json of the run folder against other processes and threads, to `run.unlock()`.

    Raises: ConfigError if another one trains there.
    """
    path = run.folder / "config.json"
    if not CAN_LOCK or not path.is_file():
        return
    run.unlock()
    file = os.open(path, os.O_RDWR)
    run.unlock = weakref.finalize(run, os.close, file)
    if not lock(file):
        raise ConfigError(
            f"another process or thread trains in {run.folder}; wait for its end, or give another "
            "--out_dir"
        )


def _load(
    settings: Settings,
    config: TrainConfig,
    model_fields: dict[str, Any],
    checkpoint: Checkpoint | None,
    device: torch.device,
    world: World,
) -> tuple[TrainConfig, GPTConfig, Corpus | Arithmetic]:
    """The data, and the settings with what follows from it; nothing large is made before it fits.

    Raises: ConfigError if the data is bad, or not the checkpoint's.
    """
    task = task_of(config, device)
    text = task.text if task else load_data(config.data)
    if world.size > 1:
        world.check_same("text", text.sha256)
    _check_applicable(settings.given, config.data, task, text)
    if isinstance(text, Prepared) and "tokenizer" not in settings.given:
        config = config.replace(tokenizer=text.vocabulary.kind)
    if not task and config.data not in NAMES:
        config = config.replace(data=str(Path(config.data).resolve()))
    if checkpoint is None:
        tokenizer = task.tokenizer if task else text.tokenizer(config.tokenizer)
        vocab_size = -(-tokenizer.vocab_size // config.vocab_multiple) * config.vocab_multiple
        model_fields = {**model_fields, "vocab_size": vocab_size}
        if task and "block_size" not in settings.given:
            model_fields["block_size"] = task.width - 1
    else:
        tokenizer = checkpoint.tokenizer
        if "imported" in checkpoint.config:
            raise ConfigError(
                f"--resume: {checkpoint.folder} was imported, without an optimizer or its text's "
                f"fingerprint; start from it: --init_from {checkpoint.folder} --out_dir NEW"
            )
        if text.sha256 != checkpoint.config.get("data", {}).get("sha256"):
            raise ConfigError(
                f"--resume: {text.source} is not the text this run was trained on; "
                "give the same --data, or start a new run"
            )
    model_config = GPTConfig(**model_fields)
    if world.parallel != "fsdp":  # whose processes share the weights
        memory.check(config, model_config, device, world)
        tokens = 1 + config.sample_tokens
        memory.check_sampling(model_config, device, 1, tokens, "--sample_tokens")
    corpus = task or Corpus.build(
        text,
        tokenizer,
        val_fraction=config.val_fraction,
        device=device,
        eval_tokens=config.eval_tokens,
    )
    corpus.check_block(model_config.block_size)
    return config, model_config, corpus


def _check_applicable(given: dict[str, Any], data: str, task: Arithmetic | None, text) -> None:
    """Raises: ConfigError if a setting that was given says nothing about this data."""
    steps = task is not None and set(task.operations) & set("*/")
    held_out = task is None and getattr(text, "val", None) is None
    for name, applies, needed in (
        ("digits", task is not None, "--data add or arithmetic"),
        ("operations", data == "arithmetic", "--data arithmetic"),
        ("worked_steps", steps, "--data arithmetic with products or quotients"),
        ("val_fraction", held_out, "a text that is not split already"),
    ):
        if name in given and not applies:
            raise ConfigError(f"--{name} needs {needed}; got --data {data}; leave --{name} out")


def _build(
    config: TrainConfig,
    model_config: GPTConfig,
    corpus: Corpus | Arithmetic,
    checkpoint: Checkpoint | None,
    origin: Checkpoint | None,
    device: torch.device,
    world: World,
) -> tuple[Step, str]:
    """Model and optimizer in a Step: new, fine-tuned from `origin`, or the checkpoint's.

    Returns: the Step, and why it computes in its dtype.
    Raises: ConfigError if weights do not fit; RunError if the memory does not hold it all.
    """
    torch.manual_seed(config.seed)
    with memory.advised(config, model_config, device, torch.float32, "the same command", world):
        model = build_model(config.model, model_config)
        if world.parallel != "fsdp":
            model.to(device)
        if origin is not None:
            words = finetune.initialise(model, corpus.tokenizer, origin)
            print(f"from    {origin.folder}: {words}")
        finetune.freeze(model, config.freeze)
        if checkpoint is not None:
            checkpoint.load_weights(model)
        dtype, dtype_reason = world.from_rank_0(
            lambda: pick_dtype(model, corpus, config, device, world)
        )
        if checkpoint is not None and checkpoint.train.dtype == config.dtype != "auto":
            dtype_reason = "as the run began"
        if world.parallel == "fsdp":
            distributed.fully_shard(model, dtype, world)
        optimizer = make_optimizer(model, config, dtype)
        if checkpoint is not None:
            checkpoint.load_optimizer(model, optimizer)
        update = Step(
            model,
            optimizer,
            corpus,
            config,
            device=device,
            dtype=dtype,
            step=0 if checkpoint is None else checkpoint.progress.step,
            world=world,
        )
    return update, dtype_reason


def _config_json(
    config: TrainConfig,
    model_config: GPTConfig,
    preset: str,
    corpus: Corpus | Arithmetic,
    world: World,
) -> str:
    """config.json: the settings, and what they were given to."""
    text = corpus.text
    return to_json(
        config,
        model_config,
        preset=preset,
        data={"source": text.source, "note": text.note, "sha256": text.sha256, **corpus.sizes},
        versions={"python": platform.python_version(), "torch": str(torch.__version__)},
        world={"processes": world.size, "parallel": world.parallel},
    )


def _make_folder(config: TrainConfig, preset: str) -> Path:
    """Make the run folder: --out_dir, or the first free runs/PRESET-N."""
    try:
        if config.out_dir is not None:
            folder = Path(config.out_dir)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        Path("runs").mkdir(exist_ok=True)
        for number in range(1, 1_000_000):
            folder = Path("runs") / f"{preset}-{number}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise ConfigError(
            f"cannot make the run folder: {error.strerror}: {error.filename}; give --out_dir"
        ) from error
    raise ConfigError("runs/ is full; give --out_dir")


# ---- one step --------------------------------------------------------------------------------


def training_step(run: Run) -> torch.Tensor:
    """One update; returns the mean loss before it, on the device."""
    return run.update()


# ---- the loop --------------------------------------------------------------------------------


def train(settings: Settings) -> Path:
    """Train as `settings` say; returns the run folder.

    Raises: ConfigError on bad input, before anything is written; RunError if the loss or a
        gradient is not finite, as --on_nonfinite says, or the disk refuses; KeyboardInterrupt
        after saving, when interrupted.
    """
    with torch_as_it_comes(), compiler_errors(), distributed.join(settings.given) as world:
        run = prepare(settings, world)
        try:
            return _train(run)
        finally:
            run.unlock()
            del run  # its engine must end before the processes part


@contextlib.contextmanager
def torch_as_it_comes() -> Iterator[None]:
    """float32 and gradients, whatever the caller has asked of torch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False):  # which ends no_grad, too
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """What torch.compile cannot do, for want of a C++ compiler say, becomes one line."""
    try:
        yield
    except RuntimeError as error:
        if "torch._dynamo" not in sys.modules:
            raise
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        said = str(error).strip().splitlines()[0]
        raise RunError(f"torch.compile failed: {said}; leave --compile out") from error


def _train(run: Run) -> Path:
    rate = machine.matmul_rate(run.device, run.update.dtype)
    announce(run, rate)
    flops = sum(model_flops(run.model, run.config.sequences).values())
    log = Log(run, flops / (rate * run.world.size))
    with log.track:
        return _loop(run, log, rate)


def _loop(run: Run, log: Log, rate: float) -> Path:
    config = run.config
    checkpoint_interval = config.checkpoint_interval or config.eval_interval
    evaluation = None
    advised = memory.advised(
        config, run.model.config, run.device, run.update.dtype, resume_command(run), run.world
    )
    watching = contextlib.closing(profiling.watch(run, log, rate))
    with (
        advised,
        disk_errors(run.folder, lambda: resume_command(run)),
        _stop_on_signals(run),
        run.writer,
        log.progress_bar(),
        watching as profile,
    ):
        while True:
            names = ["last"]
            due = run.step % config.eval_interval == 0 or run.step >= config.max_iters
            keep = due or run.step % checkpoint_interval == 0
            if (keep or looks_after(run.step, config)) and look(run, log, wait=keep):
                continue
            if due and run.step != run.evaluated_step:
                with contextlib.suppress(Stopped):
                    training, evaluation = evaluate_splits(run)
                    log.evaluated(training, evaluation)
                    if not math.isfinite(evaluation.loss) and recover(
                        run, log, f"the validation loss is {evaluation.loss} at step {run.step}"
                    ):
                        continue
                    run.evaluated_step = run.step
                    if evaluation.loss < run.best_val_loss:
                        run.best_val_loss, run.best_step = evaluation.loss, run.step
                        names = ["best", "last"]
                    show_sample(run)
                    log.restart_clock()
            stopping = run.asked_to_stop() or run.step >= config.max_iters
            if (keep or stopping) and run.saved != (run.step, run.evaluated_step):
                save(run, *names)
                run.saved = run.step, run.evaluated_step
            if stopping:
                break
            loss = training_step(run)
            run.writer.check()
            log.stepped(loss)
            next(profile, None)
        log.look(wait=True)
        run.writer.wait()
        log.plot()
    if run.evaluated_step < config.max_iters:
        print(f"stopped at step {run.step}; go on with: {resume_command(run)}")
        raise KeyboardInterrupt
    with disk_errors(run.folder, lambda: resume_command(run)):
        if evaluation is None or config.eval_mode != "exact":
            evaluation = evaluate_exactly(run)
        log.finished(evaluation)
    return run.folder


def save(run: Run, *names: str) -> None:
    """Begin to write the checkpoints `names` of the run, all the same.

    Raises: RunError if those before could not be written.
    """
    model, optimizer, fields = run.model, run.optimizer, dataclasses.fields(Progress)
    content = Content(
        weights=gather(named_weights(model), model),
        optimizer=gather(optimizer_tensors(model, optimizer), model, optimizer),
        progress=Progress(**{field.name: getattr(run, field.name) for field in fields}),
        tokenizer=run.corpus.tokenizer,
        config_json=run.config_json,
    )
    if run.world.rank == 0:
        run.writer.save([run.folder / name for name in names], content)


def show_sample(run: Run) -> None:
    """A few lines of what the model writes by now."""
    if not run.config.sample_tokens:
        return
    model = run.update.whole_model()
    if run.world.rank:
        return
    if isinstance(run.corpus, Arithmetic):
        lines = run.corpus.answers(model, cuda_graph=run.config.cuda_graph)
        tqdm.write("\n".join("  | " + line for line in lines))
        return
    tokenizer = run.corpus.tokenizer
    idx = generate(
        model,
        run.corpus.val[:1].long()[None].to(run.device),
        max_new_tokens=run.config.sample_tokens,
        temperature=0.8,
        seed=run.config.seed,
        vocab_size=tokenizer.vocab_size,
        cuda_graph=run.config.cuda_graph,
    )
    text = tokenizer.decode(idx[0, 1:].tolist())
    tqdm.write("\n".join("  | " + line for line in text.strip().splitlines()))


@contextlib.contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """SIGINT and SIGTERM set `run.stop`, so that a step ends and is saved; twice kills.

    Not under torchrun, which hands on what it gets, even twice, and kills after a while.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number, frame):
        run.stop.set()
        if run.world.parallel is None:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

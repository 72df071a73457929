"""What `--resume` goes on from: the newest whole checkpoint, or where there is none config.json."""

import dataclasses
from pathlib import Path
from typing import Any

from gptcore.checkpoint import Checkpoint, newest_whole
from gptcore.config import ConfigError, TrainConfig, check_model, ignored_by, read_saved
from gptcore.distributed import World
from gptcore.files import read_json
from gptcore.flags import Settings, split_fields

# What a resumed run may not change: the weights or the held-out text would no longer be the same.
FIXED_ON_RESUME = (
    *("model", "tokenizer", "vocab_multiple", "val_fraction"),
    *("digits", "operations", "worked_steps", "init_from", "freeze"),
)
FREE_MODEL_FIELDS = ("dropout", "embedding_dropout", "backend")
# Given, they are refused where they say nothing about the data.
DATA_FIELDS = ("digits", "operations", "worked_steps", "val_fraction")


def checkpoint_to_resume(
    config: TrainConfig, world: World
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """`newest_whole` of --out_dir with --resume; None where the run is to start."""
    folder = None if config.out_dir is None else Path(config.out_dir)
    if not config.resume:
        if world.rank:  # rank 0 may have made it by now
            return None, {}
        if folder is not None and folder.is_file():
            raise ConfigError(f"--out_dir {folder}: a file, not a folder; give another")
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(
                f"run folder {folder} exists; add --resume to go on with it, or give another "
                "--out_dir"
            )
        return None, {}
    if folder is None:
        raise ConfigError("--resume needs the run folder; add --out_dir")
    if (folder / "manifest.json").is_file():
        raise ConfigError(
            f"--resume: {folder} is a checkpoint, not a run folder; give --out_dir {folder.parent}"
        )
    checkpoint, damaged = world.from_rank_0(lambda: newest_whole(folder))
    if checkpoint is None and folder.is_dir() and any(folder.iterdir()):
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--resume: {folder} is not a run folder; give another --out_dir")
    return checkpoint, damaged


def begun_settings(settings: Settings, device_type: str) -> Settings:
    """Those of a run that left no checkpoint, by its config.json, and what is given on top.

    Such a run was killed before its first evaluation had ended, or its checkpoints are gone.
    Raises: ConfigError if the user asks for another preset.
    """
    folder = Path(settings.given["out_dir"])
    if not (folder / "config.json").is_file():
        return settings
    content = read_json(folder / "config.json")
    train, model = read_saved(content, str(folder))
    preset = content.get("preset", "auto")
    if settings.preset not in ("auto", preset):
        raise ConfigError(
            f"--resume: {folder} was started with --preset {preset}, not {settings.preset}; leave "
            "--preset out, or give another --out_dir"
        )
    defaults, _ = Settings(preset, {}).merged(device_type)
    given = {**dataclasses.asdict(train), **dataclasses.asdict(model)}
    for name in ("vocab_size", *ignored_by(train.model)):  # the first follows from the text
        given.pop(name, None)
    for name in DATA_FIELDS:
        if given[name] == getattr(defaults, name):
            del given[name]
    return Settings(preset, {**given, **settings.given})


def resumed_settings(
    checkpoint: Checkpoint, settings: Settings
) -> tuple[TrainConfig, dict[str, Any]]:
    """The checkpoint's settings with what the user gave on top, where that is possible."""
    train, model = split_fields(settings.given)
    saved = {**dataclasses.asdict(checkpoint.train), **dataclasses.asdict(checkpoint.model)}
    fixed = {*FIXED_ON_RESUME, *dataclasses.asdict(checkpoint.model)} - set(FREE_MODEL_FIELDS)
    for name, value in settings.given.items():
        if name in fixed and value != saved[name]:
            raise ConfigError(
                f"--resume: {name} is {saved[name]!r} in {checkpoint.folder} and cannot become "
                f"{value!r}; start a new run for that"
            )
    started_from = checkpoint.config.get("preset")
    if settings.preset not in ("auto", started_from):
        raise ConfigError(
            f"--resume: {checkpoint.folder} was started with --preset {started_from}, "
            f"not {settings.preset}; leave --preset out"
        )
    check_model(checkpoint.train.model, checkpoint.model, settings.given)
    train = {"profile": False, **train}  # once is enough
    return checkpoint.train.replace(**train), {**dataclasses.asdict(checkpoint.model), **model}

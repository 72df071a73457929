"""Where else a run's metrics may go: TensorBoard, Weights & Biases. Both are optional packages."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptcore.config import ConfigError


def check_tracker(name: str) -> None:
    """Raises: ConfigError if the package of tracker `name` is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"--log {name} needs the package {name}; pip install -e '.[{name}]', or leave --log out"
        )


def open_tracker(
    name: str, folder: Path, settings: dict[str, Any], step: int
) -> Callable[[dict[str, Any]], None]:
    """A function that takes the records of metrics.jsonl.

    Args:
        folder: of the run; the tracker's files go into it.
        settings: shown beside the curves.
        step: where the run goes on; tensorboard forgets what came after it before.
    """
    if name == "none":
        return lambda record: None
    return (_tensorboard if name == "tensorboard" else _wandb)(folder, settings, step)


def _tensorboard(folder: Path, settings: dict[str, Any], step: int):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
    if not step:
        table = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}")

    def track(record):
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])
        if record["kind"] != "train":
            writer.flush()

    return track


def _wandb(folder: Path, settings: dict[str, Any], step: int):
    import wandb

    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(
        project="gptcore",
        name=folder.name,
        id=identity,
        resume="allow",
        dir=str(folder),
        config=settings,
    )

    # Steps as an axis of our own: wandb's only rises, and what came late would be dropped.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")

    def track(record):
        run.log({**_numbers(record), "step": record["step"]})
        if record["kind"] == "end":
            run.finish()

    return track


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """ "train/loss": 1.5 and so on."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if name not in ("kind", "step") and value is not None
    }

"""Where else a run's metrics may go: TensorBoard, Weights & Biases. Both are optional packages."""

import contextlib
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from gptcore.config import ConfigError


def check_tracker(name: str) -> None:
    """Raises: ConfigError if tracker `name` is not installed, or wants a login."""
    if name == "none":
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # no package, but a folder of that name
        raise ConfigError(
            f"--log {name} needs the package {name}; pip install -e '.[{name}]', or leave --log out"
        )
    if name == "wandb":
        with _wandb_errors("wandb login, or WANDB_MODE=offline, or leave --log out"):
            import wandb

            wandb.login()


class Tracker:
    """Takes the records of metrics.jsonl, as long as the `with` block lasts. This one drops them.

    Args:
        folder: of the run; the tracker's files go into it.
        settings: shown beside the curves.
        step: where the run goes on; tensorboard forgets what came after it before.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], step: int):
        pass

    def __call__(self, record: dict[str, Any]) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class _TensorBoard(Tracker):
    def __init__(self, folder, settings, step):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        if not step:
            table = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
            self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}")

    def __call__(self, record):
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])
        if record["kind"] != "train":
            self.writer.flush()

    def __exit__(self, *error):
        self.writer.close()


class _WandB(Tracker):
    def __init__(self, folder, settings, step):
        import wandb

        with _wandb_errors(f"mend that, then give --out_dir {folder} --resume"):
            self.run = wandb.init(
                project="gptcore",
                name=folder.name,
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                reinit="finish_previous",  # not to log into the run of a sweep's last trial
                dir=str(folder),
                config=settings,
            )
        # Steps as an axis of our own: wandb's only rises, and what came late would be dropped.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def __call__(self, record):
        self.run.log({**_numbers(record), "step": record["step"]})

    def __exit__(self, kind, *_):
        self.run.finish(exit_code=0 if kind is None else 1)


def open_tracker(name: str, folder: Path, settings: dict[str, Any], step: int) -> Tracker:
    """The Tracker called `name`.

    Raises: ConfigError if wandb refuses.
    """
    kinds = {"none": Tracker, "tensorboard": _TensorBoard, "wandb": _WandB}
    return kinds[name](folder, settings, step)


@contextlib.contextmanager
def _wandb_errors(fix: str):
    """What wandb raises, of whatever class, becomes one line."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"--log wandb: {error}; {fix}") from error


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """ "train/loss": 1.5 and so on."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if name not in ("kind", "step") and value is not None
    }

"""What a run does when a loss or a gradient is not finite: stop, skip, or roll back.

In every case the update in question never reached the weights (gptcore.guard). `stop` is the
default: without loss scaling such a value is a sign of a wrong setting or a fault, the checkpoints
are sound, and nobody's run should change its course unasked.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from tqdm import tqdm

from gptcore.checkpoint import checkpoint_folders, open_checkpoint
from gptcore.config import RunError
from gptcore.log import Log, resume_command

if TYPE_CHECKING:
    from gptcore.trainer import Run

SKIPPED_AT_MOST = 100  # updates in a row before even --on_nonfinite skip gives up
ROLLBACKS_AT_MOST = 5  # to one checkpoint


def look(run: Run, log: Log, wait: bool) -> bool:
    """Report what the guard saw since the last look; whether the run was rolled back for it.

    Args:
        wait: as `Log.look` says.
    Raises: RunError as --on_nonfinite says, or if nothing but skipped updates comes any more.
    """
    skipped = log.look(wait)
    if not skipped:
        return False
    steps = f"step {skipped[0]}"
    if len(skipped) > 1:
        steps = f"{len(skipped)} steps from {skipped[0]} to {skipped[-1]}"
    what = f"loss or gradient not finite in {steps}, not applied to the weights"
    if log.watch.skipped_in_a_row >= SKIPPED_AT_MOST:
        raise RunError(
            f"{what}: {log.watch.skipped_in_a_row} in a row; go on from the last checkpoint with "
            f"a lower --learning_rate: {resume_command(run)}"
        )
    return recover(run, log, what)


def recover(run: Run, log: Log, what: str) -> bool:
    """Do about `what` as --on_nonfinite says; whether the run was rolled back.

    Raises: RunError with "stop", or if rolling back does not help.
    """
    policy = run.config.on_nonfinite
    if policy == "stop":
        raise RunError(
            f"{what}; go on from the last checkpoint with a lower --learning_rate, --grad_clip 1 "
            f"or --on_nonfinite skip|rollback: {resume_command(run)}"
        )
    tqdm.write(what)
    if policy == "rollback":
        roll_back(run, log, what)
    return policy == "rollback"


def roll_back(run: Run, log: Log, what: str) -> None:
    """Return to the last checkpoint, with half the learning rate from there on.

    Raises: RunError if there is none, or that has been tried from it too often.
    """
    run.world.from_rank_0(run.writer.wait)
    if not checkpoint_folders(run.folder, "last"):
        raise RunError(f"{what}, before the first checkpoint; give a lower --learning_rate")
    checkpoint, came_from = open_checkpoint(run.folder, "last"), run.step
    progress, config = checkpoint.progress, run.config
    if run.rolled_back.count(progress.step) >= ROLLBACKS_AT_MOST:
        raise RunError(
            f"{what}, and {ROLLBACKS_AT_MOST} times going back to step {progress.step} with half "
            f"the learning rate did not help, now {config.learning_rate:.3g}"
        )
    run.rolled_back.append(progress.step)
    checkpoint.load_weights(run.model)
    checkpoint.load_optimizer(run.model, run.optimizer)
    for counter in ("best_val_loss", "best_step", "evaluated_step"):
        setattr(run, counter, getattr(progress, counter))
    # Every schedule is proportional to these two; the next checkpoint holds them.
    config = config.replace(learning_rate=config.learning_rate / 2, min_lr=config.min_lr / 2)
    run.config = run.update.config = config
    settings = {**json.loads(run.config_json), "train": dataclasses.asdict(config)}
    run.config_json = json.dumps(settings, indent=2) + "\n"
    run.update.rewind(progress.step)
    log.rewound(came_from)

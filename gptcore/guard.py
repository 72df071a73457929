"""Loss safety: an update whose loss or gradient is not finite does not happen.

On the device, without waiting for it: `Guard.inspect` sets `found_inf`, which torch's fused
optimizers read in their kernels (it was made for GradScaler), and Muon: where it is 1 they leave
weights, moments and step counts as they are. The norm of each update's gradient is kept until
someone looks, NaN where the update did not happen.

On the host, where train lines are written: `Watch` says which updates were skipped and which
gradients were spikes.
"""

import statistics
from collections import deque
from dataclasses import dataclass

import torch
from torch import nn

LOOK_EVERY = 4096  # updates at most between two looks
SPIKE = 5.0  # times the running median is a spike
MEDIAN_OVER, MEDIAN_FROM = 256, 32  # gradients in the running median; fewer than 32 say little


class Guard:
    """What stands between a gradient and the weights.

    Args:
        optimizer: fused, or Muon; it heeds `found_inf` from now on.
        device: of the parameters.
        step: updates done so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, step: int = 0):
        self.found_inf = torch.zeros((), device=device)
        self.norms = torch.zeros(LOOK_EVERY, device=device)
        self.looked = step
        optimizer.found_inf, optimizer.grad_scale = self.found_inf, None

    def inspect(self, parameters, loss: torch.Tensor, step: torch.Tensor, max_norm: float) -> None:
        """Clip the gradients and decide whether this update happens.

        Args:
            loss: () of the whole update, the same on all ranks.
            step: (1,) int64 on the device: the number of this update.
            max_norm: of the gradient; 0: no limit.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        if hasattr(norm, "full_tensor"):  # of sharded gradients
            norm = norm.full_tensor()
        health = norm + (loss - loss)  # inf - inf and NaN - NaN are NaN
        self.found_inf.copy_(health - health != 0)
        self.norms.index_copy_(0, step % LOOK_EVERY, health[None])

    def look(self, step: int, norms: list[float] | None = None) -> list[tuple[int, float]]:
        """(number, norm of the gradient) of each update from the last look up to `step`.

        The norm is NaN or infinite where the update did not happen.

        Args:
            norms: `self.norms` as they were after `step` updates; by default they are read now,
                which waits for the device.
        """
        numbers = range(max(self.looked, step - LOOK_EVERY), step)
        if norms is None and numbers:
            norms = self.norms.tolist()
        self.looked = step
        return [(number, norms[number % LOOK_EVERY]) for number in numbers]


@dataclass(frozen=True)
class Spike:
    """A gradient far above the running median of those before."""

    step: int  # the number of the update, from 1
    norm: float
    median: float


class Watch:
    """Tells spikes from other gradients, by the norms of the finite ones before.

    Attributes:
        skipped_in_a_row: how many updates, up to the last one judged, did not happen.
    """

    def __init__(self):
        self.skipped_in_a_row = 0
        self.norms: deque[float] = deque(maxlen=MEDIAN_OVER)

    def judge(self, looked: list[tuple[int, float]]) -> tuple[list[int], list[Spike]]:
        """The updates that did not happen, by their number from 1, and the spikes."""
        skipped, spikes = [], []
        for number, norm in looked:
            if norm - norm != 0:
                skipped.append(number + 1)
                self.skipped_in_a_row += 1
                continue
            self.skipped_in_a_row = 0
            if len(self.norms) >= MEDIAN_FROM:
                median = statistics.median(self.norms)
                if norm > SPIKE * median:
                    spikes.append(Spike(number + 1, norm, median))
            self.norms.append(norm)
        return skipped, spikes

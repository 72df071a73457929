"""The cases of `python -m bench` under pytest-benchmark; a group is a case.

pytest bench                                   a small set
pytest bench --bench-all -k attention          all of a question
pytest bench --benchmark-save=before           and later
pytest bench --benchmark-compare               against the last saved
"""

import pytest

from bench.harness import Skip, started
from bench.peers import SDPA_WARNINGS
from kernels.timing import raise_clocks

ROUNDS = 7


class Clock:
    """Seconds of what has been sampled: a GPU's by its events, of a process by its own account."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


clock = Clock()
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{SDPA_WARNINGS}"),
    pytest.mark.benchmark(timer=clock),
]


def test_bench(benchmark, stopwatch, question, case, contestant_name):
    """Check, then time as `python -m bench` does, one contestant after the other."""
    contestant = next((c for c in case.open() if c.name == contestant_name), None)
    if contestant is None:
        pytest.skip("not asked for")
    try:
        check = contestant.check()
        assert check.passed, check.details
        call, not_replayed = started(contestant, case, stopwatch.device)
    except Skip as reason:
        pytest.skip(str(reason))

    def sampled():
        clock.seconds += 1e-3 * stopwatch.sample(call, cold=case.flush)

    benchmark.group = f"{question}: {case.name} {case.dtype}"
    benchmark.extra_info |= {"check": check.text, "flops": case.work.flops}
    benchmark.extra_info |= {"not_replayed": not_replayed} if not_replayed else {}
    raise_clocks(stopwatch.device, call)
    benchmark.pedantic(sampled, rounds=ROUNDS, warmup_rounds=1)

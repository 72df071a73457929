"""The cases of `python -m bench` under pytest-benchmark; a group is a case.

pytest bench                                   a small set
pytest bench --bench-all -k attention          all of a question
pytest bench --benchmark-save=before           and later
pytest bench --benchmark-compare               against the last saved
"""

import pytest

from bench.harness import Skip, started
from bench.peers import SDPA_WARNINGS
from bench.timing import SelfTimed

pytestmark = pytest.mark.filterwarnings(f"ignore:{SDPA_WARNINGS}")
ROUNDS = 7


def test_bench(benchmark, stopwatch, question, case, contestant_name):
    """Check, then time; the GPU is waited for, the caches are flushed before every round."""
    contestant = next((c for c in case.open() if c.name == contestant_name), None)
    if contestant is None:
        pytest.skip("not asked for")
    try:
        check = contestant.check()
        assert check.passed, check.details
        call, not_replayed = started(contestant, case, stopwatch.device)
    except Skip as reason:
        pytest.skip(str(reason))
    if isinstance(call, SelfTimed):
        pytest.skip("runs in a process of its own; see python -m bench")
    device = stopwatch.device

    def synchronised():
        call()
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)

    def flush():
        if case.flush:
            stopwatch.flush()
        if device.type == "cuda":
            import torch

            torch.cuda.synchronize(device)

    benchmark.group = f"{question}: {case.name} {case.dtype}"
    benchmark.extra_info |= {"check": check.text, "flops": case.work.flops}
    benchmark.extra_info |= {"not_replayed": not_replayed} if not_replayed else {}
    benchmark.pedantic(synchronised, setup=flush, rounds=ROUNDS, warmup_rounds=1)

"""The harness is honest: known slowness is reported as it is, whatever the machine does."""

import contextlib
import itertools
import types

import pytest
import torch

from bench import selfcheck, timing
from bench.selfcheck import agree, repeated, slowed, two_runs
from bench.timing import (
    FEW_ROUNDS,
    MIN_ROUNDS,
    SelfTimed,
    Stopwatch,
    Summary,
    ceilings,
    measure,
    paired_ratio,
    replayed,
    summarise,
)

CPU = torch.device("cpu")


class Machine:
    """A machine whose every second is known: work takes time only through `busy`.

    speed: seconds that one unit of work takes, as a function of the time of day.
    """

    def __init__(self, speed=lambda now: 1.0):
        self.now, self.speed = 0.0, speed
        self.log = []

    def clock(self):
        return self.now

    def work(self, name, units, noise=None):
        def call():
            self.log.append(name)
            self.now += units * self.speed(self.now) * (next(noise) if noise else 1.0)

        return call


def stopwatch(machine):
    return Stopwatch(CPU, clock=machine.clock, cache_bytes=0)


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 7.0])
def test_an_op_slowed_by_a_factor_is_reported_slower_by_that_factor(factor):
    machine = Machine()
    calls = {"op": machine.work("op", 0.01), "slowed": machine.work("slowed", 0.01 * factor)}
    ms = measure(calls, stopwatch(machine), seconds=1.0).ms
    assert summarise(ms["op"]).median == pytest.approx(10)
    assert paired_ratio(ms["slowed"], ms["op"]).median == pytest.approx(factor)


def test_repeating_the_work_slows_it_by_the_number_of_repeats():
    machine = Machine()
    op = machine.work("op", 0.01)
    ms = measure({"op": op, "thrice": repeated(op, 3)}, stopwatch(machine), seconds=1.0).ms
    assert paired_ratio(ms["thrice"], ms["op"]).median == pytest.approx(3)


def drifting(now):
    """A machine that gets three times slower over the measurement."""
    return 1 + now / 2


def test_a_drifting_machine_does_not_change_the_ratio():
    machine = Machine(drifting)
    calls = {"op": machine.work("op", 0.01), "slowed": machine.work("slowed", 0.02)}
    ms = measure(calls, stopwatch(machine), seconds=2.0, max_rounds=100).ms
    assert ms["op"][-1] > 1.5 * ms["op"][0]  # it did drift
    assert paired_ratio(ms["slowed"], ms["op"]).median == pytest.approx(2, rel=0.02)


def test_one_contestant_after_the_other_would_be_wrong_on_that_machine():
    machine = Machine(drifting)
    first, second = (
        measure({name: machine.work(name, units)}, stopwatch(machine), seconds=1.0).ms[name]
        for name, units in (("op", 0.01), ("slowed", 0.02))
    )
    ratio = summarise(second).median / summarise(first).median
    assert abs(ratio / 2 - 1) > 0.1


def test_a_neighbour_that_wakes_up_now_and_then_moves_no_median():
    machine = Machine()
    disturbed = itertools.cycle([1, 1, 1, 9])
    calls = {
        "op": machine.work("op", 0.01, disturbed),
        "slowed": machine.work("slowed", 0.02, itertools.cycle([1, 1, 1, 1, 9])),
    }
    ms = measure(calls, stopwatch(machine), seconds=2.0).ms
    assert paired_ratio(ms["slowed"], ms["op"]).median == pytest.approx(2)
    assert summarise(ms["op"]).spread > 0


def test_two_runs_of_one_op_differ_by_less_than_the_spread_they_report():
    generator = torch.Generator().manual_seed(0)

    def noise():
        while True:
            yield 1 + 0.1 * torch.rand((), generator=generator).item()

    machine = Machine()
    op = machine.work("op", 0.01, noise())
    first, second = (
        summarise(measure({"op": op}, stopwatch(machine), seconds=1.0).ms["op"]) for _ in range(2)
    )
    assert agree(first, second) == "good"
    assert agree(first, Summary(first.median * 1.2, first.q25 * 1.2, first.q75 * 1.2)) == "WRONG"


def test_a_large_spread_shows_nothing_unless_the_medians_agree():
    wide = Summary(1.0, 0.8, 1.2)
    assert agree(wide, Summary(1.04, 0.9, 1.1)) == "good"
    assert agree(wide, Summary(1.1, 0.9, 1.3)) == "noisy"
    assert agree(wide, Summary(1.5, 1.4, 1.6)) == "WRONG"


def test_the_two_runs_of_the_selfcheck_alternate():
    machine = Machine()
    runs = two_runs({"op": machine.work("op", 0.01)}, stopwatch(machine), seconds=0.0)
    assert [len(run["op"]) for run in runs] == [8 * MIN_ROUNDS] * 2


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Summary(2.04, 2.0, 2.1), "good"),
        (Summary(2.2, 1.99, 2.3), "good"),
        (Summary(2.2, 2.15, 2.25), "WRONG"),
        (Summary(3.0, 1.0, 9.0), "noisy"),
    ],
)
def test_selfcheck_tells_right_from_wrong_from_noisy(ratio, verdict):
    assert slowed(ratio, 2) == verdict


@pytest.mark.parametrize("right", [True, False])
def test_selfcheck_passes_only_if_what_is_slower_is_reported_so(right, monkeypatch, capsys):
    machine = Machine()
    monkeypatch.setattr(selfcheck, "BLOCKS", 1)
    monkeypatch.setattr(selfcheck, "ops", lambda device: {"op": machine.work("op", 0.01)})
    if not right:
        monkeypatch.setattr(selfcheck, "repeated", lambda call, times: call)
    record = selfcheck.selfcheck(stopwatch(machine), seconds=0.0)
    found = {f["what"]: (f["expected"], f["ratio"], f["verdict"]) for f in record["findings"]}
    assert record["passed"] is right and found == {
        "op, 2 times": (2, pytest.approx(2 if right else 1), "good" if right else "WRONG"),
        "op, 5 times": (5, pytest.approx(5 if right else 1), "good" if right else "WRONG"),
        "op, its twin": (1, pytest.approx(1), "good"),
        "op, another run": (1, pytest.approx(1), "good"),
    }


def test_contestants_take_turns_and_the_order_turns_too():
    machine = Machine()
    calls = {name: machine.work(name, 0.01) for name in "abc"}
    measure(calls, stopwatch(machine), seconds=0.0)
    rounds = machine.log[2 * 3 :]  # after the calibration
    rounds = ["".join(rounds[i : i + 3]) for i in range(0, len(rounds), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]


def test_time_is_kept_but_never_below_the_least_number_of_rounds():
    machine = Machine()
    rounds = [
        len(measure({"op": machine.work("op", units)}, stopwatch(machine), seconds=s).ms["op"])
        for units, s in ((0.1, 0.01), (1.0, 20.0), (60.0, 20.0))
    ]
    assert rounds == [MIN_ROUNDS, 20, FEW_ROUNDS]


def test_short_calls_are_sampled_many_at_a_time_and_warm():
    machine = Machine()
    samples = measure({"op": machine.work("op", 1e-5)}, stopwatch(machine), seconds=1.0)
    assert samples.calls == 100 and not samples.cold
    assert summarise(samples.ms["op"]).median == pytest.approx(0.01)


def test_one_short_contestant_makes_all_warm_so_that_none_is_favoured():
    machine = Machine()
    calls = {"short": machine.work("short", 1e-5), "long": machine.work("long", 1e-2)}
    samples = measure(calls, stopwatch(machine), seconds=1.0)
    assert not samples.cold
    assert paired_ratio(samples.ms["long"], samples.ms["short"]).median == pytest.approx(1000)


def test_the_flush_before_a_sample_is_not_timed():
    machine = Machine()
    watch = stopwatch(machine)

    def flush():
        machine.log.append("flush")
        machine.now += 5.0

    watch.flush = flush
    samples = measure({"op": machine.work("op", 0.01)}, watch, seconds=0.0)
    assert samples.cold and summarise(samples.ms["op"]).median == pytest.approx(10)
    assert machine.log[-2:] == ["flush", "op"]


def test_flushing_overwrites_every_byte_of_the_cache_buffer():
    watch = Stopwatch(CPU, cache_bytes=4096)
    watch._cache.fill_(7)
    watch.flush()
    assert watch._cache.count_nonzero() == 0


def test_twice_the_last_level_cache_is_overwritten(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 16)
    assert Stopwatch(CPU)._cache.nbytes == 2 << 16


def test_ceilings_are_the_machines_rates_and_the_time_of_one_call(monkeypatch):
    """Work in one sample of a thousand calls; rates in what tables show."""
    calls = []

    def sample(call, calls_a_sample, cold):
        calls.append((calls_a_sample, cold))
        return len(calls) * 1e-3

    monkeypatch.setattr(timing, "copy_rate", lambda device: 12e9)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 3e12)
    found = ceilings(types.SimpleNamespace(device=CPU, sample=sample), torch.bfloat16)
    assert found == {"copy_gbps": 12, "matmul_tflops": 3, "dispatch_us": 4} and set(calls) == {
        (1000, False)
    }


def test_clocks_are_raised_by_what_is_timed_right_before_it(monkeypatch):
    machine, raised = Machine(), []
    calls = {name: machine.work(name, 0.01) for name in "ab"}
    monkeypatch.setattr(timing.gc, "collect", lambda: machine.log.append("collect"))

    def raise_clocks(device, call):
        raised.append((device, call))
        machine.log.append("raised")

    monkeypatch.setattr(timing, "raise_clocks", raise_clocks)
    measure(calls, stopwatch(machine), seconds=0.0)
    assert raised == [(CPU, calls["a"])]
    after = machine.log.index("raised")
    assert machine.log[after - 1] == "collect" and machine.log[after + 1 :] == [*"abbaabbaab"]


def test_a_call_in_a_process_of_its_own_brings_its_own_time():
    machine = Machine()
    call = SelfTimed(lambda calls: 42.0 + calls)
    assert stopwatch(machine).sample(call, calls=3) == 45.0


def test_steps_are_timed_in_a_row_because_the_first_pays_for_the_change():
    machine = Machine()

    def after_another(name, units):
        def call():
            changed = machine.log[-1:] != [name]
            machine.log.append(name)
            machine.now += units * (2 if changed else 1)

        return call

    calls = {"op": after_another("op", 0.004), "other": after_another("other", 0.008)}
    samples = measure(calls, stopwatch(machine), seconds=0.0, flush=False, row=0.1)
    assert samples.calls == 25 and not samples.cold
    assert paired_ratio(samples.ms["other"], samples.ms["op"]).median == pytest.approx(2, rel=0.05)
    assert summarise(samples.ms["op"]).median == pytest.approx(4, rel=0.05)


def test_quartiles():
    summary = summarise([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (summary.q25, summary.median, summary.q75, summary.spread) == (2.0, 3.0, 4.0, 2.0)
    assert summarise([3.0]) == Summary(3.0, 3.0, 3.0)


def test_a_sample_of_many_calls_on_a_gpu_is_the_time_of_one(monkeypatch):
    event = types.SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 10.0
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    watch = Stopwatch(CPU, cache_bytes=0)
    watch.device = torch.device("cuda")
    assert watch.sample(lambda: None, calls=5, cold=False) == 2.0


@pytest.fixture
def cuda(monkeypatch):
    """torch's part of a capture, put on: the log of what was asked of it."""
    log = []

    @contextlib.contextmanager
    def capture(graph, stream):
        assert stream is side
        log.append("capture")
        yield
        log.append("captured")

    class Event:
        def __init__(self, **how):
            assert how == {"enable_timing": True, "external": torch.version.hip is None}

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            assert other is not self
            return 0.5

    where = {"device": "cuda:1", "wait_stream": lambda other: None}
    side, stream = types.SimpleNamespace(**where), types.SimpleNamespace(**where)
    graph = types.SimpleNamespace(replay=lambda: log.append("replay"))
    for name, fake in (
        ("Stream", lambda device: side),
        ("current_stream", lambda device: stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("set_sync_debug_mode", log.append),
        ("CUDAGraph", lambda: graph),
        ("graph", capture),
        ("Event", Event),
        ("synchronize", lambda device: log.append(f"wait for {device}")),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_a_call_that_waits_for_the_gpu_is_not_captured(cuda):
    """It is run before, in the mode that raises."""

    def call():
        if cuda[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        replayed(call, torch.device("cuda"))
    assert cuda[-1] == "default" and "capture" not in cuda


@pytest.mark.parametrize("rocm", [False, True])
def test_a_replayed_sample_lies_between_the_events_of_its_graph(rocm, cuda, monkeypatch):
    """What torch issues before a replay, two kernels where random numbers are drawn, is not in it;
    ROCm cannot record events in a graph, and has them around it."""
    monkeypatch.setattr(torch.version, "hip", "6.4" if rocm else None)
    call = replayed(lambda: cuda.append("call"), torch.device("cuda"))
    ends = [] if rocm else ["event"]
    captured = ["capture", *ends, "call", *ends, "captured"]
    assert cuda[-len(captured) - 3 :] == ["error", "call", "default", *captured]
    cuda.clear()
    watch = Stopwatch(torch.device("cpu"), cache_bytes=0)
    watch.device = torch.device("cuda")
    assert watch.sample(call) == 0.5
    outside = ["event"] if rocm else []
    assert cuda == [*outside, "replay", *outside, "wait for cuda:1"]

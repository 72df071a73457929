"""Cases, checks and records: what is wrong is not timed, what is absent says why."""

import dataclasses
import functools
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import harness, render
from bench import record as recording
from bench import run as asking
from bench.__main__ import main
from bench.harness import (
    OURS,
    Budget,
    Case,
    Check,
    Contestant,
    Options,
    Skip,
    Work,
    check_tensors,
    limit,
    run_case,
    run_cases,
)
from bench.ops import FORWARD, TRAINING, Op, op_case, sweep_points
from bench.timing import Samples, Stopwatch

CPU = torch.device("cpu")
CEILINGS = {"copy_gbps": 10.0, "matmul_tflops": 0.1, "dispatch_us": 5.0}
OPTIONS = Options(device=CPU, dtype=torch.float32, seconds=1.0, quick=True)


def a_case(*contestants, **changes):
    case = Case(
        name="case",
        shape={"T": 8},
        dtype="float32",
        work=Work(flops=2e6, bytes=1e6, tokens=8),
        unit="GB/s",
        open=lambda: contestants,
        quick=True,
    )
    return dataclasses.replace(case, **changes)


def contestant(name, call=lambda: None, check=lambda: Check(True, "1x plain")):
    return Contestant(name, start=lambda: call, check=check)


def run(case, options=OPTIONS):
    watch = Stopwatch(CPU, cache_bytes=0)
    record = run_case(case, options, watch, CEILINGS, seconds=0.0)
    return record, {result["name"]: result for result in record["results"]}


def raising(error):
    def call():
        raise error

    return call


def test_what_fails_its_check_is_reported_and_never_called():
    called = []
    wrong = contestant(
        "wrong", lambda: called.append(1), lambda: Check(False, "900x plain", ("o0: max 1",))
    )
    _, results = run(a_case(contestant(OURS), wrong))
    assert results["wrong"]["status"] == "failed" and "o0: max 1" in results["wrong"]["reason"]
    assert "median_ms" not in results["wrong"] and not called
    assert results[OURS]["status"] == "timed"


def test_absent_and_broken_peers_say_why_and_stop_nobody():
    peers = [
        Contestant("absent", start=raising(Skip("not installed")), check=lambda: Check(True, "")),
        contestant("broken", raising(RuntimeError("no\nsecond line"))),
        contestant("large", raising(torch.OutOfMemoryError("..."))),
    ]
    record, results = run(a_case(*peers, contestant(OURS)))
    assert results["absent"] | {"check": None} == {
        "name": "absent",
        "status": "skipped",
        "reason": "not installed",
        "check": None,
    }
    assert results["broken"]["reason"] == "RuntimeError: no"
    assert results["large"] | {"check": None} == {
        "name": "large",
        "status": "skipped",
        "reason": "out of memory",
        "check": None,
    }
    text = render.case_text(record)
    assert "absent skipped: not installed" in text and "broken failed: RuntimeError: no" in text


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.OutOfMemoryError("..."), "skipped", "out of memory"),
        (RuntimeError("worker died\nmore"), "failed", "RuntimeError: worker died"),
    ],
)
@pytest.mark.parametrize("last", [0, 4])
def test_who_breaks_while_measured_is_left_out(error, status, reason, last):
    """After its warm-up, at once or between others' samples; those are measured again."""
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) > 1 + last:
            raise error

    _, results = run(a_case(contestant(OURS), contestant("broken", breaks), contestant("peer")))
    assert (results["broken"]["status"], results["broken"]["reason"]) == (status, reason)
    assert "samples_ms" not in results["broken"]
    assert [results[name]["status"] for name in (OURS, "peer")] == ["timed"] * 2
    record, results = run(a_case(contestant("broken", breaks)))
    assert results["broken"]["status"] == status and render.case_text(record)


def test_memory_that_a_capture_has_not_is_no_reason_to_time_without(monkeypatch):
    def replayed(call, device):
        raise torch.OutOfMemoryError("...")

    monkeypatch.setattr(harness, "replayed", replayed)
    watch = Stopwatch(CPU, cache_bytes=0)
    watch.device = torch.device("cuda")
    record = run_case(a_case(contestant(OURS)), OPTIONS, watch, CEILINGS, seconds=0.0)
    (result,) = record["results"]
    assert (result["status"], result["reason"]) == ("skipped", "out of memory")


def test_a_row_says_in_which_other_dtype_it_is():
    other = dataclasses.replace(contestant("naive"), dtype=torch.float32)
    record, _ = run(a_case(contestant(OURS), other))
    names = [row[0] for row in render.case_rows(record)]
    assert names == ["", OURS, "naive, float32"]
    assert [result.get("dtype") for result in record["results"]] == [None, "float32"]


@pytest.mark.parametrize("flush", [True, False], ids=["op", "step"])
def test_ops_are_replayed_on_a_gpu_and_steps_are_not(flush, monkeypatch):
    """There Python would take longer to issue an op than it runs."""

    def replayed(call, device):
        assert device == GPU
        if call() == "cannot":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: "replay"

    def measured(calls, *_, row, **__):
        assert bool(row) != flush  # steps are timed in a row
        timed.update({name: call() for name, call in calls.items()})
        return Samples({name: [1.0] for name in calls}, 1, True)

    GPU, timed = torch.device("cuda"), {}
    monkeypatch.setattr(harness, "replayed", replayed)
    monkeypatch.setattr(harness, "measure", measured)
    case = a_case(
        contestant(OURS, lambda: "call"), contestant("peer", lambda: "cannot"), flush=flush
    )
    watch = Stopwatch(CPU, cache_bytes=0)
    watch.device = GPU
    record = run_case(case, OPTIONS, watch, CEILINGS, seconds=0.0)
    assert timed == {OURS: "replay" if flush else "call", "peer": "cannot"}
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert [r.get("not_replayed") for r in record["results"]] == [None, reason if flush else None]
    text = render.case_text(record)
    assert (f"peer timed with all that issues it: {reason}" in text) == flush
    assert ["ratio" in r for r in record["results"]] == [True, not flush]  # unlike is not compared


def test_a_record_says_rate_limit_and_ratio(monkeypatch):
    """A peer that takes twice as long as our 3 ms, its quartiles a third away."""
    ms = {OURS: [3.0] * 5, "peer": [2.0, 4.0, 6.0, 8.0, 10.0]}
    monkeypatch.setattr(harness, "measure", lambda *_, **__: Samples(ms, 1, True))
    record, results = run(a_case(contestant(OURS), contestant("peer")))
    assert record["limit_ms"] == pytest.approx(0.1) and record["bound"] == "memory"
    ours, peer = results[OURS], results["peer"]
    assert ours["rate"] == pytest.approx(1 / 3)
    assert ours["percent_of_limit"] == pytest.approx(100 / 30)
    assert ours["ratio"] == 1.0 and peer["samples_ms"] == ms["peer"]
    assert [peer[name] for name in ("q25_ms", "median_ms", "q75_ms")] == [4, 6, 8]
    ratios = [peer[name] for name in ("ratio_q25", "ratio", "ratio_q75")]
    assert ratios == pytest.approx([4 / 3, 2, 8 / 3])


def test_the_limit_is_the_slower_of_memory_and_compute():
    assert limit(Work(1e9, 1e6), CEILINGS) == {"limit_ms": 10.0, "bound": "compute"}
    assert limit(Work(1e6, 1e9), CEILINGS) == {"limit_ms": 100.0, "bound": "memory"}


def test_a_question_is_held_against_the_faster_of_two_measurements(monkeypatch):
    """The machine doubles its copy rate, or loses half of it, while the question is asked."""
    one, question = a_case(contestant(OURS)), types.ModuleType("question")
    question.cases = lambda options: [one]
    for measured in ([10.0, 20.0], [20.0, 10.0]):
        rates = iter(CEILINGS | {"copy_gbps": rate, "dispatch_us": rate} for rate in measured)
        monkeypatch.setattr(asking, "ceilings", lambda *_, rates=rates: next(rates))
        content = asking.ask(question, OPTIONS, Stopwatch(CPU, cache_bytes=0))
        assert [c["copy_gbps"] for c in content["ceilings_measured"]] == measured
        assert content["ceilings"] == CEILINGS | {"copy_gbps": 20.0, "dispatch_us": 10.0}
        (record,) = content["cases"]
        (result,) = record["results"]
        assert record["limit_ms"] == pytest.approx(0.05)
        assert result["percent_of_limit"] == pytest.approx(5 / result["median_ms"])


@pytest.mark.parametrize("passed", [True, False])
def test_a_run_shares_its_seconds_and_keeps_what_it_found(passed, monkeypatch, tmp_path, capsys):
    """Of 950 seconds by weights of 70 and 25; what of ours fails, fails the run."""
    record, _ = run(a_case(contestant(OURS), sweeps=("T",)))
    broken = record | {"results": [{"name": OURS, "status": "failed", "reason": "9x plain"}]}
    now, shares = [0.0], {}

    def question(name, found):
        def answer(options, *_):
            shares[name] = options.seconds
            now[0] += options.seconds
            return {"cases": [{**found, "case": f"T{T}", "shape": {"T": T}} for T in (8, 16)]}

        module = types.ModuleType(name, "How fast?")
        module.answer = answer
        monkeypatch.setitem(sys.modules, f"bench.{name}", module)

    question("attention", record)
    question("mlp", record if passed else broken)
    monkeypatch.setattr(asking, "Budget", functools.partial(Budget, clock=lambda: now[0]))
    monkeypatch.setattr(asking, "ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(render, "save", lambda drawing, path: path)
    path = tmp_path / "new" / "x.json"
    argv = ["attention", "mlp", "--seconds=950", "--device=cpu", f"--json={path}", "--plot=p"]
    monkeypatch.chdir(tmp_path)
    assert main(argv) == (0 if passed else 1)
    assert shares == pytest.approx({"attention": 700, "mlp": 250})
    questions = recording.read(path)["questions"]
    asked = {name: [case["case"] for case in questions[name]["cases"]] for name in questions}
    assert asked == dict.fromkeys(("attention", "mlp"), ["T8", "T16"])
    said = capsys.readouterr().out.splitlines()
    for name in ("attention-T", "mlp-T", "roofline"):
        assert f"wrote {Path('p', name)}.png" in said
    assert said.count("FAILED mlp: T16: 9x plain") == (not passed)


def test_cases_left_out_for_time_are_named():
    cases = [a_case(contestant(OURS), name=name) for name in "abc"]
    content = run_cases(
        cases,
        dataclasses.replace(OPTIONS, seconds=0.0),
        Stopwatch(CPU, cache_bytes=0),
        CEILINGS,
        show=lambda case: None,
    )
    assert [case["case"] for case in content["cases"]] == ["a"]
    assert content["left_out"] == ["b", "c"]


@pytest.mark.parametrize("left, begun", [(0.4, 2), (0.6, 3)], ids=["too-little", "enough"])
def test_a_case_is_begun_only_if_half_of_it_fits(left, begun, monkeypatch):
    """Two cases of a second each, then `left` seconds of the budget."""
    now = [0.0]

    def lasts_a_second(case, *_):
        now[0] += 1
        return {"case": case.name}

    monkeypatch.setattr(harness, "run_case", lasts_a_second)
    monkeypatch.setattr(harness, "Budget", functools.partial(Budget, clock=lambda: now[0]))
    cases = [a_case(contestant(OURS), name=name) for name in "abc"]
    options = dataclasses.replace(OPTIONS, seconds=2 + left)
    content = run_cases(cases, options, None, CEILINGS, show=lambda case: None)
    assert len(content["cases"]) == begun and len(content["left_out"]) == 3 - begun


def test_a_case_named_twice_runs_once():
    cases = [a_case(contestant(OURS), name=name) for name in "aba"]
    options = dataclasses.replace(OPTIONS, seconds=60.0)
    watch = Stopwatch(CPU, cache_bytes=0)
    content = run_cases(cases, options, watch, CEILINGS, show=lambda case: None)
    assert [case["case"] for case in content["cases"]] == ["a", "b"]


def test_quick_default_and_full_choose_their_cases():
    cases = [
        a_case(contestant(OURS), name="quick"),
        a_case(contestant(OURS), name="default", quick=False),
        a_case(contestant(OURS), name="full", quick=False, full=True),
    ]

    def names(**changes):
        options = dataclasses.replace(OPTIONS, quick=False, seconds=60.0, **changes)
        watch = Stopwatch(CPU, cache_bytes=0)
        content = run_cases(cases, options, watch, CEILINGS, show=lambda case: None)
        return [case["case"] for case in content["cases"]]

    assert names(full=True) == ["quick", "default", "full"]
    assert names() == ["quick", "default"]


# ---- ops -------------------------------------------------------------------------------------


def square_op(ours, peers=None, p=0.0):
    def plain(x, p, key):
        return x["x"] ** 2 * x["w"]

    def inputs(generator):
        return {
            "x": torch.randn(8, 16, generator=generator),
            "w": torch.randn(16, generator=generator),
        }

    return Op(inputs, plain, ours, peers or {}, p)


def run_op(op, phase=TRAINING):
    options = dataclasses.replace(OPTIONS, peers=("eager", "naive", "sdpa"))
    case = op_case(op, options, "op", phase, Work(1, 1), "GB/s", shape={"T": 8}, quick=True)
    return run(case, options)[1]


def right(x, p, key):
    return x["x"] * x["x"] * x["w"]


@pytest.mark.parametrize("phase", [FORWARD, TRAINING])
def test_a_right_op_is_timed(phase):
    results = run_op(square_op(right), phase)
    assert results[OURS]["status"] == results["eager"]["status"] == "timed"


class WrongGradient(torch.autograd.Function):
    """x * x * w with the gradient of x missing its factor of two."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy * x * w, (dy * x * x).sum(0)


DAMAGED = {
    "value": lambda x, p, key: right(x, p, key) * (1 + 1e-4),
    "one element": lambda x, p, key: right(x, p, key) + 1e-3 * (torch.arange(16) == 5),
    "nan": lambda x, p, key: right(x, p, key) * float("nan"),
    "gradient": lambda x, p, key: WrongGradient.apply(x["x"], x["w"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_op_is_not_timed(damage):
    result = run_op(square_op(DAMAGED[damage]))[OURS]
    assert result["status"] == "failed" and "median_ms" not in result


@pytest.mark.parametrize("damage", ["value", "nan", "gradient"])
def test_a_damaged_peer_is_not_timed(damage):
    peer = {"naive": lambda x, p: DAMAGED[damage](x, p, None)}
    result = run_op(square_op(right, peer))["naive"]
    assert result["status"] == "failed"


def test_dropout_masks_of_ours_are_checked():
    from bench.layer_norm import our_add, plain_add

    def inputs(generator):
        draw = {"generator": generator}
        rows = {name: torch.randn(2, 3, 16, **draw) for name in ("x", "residual")}
        return rows | {"weight": torch.ones(16), "bias": torch.zeros(16)}

    def other_mask(x, p, key):
        return our_add(x, p, key + torch.tensor([0, 1, 0]))

    assert run_op(Op(inputs, plain_add, our_add, {}, 0.5))[OURS]["status"] == "timed"
    assert run_op(Op(inputs, plain_add, other_mask, {}, 0.5))[OURS]["status"] == "failed"


def test_a_breach_on_one_draw_is_held_over_more_of_them():
    drawn = []

    def inputs(generator):
        drawn.append(generator.initial_seed())
        return {"x": torch.ones(64)}

    def plain(x, p, key):  # float64 is exact; the first draw is a lucky one
        rounding = 1e-5 if len(drawn) == 1 else 1e-4
        return x["x"] + rounding * (x["x"].dtype == torch.float32)

    def ours(factor):
        return lambda x, p, key: x["x"] + factor * (plain(x, p, key) - x["x"])

    assert run_op(Op(inputs, plain, ours(1), {}), FORWARD)[OURS]["status"] == "timed"
    assert drawn == [1337]
    drawn.clear()
    unlucky = lambda x, p, key: x["x"] + 3e-5  # noqa: E731
    assert run_op(Op(inputs, plain, unlucky, {}), FORWARD)[OURS]["status"] == "timed"
    assert drawn == [*range(1337, 1337 + 16)]
    drawn.clear()
    assert run_op(Op(inputs, plain, ours(3), {}), FORWARD)[OURS]["status"] == "failed"
    assert len(drawn) == 16


@pytest.mark.parametrize(("times", "passed"), [(7, True), (9, False)])
def test_a_peer_may_be_off_by_eight_times_plain_pytorch(times, passed):
    exact = {"o0": torch.ones(20, dtype=torch.float64)}
    plain, peer = ({"o0": torch.ones(20) + k * 1e-4} for k in (1, times))
    assert check_tensors(peer, plain, exact, ours=False).passed == passed


def test_a_peer_with_its_own_weights_is_compared_where_names_agree():
    exact = {"o0": torch.ones(20, dtype=torch.float64), "dw": torch.ones(3, dtype=torch.float64)}
    plain = {name: tensor.float() for name, tensor in exact.items()}
    check = check_tensors({"o0": torch.ones(20), "dother": None}, plain, exact, ours=False)
    assert check.passed


@pytest.mark.parametrize("name", ["first", "last"])
def test_what_is_not_a_number_is_reported(name):
    exact = {"first": torch.ones(3, dtype=torch.float64), "last": torch.ones(3).double()}
    plain = {name: tensor.float() for name, tensor in exact.items()}
    check = check_tensors(plain | {name: plain[name] * math.nan}, plain, exact, ours=True)
    assert not check.passed and check.text == "nanx plain"


def test_sweeps_share_the_point_in_their_middle():
    points = sweep_points({"T": (1, 2), "B": (4, 8)}, B=4, T=2)
    assert points == [
        (("T",), {"B": 4, "T": 1}),
        (("T", "B"), {"B": 4, "T": 2}),
        (("B",), {"B": 8, "T": 2}),
    ]


# ---- records and tables ----------------------------------------------------------------------


def test_a_record_survives_writing_and_reading(tmp_path):
    record = recording.new(["step", "--quick"], CPU)
    case, _ = run(a_case(contestant(OURS), contestant("peer"), sweeps=("T",)))
    record["questions"]["step"] = {"cases": [case], "left_out": [], "ceilings": CEILINGS}
    path = tmp_path / "deep" / "record.json"
    recording.write(record, path)
    again = recording.read(path)
    assert again["command"] == "python -m bench step --quick"
    assert {"device", "versions", "cpu"} <= set(again["environment"])
    assert again["environment"]["threads"] == torch.get_num_threads()
    assert {"revision", "dirty"} == set(again["git"]) and again["date"].endswith("+00:00")
    samples = again["questions"]["step"]["cases"][0]["results"][0]["samples_ms"]
    wanted = case["results"][0]["samples_ms"]
    assert samples == pytest.approx(wanted, rel=1e-5)
    text = render.case_text(again["questions"]["step"]["cases"][0])
    assert OURS in text and "peer" in text
    recording.write(again, path)  # numbers are rounded once, not again
    assert recording.read(path) == again
    assert not list(path.parent.glob("*.partial"))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_revision_is_the_last_commit_and_dirty_if_code_differs_from_it(monkeypatch, tmp_path):
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setattr(recording, "ROOT", tmp_path)
    assert recording.revision() == {"revision": None, "dirty": None}
    git("init")
    code, result = tmp_path / "code.py", tmp_path / "bench" / "results" / "cpu.json"
    result.parent.mkdir(parents=True)
    for text in ("first", "second"):
        code.write_text(text)
        result.write_text(text)
        git("add", ".")
        git("commit", "-m", text)
    last = git("log", "-1", "--format=%H")
    for path, dirty in ((tmp_path / "notes", False), (result, False), (code, True)):
        path.write_text("third")
        assert recording.revision() == {"revision": last, "dirty": dirty}


@pytest.mark.parametrize("said", ["570.86.10\n570.86.10\n", "", None])
def test_the_driver_s_version_is_what_nvidia_smi_says(said, monkeypatch):
    def run(command, **_):
        if said is None:
            raise FileNotFoundError(command[0])
        return types.SimpleNamespace(stdout=said)

    monkeypatch.setattr(recording.subprocess, "run", run)
    assert recording.driver_version() == ("570.86.10" if said else None)


def test_what_peers_run_without_is_said(monkeypatch, capsys):
    assert recording.environment(CPU)["allocator_variables"] == []
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("LD_PRELOAD", "")
    record = recording.new([], CPU)
    assert record["environment"]["allocator_variables"] == ["LD_PRELOAD", "MALLOC_ARENA_MAX"]
    asking.show_environment(record)
    assert "WARNING: LD_PRELOAD, MALLOC_ARENA_MAX set: peers" in capsys.readouterr().out


def test_a_command_line_names_no_folder_of_this_machine():
    words = ["step", "--nanogpt", "/home/someone/nanoGPT", "--json=/tmp/x/out.json", "--plot", "p"]
    wanted = "python -m bench step --nanogpt nanoGPT --json=out.json --plot p"
    assert recording.command_line(words) == wanted


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}', "{"])
def test_other_files_are_no_records(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be"):
        recording.read(path)


def test_growth_says_whether_cost_grows_as_it_should():
    def point(T, ms):
        result = {"name": OURS, "status": "timed", "median_ms": ms}
        return {
            "sweeps": ["T"],
            "shape": {"T": T, "kind": "core", "p": 0.0},
            "phase": FORWARD,
            "limit_ms": T * T / 1e4,
            "results": [result],
        }

    text = render.growth_text([point(512, 3.0), point(256, 1.0)], OURS)
    assert text == "core forward: T 256 -> 512 (x2): time x3.00, least time x4.00"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1,234"), (12.345, "12.3"), (0.012345, "0.0123"), (9.999, "10.00")],
)
def test_quantities_have_three_digits(value, text):
    assert render.quantity(value) == text

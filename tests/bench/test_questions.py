"""Every question: its cases can be listed for nothing, and a tiny one can be answered."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from bench import kernels, memory, models, peers
from bench import record as recording
from bench.__main__ import QUESTIONS
from bench.conftest import QUESTIONS as PYTEST_QUESTIONS
from bench.harness import OURS, Contestant, Options, Skip, distinct, run_case
from bench.record import ROOT
from bench.run import broken, options_of, peers_of
from bench.timing import Stopwatch
from gptcore.config import GPTConfig, TrainConfig
from gptcore.model import GPT
from kernels import backend
from kernels.budgets import CASES
from kernels.codegen import measurements
from kernels.gpus import product

CPU = torch.device("cpu")
CEILINGS = {"copy_gbps": 10.0, "matmul_tflops": 0.1, "dispatch_us": 5.0}
OPTIONS = Options(device=CPU, dtype=torch.float32, seconds=1.0, quick=True)
TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.0)
CASED = [name for name in QUESTIONS if name not in ("time_to_loss", "ablation", "kernels")]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_states_question_method_and_formula(name):
    text = importlib.import_module(f"bench.{name}").__doc__
    assert all(f"\n{word}\n" in text for word in ("Question", "Method", "Formula"))


@pytest.mark.parametrize("name", CASED)
def test_cases_are_listed_without_opening_them(name, monkeypatch):
    monkeypatch.setattr(torch, "randn", None)
    cases = distinct(importlib.import_module(f"bench.{name}").cases(OPTIONS))
    assert cases and any(case.quick for case in cases)
    assert all(case.work.flops > 0 and case.work.bytes > 0 for case in cases)
    assert len({case.name for case in cases}) == len(cases)
    swept = {axis for case in cases for axis in case.sweeps}
    for axis in swept:
        assert len({case.shape[axis] for case in cases if axis in case.sweeps}) > 1


OPS = ("attention", "layer_norm", "mlp", "cross_entropy", "embedding")


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_checked_and_timed(name):
    """The smallest case of the question, everyone who can run in float32 on a CPU."""
    cases = importlib.import_module(f"bench.{name}").cases(OPTIONS)
    case = min(cases, key=lambda case: case.work.flops)
    record = run_case(case, OPTIONS, Stopwatch(CPU, cache_bytes=0), CEILINGS, seconds=0.0)
    status = {result["name"]: result["status"] for result in record["results"]}
    assert status[OURS] == status["eager"] == "timed"
    assert "failed" not in status.values(), record["results"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_measures_both_ways_of_linear_act(device):
    from bench import mlp

    cases = mlp.cases(dataclasses.replace(OPTIONS, device=torch.device(device)))
    contestants = {name for case in cases for name in case.contestants}
    assert contestants & set(mlp.WAYS) == (set(mlp.WAYS) if device == "cuda" else set())
    assert all(name.split("-")[0] in peers.PEERS for name in mlp.WAYS)


def test_ways_of_linear_act_are_what_their_names_say():
    from bench import mlp
    from kernels import backend

    shapes = {"x": (2, 8), "weight": (4, 8), "bias": (4,)}
    x = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = {}
    for name, plan in mlp.WAYS.items():
        launches = []
        with backend.recording(lambda *launch, to=launches: to.append(launch), "sm_90"):
            mlp.by(plan, "gelu")(x, 0.0)
        found[name] = ["x".join(str(l[3][f"BLOCK_{b}"]) for b in "MNK") for l in launches]
    assert found.pop("linear_act-library") == []
    assert found == {name: [name.removeprefix("linear_act-")] for name in found}


@pytest.mark.parametrize("damaged", [False, True])
def test_an_update_is_checked_and_timed(monkeypatch, damaged):
    from bench import muon

    monkeypatch.setattr(muon, "SIZES", {"nanogpt-cpu": (1, 2, 16)})
    if damaged:
        monkeypatch.setattr("gptcore.muon.COEFFICIENTS", (3.4445, -4.7750, 2.04))
    (case,) = muon.cases(OPTIONS)
    record = run_case(case, OPTIONS, Stopwatch(CPU, cache_bytes=0), CEILINGS, seconds=0.0)
    status = {result["name"]: result["status"] for result in record["results"]}
    assert status == {OURS: "failed" if damaged else "timed", "torch": "timed"}


def test_work_is_what_counting_by_hand_gives():
    """FLOPs, and bytes: elements of the tensors in the order of each docstring, times their size.

    attention: a tensor of 120 numbers, 10 pairs of query and key for each of 6 heads.
    """
    from bench import attention, cross_entropy, embedding, layer_norm, mlp
    from bench.ops import FORWARD, TRAINING

    core, layer = attention.attention_work, attention.layer_work
    norm, loss = layer_norm.norm_work, cross_entropy.loss_work
    head, embed, linear = cross_entropy.head_work, embedding.embedding_work, mlp.mlp_work
    found = {
        "core": core(2, 3, 4, 5, 2, FORWARD),
        "core, both": core(2, 3, 4, 5, 2, TRAINING),
        "layer": layer(2, 3, 4, 5, 2, FORWARD),
        "layer, both": layer(2, 3, 4, 5, 2, TRAINING),
        "norm": norm(1, 2, 3, 4, FORWARD, add=False),
        "norm, both": norm(1, 2, 3, 4, TRAINING, add=False),
        "add": norm(1, 2, 3, 4, FORWARD, add=True),
        "add, both": norm(1, 2, 3, 4, TRAINING, add=True, p=0.1),
        "add, both, p=0": norm(1, 2, 3, 4, TRAINING, add=True),
        "mlp": linear(1, 2, 3, 4, FORWARD),
        "mlp, both": linear(1, 2, 3, 4, TRAINING),
        "loss": loss(2, 3, 4, FORWARD),
        "loss, both": loss(2, 3, 4, TRAINING),
        "head": head(2, 3, 5, 4, FORWARD),
        "head, both": head(2, 3, 5, 4, TRAINING),
        "embed": embed(2, 3, 4, 10, 4, FORWARD),
        "embed, both": embed(2, 3, 4, 10, 4, TRAINING),
        "embed, few rows": embed(2, 3, 4, 5, 4, FORWARD),
    }
    products = 2 * 8 * 4 * 15 * 15
    assert {name: (work.flops, work.bytes) for name, work in found.items()} == {
        "core": (2 * 2 * 5 * 10 * 6, 4 * 120 * 2),
        "core, both": (7 * 2 * 5 * 10 * 6, 12 * 120 * 2 + 2 * 24 * 4),
        "layer": (1200 + products, (120 + 3 * 120 + 120 + 120 + 4 * 225) * 2),
        "layer, both": (4200 + 3 * products, 3 * (6 * 120 + 4 * 225) * 2),
        "norm": (8 * 6, (6 + 6) * 4),
        "norm, both": (24 * 6, (2 + 3) * 6 * 4),
        "add": (8 * 6, 4 * 6 * 4),
        "add, both": (24 * 6, (4 + 5) * 6 * 4),
        "add, both, p=0": (24 * 6, (4 + 4) * 6 * 4),
        "mlp": (2 * 2 * 3 * 12, (6 + 36 + 24) * 4),
        "mlp, both": (6 * 2 * 3 * 12, 3 * (6 + 36 + 24) * 4),
        "loss": (5 * 6, 6 * 4),
        "loss, both": (15 * 6, 3 * 6 * 4),
        "head": (2 * 2 * 3 * 5, (6 + 15) * 4),
        "head, both": (6 * 2 * 3 * 5, 3 * (6 + 15) * 4),
        "embed": (2 * 24, (24 + 6 * 4 + 12) * 4 + 8 * 6),
        "embed, both": (4 * 24, (24 + 6 * 4 + 12 + 24 + 10 * 4 + 12) * 4 + 2 * 8 * 6),
        "embed, few rows": (2 * 24, (24 + 5 * 4 + 12) * 4 + 8 * 6),
    }


def test_without_dropout_one_gradient_serves_two_inputs():
    from bench.layer_norm import cases

    (dropped, kept) = (
        next(c for c in cases(OPTIONS) if c.name == f"add B4-T256-C384 p={p} forward+backward")
        for p in ("0.2", "0")
    )
    assert dropped.work.bytes - kept.work.bytes == 4 * 256 * 384 * 4


def test_multihead_attention_is_told_that_its_mask_is_causal(monkeypatch):
    from bench import attention

    masks, right = [], torch.nn.functional.scaled_dot_product_attention

    def sdpa(q, k, v, attn_mask, dropout_p, is_causal):
        masks.append((attn_mask, is_causal))
        return right(q, k, v, attn_mask, dropout_p, is_causal)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    x = {"x": torch.randn(1, 4, 64), "w_qkv": torch.randn(192, 64), "w_out": torch.randn(64, 64)}
    attention.multihead_attention(x, 0.0).forward()
    assert masks == [(None, True)]


def test_a_peer_that_writes_into_its_logits_has_its_own_and_copies_nothing_when_timed(monkeypatch):
    from bench import cross_entropy, peers

    seen = []

    class InPlace(torch.autograd.Function):
        """As Liger's: the gradient of logits (N, V) takes their place."""

        @staticmethod
        def forward(ctx, logits, targets, _):
            seen.append(logits.data_ptr())
            loss = torch.nn.functional.cross_entropy(logits, targets)
            gradient = logits.softmax(-1)
            gradient[torch.arange(len(targets)), targets] -= 1
            logits.data.copy_(gradient / len(targets))
            ctx.save_for_backward(logits.detach())
            return loss, None

        @staticmethod
        def backward(ctx, dloss, _):
            return ctx.saved_tensors[0] * dloss, None, None

    monkeypatch.setattr(peers, "liger", lambda *_: InPlace)
    options = dataclasses.replace(OPTIONS, peers=("liger",))
    case = next(c for c in cross_entropy.cases(options) if c.name.startswith("loss N512-V65"))
    ours, liger = case.open()
    assert liger.check().passed
    seen.clear()
    call = liger.start()
    call(), call()
    assert seen[0] == seen[1] and ours.check().passed


def test_the_layer_lets_multihead_attention_and_the_seeds_compete():
    from bench import attention

    options = dataclasses.replace(OPTIONS, peers=("naive", "mha", "sdpa", "eager"))
    (case,) = [c for c in attention.cases(options) if "layer" in c.name and "backward" in c.name]
    checks = {c.name: c.check() for c in case.open()}
    assert set(checks) == {OURS, "eager", "naive", "sdpa", "mha"}
    assert all(check.passed for check in checks.values())


def test_peak_memory_is_what_was_held_at_once():
    def call():
        a = torch.ones(1000, dtype=torch.float32)  # 4 kB
        b = a + 1
        del a, b
        c = torch.ones(500, dtype=torch.float32)
        return c.sum()

    assert 8000 <= memory.peak_bytes(call, CPU) <= 8200


def test_peak_memory_of_a_gpu_is_what_its_allocator_held_beyond_what_it_held_before(monkeypatch):
    held = {"now": 1000, "peak": 9000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: held.update(peak=1000))
    call = lambda: held.update(now=1200, peak=max(1500, held["peak"]))  # noqa: E731
    assert memory.peak_bytes(call, torch.device("cuda")) == 500


@pytest.mark.parametrize(("device", "held"), [("cpu", 100), ("cuda", 900)])
def test_memory_is_that_of_an_update_like_those_that_are_timed(device, held, monkeypatch):
    """The optimizer's state comes first; the fourth, on CUDA captured, asks for all that counts."""
    needs, asked = [5000, 500, 500, 900, 300, 100], []

    def peak_bytes(call, where):
        before = len(asked)
        call()
        return max(asked[before:])

    monkeypatch.setattr(memory, "peak_bytes", peak_bytes)
    call = lambda: asked.append(needs[len(asked)])  # noqa: E731
    assert memory.warm_peak_bytes(call, 5, torch.device(device)) == held
    assert asked == needs
    assert memory.warm_peak_bytes(lambda: asked.append(7), 1, torch.device(device)) == 7


def test_between_updates_nobody_holds_gradients():
    model = GPT(TINY)
    batch = tuple(torch.arange(16).view(2, 8) for _ in range(2))
    models.naive_step(model, TrainConfig(), batch, OPTIONS)()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generation_reads_all_weights_for_every_new_token():
    """nanogpt-char: six layers of 12 C x C, the head tied to 65 tokens, 256 positions, 13 norms."""
    from bench.generate import cases

    matrices = 6 * 12 * 384**2 + 65 * 384
    weights = matrices + 256 * 384 + 13 * 384
    for case in cases(dataclasses.replace(OPTIONS, dtype=torch.bfloat16)):
        B, new = case.shape["B"], case.shape["N"]
        assert case.work.flops == 2 * matrices * B * (16 + new)
        assert (case.work.bytes, case.work.tokens) == (2 * weights * new, B * new)


def test_greedy_tokens_are_checked_against_float64():
    from bench.generate import PROMPT, check_tokens, notebook_loop

    torch.manual_seed(0)
    source = GPT(TINY.replace(block_size=32)).eval()
    prompt = torch.randint(TINY.vocab_size, (2, PROMPT))
    tokens = notebook_loop(source, prompt, 6)
    assert check_tokens(tokens, source, torch.float32).passed
    tokens[1, PROMPT + 3] = (tokens[1, PROMPT + 3] + 1) % TINY.vocab_size
    assert not check_tokens(tokens, source, torch.float32).passed


@pytest.mark.parametrize(("short", "passed"), [(0.03, True), (0.05, False)])
def test_a_token_may_fall_short_by_four_times_the_rounding(short, passed, monkeypatch):
    from bench.generate import PROMPT, check_tokens

    exact = torch.tensor([0, 1, 1 - short], dtype=torch.float64).expand(1, PROMPT + 1, 3)
    monkeypatch.setattr(models, "reference_logits", lambda *_: (exact + 0.01, exact))
    tokens = torch.full((1, PROMPT + 2), 2)
    assert check_tokens(tokens, None, torch.float32).passed == passed


def test_memory_of_peers_that_time_themselves_is_measured_here(monkeypatch):
    from bench import step

    fields = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8}
    options = dataclasses.replace(OPTIONS, data="pydoc", peers=("naive",))
    case = step.step_case(step.Size("tiny", "baby-cpu", fields), options, shape={"kind": "step"})
    monkeypatch.setattr(memory, "cases", lambda options: [case])
    content = memory.answer(options, None, None, None)
    peaks = content["peaks_mb"]["step"]["8"]
    assert not content["absent"] and peaks.keys() == {OURS, "naive"} and min(peaks.values()) > 0


@pytest.mark.parametrize("name", [OURS, "peer"])
def test_memory_that_broke_fails_the_run_if_it_is_ours(name, monkeypatch):
    def broke():
        raise ValueError("no such shape")

    contestants = [Contestant(name, start=lambda: broke, check=None)]
    case = types.SimpleNamespace(shape={"kind": "core", "T": 8}, open=lambda: contestants)
    monkeypatch.setattr(memory, "cases", lambda options: [case])
    content = memory.answer(OPTIONS, None, None, None)
    assert content["absent"] == {name: "ValueError: no such shape"}
    failures = [f"memory: {OURS}: ValueError: no such shape"] if name == OURS else []
    assert broken({"questions": {"memory": content}}) == failures


# ---- kernels ---------------------------------------------------------------------------------


def small_case(op, name):
    shipped = next(case for case in CASES if case.op == op)
    sizes = {word[0]: int(word[1:]) for word in name.split("-")}
    return dataclasses.replace(shipped, name=name, sizes=sizes, dtype=torch.float32)


def test_kernel_times_are_what_codegen_reads(monkeypatch, tmp_path):
    """Interpreted launches of two cases under a fake timer, through the record, into codegen."""
    pytest.importorskip("triton", reason="needs triton")
    if not backend.interpreting():
        pytest.skip("launches on CPU tensors")
    cases = [small_case("rotary_qkv", "B1-T4-H2-D16"), small_case("layer_norm", "M4-C16")]
    monkeypatch.setattr(kernels, "CASES", cases)
    monkeypatch.setattr(backend, "resolve", lambda *_: "triton")
    restarted = []

    def timer(launch, rounds):
        before = [a.clone() for a in launch.args if isinstance(a, torch.Tensor)]
        kernels.restart(launch)()
        after = [a for a in launch.args if isinstance(a, torch.Tensor)]
        assert all(map(torch.equal, before, after))  # it did run, and again does the same
        restarted.append(launch.name)
        return [3.0, 1.0, 2.0 + len(restarted)]

    options = dataclasses.replace(OPTIONS, seconds=600.0)
    content = kernels.answer(options, None, CEILINGS, None, timer)
    assert not content["absent"] and restarted[:2] == ["_rotary_kernel"] * 2
    recording.write({"kernel_times": content["kernel_times"]}, tmp_path / "gpu.json")
    measured = measurements(tmp_path)
    rotary = [("CPU", "rotary_qkv", "B1-T4-H2-D16", "_rotary_kernel", i) for i in range(2)]
    assert [measured[key] for key in rotary] == [3.0, 3.0]
    assert len(measured) == len(restarted) == len(content["tables"][0]["rows"]) - 1
    assert {key[1] for key in measured} == {"rotary_qkv", "layer_norm"}


def test_a_kernel_that_the_profile_lacks_is_absent_and_the_rest_goes_on(monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    if not backend.interpreting():
        pytest.skip("launches on CPU tensors")
    monkeypatch.setattr(kernels, "CASES", [small_case("rotary_qkv", "B1-T4-H2-D16")])
    monkeypatch.setattr(backend, "resolve", lambda *_: "triton")
    content = kernels.answer(OPTIONS, None, CEILINGS, None, lambda *_: [])
    (reason,) = content["absent"].values()
    assert "_rotary_kernel must show in the profile" in reason
    assert content["kernel_times"] == []
    assert broken({"questions": {"kernels": content}}) == [
        f"kernels: {(*content['absent'],)[0]}: {reason}"
    ]


def test_without_a_gpu_kernels_say_so(capsys):
    content = kernels.answer(OPTIONS, None, CEILINGS, None)
    assert "kernel_times" not in content and "runs on a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("lost, found", [(0, 3), (2, 3), (20, 3), (47, 1), (60, 0)])
def test_a_profile_that_lacks_its_first_records_is_made_up_for(lost, found, monkeypatch):
    """What comes back are the last launches, as many as rounds if a profile has them."""
    launched = []

    class Profile:
        def __init__(self, **_):
            self.first = len(launched)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            for us in launched[self.first + lost :]:
                took = types.SimpleNamespace(elapsed_us=lambda us=us: us)
                of_kernel = {"device_type": kernels.DeviceType.CUDA, "name": "_kernel"}
                yield types.SimpleNamespace(time_range=took, **of_kernel)

    monkeypatch.setattr(kernels, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(kernels, "restart", lambda _: lambda: launched.append(len(launched)))
    launch = types.SimpleNamespace(name="_kernel")
    times = kernels.profiled(Stopwatch(CPU, cache_bytes=0))(launch, 3)
    assert times == launched[len(launched) - found :]


@pytest.mark.gpu
def test_the_profiler_times_a_launch(device):
    case = small_case("layer_norm", "M4096-C384")
    timer = kernels.profiled(Stopwatch(device))
    times = kernels.kernel_times(case, "this", device, timer, rounds=5)
    assert times and all(len(t["samples_us"]) == 5 and 0 < t["us"] < 1e4 for t in times)


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB"),
        ("NVIDIA RTX A1000", "NVIDIA RTX A1000"),
    ],
)
def test_a_driver_s_name_means_a_product(name, known):
    assert product(name) == known


# ---- options ---------------------------------------------------------------------------------


def test_the_longest_search_of_a_compiler_is_asked_for_by_name():
    """On a GPU it would take the seconds of all other cases."""
    gpu = dataclasses.replace(OPTIONS, device=torch.device("cuda"), quick=False)
    assert callable(peers.compiled(print, "default", gpu))
    with pytest.raises(Skip, match="ask for it: --full or --peers compile-max"):
        peers.compiled(print, "max-autotune", gpu)
    assert callable(peers.compiled(print, "max-autotune", dataclasses.replace(gpu, full=True)))


def test_a_peer_stands_for_its_family():
    options = dataclasses.replace(OPTIONS, peers=("sdpa", "compile-max"))
    names = ("sdpa", "sdpa-flash", "compile-max", "compile-default", "naive")
    assert [n for n in names if options.wants(n)] == ["sdpa", "sdpa-flash", "compile-max"]
    assert dataclasses.replace(OPTIONS, peers=()).wants("naive") is False


def test_peers_come_with_spaces_or_commas():
    assert peers_of(["naive,eager", "sdpa"]) == ("naive", "eager", "sdpa")
    assert peers_of(["none"]) == ()
    assert set(peers_of(["all"])) >= {"naive", "compile", "nanogpt"}


def test_defaults_follow_the_device():
    options = options_of({"device": "cpu"}, None)
    assert (options.dtype, options.seconds, options.quick) == (torch.float32, 300, False)
    assert options_of({"device": "cpu", "quick": True}, None).seconds == 48


def test_pytest_bench_asks_questions_that_exist():
    assert set(PYTEST_QUESTIONS) <= set(QUESTIONS)


def test_pytest_bench_times_what_the_stopwatch_says(tmp_path):
    """Which reads a GPU's events and hears of processes, and here says a second a sample."""
    plugin = """
from bench.timing import Stopwatch

Stopwatch.sample = lambda self, call, calls=1, cold=True: 1000.0
"""
    (tmp_path / "stopped.py").write_text(plugin)
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "stopped", "-p", "no:xdist"]
    command += ["-k", "baby-cpu and (gptcore or naive)", "--bench-device", "cpu"]
    command += [f"--benchmark-json={tmp_path / 'times.json'}"]
    # Its parent's worker, if it has one, is not its own: under xdist nothing is timed.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PYTEST")}
    environment["PYTHONPATH"] = path
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    timed = json.loads((tmp_path / "times.json").read_text())["benchmarks"]
    assert [entry["stats"]["mean"] for entry in timed] == [1.0, 1.0]

"""The certificate: its rule, its checks, its command line, and that it can fail."""

import contextlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import backend, checks, damages, problems, verify
from kernels.verify import Comparison, compare

verify.load_plugins()  # before a test replaces an op that they import
CPU = torch.device("cpu")
EAGER = checks.Settings(CPU, ("eager",), ("float32",), full=False, seed=0)


# The rule -------------------------------------------------------------------------------------


def noisy(reference, size, seed=0):
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed))
    return (reference + size * noise).float()


def test_the_rule_allows_twice_the_plain_error_and_no_more():
    reference = torch.randn(1000, generator=torch.Generator().manual_seed(9)).double()
    plain = noisy(reference, 1e-4)
    assert compare("x", noisy(reference, 1.9e-4), plain, reference).passed
    assert not compare("x", noisy(reference, 2.1e-4), plain, reference).passed


def test_the_rule_sees_one_wrong_element_and_a_small_bias():
    reference = torch.randn(1000, generator=torch.Generator().manual_seed(9)).double()
    plain = noisy(reference, 1e-4)
    one_wrong = plain.clone()
    one_wrong[3] += 0.002  # too little for the RMS, as the bias is for the maximum
    assert not compare("x", one_wrong, plain, reference).passed
    assert not compare("x", plain + 3e-4, plain, reference).passed


def test_where_plain_pytorch_is_exact_one_rounding_is_allowed():
    eps = torch.finfo(torch.float32).eps

    def passed(size, error):
        ones, actual = torch.ones(size), torch.ones(size)
        actual[0] += error
        return compare("x", actual, ones, ones.double()).passed

    assert passed(16, -eps / 2) and not passed(16, eps)
    assert passed(15, 2 * eps) and not passed(15, 3 * eps)


def test_nan_and_infinity_fail():
    reference = torch.ones(20, dtype=torch.float64)
    plain = torch.ones(20)
    for bad in (math.nan, math.inf):
        actual = plain.clone()
        actual[7] = bad
        comparison = compare("x", actual, plain, reference)
        assert not comparison.passed
        assert comparison.figures[0] != comparison.figures[1]


def test_figures_are_those_of_the_norm_with_the_least_room():
    comparison = Comparison("x", 1.0, 3.0, 1.0, 1.0, 0.5, 0.5)
    assert comparison.figures == (3.0, 1.0, 2.5)


@pytest.mark.parametrize(
    "actual, plain, reference, message",
    [
        (torch.ones(2), torch.ones(3), torch.ones(3).double(), "shapes must agree"),
        (torch.ones(3), torch.ones(3), torch.ones(3), "reference must be float64"),
        (torch.ones(3).half(), torch.ones(3), torch.ones(3).double(), "dtypes agree"),
    ],
)
def test_compare_refuses(actual, plain, reference, message):
    with pytest.raises(ValueError, match=message):
        compare("x", actual, plain, reference)


# The pieces -----------------------------------------------------------------------------------


def test_shapes_are_read_from_their_names():
    shape = problems.read_shape("B2-T65-Tk70-D16-p0.25-nobias-relu2-none")
    assert shape == {
        "B": 2,
        "T": 65,
        "Tk": 70,
        "D": 16,
        "p": 0.25,
        "bias": False,
        "activation": "relu2",
        "reduction": "none",
    }


def test_sizes_grow_with_what_the_machine_can_do():
    """Beside those drawn: six with --full, else one."""
    op = "causal_attention"
    shapes = problems.SHAPES[op]
    quick, full, large, blocks = map(set, (shapes.quick, shapes.full, shapes.large, shapes.blocks))
    for arguments, expected, drawn in (
        ((False, False, 0, "float32"), quick, 1),
        ((False, False, 0, "float16"), {shapes.quick[0]}, 1),
        ((True, False, 0, "float16"), quick | full, 6),
        ((False, True, 0, "float16"), quick | full | blocks, 1),
        ((True, True, 0, "float16"), quick | full | blocks, 6),
        ((True, True, 0, "float32"), quick | full | blocks | large, 6),
        ((True, True, 0, "float16", True), quick | full | blocks | large, 6),
    ):
        names = problems.problem_names(op, *arguments)
        assert expected <= set(names) and len(names) == len(expected) + drawn


@pytest.mark.parametrize("op", problems.SHAPES)
def test_a_seed_repeats_shapes_and_inputs(op):
    names = problems.problem_names(op, False, True, 5, "float32")
    assert names == problems.problem_names(op, False, True, 5, "float32")
    assert names != problems.problem_names(op, False, True, 6, "float32")
    first, again = (problems.build_problem(op, names[0], "float32", CPU, 5) for _ in range(2))
    assert checks.bit_equal(first.inputs, again.inputs) == []
    other = problems.build_problem(op, names[0], "float32", CPU, 6)
    assert checks.bit_equal(first.inputs, other.inputs) != []


def test_poisoned_memory_is_nan_and_the_settings_come_back():
    before = torch.are_deterministic_algorithms_enabled()
    with checks.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_strided_copies_have_the_values_and_not_the_layout():
    tensors = {"a": torch.randn(4, 6), "b": torch.randn(3, 4, 5)}
    views = checks.strided(tensors)
    assert checks.bit_equal(tensors, views) == []
    assert not any(view.is_contiguous() for view in views.values())


def test_bits_tell_zeros_apart_and_nan_equals_itself():
    a = {"x": torch.tensor([0.0, math.nan])}
    assert checks.bit_equal(a, {"x": a["x"].clone()}) == []
    assert checks.bit_equal(a, {"x": torch.tensor([-0.0, math.nan])}) == ["x"]


@pytest.mark.parametrize(
    "errors, drawn, passed",
    [
        ([(1, 1)], 0, True),
        ([(1, 0.4), (1, 1), (1, 1)], 2, True),  # plain PyTorch had luck, once
        ([(3, 1), (3, 1), (3, 1)], 2, False),
        ([(1, 0.4), (1, 1), (4, 1)], 2, False),
        ([(1, 0.4), (1, 1), (2.1, 1)], 2, True),  # the largest of all alone would fail
        ([(11, 1)], 0, False),
        ([(math.nan, 1)], 0, False),
    ],
    ids=("fine", "luck", "lasting", "not by the first alone", "one large", "gross", "NaN"),
)
def test_a_breach_must_last_over_all_draws(errors, drawn, passed):
    """Errors of the op and of plain PyTorch in thousandths, the same in both norms."""
    generator = torch.Generator().manual_seed(0)

    def draw(errors):
        signs = torch.randn(100, generator=generator).sign().double()
        fused, plain = (signs * (1 + 1e-3 * error) for error in errors)
        return {"y": fused.float()}, {"y": plain.float()}, {"y": signs}

    first, *others = map(draw, errors)
    rest = iter(others)
    (comparison,) = checks.hold_rule(first, rest)
    assert comparison.passed == passed
    assert len(list(rest)) == len(others) - drawn


# Checks that must fail ------------------------------------------------------------------------


def failures(op, settings=EAGER):
    part = checks.parts(op, settings)[0]
    return {result.check for result in checks.part_results(part, settings) if not result.passed}


def test_intact_ops_have_no_failures():
    assert failures("layer_norm") == set()
    assert failures("dropout_keep_mask") == set()


def test_an_op_that_writes_its_input_is_caught(monkeypatch):
    def damaged(x, weight, bias=None, **options):
        x.data.add_(1)
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias)

    monkeypatch.setattr(kernels, "layer_norm", damaged)
    assert "inputs untouched" in failures("layer_norm")


def test_an_op_that_varies_is_caught(monkeypatch):
    def damaged(x, weight, bias=None, **options):
        y = torch.nn.functional.layer_norm(x, weight.shape, weight, bias)
        return y * (1 + 1e-7 * torch.rand(()))

    monkeypatch.setattr(kernels, "layer_norm", damaged)
    assert "rerun bit-identical" in failures("layer_norm")


def test_an_op_that_assumes_contiguous_inputs_is_caught(monkeypatch):
    def damaged(x, weight, bias=None, **options):
        x = torch.as_strided(x, x.shape, (x.shape[-1], 1))
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias)

    monkeypatch.setattr(kernels, "layer_norm", damaged)
    assert failures("layer_norm") == {"strided inputs"}


def test_an_op_that_leaves_memory_unwritten_is_caught(monkeypatch):
    def damaged(x, weight, bias=None, **options):
        y = torch.nn.functional.layer_norm(x, weight.shape, weight, bias)
        hole = torch.empty_like(y)
        return torch.cat((y[:-1], y[-1:] + 0 * hole[-1:]))

    monkeypatch.setattr(kernels, "layer_norm", damaged)
    assert "accuracy" in failures("layer_norm")


def test_attention_that_sees_the_future_is_caught(monkeypatch):
    def damaged(q, k, v, **options):
        return torch.softmax(q @ k.mT, -1) @ v

    monkeypatch.setattr(kernels, "causal_attention", damaged)
    results = checks.check_causality(EAGER, "eager", "float32")
    assert [result.passed for result in results] == [False, False]


def test_attention_that_ignores_a_token_is_caught(monkeypatch):
    monkeypatch.setattr(kernels, "causal_attention", lambda q, k, v, **options: 0 * (q + k + v))
    causality, _ = checks.check_causality(EAGER, "eager", "float32")
    assert not causality.passed


def test_a_gradient_that_overflows_is_caught(monkeypatch):
    """The square root of 0 has none."""
    op = kernels.causal_attention

    def damaged(q, k, v, **options):
        return op(q, k, v, **options) + 0 * (0 * k).sqrt().sum()

    monkeypatch.setattr(kernels, "causal_attention", damaged)
    monkeypatch.setattr(checks, "problem_names", lambda *_: [])
    assert "huge logits" in failures("causal_attention")


def test_the_mask_of_another_site_is_caught(monkeypatch):
    op = kernels.causal_attention

    def damaged(*tensors, site, **options):
        return op(*tensors, site=site + 1, **options)

    monkeypatch.setattr(kernels, "causal_attention", damaged)
    monkeypatch.setattr(checks, "problem_names", lambda *_: [])
    assert failures("causal_attention") == {"mask bit-equal to scalar Philox"}


def test_an_exception_is_a_failed_result(monkeypatch):
    def damaged(*args, **options):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(kernels, "embed", damaged)
    results = checks.check_part(("embed", "eager", "float32"), EAGER)
    assert {result.check for result in results} == {"runs"}
    assert "no such luck" in results[0].detail


# Damages --------------------------------------------------------------------------------------


def test_every_op_has_two_damages_and_each_applies():
    for op in (*checks.OPS, "GPT"):
        assert sum(damage.op == op for damage in damages.all_damages()) >= 2
    found = [(d.op, d.what, damages.occurrences(d)) for d in damages.all_damages()]
    assert found == [(d.op, d.what, d.count) for d in damages.all_damages()]


def test_a_damage_that_slips_through_fails_the_self_test(monkeypatch, capsys):
    harmless = damages.Damage("layer_norm", "eager", "nothing", "no text", "no text")
    monkeypatch.setattr(damages, "DAMAGES", (harmless,))
    monkeypatch.setattr(damages, "_registered", [])
    monkeypatch.setattr(damages, "try_damage", lambda damage: {})
    assert damages.self_test() == 1
    output = capsys.readouterr().out
    assert "NOT CAUGHT" in output and "1 NOT caught" in output


def test_a_damage_that_does_not_apply_says_so():
    absent = damages.Damage("layer_norm", "eager", "nothing", "no such text", "")
    assert "must occur 1 times" in damages.try_damage(absent)["detail"]


@pytest.mark.parametrize("op", ["layer_norm", "dropout_keep_mask", "GPT"])
def test_a_damage_is_caught(op):
    damage = next(d for d in damages.all_damages() if d.op == op and d.backend == "eager")
    assert "check" in damages.try_damage(damage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", damages.all_damages(), ids=lambda d: f"{d.op}-{d.backend}-{d.what}"
)
def test_all_damages_are_caught(damage):
    assert "check" in damages.try_damage(damage)


# The command ----------------------------------------------------------------------------------


def run(*arguments, **environment):
    """The command, as from a shell in which TRITON_INTERPRET is not set."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment)


@pytest.mark.parametrize(
    "arguments, known",
    [
        (["--ops", "attention"], "causal_attention"),
        (["--ops", "gpt", "--self-test"], "causal_attention"),
        (["--dtypes", "float8"], "bfloat16"),
        (["--backend", "cuda"], "triton"),
        (["--quick", "--full"], "exclude"),
        (["--json", "no/such/folder/file.json"], "writable"),
        (["--seed", "x"], "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, known, capsys):
    with pytest.raises(SystemExit) as exit:
        verify.main(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and known in error


@pytest.mark.parametrize(
    "arguments, dtypes, full, seed",
    [
        ([], ("float32", "float16", "bfloat16"), False, 0),
        (
            ["--full", "--dtypes", "float16", "bfloat16", "--seed", "7"],
            ("float16", "bfloat16"),
            True,
            7,
        ),
    ],
    ids=["defaults", "flags"],
)
def test_flags_say_what_is_checked(arguments, dtypes, full, seed, device, monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "certify", lambda *args: asked.append(args) or 0)
    assert verify.main(["--backend", "eager", "--ops", "embed", *arguments]) == 0
    assert asked == [(["embed"], checks.Settings(device, ("eager",), dtypes, full, seed), None)]


def test_the_command_interprets_by_itself_and_writes_json(tmp_path):
    pytest.importorskip("triton", reason="runs Triton kernels")
    path = tmp_path / "certificate.json"
    arguments = ["--ops", "linear_act", "--dtypes", "float32", "--seed", "3"]
    result = run(*arguments, "--json", str(path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all passed" in result.stdout.splitlines()[-1]
    if not torch.cuda.is_available():
        assert "interpreter" in result.stdout.splitlines()[0]
    certificate = json.loads(path.read_text())
    assert certificate["failed"] == 0 and certificate["seed"] == "3"
    accuracy = [row for row in certificate["results"] if row["check"] == "accuracy"]
    assert {row["backend"] for row in accuracy} == {"triton", "eager"}
    names = {comparison["name"] for row in accuracy for comparison in row["comparisons"]}
    assert names == {"y", "dx", "dweight", "dbias"}
    assert all(0 <= c["error_max"] < 1e-5 for row in accuracy for c in row["comparisons"])


def test_the_row_of_an_op_shows_its_worst_tensor(capsys):
    def result(*errors):
        comparisons = [Comparison(n, e, e, 1.0, 1.0, 0.1, 0.1) for n, e in errors]
        return checks.Result("op", "case", "float32", "eager", "accuracy", False, "", comparisons)

    for errors in ([("y", 1.0), ("dx", 3.0)], [("y", 1.0), ("dx", math.nan)]):
        for order in (errors, errors[::-1]):
            verify._print_op("op", [result(*order)])
            (row,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("eager"))
            assert " dx " in row


def test_a_failure_is_exit_code_1(monkeypatch, capsys):
    def damaged(x, weight, bias=None, **options):
        return x * weight if bias is None else x * weight + bias

    monkeypatch.setattr(verify, "_workers", lambda settings: contextlib.nullcontext(map))
    monkeypatch.setattr(kernels, "layer_norm", damaged)
    arguments = ["--ops", "layer_norm", "--backend", "eager", "--dtypes", "float32"]
    assert verify.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED" in lines[-1]
    assert any(line.startswith("FAIL layer_norm eager float32 M33-C96: accuracy") for line in lines)


def test_whole_model_rows_are_there_and_pass():
    assert "GPT" in checks.registered()
    results = checks.check_part(("GPT", "eager", "float32"), EAGER)
    assert len(results) > 3 and all(result.passed for result in results)
    names = {c.name for c in results[0].comparisons}
    assert {"logits", "loss", "dtoken_embedding.weight", "dblocks.0.qkv.weight"} <= names


def test_the_kernels_run_under_pytest_too():
    if not (backend.interpreting() or torch.cuda.is_available()):
        pytest.skip("needs triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = checks.Settings(device, ("triton",), ("float32",), full=False, seed=1)
    results = checks.check_part(("cross_entropy", "triton", "float32"), settings)
    assert all(result.passed for result in results), [r for r in results if not r.passed]


@pytest.mark.gpu
@pytest.mark.parametrize("op", problems.SHAPES)
def test_graphs_replay_on_a_gpu(op):
    problem = problems.build_problem(
        op, problems.SHAPES[op].quick[0], "float16", torch.device("cuda"), 0
    )
    assert all(result.passed for result in checks.check_graph(problem, "triton"))


def test_a_gpu_is_shared_by_as_many_processes_as_its_memory_and_the_cores_allow(monkeypatch):
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 16)
    assert verify._worker_count(torch.device("cpu")) == 16
    for free_gib, count in ((130, 8), (15.9, 3), (1, 1)):
        free = int(free_gib * 2**30), 2**40
        monkeypatch.setattr(verify.torch.cuda, "mem_get_info", lambda device, free=free: free)
        assert verify._worker_count(torch.device("cuda")) == count


def die(part, settings):
    """What stands for checks.check_part in a process that crashes."""
    os._exit(3)


def test_a_process_that_dies_is_one_line(monkeypatch, capsys):
    """It was waited for without end."""
    monkeypatch.setattr(verify, "_worker_count", lambda device: 1)
    monkeypatch.setattr(checks, "parts", lambda op, settings: [1])
    monkeypatch.setattr(checks, "check_part", die)
    arguments = ["--ops", "layer_norm", "--backend", "eager"]
    assert verify.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("verify: a process died while it checked") and error.count("\n") == 1

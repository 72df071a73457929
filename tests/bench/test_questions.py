"""Every question: its cases can be listed for nothing, and a tiny one can be answered."""

import dataclasses
import functools
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bench import ablation, kernels, memory, models, step, time_to_loss
from bench import record as recording
from bench import worker as workers
from bench.__main__ import QUESTIONS
from bench.conftest import QUESTIONS as PYTEST_QUESTIONS
from bench.harness import OURS, Contestant, Options, Skip, distinct, run_case, started
from bench.run import broken, options_of, peers_of
from bench.timing import Stopwatch
from bench.worker import Worker
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


def tiny_step(**given):
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 2}
    return step.Size("tiny", "nanogpt-cpu", tiny | given)


def test_a_step_is_checked_and_timed_beside_its_peers():
    options = dataclasses.replace(OPTIONS, data="pydoc", peers=("naive", "eager"))
    case = step.step_case(tiny_step(), options)
    record = run_case(case, options, Stopwatch(CPU, cache_bytes=0), CEILINGS, seconds=0.0)
    timed = [result["name"] for result in record["results"] if result["status"] == "timed"]
    assert timed == [OURS, "naive", "eager"], record["results"]


def test_a_step_moves_seven_numbers_a_parameter():
    """AdamW reads it, its gradient and two moments, and writes all but the gradient."""
    case = step.step_case(tiny_step(), OPTIONS)
    assert case.work.bytes == 7 * 4 * GPT(GPTConfig(**case.config)).num_parameters()


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_no_sample_of_a_step_holds_what_its_first_updates_set_up(cuda_graph):
    """Recording, or capturing, and proving are over when the first sample is taken."""
    options = dataclasses.replace(OPTIONS, data="pydoc", peers=())
    case = step.step_case(tiny_step(cuda_graph=cuda_graph), options)
    ours = next(iter(case.open()))
    started(ours, case, CPU)
    update = ours.start.__self__.run.update
    assert update.updates == update.warm_ups == (5 if cuda_graph else 1)
    assert (update.replay is not None and update.replay.proven) == cuda_graph


def test_a_step_of_wrong_weights_is_not_timed(monkeypatch):
    def damaged(source):
        model = models.BatchedGPT(source.config)
        model.load_state_dict(source.state_dict())
        with torch.no_grad():
            model.blocks[0].proj.weight[0, 0] += 0.1
        return model

    monkeypatch.setattr(models, "batched", damaged)
    options = dataclasses.replace(OPTIONS, data="pydoc", peers=("eager",))
    case = step.step_case(tiny_step(), options)
    record = run_case(case, options, Stopwatch(CPU, cache_bytes=0), CEILINGS, seconds=0.0)
    assert [r["status"] for r in record["results"]] == ["timed", "failed"]


def failed_update(monkeypatch, name, damage, **given):
    """Why an update that `damage` spoils, one of the tiny step's, is not timed."""
    options = dataclasses.replace(OPTIONS, data="pydoc", peers=("naive", "eager"))
    contestants = {c.name: c for c in step.step_case(tiny_step(**given), options).open()}
    assert contestants[name].check().passed
    damage(monkeypatch)
    check = contestants[name].check()
    assert not check.passed
    return check.details[0]


def damaged_loss(monkeypatch):
    """What training computes and the logits of an evaluation do not show."""
    loss_of = models.loss_of
    monkeypatch.setattr(models, "loss_of", lambda m, i, t: loss_of(m, i, t) * 1.01)


def damaged_kernel(monkeypatch):
    from gptcore import model

    right = model.linear_cross_entropy
    monkeypatch.setattr(model, "linear_cross_entropy", lambda *a, **k: right(*a, **k) * 1.01)


def no_clipping(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *_: None)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (OURS, damaged_kernel),
        (OURS, no_clipping),
        ("naive", damaged_loss),
        ("eager", damaged_loss),
        ("eager", no_clipping),
    ],
)
def test_an_update_that_trains_on_other_gradients_is_not_timed(name, damage, monkeypatch):
    clip = 1e-3 if damage is no_clipping else 0.0
    assert "max" in failed_update(monkeypatch, name, damage, grad_clip=clip)


def test_a_replay_of_ours_that_differs_from_what_it_recorded_is_not_timed(monkeypatch):
    """Its proof is taken away; the check, too, looks at an update that is replayed."""
    from gptcore.replay import Replay

    def damage(monkeypatch):
        run = Replay.__call__
        monkeypatch.setattr(Replay, "prove", lambda self, *_: setattr(self, "proven", True))

        def replayed(self, *batch):
            loss, gradients = run(self, *batch)
            return loss, [gradient * 1.01 for gradient in gradients]

        monkeypatch.setattr(Replay, "__call__", replayed)

    failed_update(monkeypatch, OURS, damage, grad_clip=0.0)


@pytest.mark.parametrize("name", [OURS, "eager"])
def test_an_update_that_leaves_a_weight_alone_is_not_timed(name, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    options = dataclasses.replace(OPTIONS, data="pydoc", peers=("eager",))
    contestants = {c.name: c for c in step.step_case(tiny_step(), options).open()}
    with pytest.raises(RuntimeError, match="must change every weight"):
        contestants[name].check()


def test_gradients_are_clipped_to_the_norm_asked_for():
    gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    found = models.clipped(gradients, 1.0)
    torch.testing.assert_close(found, {"a": torch.tensor([0.6, 0.0]), "b": torch.tensor([0.8])})
    for most in (0.0, 6.0):
        torch.testing.assert_close(models.clipped(gradients, most), gradients)


def test_a_peer_computes_in_the_dtype_that_is_asked_for():
    seen = []

    def forward(idx, targets):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return weight.weight.sum()

    weight = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(weight.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        models.plain_step(weight, optimizer, (None, None), dtype, forward=forward)()
    assert seen == [False, torch.bfloat16]


def test_on_a_cpu_nanogpt_is_timed_as_written_and_by_autocast(tmp_path, monkeypatch):
    (tmp_path / "model.py").write_text(NANOGPT)
    begun = {}

    def worker_of(name):
        begin = lambda peer, config, train, twin: begun.update({name: twin.dtype})  # noqa: E731
        return types.SimpleNamespace(begin=begin, step_ms=lambda: 1.0)

    monkeypatch.setattr(step, "worker_of", worker_of)
    given = {"dtype": torch.bfloat16, "data": "pydoc", "nanogpt": tmp_path}
    options = dataclasses.replace(OPTIONS, peers=("naive", "nanogpt"), **given)
    for contestant in step.step_case(tiny_step(), options).open():
        contestant.start()
    assert begun == {
        "naive torch.float32": torch.float32,
        "nanogpt torch.float32": torch.float32,
        "nanogpt torch.bfloat16": torch.bfloat16,
    }


def test_ids_come_from_the_whole_vocabulary():
    """Characters alone would meet 65 of GPT-2's 50,304 rows."""
    options = dataclasses.replace(OPTIONS, data="pydoc", peers=())
    size = dataclasses.replace(tiny_step(), vocab_size=1000)
    bench = next(iter(step.step_case(size, options).open())).check.__self__
    drawn = bench.run.update.stream.batch(0, 0, 2)
    for idx in (*bench.batch, *drawn):
        assert 500 < idx.max() < 1000


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def test_a_worker_answers_with_milliseconds_and_ends(worker):
    for config in (TINY, TINY.replace(n_layer=2)):
        worker.begin("naive", config, TrainConfig(batch_size=2), OPTIONS)
        assert worker.step_ms() > 0 and worker.step_ms() > 0
    worker.close()
    assert worker._process.returncode == 0


def test_a_worker_that_died_is_noticed_and_replaced(monkeypatch, worker):
    monkeypatch.setattr(workers, "_workers", {"naive": worker})
    assert workers.worker_of("naive") is worker
    worker._process.kill()
    worker._process.wait()
    with pytest.raises(RuntimeError, match="must answer; it ended with -9"):
        worker.step_ms()
    other = workers.worker_of("naive")
    assert other is not worker and other.alive
    other.close()


NANOGPT = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: 0.00M")
        C = config.n_embd
        norm = lambda: nn.LayerNorm(C, bias=config.bias)
        linear = lambda i, o: nn.Linear(i, o, bias=config.bias)
        block = lambda: nn.ModuleDict(dict(
            ln_1=norm(), attn=nn.ModuleDict(dict(c_attn=linear(C, 3 * C), c_proj=linear(C, C))),
            ln_2=norm(), mlp=nn.ModuleDict(dict(c_fc=linear(C, 4 * C), c_proj=linear(4 * C, C)))))
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, C), wpe=nn.Embedding(config.block_size, C),
            h=nn.ModuleList(block() for _ in range(config.n_layer)), ln_f=norm()))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("using fused AdamW: False")
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

    def forward(self, idx, targets):
        logits = self.transformer.wte(idx) @ self.transformer.wte.weight.T
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_nanogpt_steps_in_a_process_of_its_own_and_its_words_are_not_answers(tmp_path, worker):
    """A stand-in with nanoGPT's names that prints where nanoGPT does; it computes less."""
    (tmp_path / "model.py").write_text(NANOGPT)
    options = dataclasses.replace(OPTIONS, nanogpt=tmp_path)
    config = TINY.replace(**models.NANOGPT_WIRING)
    worker.begin("nanogpt", config, TrainConfig(batch_size=2), options)
    assert worker.step_ms() > 0


def test_nanogpt_compiled_takes_the_steps_of_nanogpt(tmp_path):
    """The same stand-in through torch.compile, as its train.py runs on a GPU."""
    (tmp_path / "model.py").write_text(NANOGPT)
    options = dataclasses.replace(OPTIONS, nanogpt=tmp_path)
    config = TINY.replace(**models.NANOGPT_WIRING)
    batch = tuple(torch.arange(2 * 8).view(2, 8) % config.vocab_size for _ in range(2))
    weights = []
    compiler = CompileCounterWithBackend("aot_eager")
    for through in (None, functools.partial(torch.compile, backend=compiler)):
        torch.manual_seed(0)
        model = models.to_nanogpt(GPT(config), options)
        before = model.transformer.wte.weight.detach().clone()
        compiled = through and through(model)
        take = models.nanogpt_step(model, TrainConfig(batch_size=2), batch, options, compiled)
        take()
        weights.append(model.transformer.wte.weight.detach())
        assert not torch.equal(weights[-1], before)
    assert compiler.frame_count == 1
    torch.testing.assert_close(*weights)


def test_a_worker_uses_as_many_threads_as_its_parent(monkeypatch):
    sent, used = [], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    parent = types.SimpleNamespace(_ask=sent.append)
    Worker.begin(parent, "naive", TINY, TrainConfig(batch_size=2), OPTIONS)
    workers._begin(*sent)
    assert used == [3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_leaves_malloc_as_it_is(monkeypatch):
    """Neither the parent's settings nor its environment reach the worker."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")
    worker = Worker()
    try:
        worker.begin("naive", TINY, TrainConfig(batch_size=2), OPTIONS)
        environment = Path(f"/proc/{worker._process.pid}/environ").read_bytes()
    finally:
        worker.close()
    assert b"MALLOC_" not in environment and b"TUNABLES" not in environment


def test_nanogpt_without_a_folder_says_which_flag():
    with pytest.raises(Skip, match="--nanogpt DIR"):
        models.to_nanogpt(GPT(TINY), OPTIONS)


def test_peak_memory_is_what_was_held_at_once():
    def call():
        a = torch.ones(1000, dtype=torch.float32)  # 4 kB
        b = a + 1
        del a, b
        c = torch.ones(500, dtype=torch.float32)
        return c.sum()

    assert 8000 <= memory.peak_bytes(call, CPU) <= 8200


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


# ---- time to loss ----------------------------------------------------------------------------

TRAINER = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out_dir") + 1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
out.mkdir(parents=True)
(out / "config.json").write_text('{"train": {"dtype": "bfloat16"}}')
with open(out / "metrics.jsonl", "a") as file:
    for step in range(0, 1000, 100):
        loss = 4 - step / 200 - (seed - 1337) / 10
        record = {"kind": "eval", "step": step, "val_loss": loss, "elapsed_s": 2 + step / 10}
        file.write(json.dumps(record) + "\\n")
        file.flush()
        time.sleep(0.01)
time.sleep(60)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAINER)
    monkeypatch.setattr(time_to_loss, "ROOT", tmp_path)


def test_a_run_ends_with_the_first_evaluation_at_the_target(trainer):
    options = dataclasses.replace(OPTIONS, target=2.5, seeds=2)
    content = time_to_loss.answer(options, None, None, None)
    wanted = {1337: (300, 30.0, 2.5), 1338: (300, 30.0, 2.4)}
    runs = {run["seed"]: (run["steps"], run["seconds"], run["val_loss"]) for run in content["runs"]}
    assert runs == {seed: pytest.approx(run) for seed, run in wanted.items()}
    assert all(run["reached"] and run["dtype"] == "bfloat16" for run in content["runs"])
    assert content["absent"] == {"nanogpt": "no folder named: --nanogpt DIR"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_caches_are_filled_by_a_step_that_does_not_count(device, monkeypatch):
    """17 kernels of a training step would be compiled within the time of the first run."""
    asked = []

    def runner(who):
        def run(options, seed, flags=()):
            asked.append((who, seed, *flags))
            row = {"who": who, "seed": seed, "seconds": 1.0, "steps": 2, "val_loss": 3.0}
            return row | {"reached": False, "curve": []}

        return run

    monkeypatch.setattr(time_to_loss, "gptcore_run", runner(OURS))
    monkeypatch.setattr(time_to_loss, "nanogpt_run", runner("nanogpt"))
    options = dataclasses.replace(OPTIONS, device=torch.device(device), seeds=2)
    content = time_to_loss.answer(options, None, None, None)
    counted = [(who, seed) for seed in (1337, 1338) for who in (OURS, "nanogpt")]
    assert [(run["who"], run["seed"]) for run in content["runs"]] == counted
    if device == "cuda":
        first = [(OURS, 1337, "--max_iters", "1"), ("nanogpt", 1337, "--max_iters=1")]
        counted = [first[0], counted[0], first[1], *counted[1:]]
    assert asked == counted


def test_a_run_out_of_time_has_not_reached_the_target(trainer):
    options = dataclasses.replace(OPTIONS, target=-9.0, run_seconds=1.0)
    run = time_to_loss.gptcore_run(options, 1337)
    assert not run["reached"] and run["val_loss"] > -9


def test_no_run_is_begun_that_gets_nowhere(trainer, capsys):
    options = dataclasses.replace(OPTIONS, run_seconds=5.0)
    content = time_to_loss.answer(options, None, None, None)
    assert content["runs"] == [] and set(content["absent"]) == {"gptcore", "nanogpt"}
    out = capsys.readouterr().out
    assert "gptcore skipped: 5 s are left; alone: python -m bench" in out
    assert "val loss" not in out


def test_a_trainer_that_breaks_ends_the_question_with_its_words(tmp_path, monkeypatch):
    from gptcore.config import RunError

    (tmp_path / "train.py").write_text("raise SystemExit('error: no such thing')")
    monkeypatch.setattr(time_to_loss, "ROOT", tmp_path)
    with pytest.raises(RunError, match="no such thing"):
        time_to_loss.gptcore_run(OPTIONS, 1337)


def edited_trainer(tmp_path, monkeypatch, old, new):
    assert old in TRAINER
    (tmp_path / "train.py").write_text(TRAINER.replace(old, new))
    monkeypatch.setattr(time_to_loss, "ROOT", tmp_path)


@pytest.mark.parametrize("death", ["sys.exit('error: disk full')", "os.kill(os.getpid(), 9)"])
def test_a_trainer_that_breaks_after_an_evaluation_has_not_just_missed_the_target(
    death, tmp_path, monkeypatch
):
    from gptcore.config import RunError

    edited_trainer(tmp_path, monkeypatch, "        time.sleep(0.01)", f"        {death}")
    said = "disk full" if "disk" in death else "exit code -9"
    with pytest.raises(RunError, match=said):
        time_to_loss.gptcore_run(OPTIONS, 1337)


def test_a_loss_that_is_no_number_reaches_nothing(tmp_path, monkeypatch):
    edited_trainer(tmp_path, monkeypatch, '"val_loss": loss', '"val_loss": loss if step else None')
    run = time_to_loss.gptcore_run(dataclasses.replace(OPTIONS, target=3.2), 1337)
    assert (run["steps"], run["seconds"], run["val_loss"]) == (200, 20.0, 3.0)


NANOGPT_BIGRAMS = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: 0.00M")
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        logits, loss = self.table(idx), nn.functional.cross_entropy
        return logits, loss(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""
NANOGPT_TRAINER = """
import pickle, shutil, time
from pathlib import Path
import torch
from model import GPT, GPTConfig

data = Path("data/shakespeare_char")
shutil.copytree(data, SEEN)
args = {"block_size": 8, **pickle.loads((data / "meta.pkl").read_bytes())}
model = GPT(GPTConfig(**args))
print("step 0: train loss 4.2000, val loss 4.3000")
print("iter 0: loss 4.2000, time 1.00ms, mfu -100.00%")
time.sleep(0.2)
weights = {"_orig_mod." + name: w for name, w in model.state_dict().items()}
Path("out-shakespeare-char").mkdir()
torch.save({"model": weights, "model_args": args}, "out-shakespeare-char/ckpt.pt")
torch.save(model.table.weight.detach(), SEEN + "/table")
print("step 250: train loss 2.1000, val loss 2.2000")
time.sleep(60)
"""


def test_nanogpt_is_timed_from_its_first_evaluation_and_judged_on_the_whole_split(tmp_path):
    """A stand-in, whose loss of a character follows from the one before: no window matters."""
    seen, folder, text = tmp_path / "seen", tmp_path / "nanogpt", "held out is what is last" * 30
    (folder / "config").mkdir(parents=True)
    for name in ("config/train_shakespeare_char.py", "configurator.py"):
        (folder / name).touch()
    (folder / "model.py").write_text(NANOGPT_BIGRAMS)
    (folder / "train.py").write_text(NANOGPT_TRAINER.replace("SEEN", repr(str(seen))))
    (tmp_path / "text").write_text(text)
    given = {"nanogpt": folder, "data": str(tmp_path / "text"), "target": 2.2}
    run = time_to_loss.nanogpt_run(dataclasses.replace(OPTIONS, **given), 1)
    assert run["curve"] == [[0.0, 4.3], [run["seconds"], 2.2]] and run["seconds"] >= 0.2
    assert (run["steps"], run["val_loss"], run["reached"]) == (250, 2.2, True)

    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = [ids[character] for character in text]
    train, val = (memoryview((seen / f"{n}.bin").read_bytes()).cast("H") for n in ("train", "val"))
    assert (train.tolist(), val.tolist()) == (tokens[:648], tokens[648:])
    log_p = torch.load(seen / "table").double().log_softmax(-1)
    losses = [-log_p[pair].item() for pair in zip(val, val[1:], strict=False)]
    assert len(losses) % 8 and run["exact_val_loss"] == pytest.approx(sum(losses) / len(losses))


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
    ],
)
def test_a_driver_s_name_means_a_product(name, known):
    assert product(name) == known


# ---- options ---------------------------------------------------------------------------------


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


def test_the_ablation_pairs_runs_by_seed():
    from bench.ablation import VARIANTS, WHOLE, table

    def run(variant, seed, loss):
        return {"variant": variant, "seed": seed, "val_loss": loss}

    losses = {WHOLE: (1.5, 1.7)} | {name: (1.6, 1.9) for name in VARIANTS if name != WHOLE}
    runs = [
        run(name, seed, loss) for name, pair in losses.items() for seed, loss in enumerate(pair)
    ]
    rows = table(runs)
    assert rows[1] == [WHOLE, "2", "1.6000", "", "0.1414"]
    assert [row[3:] for row in rows[2:]] == [["+0.1500", "0.0707"]] * (len(VARIANTS) - 1)
    assert table([run(WHOLE, 0, 1.5), run("GELU", 0, 1.6), run("GELU", 1, 1.9)])[1:] == [
        [WHOLE, "1", "1.5000", "", "-"],
        ["GELU", "1", "1.6000", "+0.1000", "-"],
    ]


def test_only_whole_runs_enter_the_ablation(monkeypatch):
    """One is cut short by the time, one has no evaluation, one breaks."""
    from gptcore.config import RunError

    def ended(options, seed, target, flags):
        if "--activation=gelu" in flags:
            raise RunError("the loss is nan")
        if "--token_shift=false" in flags:
            raise Skip("no evaluation within 1 s")
        steps = 0 if "--init_std=0.02" in flags else 400
        return {"seed": seed, "steps": steps, "val_loss": 2.0, "seconds": 1.0}

    monkeypatch.setattr(ablation, "gptcore_run", ended)
    content = ablation.answer(OPTIONS, None, None, None)
    assert content["absent"] == {
        "no token shift, seed 0": "no evaluation within 1 s",
        "GELU, seed 0": "the loss is nan",
        "initial weights of 0.02, seed 0": "out of time after its evaluation at step 0",
    }
    assert len(content["variants"]) == len(content["tables"][0]["rows"]) - 1 == 4
    assert broken({"questions": {"ablation": content}}) == [
        "ablation: GELU, seed 0: the loss is nan"
    ]


def test_every_variant_of_the_ablation_is_a_setting_the_preset_has_not():
    from bench.ablation import VARIANTS, WHOLE
    from gptcore.flags import parse_settings

    whole = parse_settings(["--preset=speedrun-cpu"]).merged()
    for name, flags in VARIANTS.items():
        changed = parse_settings(["--preset=speedrun-cpu", *flags]).merged()
        assert (changed == whole) == (name == WHOLE), name

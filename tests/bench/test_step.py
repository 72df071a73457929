"""Training steps side by side: what is checked before it is timed, and peers in their processes."""

import dataclasses
import functools
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bench import models, step
from bench import worker as workers
from bench.harness import OURS, Options, Skip, run_case, started
from bench.timing import Stopwatch
from bench.worker import Worker
from gptcore.config import GPTConfig, TrainConfig
from gptcore.model import GPT

CPU = torch.device("cpu")
CEILINGS = {"copy_gbps": 10.0, "matmul_tflops": 0.1, "dispatch_us": 5.0}
OPTIONS = Options(device=CPU, dtype=torch.float32, seconds=1.0, quick=True)
TINY = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.0)


def tiny_step(**given):
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 2}
    return step.Size("tiny", "nanogpt-cpu", tiny | given)


def test_a_step_is_checked_and_timed_beside_its_peers():
    options = dataclasses.replace(OPTIONS, peers=("naive", "eager"))
    case = step.step_case(tiny_step(), options)
    record = run_case(case, options, Stopwatch(CPU, cache_bytes=0), CEILINGS, seconds=0.0)
    timed = [result["name"] for result in record["results"] if result["status"] == "timed"]
    assert timed == [OURS, "naive", "eager"], record["results"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("compile-default", "--peers compile$"), ("compile-max", "--peers compile-max")],
)
def test_no_step_is_compiled_for_minutes_unasked(name, said):
    contestants = {c.name: c for c in step.step_case(tiny_step(), OPTIONS).open()}
    with pytest.raises(Skip, match=said):
        contestants[name].check()


def test_a_step_moves_seven_numbers_a_parameter():
    """AdamW reads it, its gradient and two moments, and writes all but the gradient."""
    case = step.step_case(tiny_step(), OPTIONS)
    assert case.work.bytes == 7 * 4 * GPT(GPTConfig(**case.config)).num_parameters()


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_no_sample_of_a_step_holds_what_its_first_updates_set_up(cuda_graph):
    """Recording, or capturing, and proving are over when the first sample is taken."""
    options = dataclasses.replace(OPTIONS, peers=())
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
    options = dataclasses.replace(OPTIONS, peers=("eager",))
    case = step.step_case(tiny_step(), options)
    record = run_case(case, options, Stopwatch(CPU, cache_bytes=0), CEILINGS, seconds=0.0)
    assert [r["status"] for r in record["results"]] == ["timed", "failed"]


def test_no_unit_of_the_judged_model_is_near_the_edge_of_its_relu(monkeypatch):
    """One that rounding turns on or off changes a float32 gradient more than all the rounding."""
    from gptcore import model as module

    right, margins = module.linear_act, []

    def linear_act(x, weight, bias, **options):
        z = torch.nn.functional.linear(x, weight, bias).detach()
        margins.append(z / weight.detach().norm(dim=1))
        return right(x, weight, bias, **options)

    monkeypatch.setattr(module, "linear_act", linear_act)
    size = step.Size("tiny", "notebook", tiny_step().given)
    contestants = {c.name: c for c in step.step_case(size, OPTIONS).open()}
    assert contestants[OURS].check().passed
    assert margins and all((margin.abs() > 2).all() for margin in margins)
    assert all((margin > 0).float().mean() == 0.5 for margin in margins)


def failed_update(monkeypatch, name, damage, **given):
    """Why an update that `damage` spoils, one of the tiny step's, is not timed."""
    options = dataclasses.replace(OPTIONS, peers=("naive", "eager"))
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
    options = dataclasses.replace(OPTIONS, peers=("eager",))
    contestants = {c.name: c for c in step.step_case(tiny_step(), options).open()}
    with pytest.raises(RuntimeError, match="must change every weight"):
        contestants[name].check()


def test_gradients_are_clipped_to_the_norm_asked_for():
    gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    found = models.clipped(gradients, 1.0)
    torch.testing.assert_close(found, {"a": torch.tensor([0.6, 0.0]), "b": torch.tensor([0.8])})
    for most in (0.0, 6.0):
        torch.testing.assert_close(models.clipped(gradients, most), gradients)


def test_what_is_clipped_is_rounded_as_what_it_stands_for():
    """Plain PyTorch's norm of float32 gradients is no float64 one."""
    torch.manual_seed(0)
    gradients = {"a": torch.randn(1000, 100), "b": torch.randn(3)}
    weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients.values()]
    for weight, gradient in zip(weights, gradients.values(), strict=True):
        weight.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    found = models.clipped(gradients, 1.0)
    assert all(torch.equal(w.grad, found[n]) for w, n in zip(weights, found, strict=True))


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
        return types.SimpleNamespace(begin=begin, step_ms=lambda steps: 1.0)

    monkeypatch.setattr(step, "worker_of", worker_of)
    given = {"dtype": torch.bfloat16, "nanogpt": tmp_path}
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
    options = dataclasses.replace(OPTIONS, peers=())
    for vocab_size in (65, 1000):
        size = dataclasses.replace(tiny_step(batch_size=64), vocab_size=vocab_size)
        case = step.step_case(size, options)
        bench = next(iter(case.open())).check.__self__
        drawn = bench.run.update.stream.batch(0, 0, 64)
        for idx in (*bench.batch, *drawn):
            assert 0.9 * vocab_size < idx.max() < vocab_size and idx.min() < 0.1 * vocab_size


def test_the_model_that_trains_is_the_one_on_record(monkeypatch, tmp_path):
    """Offline, too, and wherever no text is: work, limit and predictions are of that model."""
    monkeypatch.setenv("GPTCORE_DATA_DIR", str(tmp_path))
    for vocab_size in (65, 130):
        size = dataclasses.replace(tiny_step(), vocab_size=vocab_size)
        case = step.step_case(size, dataclasses.replace(OPTIONS, peers=()))
        trained = next(iter(case.open())).check.__self__.source.config
        assert case.config == dataclasses.asdict(trained) and trained.vocab_size == vocab_size


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def test_a_worker_answers_with_milliseconds_and_ends(worker):
    for config in (TINY, TINY.replace(n_layer=2)):
        worker.begin("naive", config, TrainConfig(batch_size=2), OPTIONS)
        assert worker.step_ms() > 0 and worker.step_ms(3) > 0
    worker.close()
    assert worker._process.returncode == 0


def test_a_worker_takes_as_many_steps_as_asked_and_says_what_each_took(monkeypatch, capsys):
    """Of 2 seconds, the first of them when it begins."""
    now, tasks = [0.0], []

    def begin(task):
        tasks.append(task)
        return lambda: now.__setitem__(0, now[0] + 2)

    monkeypatch.setattr(workers, "_begin", begin)
    monkeypatch.setattr(workers.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(workers.sys, "stdin", ['{"peer": "naive"}', "3"])
    workers.main()
    assert (tasks, now) == ([{"peer": "naive"}], [8.0])
    assert capsys.readouterr().out.split() == ["2000.0"] * 2


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

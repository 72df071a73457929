"""One update: the same on every path, master weights in float32, and what is never captured."""

import contextlib
import math
import threading

import pytest
import torch

from gptcore import step as step_module
from gptcore.config import GPTConfig, TrainConfig
from gptcore.flags import split_fields
from gptcore.model import GPT
from gptcore.naive import NaiveGPT
from gptcore.optim import make_optimizer
from gptcore.presets import PRESETS
from gptcore.step import HalfCopy, Step, eager_reason, pick_dtype


def state_of(run):
    """Every number an update changes."""
    moments = [v for s in run.optimizer.state.values() for v in s.values()]
    return [*(p.detach().clone() for p in run.model.parameters()), *moments]


def test_batches_drawn_ahead_equal_those_drawn_step_by_step(prepared):
    """The stream of a CPU and the drawing inside an update, as a GPU has it, agree."""
    ahead, inside = prepared("--dropout=0.2"), prepared("--dropout=0.2")
    inside.update.stream = None
    assert ahead.update.stream is not None
    assert [ahead.update().item() for _ in range(4)] == [inside.update().item() for _ in range(4)]
    assert all(map(torch.equal, state_of(ahead), state_of(inside)))


def test_an_update_goes_on_where_its_step_says(prepared):
    """Update n is a function of the weights and of n alone."""
    whole, parted = prepared("--dropout=0.2"), prepared("--dropout=0.2")
    losses = [whole.update().item() for _ in range(4)]
    first = [parted.update().item() for _ in range(2)]
    again = Step(
        parted.model,
        parted.optimizer,
        parted.corpus,
        parted.config,
        device=parted.device,
        step=2,
    )
    assert [*first, again().item(), again().item()] == losses
    shifted = Step(
        parted.model, parted.optimizer, parted.corpus, parted.config, device=parted.device, step=9
    )
    assert shifted.key.tolist() == [parted.config.seed, 9, 0]


def test_bfloat16_computes_on_a_copy_of_float32_masters(prepared):
    run = prepared("--dtype=bfloat16", "--dropout=0")
    reference = prepared("--dtype=float32", "--dropout=0")
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert {p.dtype for p in run.update.compute.parameters()} == {torch.bfloat16}
    for _ in range(5):
        loss, expected = run.update().item(), reference.update().item()
        assert loss == pytest.approx(expected, rel=2e-2)
    for master, half in zip(run.model.parameters(), run.update.compute.parameters(), strict=True):
        assert torch.equal(master.to(torch.bfloat16), half)
    # Updates smaller than a bfloat16 rounding are kept in the masters.
    assert any((m != m.to(torch.bfloat16)).any() for m in run.model.parameters())


def test_micro_batch_gradients_add_in_float32():
    master = torch.nn.Linear(4, 1, bias=False)
    half = HalfCopy(master, torch.bfloat16)
    for value in (1.0, 2**-10, 2**-10):  # 1 + 2**-10 is lost in bfloat16
        half.halves[0].grad = torch.full((1, 4), value, dtype=torch.bfloat16)
        half.move_gradients()
    assert torch.equal(master.weight.grad, torch.full((1, 4), 1 + 2**-9))
    assert half.halves[0].grad is None


def test_accumulation_in_bfloat16_equals_float32_sums(prepared):
    flags = ("--dtype=bfloat16", "--dropout=0.2")
    runs = prepared(*flags), prepared(*flags, "--batch_size=4", "--gradient_accumulation_steps=4")
    whole, parts = (run.update().item() for run in runs)
    assert whole == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("operations", ["+", "+*"])
def test_accumulation_weighs_micro_batches_by_what_counts(prepared, operations):
    """Problems differ in how many targets count; the loss is the mean over all of them."""
    flags = ("--data=arithmetic", f"--operations={operations}", "--dropout=0", "--block_size=16")
    runs = prepared(*flags), prepared(*flags, "--batch_size=4", "--gradient_accumulation_steps=4")
    losses, gradients = [], []
    for run in runs:
        run.optimizer.zero_grad = lambda set_to_none: None
        losses.append(run.update().item())
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sequences", [1, 3, 7])
def test_a_cpu_cuts_large_batches(prepared, monkeypatch, sequences):
    """The same loss and gradients, dropout included, in pieces that stay in the cache."""
    flags = "--dropout=0.2", "--batch_size=7"
    results = []
    for elements in (step_module.CPU_ELEMENTS, None):
        model = prepared(*flags).model.config
        elements = elements or sequences * model.block_size * model.n_embd
        monkeypatch.setattr(step_module, "CPU_ELEMENTS", elements)
        run = prepared(*flags)
        run.optimizer.zero_grad = lambda set_to_none: None
        loss = run.update().item()
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        results.append((loss, gradient, run.update))
    (whole, gradient, at_once), (parts, summed, cut) = results
    pieces = math.ceil(7 / sequences)
    assert (len(at_once.micro_batches), len(cut.micro_batches)) == (1, pieces)
    assert "micro-batch" not in at_once.how
    assert (f"in {pieces} micro-batches of up to {sequences} sequences" in cut.how) == (pieces > 1)
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(summed, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "device", "reason"),
    [
        (TrainConfig(batch_size=16), "cpu", None),
        (TrainConfig(batch_size=17), "cpu", "outlast"),
        (TrainConfig(batch_size=1), "cpu", "outlast"),  # its vocabulary: see below
        (TrainConfig(batch_size=16, optimizer="sgd"), "cpu", None),
        (TrainConfig(batch_size=16, model="naive"), "cpu", "--model naive"),
        (TrainConfig(batch_size=16, cuda_graph=False), "cpu", "--cuda_graph false"),
        (TrainConfig(batch_size=16, compile=True), "cpu", "--compile"),
        (TrainConfig(batch_size=16, gradient_accumulation_steps=4), "cpu", "one micro-batch"),
        (TrainConfig(), "cuda", None),
        (TrainConfig(gradient_accumulation_steps=4), "cuda", None),
        (TrainConfig(model="naive"), "cuda", "--model naive"),
        (TrainConfig(optimizer="muon"), "cuda", None),
        (TrainConfig(optimizer="sgd"), "cuda", "--optimizer sgd"),
        (TrainConfig(cuda_graph=False), "cuda", "--cuda_graph false"),
        (TrainConfig(schedule="cyclic", cycle_momentum=True), "cuda", "momentum"),
    ],
)
def test_why_an_update_is_not_captured(config, device, reason):
    V = 5000 if config.batch_size == 1 else 65
    model = GPTConfig(block_size=64, n_embd=128, n_head=4, n_layer=1, vocab_size=V)
    found = eager_reason(config, model, torch.device(device))
    assert found is None if reason is None else reason in found


def test_the_dtype_of_a_cpu_is_timed_where_it_has_bfloat16(prepared, monkeypatch):
    run = prepared()
    arguments = run.model, run.corpus, run.config.replace(dtype="auto"), torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert pick_dtype(*arguments) == (torch.float32, "this CPU has no bfloat16 products")
    given = *arguments[:2], run.config.replace(dtype="bfloat16"), arguments[3]
    slow = "--dtype bfloat16, which this CPU does not multiply: float32 would be many times as fast"
    assert pick_dtype(*given) == (torch.bfloat16, slow)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    sizes, draw, shape = [], run.corpus.batch, run.model.config
    monkeypatch.setattr(step_module, "CPU_ELEMENTS", 2 * shape.block_size * shape.n_embd)

    def batch(_, key, size, block_size):
        sizes.append(size)
        return draw(key, size, block_size)

    monkeypatch.setattr(type(run.corpus), "batch", batch)
    for float32_s, bfloat16_s, expected in (
        (1, 5, torch.float32),
        (5, 1, torch.bfloat16),
        (50, 46, torch.float32),  # which is not a tenth
        (50, 44, torch.bfloat16),
    ):
        # A clock that moves as long in each contestant as they are said to take.
        ticks = iter([0, float32_s, float32_s, float32_s + bfloat16_s] * 3)
        monkeypatch.setattr(step_module.time, "perf_counter", lambda ticks=ticks: next(ticks))
        took = f"{1e3 * float32_s:.1f} ms in float32, {1e3 * bfloat16_s:.1f} in bfloat16"
        assert pick_dtype(*arguments) == (expected, f"forward and backward took {took}")
    assert sizes == [2] * 4  # what a micro-batch has, not the whole batch
    assert pick_dtype(*given) == (torch.bfloat16, "--dtype bfloat16")
    monkeypatch.undo()
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--batch_size=4", "--gradient_accumulation_steps=4"),
        ("--optimizer=muon", "--schedule=wsd", "--decay_fraction=1"),
    ],
    ids=["adamw", "accumulated", "muon"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_captured_update_equals_the_eager_one_bit_for_bit(prepared, flags, dtype):
    flags = (*flags, "--device=cuda", f"--dtype={dtype}", "--dropout=0.2", "--grad_clip=1")
    captured = prepared(*flags)
    eager = prepared(*flags, "--cuda_graph=false")
    assert captured.update.eager_reason is None and eager.update.eager_reason is not None
    losses = [[run.update().item() for _ in range(10)] for run in (captured, eager)]
    assert captured.update.graph is not None
    assert losses[0] == losses[1] and len(set(losses[0])) == 10
    assert all(map(torch.equal, state_of(captured), state_of(eager)))


@pytest.fixture
def capturing(prepared, monkeypatch):
    """A run whose next update is captured, by a stand-in: it changes no number, and leaves
    gradients that were never computed. Errors: `begin` comes before the update, `within` in its
    optimizer, `end` at the end of the capture.
    """
    streams = []

    def start(*flags, begin=None, within=None, end=None):
        run = prepared("--cuda_graph=false", *flags)
        update = run.update

        @contextlib.contextmanager
        def graph(graph, **mode):
            kept = [tensor.clone() for tensor in state_of(run)], update.key.clone()
            halves = [p.detach().clone() for p in update.computing]
            if begin is not None:
                raise begin
            try:
                yield
            finally:
                with torch.no_grad():
                    for parameter, value in zip(run.model.parameters(), kept[0], strict=False):
                        parameter.copy_(value)
                        parameter.grad = torch.ones_like(parameter)
                    for parameter, value in zip(update.computing, halves, strict=True):
                        parameter.copy_(value)
                        parameter.grad = torch.ones_like(parameter)
                    run.optimizer.state.clear()
                    update.key.copy_(kept[1])
                if end is not None:
                    raise end

        def broken():
            raise within

        def set_stream(stream):
            streams.append(stream)
            monkeypatch.setattr(run.optimizer, "step", step)

        step = run.optimizer.step
        if within is not None:
            monkeypatch.setattr(run.optimizer, "step", broken)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
        monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
        update.updates = step_module.EAGER_UPDATES
        return run

    start.streams = streams
    return start


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["within", "end", "both"])
def test_a_capture_that_fails_leaves_eager_updates(prepared, capturing, dtype, where):
    """Said with what broke it, not with what its end makes of that, and on the stream of before."""
    flags = "--dropout=0.2", f"--dtype={dtype}"
    cause = RuntimeError("operation not permitted when stream is capturing\nsecond line")
    broken = {"within": {"within": cause}, "end": {"end": cause}}
    broken["both"] = {"within": cause, "end": RuntimeError("operation failed due to a previous")}
    plain, run = prepared("--cuda_graph=false", *flags), capturing(*flags, **broken[where])
    before = state_of(run)
    with pytest.warns(UserWarning, match="run eagerly, because its capture failed: operation not"):
        loss = run.update._on_gpu()
    assert capturing.streams == ["current"]
    assert loss.item() == plain.update().item() and not all(map(torch.equal, before, state_of(run)))
    assert run.update.graph is None and "second line" not in run.update.how
    run.update.step += 1  # as a call of the whole update does
    assert [run.update().item() for _ in range(3)] == [plain.update().item() for _ in range(3)]
    assert all(map(torch.equal, state_of(run), state_of(plain)))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("end", [None, RuntimeError("operation failed due to a previous error")])
def test_a_capture_without_memory_ends_the_run(capturing, error, end):
    """That is mended by a smaller batch, not by eager updates; nor is a wish to stop lost."""
    run = capturing(within=error, end=end)
    with pytest.raises(type(error)):
        run.update._on_gpu()
    if isinstance(error, RuntimeError):
        with pytest.raises(type(error)):
            capturing(begin=error).update._on_gpu()


@pytest.mark.gpu
def test_another_thread_may_wait_for_the_device_during_capture(prepared):
    """As the one that writes a checkpoint does for its copies."""
    run = prepared("--device=cuda")
    done, copied = threading.Event(), torch.cuda.current_stream().record_event()

    def wait():
        while not done.is_set():
            copied.synchronize()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        losses = [run.update().item() for _ in range(6)]
    finally:
        done.set()
        thread.join()
    assert run.update.graph is not None and all(map(math.isfinite, losses))


def curves(notebook, corpus, steps, backend="eager", damage=0):
    """Losses of the naive model and of the fast step: one initialisation, batches and masks.

    On the device of `corpus`.
    """
    train, shape = split_fields({**PRESETS["notebook"], **notebook})
    torch.manual_seed(0)
    naive = NaiveGPT(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **shape)).to(corpus.device)
    fast = GPT.from_naive(naive)
    fast.config = fast.config.replace(backend=backend)
    losses = []
    for name, model in (("naive", naive), ("gpt", fast)):
        config = TrainConfig(**train, model=name, seed=1 + damage * (name == "gpt"))
        update = Step(model, make_optimizer(model, config), corpus, config, device=corpus.device)
        losses.append([update().item() for _ in range(steps)])
    return losses


SMALL = {"batch_size": 2, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 48}
WHOLE = {"batch_size": 2, "block_size": 32}
TINY = {"batch_size": 1, "block_size": 4, "n_layer": 1, "n_head": 1, "n_embd": 8}


@pytest.mark.parametrize(
    ("notebook", "backend", "steps"),
    (
        pytest.param(SMALL, "eager", 50, id="small-eager-50"),
        pytest.param(TINY, "triton", 5, id="tiny-triton-5"),
        pytest.param(TINY, "triton", 50, id="tiny-triton-50", marks=pytest.mark.slow),
        pytest.param(WHOLE, "eager", 50, id="whole-eager-50", marks=pytest.mark.slow),
    ),
)
def test_the_curve_is_the_naive_models(prepared, device, notebook, backend, steps):
    """The notebook's preset in float32, dropout on: the losses differ by rounding alone."""
    device = "cpu" if backend == "eager" else device
    naive, fast = curves(notebook, prepared(f"--device={device}").corpus, steps, backend)
    assert fast == pytest.approx(naive, rel=1e-3)
    assert fast[0] == pytest.approx(naive[0], rel=1e-6)
    assert len(set(fast)) == steps


def test_the_comparison_of_curves_sees_another_seed(prepared):
    naive, fast = curves(SMALL, prepared().corpus, 10, damage=1)
    assert fast != pytest.approx(naive, rel=1e-3)

"""--profile: every moment of a step belongs to one kind of work, and the right one."""

import types

import pytest
import torch
from torch.autograd import DeviceType

from gptcore import profiling, roofline
from gptcore.config import GPTConfig, TrainConfig
from gptcore.flags import parse_settings
from gptcore.model import GPT, build_model
from gptcore.profiling import of_cpu, of_gpu
from gptcore.roofline import (
    ATTENTION,
    DATA,
    GAPS,
    KINDS,
    OPTIMIZER,
    OTHER,
    PRODUCTS,
    model_flops,
    work_of,
)
from gptcore.trainer import train
from kernels import rng

FLAGS = (
    "--profile --max_iters=36 --eval_interval=36 --n_layer=2 --n_embd=64 --n_head=2 "
    "--head_size=32 --block_size=32 --batch_size=16 --sample_tokens=0"
).split()


@pytest.fixture
def profiled(tiny_flags, tmp_path, monkeypatch):
    """profiled(flags) -> (the Profile of a run of 36 steps, its folder)."""
    profiles = []
    table = roofline.Profile.table
    monkeypatch.setattr(
        roofline.Profile, "table", lambda self: profiles.append(self) or table(self)
    )

    def run(*flags):
        folder = tmp_path / f"run{len(profiles)}"
        train(parse_settings([*tiny_flags, *FLAGS, f"--out_dir={folder}", *flags]))
        return profiles[-1], folder

    return run


def test_a_profile_accounts_for_all_of_a_step(profiled, monkeypatch, capsys):
    traced = []
    monkeypatch.setattr(
        profiling, "of_cpu", lambda events: traced.append(of_cpu(events)) or traced[0]
    )
    profile, folder = profiled()
    assert sum(traced[0].values()) < 12 * profile.traced_s
    of_twelve = {kind: 12 * profile.seconds[kind] for kind in KINDS if kind != GAPS}
    assert of_twelve == pytest.approx({kind: traced[0][kind] for kind in of_twelve})
    assert sum(profile.seconds.values()) == pytest.approx(profile.traced_s, rel=1e-6)
    assert all(profile.seconds[kind] > 0 for kind in KINDS)
    assert profile.seconds[DATA] < 0.2 * profile.traced_s
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "last").is_dir()  # it trained on
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith(tuple(f"  {k} " for k in KINDS))]
    assert len(rows) == len(KINDS)
    ms = sum(float(row[2 if row[1].isalpha() else 1]) for row in rows)
    assert ms == pytest.approx(1e3 * profile.traced_s, rel=1e-2)
    assert any(line.startswith("  sum ") and "100.0%" in line for line in lines)


def test_more_products_show_as_products(profiled, monkeypatch):
    """The feed-forward's first product eight times: products grow against attention."""
    before, _ = profiled()
    activated = GPT._activated
    monkeypatch.setattr(
        GPT, "_activated", lambda *args: torch.stack([activated(*args) for _ in range(8)]).mean(0)
    )
    after, _ = profiled()

    def ratio(profile, kind):
        return profile.seconds[kind] / profile.seconds[ATTENTION]

    assert ratio(after, PRODUCTS) > 1.6 * ratio(before, PRODUCTS)
    assert ratio(after, OPTIMIZER) < 1.6 * ratio(before, OPTIMIZER)


def test_what_was_marked_for_the_trace_is_unmarked(prepared):
    run, keep = prepared(), rng._keep_numpy
    with profiling._labelled(run.update):
        assert "_batch" in vars(run.update) and rng._keep_numpy is not keep
    assert "_batch" not in vars(run.update) and rng._keep_numpy is keep
    assert "inspect" not in vars(run.update.guard)


def test_a_run_that_ends_early_ends_its_trace(prepared, monkeypatch):
    run = prepared(*FLAGS)
    watching = profiling.watch(run, types.SimpleNamespace(), 1e9)
    for _ in range(profiling.WARM_UP + profiling.TIMED + 3):
        run.update()
        next(watching)
    assert "_batch" in vars(run.update)
    watching.close()
    assert "_batch" not in vars(run.update)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
        pass  # refuses to begin inside another


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_iters=31"], "needs 8 steps and then 24 without"),
        (["--max_iters=500", "--eval_interval=23"], "eval_interval 23"),
        (["--max_iters=500", "--checkpoint_interval=20"], "checkpoint_interval 20"),
    ],
    ids=["short", "evaluations", "checkpoints"],
)
def test_a_run_with_no_room_for_it_is_refused(
    train_main, tiny_flags, tmp_path, capsys, flags, words
):
    folder = tmp_path / "run"
    assert train_main([*tiny_flags, *FLAGS, f"--out_dir={folder}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --profile needs") and words in error
    assert error.count("\n") == 1 and not folder.exists()


def test_torchrun_is_refused():
    world = types.SimpleNamespace(parallel="ddp")
    with pytest.raises(profiling.ConfigError, match="--profile watches one process"):
        profiling.first_step(TrainConfig(), 0, world)


@pytest.mark.parametrize(
    ("step", "first"), [(0, 8), (470, 501), (467, 475), (468, 476), (469, 501)]
)
def test_nothing_comes_between_the_steps_watched(step, first):
    """Evaluations are after steps 500, 1000, ...; 24 steps are watched."""
    config, world = TrainConfig(eval_interval=500), types.SimpleNamespace(parallel=None)
    assert profiling.first_step(config, step, world) == first


def test_a_resumed_run_is_not_profiled_again(profiled, tiny_flags):
    _, folder = profiled()
    (folder / "roofline.png").unlink()
    train(parse_settings([tiny_flags[0], f"--out_dir={folder}", "--resume", "--max_iters=40"]))
    assert not (folder / "roofline.png").exists()


# ---- which time is whose ---------------------------------------------------------------------


def op(name, start, end, *children, thread=1):
    """An event of torch.profiler on the host; times in ms."""
    own = end - start - sum(child.end - child.start for child in children)
    event = types.SimpleNamespace(
        name=name,
        thread=thread,
        start=start,
        end=end,
        self_cpu_time_total=1e3 * own,
        cpu_children=list(children),
        cpu_parent=None,
    )
    for child in children:
        child.cpu_parent = event
    return event


def flat(events):
    for event in events:
        yield event
        yield from flat(event.cpu_children)


def test_ops_on_a_cpu_by_kind():
    trace = [
        op("data", 0, 4, op("aten::index", 1, 3)),
        op("aten::linear", 4, 10, op("aten::t", 4, 5), op("aten::addmm", 5, 9)),
        op("SmallAttention", 10, 20, op("aten::bmm", 11, 14), op("aten::_softmax", 14, 18)),
        op("aten::gelu", 20, 23),
        op("autograd::engine::evaluate_function: MmBackward0", 24, 30, op("aten::mm", 25, 29)),
        op("_DropoutAdd", 30, 36, op("other kernels", 31, 34), op("aten::add", 34, 35)),
        op("Optimizer.step#AdamW.step", 36, 40, op("aten::_fused_adamw_", 37, 39)),
        op("aten::mm", 0, 40, thread=2),
    ]
    milliseconds = {kind: 1e3 * seconds for kind, seconds in of_cpu(flat(trace)).items()}
    expected = {PRODUCTS: 8, ATTENTION: 10, OTHER: 7, OPTIMIZER: 4, DATA: 4, GAPS: 6}
    assert milliseconds == pytest.approx(expected)


def kernels(*names_and_ms, annotation="step"):
    """Events of a GPU, one after the other with gaps of 1 ms, under one annotation."""
    events, now = [], 0.0
    for name, took in (*names_and_ms, (annotation, None)):
        start, end = (now, now + 1e3 * took) if took else (0, now)
        events.append(
            types.SimpleNamespace(
                name=name,
                device_type=DeviceType.CUDA,
                is_user_annotation=took is None,
                time_range=types.SimpleNamespace(start=start, end=end),
            )
        )
        now = end + 1e3
    host = types.SimpleNamespace(name="cudaGraphLaunch", device_type=DeviceType.CPU)
    return [*events, host]


STEP = (
    ("void at::native::vectorized_elementwise_kernel<4, philox>", 1),
    ("void at::native::index_elementwise_kernel<128, 4>", 2),
    ("_embed_kernel", 3),
    ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", 10),
    ("_attention_forward_kernel", 7),
    ("_linear_act_kernel", 5),
    ("_attention_dkdv_kernel", 8),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 20),
    ("_layer_norm_backward_kernel", 4),
    ("void at::native::multi_tensor_apply_kernel<LpNormFunctor<float>>", 2),
    ("void at::native::reduce_kernel<512, 1>", 1),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", 6),
)


def test_kernels_on_a_gpu_by_kind_replay_after_replay():
    """What draws a batch has no name of its own: it comes after the optimizer."""
    seconds = of_gpu(kernels(*STEP, *STEP, *STEP))
    first = {DATA: 0, OTHER: 10}  # nothing came before the first
    rest = {DATA: 3, OTHER: 7}
    expected = {PRODUCTS: 105, ATTENTION: 45, OPTIMIZER: 27, GAPS: 0}
    expected |= {kind: first[kind] + 2 * rest[kind] for kind in first}
    assert seconds == pytest.approx({kind: ms / 1e3 for kind, ms in expected.items()})


def test_muons_products_are_the_optimizers():
    """They come after those kernels of AdamW that tell it, and before the next one."""
    muon = (
        ("void at::native::CatArrayBatchedCopy<4>", 1),
        ("nvjet_tst_64x64_64x4_v_bz_TNT", 9),
        ("void at::native::multi_tensor_apply_kernel<BinaryOpListAlphaFunctor<float>>", 2),
    )
    once, twice = (of_gpu(kernels(*(*STEP, *muon) * n), muon=True) for n in (1, 2))
    assert once[OPTIMIZER] == pytest.approx((9 + 12) / 1e3)
    assert once[PRODUCTS] == pytest.approx(35 / 1e3)
    assert twice[OPTIMIZER] == pytest.approx(2 * once[OPTIMIZER])
    assert twice[PRODUCTS] == pytest.approx(2 * once[PRODUCTS])
    assert twice[DATA] == pytest.approx(3 / 1e3)
    unaware = of_gpu(kernels(*STEP, *muon))
    assert unaware[PRODUCTS] == pytest.approx(44 / 1e3)


@pytest.mark.parametrize("begins", ["vectorized_gather_kernel", "vectorized_layer_norm_kernel"])
def test_an_eager_step_is_not_muons(begins):
    """Its attention and embedding have no names of ours."""
    update = ("multi_tensor_apply_kernel<FusedAdam>", 1), ("nvjet", 2), ("multi_tensor_apply", 1)
    step = ((begins, 3), ("sm90_xmma_gemm", 20), ("softmax_warp_forward", 5), *update)
    seconds = of_gpu(kernels(*step * 3), muon=True)
    expected = {OPTIMIZER: 12, PRODUCTS: 60, OTHER: 24}
    assert {kind: seconds[kind] for kind in expected} == pytest.approx(
        {kind: ms / 1e3 for kind, ms in expected.items()}
    )


def test_kernels_that_overlap_count_once():
    events = kernels(("sm90_gemm", 4), ("_embed_kernel", 4))
    for event, (start, end) in zip(events, [(0, 4e3), (1e3, 6e3)], strict=False):
        event.time_range = types.SimpleNamespace(start=start, end=end)
    seconds = of_gpu(events)
    assert (seconds[PRODUCTS], seconds[OTHER]) == pytest.approx((4e-3, 2e-3))


# ---- floors ----------------------------------------------------------------------------------


def test_flops_at_the_notebooks_size():
    """ANCHORS of the design: 1.046 TFLOP dense and 0.058 in attention for 64 x 256 tokens."""
    with torch.device("meta"):
        flops = [model_flops(build_model(name, GPTConfig()), 64) for name in ("gpt", "naive")]
    assert flops[0] == flops[1]
    assert flops[0][PRODUCTS] == pytest.approx(1.046e12, rel=2e-3)
    assert flops[0][ATTENTION] == pytest.approx(0.058e12, rel=1e-2)


def test_a_rung_without_blocks_has_no_attention():
    model = build_model("bigram-embedding", GPTConfig(n_embd=24, n_head=2, block_size=8))
    assert model_flops(model, 3) == {PRODUCTS: 6 * 3 * 8 * 24 * 65, ATTENTION: 0}
    assert work_of(model, TrainConfig(batch_size=3), torch.float32)[ATTENTION].bytes == 0


def test_floors_at_the_notebooks_size():
    """The figures of a layer in bfloat16: 12.6 MB a tensor, 4,300 GB/s, 790 TFLOP/s."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    work = work_of(model, TrainConfig(), torch.bfloat16)
    profile = roofline.Profile(dict.fromkeys(KINDS, 1e-3), work, 6e-3, 6e-3, 16384, 790e12, 4.3e12)
    tensor = 64 * 256 * 384 * 2 / 4.3e12
    assert profile.floor_s(ATTENTION) == pytest.approx(6 * 12 * tensor)
    assert profile.floor_s(OTHER) == pytest.approx(6 * 30 * tensor, rel=0.06)
    assert profile.floor_s(OPTIMIZER) == pytest.approx(75e-6 * 44 / 28, rel=0.1)
    assert profile.floor_s(PRODUCTS) == pytest.approx(1.046e12 / 790e12, rel=2e-3)
    assert profile.mfu == pytest.approx(1.104e12 / 790e12 / 6e-3, rel=2e-3)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "update"),
    [
        ("adamw", torch.float32, 28 + 4),
        ("sgd", torch.float32, 20 + 4),
        ("adamw", torch.bfloat16, 28 + 4 + 12),
    ],
    ids=["adamw", "sgd", "bfloat16"],
)
def test_work_by_hand(optimizer, dtype, update):
    """24 tokens; matrices 4 x 12, 4 x 4, 4 x 16, 16 x 4 and 4 x 5."""
    model = GPT(GPTConfig(n_layer=1, n_embd=4, n_head=1, block_size=8, vocab_size=5))
    work = work_of(model, TrainConfig(batch_size=3, optimizer=optimizer), dtype)
    size, parameters = dtype.itemsize, sum(p.numel() for p in model.parameters())
    assert {kind: (done.flops, done.bytes) for kind, done in work.items()} == {
        PRODUCTS: (6 * 24 * 212, 3 * size * (24 * (16 + 8 + 20 + 20 + 9) + 212)),
        ATTENTION: (6 * 24 * 4 * 9, size * 12 * 24 * 4),
        OTHER: (24 * (37 * 4 + 2 * 5), size * 24 * (37 * 4 + 2 * 5)),
        OPTIMIZER: (parameters * update / 4, parameters * update),
        DATA: (0, 24 * (2 * 2 + 2 * 8)),
        GAPS: (0, 0),
    }


def test_muons_work_by_hand():
    """Four matrices of 4 x 4, two of 4 x 16; five times three products."""
    model = GPT(GPTConfig(n_layer=1, n_embd=4, n_head=1, block_size=8, vocab_size=5))
    config = TrainConfig(batch_size=3)
    muon, adamw = (
        work_of(model, config.replace(optimizer=name), torch.float32)[OPTIMIZER]
        for name in ("muon", "adamw")
    )
    assert adamw.bytes - muon.bytes == 8 * (4 * 16 + 2 * 64)
    products = 5 * (4 * 6 * 4**3 + 2 * (4 * 4 * 4 * 16 + 2 * 4**3))
    assert muon.flops == muon.bytes / 4 + products


def test_the_roofline_bends_where_a_copy_is_as_slow_as_a_product(monkeypatch, tmp_path):
    """100 FLOP/s and 10 bytes/s; 80 FLOPs on 4 bytes in 2 s."""
    drawn = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *a, **k: drawn.append(self)
    )
    work = dict.fromkeys(KINDS, roofline.Work()) | {PRODUCTS: roofline.Work(80.0, 4.0)}
    roofline.Profile(dict.fromkeys(KINDS, 2.0), work, 12, 12, 1, 100, 10).plot(tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[0.1, 1], [10, 100], [80, 100]]
    assert axes.collections[0].get_offsets().tolist() == [[20, 40]]

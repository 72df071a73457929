"""Causal attention, heads batched: how fast, against whom, how far from the limit?

Question
    How long does causal attention take at the notebook's shape, how does it grow with T, D and
    B, and what does dropout of the probabilities cost?
Method
    "core": q, k, v (B, H, T, D) contiguous -> o. "layer": x (B, T, C) through the projections
    of q, k, v, attention and the output projection, where nn.MultiheadAttention and the seeds'
    MultiHead can compete. Sweeps hold all other axes fixed.
Formula
    forward FLOPs 4 B H D T(T+1)/2 (two products over the causal half), backward 2.5 times that
    (five products; FlashAttention-2 counts so); the layer adds 2 FLOPs a weight and token,
    three times with a backward.
    bytes: q, k, v, o once forward; q, k, v, o, do, dq, dk, dv backward; lse in float32.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from bench import peers
from bench.harness import Bound, Case, Options, Work
from bench.ops import PHASES, TRAINING, Op, op_case, random_normal, sweep_points
from gptcore.config import GPTConfig
from kernels import causal_attention, causal_attention_qkv
from kernels.rng import dropout_keep_mask, dropout_scale

SITE = 16


def attention_work(B, H, T, D, itemsize: int, phase: str) -> Work:
    """FLOPs and bytes of the core."""
    forward, tensor = 4 * B * H * D * T * (T + 1) / 2, B * H * T * D * itemsize
    lse = 4 * B * H * T
    if phase == TRAINING:
        return Work(3.5 * forward, 12 * tensor + 2 * lse, B * T)
    return Work(forward, 4 * tensor, B * T)


def layer_work(B, H, T, D, itemsize: int, phase: str) -> Work:
    """FLOPs and bytes of the layer, C = H D."""
    C, core = H * D, attention_work(B, H, T, D, itemsize, phase)
    passes = 3 if phase == TRAINING else 1
    products = passes * 2 * B * T * 4 * C * C
    # x, qkv, o, y and the weights cross the bus at least once in each pass.
    moved = passes * itemsize * (B * T * 6 * C + 4 * C * C)
    return Work(core.flops + products, moved, B * T)


@functools.lru_cache(maxsize=4)
def _future(T: int, device: torch.device) -> torch.Tensor:
    """(T, T), true after the diagonal; made once, as models keep it."""
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


def plain_core(x, p, key):
    """softmax(scale q k^T, causal) v, probabilities dropped."""
    q, k, v = x["q"], x["k"], x["v"]
    B, H, T, D = q.shape
    weights = (q @ k.mT * D**-0.5).masked_fill(_future(T, q.device), float("-inf")).softmax(-1)
    if p and key is None:
        weights = F.dropout(weights, p)
    elif p:
        keep = dropout_keep_mask(key, SITE, B * H, T, T, p)
        weights = weights * keep.view(B, H, T, T) * dropout_scale(p)
    return weights @ v


def our_core(x, p, key):
    """The op under test."""
    return causal_attention(x["q"], x["k"], x["v"], dropout_p=p, key=key, site=SITE)


def one_head_at_a_time(x, p):
    """The seeds' loop over heads."""
    heads = range(x["q"].shape[1])
    return torch.stack(
        [plain_core({n: t[:, h, None] for n, t in x.items()}, p, None)[:, 0] for h in heads], 1
    )


def core_peers(options: Options, T: int, D: int):
    """Whoever takes q, k, v."""

    def sdpa(backend, x, p):
        return peers.sdpa(x["q"], x["k"], x["v"], backend, scale=D**-0.5, dropout_p=p)

    def flex(x, p):
        if p:
            raise peers.Skip("FlexAttention has no dropout")
        attention = peers.flex(options, T, scale=D**-0.5)
        leaves = {n: t for n, t in x.items() if t.requires_grad}
        return Bound(lambda: attention(x["q"], x["k"], x["v"]), leaves)

    by_backend = {n: functools.partial(sdpa, b) for n, b in peers.SDPA_BACKENDS.items()}
    return {"naive": one_head_at_a_time, **by_backend, "flex": flex}


def plain_layer(x, p, key):
    """The projections around the core; w_qkv has rows (3, H, D)."""
    H = _heads(x)
    q, k, v = F.linear(x["x"], x["w_qkv"]).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
    o = plain_core({"q": q, "k": k, "v": v}, p, key)
    return F.linear(o.transpose(1, 2).flatten(-2), x["w_out"])


def our_layer(x, p, key):
    """The projections around the packed op, without a copy."""
    qkv = F.linear(x["x"], x["w_qkv"]).unflatten(-1, (3, _heads(x), -1))
    o = causal_attention_qkv(qkv, dropout_p=p, key=key, site=SITE)
    return F.linear(o.flatten(-2), x["w_out"])


def _heads(x) -> int:
    return x["x"].shape[-1] // 64


def sdpa_layer(x, p):
    """The projections around SDPA, as nanoGPT writes it."""
    q, k, v = F.linear(x["x"], x["w_qkv"]).unflatten(-1, (3, _heads(x), -1)).permute(2, 0, 3, 1, 4)
    o = peers.sdpa(q, k, v, None, scale=None, dropout_p=p)
    return F.linear(o.transpose(1, 2).flatten(-2), x["w_out"])


@torch.no_grad()
def multihead_attention(x, p) -> Bound:
    """nn.MultiheadAttention with a boolean mask; said to be causal, it takes SDPA's causal path."""
    B, T, C = x["x"].shape
    mha = nn.MultiheadAttention(C, _heads(x), dropout=p, bias=False, batch_first=True)
    mha = mha.to(x["x"].device, x["x"].dtype)
    mha.in_proj_weight.copy_(x["w_qkv"])
    mha.out_proj.weight.copy_(x["w_out"])
    mask = _future(T, x["x"].device)

    def forward():
        x3 = x["x"], x["x"], x["x"]
        return mha(*x3, attn_mask=mask, is_causal=True, need_weights=False)[0]

    leaves = {"x": x["x"], "w_qkv": mha.in_proj_weight, "w_out": mha.out_proj.weight}
    return Bound(forward, leaves)


@torch.no_grad()
def naive_multihead(x, p) -> Bound:
    """The seeds' MultiHead, a list of Heads; its weights are per head, so only dx is compared."""
    from gptcore.naive import MultiHead

    B, T, C = x["x"].shape
    H = _heads(x)
    config = GPTConfig(
        block_size=T, n_embd=C, n_head=H, dropout=p, bias=False, attention_scale="head_size"
    )
    module = MultiHead(config).to(x["x"].device, x["x"].dtype)
    weights = x["w_qkv"].unflatten(0, (3, H, C // H))
    for h, head in enumerate(module.heads):
        for which, linear in enumerate((head.query, head.key, head.value)):
            linear.weight.copy_(weights[which, h])
    module.proj.weight.copy_(x["w_out"])
    own = {f"naive.{name}": parameter for name, parameter in module.named_parameters()}
    return Bound(lambda: module(x["x"]), {"x": x["x"], **own})


def cases(options: Options) -> list[Case]:
    """The notebook's shape first, then sweeps over T, D and B."""
    cuda = options.device.type == "cuda"
    size = options.dtype.itemsize
    B0 = 64 if cuda else 4 if options.quick else 16

    def core(B, T, D, p=0.0, phase=TRAINING, H=6, **rest):
        def inputs(generator):
            return {
                name: random_normal(generator, B, H, T, D, dtype=options.dtype) for name in "qkv"
            }

        op = Op(
            inputs,
            plain_core,
            our_core,
            core_peers(options, T, D),
            p,
            part=lambda tensor: tensor[:2],
        )
        return op_case(
            op,
            options,
            f"core B{B}-H{H}-T{T}-D{D} p={p:g}",
            phase,
            attention_work(B, H, T, D, size, phase),
            "TFLOP/s",
            shape={"B": B, "H": H, "T": T, "D": D, "C": H * D, "kind": "core"},
            **rest,
        )

    def layer(B, T, phase, **rest):
        H, D = 6, 64

        def inputs(generator):
            C = H * D
            draw = functools.partial(random_normal, generator, dtype=options.dtype)
            return {
                "x": draw(B, T, C),
                "w_qkv": draw(3 * C, C, scale=C**-0.5),
                "w_out": draw(C, C, scale=C**-0.5),
            }

        layer_peers = {
            "naive": naive_multihead,
            "sdpa": sdpa_layer,
            "mha": multihead_attention,
        }
        return op_case(
            Op(inputs, plain_layer, our_layer, layer_peers),
            options,
            f"layer B{B}-H{H}-T{T}-D{D}",
            phase,
            layer_work(B, H, T, D, size, phase),
            "TFLOP/s",
            shape={"B": B, "H": H, "T": T, "D": D, "C": H * D, "kind": "layer"},
            **rest,
        )

    Ts = (64, 128, 256, 512, 1024) + ((2048, 4096, 8192) if cuda else ())
    batches = (1, 4, 16, 64) + ((256,) if cuda else ())
    found = [
        core(B0, 256, 64, p, phase, quick=cuda or (p > 0 and phase == TRAINING))
        for p in (0.2, 0.0)
        for phase in PHASES
    ]
    found += [layer(B0, 256, phase, quick=cuda and phase == TRAINING) for phase in PHASES]
    if cuda:
        found += [core(8, 1024, 64, p, phase, H=12) for p in (0.0, 0.1) for phase in PHASES]
    points = sweep_points({"T": Ts, "D": (16, 32, 64, 85, 128), "B": batches}, B=4, T=256, D=64)
    for axes, point in points:
        quick = axes[0] == "T" and 64 < point["T"] < 1024
        found.append(core(**point, sweeps=axes, quick=quick, full=not cuda and point["B"] > 16))
    found += [core(4, T, 64, 0.2, sweeps=("T",), full=not cuda) for T in Ts]
    if not cuda:
        found += [core(64, 256, 64, p, full=True) for p in (0.0, 0.2)]
    return found

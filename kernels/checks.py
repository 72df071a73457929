"""What the certificate checks of every op, and what others may add to it.

`check_problem` holds a problem of `kernels.problems` to the 2x rule and to bit-identical reruns;
the other `check_*` functions test what a formula does not show: masks, causality, CUDA graphs.
All yield `Result`s, and so do the checks that other packages add by `register_check`.
"""

import contextlib
import functools
import itertools
import random
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

import kernels
from kernels import rng
from kernels.problems import (
    DTYPES,
    SHAPES,
    SITE,
    Draw,
    Problem,
    Tensors,
    build_problem,
    problem_names,
)
from kernels.verify import Comparison, compare

OPS = (*SHAPES, "dropout_keep_mask")
LARGE = 1 << 20  # elements of an input
LUCK = 4.0  # times the allowed error: no draw is that unlucky, so nothing is drawn again

Measured = tuple[Tensors, Tensors, Tensors]  # fused, plain PyTorch, float64


@dataclass(frozen=True)
class Settings:
    """What a run of the certificate covers."""

    device: torch.device
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    full: bool
    seed: int


@dataclass(frozen=True)
class Result:
    """One check of one op; `comparisons` hold the figures where there are any."""

    op: str
    case: str
    dtype: str
    backend: str
    check: str
    passed: bool
    detail: str = ""
    comparisons: tuple[Comparison, ...] = ()


# ------------------------------------------------------------------------------------ evaluation


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that `torch.empty` hands out holds NaN, so that an element left unwritten shows."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of plain PyTorch's own kernels; we want only the fill
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill


def evaluate(function: Callable[[Tensors], Tensors], inputs: Tensors, cotangents: Tensors):
    """Outputs and, under "d" + name, the gradients of the inputs; detached, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = function(leaves)
    gradients = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        [cotangents[name].to(output.dtype) for name, output in outputs.items()],
    )
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def cotangents_of(problem: Problem) -> Tensors:
    """A gradient for each output, drawn in the dtype of the problem."""
    with torch.no_grad():
        outputs = problem.plain(problem.inputs)
    generator = torch.Generator().manual_seed(zlib.crc32(problem.name.encode()))
    return {
        name: torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        for name, output in outputs.items()
    }


def doubled(tensors: Tensors) -> Tensors:
    """The same values in float64."""
    return {name: tensor.double() for name, tensor in tensors.items()}


def strided(tensors: Tensors) -> Tensors:
    """The same values, in turn as every second element of a wider row and with axes reversed."""
    views = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        if i % 2 == 0:
            wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1])
            views[name] = wide[..., ::2].copy_(tensor)
        else:
            views[name] = tensor.permute(*range(tensor.ndim)[::-1]).contiguous()
            views[name] = views[name].permute(*range(tensor.ndim)[::-1])
    return views


def compare_all(fused: Tensors, plain: Tensors, reference: Tensors) -> tuple[Comparison, ...]:
    """The 2x rule for every output and gradient."""
    return tuple(
        compare(name, fused[name], plain[name].to(fused[name].dtype), reference[name])
        for name in reference
    )


def bit_equal(a: Tensors, b: Tensors) -> list[str]:
    """Names under which a and b differ in any bit."""
    return [name for name in a if not torch.equal(_bits(a[name]), _bits(b[name]))]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bit patterns, so that NaN equals itself and -0 differs from 0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


# ---------------------------------------------------------------------------------------- checks


def draws_of(inputs: Tensors) -> int:
    """How many draws `hold_rule` is to have of a problem that breaks the rule at first."""
    return 16 if max(tensor.numel() for tensor in inputs.values()) < LARGE else 4


def hold_rule(first: Measured, others: Iterable[Measured] = ()) -> tuple[Comparison, ...]:
    """The 2x rule on (fused, plain, reference); where `first` breaks it, on the mean of all draws.

    Of one draw, above all in max norm, either error may be luck: a breach by the op itself lasts.
    The largest error of all draws would be one number's luck again; the mean of theirs is not.
    Nothing is drawn again where an error is NaN or more than LUCK times what is allowed.
    """
    comparisons = compare_all(*first)
    errors = [error / allowed for error, _, allowed in (c.figures for c in comparisons)]
    if all(c.passed for c in comparisons) or not all(error <= LUCK for error in errors):
        return comparisons
    draws = [comparisons, *(compare_all(*other) for other in others)]
    return tuple(Comparison.mean(same) for same in zip(*draws, strict=True))


def check_problem(
    problem: Problem,
    backend: str,
    thorough: bool = True,
    redraws: Callable[[], Iterable[Problem]] = lambda: (),
) -> Iterator[Result]:
    """Accuracy by the 2x rule; if thorough, a bit-identical rerun and strided inputs too.

    redraws() yields more problems of the same size, for `hold_rule`.
    """
    dtype = str(next(iter(problem.inputs.values())).dtype).removeprefix("torch.")
    about = (problem.op, problem.name, dtype, backend)
    cotangents = cotangents_of(problem)

    def fused(problem: Problem, inputs: Tensors) -> Tensors:
        with poisoned():
            return evaluate(lambda x: problem.call(x, backend), inputs, cotangents)

    def measure(problem: Problem, arrange=lambda inputs: inputs) -> Measured:
        reference = evaluate(problem.plain, doubled(problem.inputs), doubled(cotangents))
        inputs = arrange(problem.inputs)  # how they lie decides how plain PyTorch, too, adds
        return fused(problem, inputs), evaluate(problem.plain, inputs, cotangents), reference

    before = {name: tensor.clone() for name, tensor in problem.inputs.items()}
    first = measure(problem)
    comparisons = hold_rule(first, map(measure, redraws()))
    yield Result(*about, "accuracy", all(c.passed for c in comparisons), "", comparisons)
    changed = bit_equal(before, problem.inputs)
    yield Result(*about, "inputs untouched", not changed, ", ".join(changed))
    if not thorough:
        return
    changed = bit_equal(first[0], fused(problem, problem.inputs))
    yield Result(*about, "rerun bit-identical", not changed, ", ".join(changed))
    apart = (measure(other, strided) for other in redraws())
    comparisons = hold_rule(measure(problem, strided), apart)
    yield Result(*about, "strided inputs", all(c.passed for c in comparisons), "", comparisons)


def check_causality(settings: Settings, backend: str, dtype: str) -> Iterator[Result]:
    """What token j is changes no output before j, and what o[<j] is asked for no gradient from j.

    The checks also see that the output at j and later does change: they are able to fail.
    """
    T, j = 34, 19
    draw = Draw(settings.device, DTYPES[dtype], settings.seed)
    problem = SHAPES["causal_attention"].build(draw, B=1, H=1, T=T, D=16, p=0.2)
    other = {name: tensor.clone() for name, tensor in problem.inputs.items()}
    for tensor in other.values():
        tensor[:, :, j] += 4
    cotangent = torch.zeros_like(problem.inputs["q"])
    cotangent[:, :, :j] = 1

    def fused(x: Tensors) -> Tensors:
        return problem.call(x, backend)

    a = evaluate(fused, problem.inputs, {"o": cotangent})
    b = evaluate(fused, other, {"o": cotangent})
    about = ("causal_attention", f"T{T}, token {j} changed", dtype, backend)
    before = torch.equal(a["o"][:, :, :j], b["o"][:, :, :j])
    after = float((a["o"][:, :, j:] != b["o"][:, :, j:]).any(-1).double().mean()) > 0.5
    detail = f"o before it {'equal' if before else 'changed'}, "
    detail += f"from it on {'changed' if after else 'equal'}"
    yield Result(*about, "causality", before and after, detail)
    leaks = [n for n in ("dq", "dk", "dv") if bool((a[n][:, :, j:] != 0).any())]
    yield Result(*about, "causality of gradients", not leaks, ", ".join(leaks))


def check_huge_logits(settings: Settings, backend: str, dtype: str) -> Iterator[Result]:
    """Logits whose exponential overflows: o by the 2x rule, gradients finite.

    Gradients have no 2x rule here: where a query is 30 times the others, the rounding of
    rowsum(do * o), which every flash algorithm subtracts, is 30 times as large in dk.
    """
    draw = Draw(settings.device, DTYPES[dtype], settings.seed)
    problem = SHAPES["causal_attention"].build(draw, B=1, H=1, T=20, D=16)
    problem.inputs["q"][:, :, 7] *= 100 if dtype == "float16" else 1e4
    cotangents = cotangents_of(problem)
    reference = evaluate(problem.plain, doubled(problem.inputs), doubled(cotangents))
    plain = evaluate(problem.plain, problem.inputs, cotangents)
    actual = evaluate(lambda x: problem.call(x, backend), problem.inputs, cotangents)
    comparison = compare("o", actual["o"], plain["o"], reference["o"])
    wild = [name for name, tensor in actual.items() if not tensor.isfinite().all()]
    about = ("causal_attention", "T20, query 7 huge", dtype, backend)
    detail = f"not finite: {', '.join(wild)}" if wild else ""
    yield Result(*about, "huge logits", comparison.passed and not wild, detail, (comparison,))


def _scalar_keep(key: torch.Tensor, plane: int, row: int, col: int, p: float) -> bool:
    """DESIGN's section 4 for one element, in Python's integers."""
    k0, k1 = key.tolist()[:2]
    c0, c1, c2, c3 = col // 8, row, plane, SITE
    for _ in range(7):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & 0xFFFFFFFF
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    lane = col % 8
    return ((c0, c1, c2, c3)[lane // 2] >> 16 * (lane % 2)) & 0xFFFF >= round(p * 65536)


def check_keep_mask(settings: Settings) -> Iterator[Result]:
    """`dropout_keep_mask` against a scalar Philox, its rate, and the independence of its keys."""
    draw = Draw(settings.device, torch.float32, settings.seed)
    key, p = draw.key(), 0.2
    about = ("dropout_keep_mask", "8 planes, 64 rows, 203 columns, p0.2", "bool", "eager")
    mask = rng.dropout_keep_mask(key, SITE, range(3, 11), range(5, 69), 203, p)
    r = random.Random(settings.seed)
    places = [(r.randrange(8), r.randrange(64), r.randrange(203)) for _ in range(2000)]
    places += [(0, 0, col) for col in range(203)]
    wrong = sum(
        bool(mask[i, j, col]) != _scalar_keep(key, 3 + i, 5 + j, col, p) for i, j, col in places
    )
    detail = f"{len(places)} bits, {wrong} differ"
    yield Result(*about, "mask bit-equal to scalar Philox", wrong == 0, detail)
    count, dropped = mask.numel(), int((~mask).sum())
    expected = rng.dropout_threshold(p) / 65536
    deviation = abs(dropped - count * expected) / (count * expected * (1 - expected)) ** 0.5
    detail = f"{dropped / count:.4f} of {count} dropped, {deviation:.1f} sigma from {expected:.4f}"
    yield Result(*about, "rate", deviation < 5, detail)
    for name, other_key, other_site in (
        ("seed", key + torch.tensor([1, 0, 0], device=key.device), SITE),
        ("step", key + torch.tensor([0, 1, 0], device=key.device), SITE),
        ("site", key, SITE + 1),
    ):
        other = rng.dropout_keep_mask(other_key, other_site, range(3, 11), range(5, 69), 203, p)
        agree = float((mask == other).float().mean())
        unrelated = abs(agree - (p * p + (1 - p) ** 2)) < 0.02
        detail = f"{agree:.3f} of the bits agree by chance"
        yield Result(*about, f"next {name} is another mask", unrelated, detail)


def applied_mask(op: str, draw: Draw, key: torch.Tensor, backend: str, p: float):
    """The mask (N,) that an op applied, read off its output, and [(plane, row, col), ...].

    The places are counted as DESIGN's section 4 has them; None for an op that drops nothing.
    """
    options = {"dropout_p": p, "key": key, "site": SITE, "backend": backend}
    first, (B, H, T, C) = int(key[2]), (2, 2, 17, 37)
    if op.startswith("causal_attention"):
        # Probabilities of row i are all 1 / (i + 1), and v copies them to the output.
        q = torch.zeros(B, H, T, T).to(draw.device, draw.dtype)
        v = torch.eye(T).expand(B, H, T, T).to(q)
        if op == "causal_attention":
            o = kernels.causal_attention(q, q, v, **options)
        else:
            qkv = torch.stack((q, q, v)).permute(1, 3, 0, 2, 4)
            o = kernels.causal_attention_qkv(qkv, **options).transpose(1, 2)
        planes = range(first * H, (first + B) * H)
        where = [(n, i, j) for n in planes for i in range(T) for j in range(i + 1)]
        i, j = torch.tril_indices(T, T)
        return (o != 0)[:, :, i, j].flatten(), where
    where = [(0, first * T + row, col) for row in range(B * T) for col in range(C)]
    ones = torch.ones(B, T, C, device=draw.device, dtype=draw.dtype)
    if op == "dropout_add_layer_norm":
        _, x = kernels.dropout_add_layer_norm(ones, ones * 0, ones[0, 0], **options)
    elif op == "embed":
        idx = torch.zeros(B, T, dtype=torch.int64, device=draw.device)
        x = kernels.embed(idx, ones[0, :3], ones[0] * 0, **options)
    else:
        return None
    return (x != 0).flatten(), where


def check_masks(op: str, settings: Settings, backend: str, dtype: str) -> Iterator[Result]:
    """The mask that an op applies, read off its output, bit-equal to the scalar Philox."""
    p, draw = 0.3, Draw(settings.device, DTYPES[dtype], settings.seed)
    key = draw.key()
    applied = applied_mask(op, draw, key, backend, p)
    if applied is None:
        return
    mask, where = applied
    expected = [_scalar_keep(key, *place, p) for place in where]
    wrong = sum(a != b for a, b in zip(mask.tolist(), expected, strict=True))
    rate = 1 - sum(expected) / len(expected)
    detail = f"{len(where)} bits, {wrong} differ; {rate:.3f} dropped"
    yield Result(op, f"p{p}", dtype, backend, "mask bit-equal to scalar Philox", not wrong, detail)


def check_graph(problem: Problem, backend: str) -> Iterator[Result]:
    """A CUDA graph of forward and backward, replayed, equals eager calls; masks change each time.

    Only the key's second word, the step, changes between replays, in place.
    """
    dtype = str(next(iter(problem.inputs.values())).dtype).removeprefix("torch.")
    about = (problem.op, problem.name, dtype, backend)
    cotangents = cotangents_of(problem)

    def step() -> Tensors:
        return evaluate(lambda x: problem.call(x, backend), problem.inputs, cotangents)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles what must not compile under capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    seen, wrong = [], []
    for number in range(3):
        if problem.key is not None:
            problem.key[1] = number
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in captured.items()}
        wrong += [f"{name} at step {number}" for name in bit_equal(replayed, step())]
        seen.append(replayed)
    yield Result(*about, "graph replay equals eager", not wrong, ", ".join(wrong))
    if problem.key is not None:
        frozen = [n for n in range(2) if not bit_equal(seen[n], seen[n + 1])]
        yield Result(*about, "graph masks change", not frozen, f"{3 - len(frozen)} masks")


# ----------------------------------------------------------------------------------- the whole

_registered: dict[str, Callable[[Settings, str, str], Iterator[Result]]] = {}


def register_check(name: str, function: Callable[[Settings, str, str], Iterator[Result]]) -> None:
    """Have the certificate run `function(settings, backend, dtype)` under the op name `name`.

    This is how packages built on the ops add whole-model rows; `kernels.verify` imports the
    modules named in its PLUGINS, where they are installed, and they call this.
    """
    _registered[name] = function


def registered() -> tuple[str, ...]:
    """Names given to `register_check`."""
    return tuple(_registered)


def parts(op: str, settings: Settings) -> list[tuple[str, str, str]]:
    """(op, backend, dtype) for each part of an op's checks that can be run by itself."""
    if op == "dropout_keep_mask":
        return [(op, "eager", "bool")]
    return list(itertools.product((op,), settings.backends, settings.dtypes))


def part_results(part: tuple[str, str, str], settings: Settings) -> Iterator[Result]:
    """Everything the certificate says about one of `parts`; an exception is a failed result."""
    op, backend, dtype = part
    if op == "dropout_keep_mask":
        results = check_keep_mask(settings)
    elif op in _registered:
        results = _registered[op](settings, backend, dtype)
    else:
        results = _check_kernel_op(op, settings, backend, dtype)
    return _guarded((op, "", dtype, backend), results)


def check_part(part: tuple[str, str, str], settings: Settings) -> list[Result]:
    """`part_results` as a list, which can travel between processes."""
    return list(part_results(part, settings))


def _check_kernel_op(op: str, settings: Settings, backend: str, dtype: str) -> Iterator[Result]:
    on_gpu = settings.device.type == "cuda"
    compiled = on_gpu or backend == "eager"
    names = problem_names(op, settings.full, compiled, settings.seed, dtype, on_gpu)
    for number, name in enumerate(names):
        about = (op, name, dtype, backend)

        def draw(seed: int | str, name: str = name) -> Problem:
            return build_problem(op, name, dtype, settings.device, seed)

        problem = draw(settings.seed)
        seeds = [f"{settings.seed} {i}" for i in range(1, draws_of(problem.inputs))]
        thorough = settings.full or compiled or number == 0
        redraws = functools.partial(map, draw, seeds)
        yield from _guarded(about, check_problem(problem, backend, thorough, redraws))
        if on_gpu and number == 0:
            yield from _guarded(about, check_graph(problem, backend))
    if op == "causal_attention":
        yield from check_causality(settings, backend, dtype)
        yield from check_huge_logits(settings, backend, dtype)
    if settings.full or compiled or dtype == "float32":
        yield from check_masks(op, settings, backend, dtype)


def _guarded(about: tuple[str, ...], results: Iterator[Result]) -> Iterator[Result]:
    """`results`; what computing them raises is one more result, a failed one."""
    try:
        yield from results
    except Exception as error:  # the certificate reports every failure and goes on
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Result(*about, "runs", False, message)

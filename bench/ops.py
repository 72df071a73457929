"""Cases of one op: the same inputs for everyone, plain PyTorch and float64 as judges.

An op is given as a plain formula `plain(inputs, p, key)` that is right in any dtype; with key
None its dropout is F.dropout, else the mask of `kernels.rng`. Everyone is checked without
dropout; gptcore is checked with the masks of its key as well.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import (
    OURS,
    Bound,
    Case,
    Check,
    Contestant,
    Options,
    Tensors,
    Work,
    as_tuple,
    check_tensors,
    named_results,
    timed_call,
)
from bench.peers import COMPILE_MODES, compiled
from kernels.checks import Measured, draws_of
from kernels.rng import dropout_keep_mask, dropout_scale, make_key

FORWARD, TRAINING = "forward", "forward+backward"
PHASES = (FORWARD, TRAINING)
SEED = 1337

Formula = Callable[[Tensors, float, torch.Tensor | None], Any]
Peer = Callable[[Tensors, float], Any]  # returns the outputs, or a Bound of its own


@dataclass(frozen=True)
class Op:
    """An op at one shape.

    Args:
        inputs: makes the tensors, given a generator; floating ones are leaves.
        plain: the formula. ours: the op under test, called in the same way.
        peers: name -> (inputs, p) -> outputs; or a Bound where the peer owns its weights.
        part: cuts the batch of every tensor short, so that the float64 reference stays small;
            only for ops whose results in one batch entry depend on that entry alone.
    """

    inputs: Callable[[torch.Generator], Tensors]
    plain: Formula
    ours: Formula
    peers: dict[str, Peer]
    p: float = 0.0
    part: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


def op_case(op: Op, options: Options, name: str, phase: str, work: Work, unit: str, **rest) -> Case:
    """The case of `op` in one phase; `rest` goes to Case."""
    dtype = str(options.dtype).removeprefix("torch.")
    shape = rest.pop("shape") | {"p": op.p}
    names = (OURS, "eager", *op.peers, *(() if "sweeps" in rest else COMPILE_MODES))
    return Case(
        name=f"{name} {phase}",
        shape=shape,
        dtype=dtype,
        work=work,
        unit=unit,
        open=functools.partial(_open, op, options, phase, names),
        contestants=names,
        phase=phase,
        **rest,
    )


class _Bench:
    """One opened op: inputs, gradients and what is right."""

    def __init__(self, op: Op, options: Options, phase: str, seed: int = SEED):
        self.op, self.options, self.phase = op, options, phase
        generator = torch.Generator(options.device).manual_seed(seed)
        self.inputs = op.inputs(generator)
        for tensor in self.inputs.values():
            tensor.requires_grad_(phase == TRAINING and tensor.is_floating_point())
        self.key = make_key(SEED, 0, device=options.device)
        meta = {name: tensor.to("meta") for name, tensor in self.inputs.items()}
        self.gradients = [
            torch.randn(o.shape, dtype=o.dtype, device=options.device, generator=generator)
            for o in as_tuple(op.plain(meta, 0.0, None))
        ]
        self._expected: dict[float, tuple[Tensors, Tensors]] = {}

    def bind(self, outputs: Callable[[Tensors, float], Any], p: float) -> Bound:
        """`outputs(inputs, p)`, or the Bound it returns, on these inputs."""
        bound = outputs(self.inputs, p)
        if isinstance(bound, Bound):
            return bound if self.phase == TRAINING else Bound(bound.forward, {})
        return Bound(lambda: outputs(self.inputs, p), self._leaves(self.inputs))

    def expected(self, p: float) -> tuple[Tensors, Tensors]:
        """Results of the plain formula in the op's dtype and in float64."""
        if p not in self._expected:
            self._expected[p] = tuple(self._plain(p, double) for double in (False, True))
        return self._expected[p]

    def _plain(self, p: float, double: bool) -> Tensors:
        def convert(tensor):
            tensor = self.op.part(tensor.detach())
            return tensor.double() if double and tensor.is_floating_point() else tensor.clone()

        inputs = {name: convert(tensor) for name, tensor in self.inputs.items()}
        leaves = {n: t.requires_grad_() for n, t in self._leaves(inputs).items()}
        bound = Bound(lambda: self.op.plain(inputs, p, self.key if p else None), leaves)
        return named_results(bound, [convert(g) for g in self.gradients])

    def _leaves(self, inputs: Tensors) -> Tensors:
        if self.phase == FORWARD:
            return {}
        return {n: t for n, t in inputs.items() if t.is_floating_point()}

    def measured(self, outputs: Callable[[Tensors, float], Any], p: float) -> Measured:
        """Results of `outputs`, and what is expected."""
        actual = named_results(self.bind(outputs, p), self.gradients)
        return {name: self.op.part(x) for name, x in actual.items()}, *self.expected(p)

    def check(self, outputs: Callable[[Tensors, float], Any], ps: set[float], ours: bool) -> Check:
        """Hold results at every p of `ps` against the formula."""
        checks = []
        for p in sorted(ps):
            others = (
                _Bench(self.op, self.options, self.phase, SEED + i).measured(outputs, p)
                for i in range(1, draws_of(self.inputs))
            )
            checks.append(check_tensors(*self.measured(outputs, p), ours=ours, others=others))
        failed = [check for check in checks if not check.passed]
        return failed[0] if failed else checks[-1]

    def start(self, outputs: Callable[[Tensors, float], Any]):
        return timed_call(self.bind(outputs, self.op.p), self.gradients, self.phase)


def _open(op: Op, options: Options, phase: str, names: tuple[str, ...]) -> Iterator[Contestant]:
    bench = _Bench(op, options, phase)

    def ours(inputs, p):
        return op.ours(inputs, p, bench.key)

    def eager(inputs, p):
        return op.plain(inputs, p, None)

    def contestant(name, outputs, ps=frozenset({0.0})):
        return Contestant(
            name,
            start=lambda: bench.start(outputs),
            check=lambda: bench.check(outputs, ps, ours=name == OURS),
        )

    yield contestant(OURS, ours, {0.0, op.p})
    peers = {"eager": eager, **op.peers} | {
        name: functools.partial(_compiled, eager, mode, options)
        for name, mode in COMPILE_MODES.items()
    }
    for name in names[1:]:
        if options.wants(name):
            yield contestant(name, peers[name])


def _compiled(eager, mode: str, options: Options, inputs: Tensors, p: float) -> Bound:
    function = compiled(lambda inputs: eager(inputs, p), mode, options)
    leaves = {n: t for n, t in inputs.items() if t.requires_grad}
    return Bound(lambda: function(inputs), leaves)


def sweep_points(
    sweeps: dict[str, tuple[int, ...]], **centre: int
) -> list[tuple[tuple[str, ...], dict[str, int]]]:
    """Each point of one-axis sweeps through `centre` once, with the axes it belongs to."""
    axes_of: dict[tuple[int, ...], list[str]] = {}
    for axis, values in sweeps.items():
        for value in values:
            axes_of.setdefault(tuple((centre | {axis: value}).values()), []).append(axis)
    return [(tuple(axes), dict(zip(centre, point, strict=True))) for point, axes in axes_of.items()]


def random_normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0):
    """A tensor of the generator's device; drawn in float32 so that dtypes agree on the values."""
    tensor = torch.randn(*shape, generator=generator, device=generator.device)
    return tensor.mul_(scale).to(dtype)


def dropout_rows(x: torch.Tensor, p: float, key: torch.Tensor | None, site: int) -> torch.Tensor:
    """Plain dropout of x (..., C): F.dropout, or with a key the mask of plane 0."""
    if not p:
        return x
    if key is None:
        return torch.nn.functional.dropout(x, p)
    keep = dropout_keep_mask(key, site, 1, x.numel() // x.shape[-1], x.shape[-1], p)
    return x * keep.view(x.shape) * dropout_scale(p)

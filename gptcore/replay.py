"""A small model's forward and backward on a CPU, replayed as a list of ops.

Such an update issues hundreds of ops, each shorter than what modules, autograd and its engine add
to it in Python. They are written down once, below autograd, and from then on called in the same
order on the same weights: the same bits, and much sooner where the model is tiny. This is to a
CPU what a CUDA graph is to a GPU. What changes from one update to the next are the batch and the
masks of dropout, which are inputs; masks of a tiny model are drawn for many updates at once.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from kernels import rng


class Replay:
    """loss, gradients = replay(idx, targets, key): what `forward` and autograd compute.

    Attributes:
        source: the ops, as Python that defines run(idx, targets, *masks).
        proven: whether a replayed update was compared with the same one computed.
    """

    def __init__(self, source: str, names: dict[str, Any], masks: rng.MasksAhead):
        self.source, self.names, self.masks = source, names, masks
        self.run, self.proven = _defined(source, names), False

    @classmethod
    def record(cls, forward: Callable, parameters: list[torch.Tensor], idx, targets, key):
        """Run one update and write its ops down.

        Args:
            forward: (idx, targets, key) -> (_, loss). Which ops it issues, in this thread alone,
                must not depend on numbers.
            parameters: trained in place; the gradient of one that the loss does not need is None.
            idx, targets: (B, T); later ones have these shapes.
            key: of `kernels.rng`; later ones differ in seed and step.
        Returns: replay, and the loss and the gradients of this update.
        Raises: RuntimeError if an op reads a result that no op was seen to return.
        """
        requests, masks = [], []

        def note(key, *request):
            requests.append(request)
            masks.append(rng.draw_keep_mask(key, *request))
            return masks[-1]

        with torch.no_grad(), rng.masks_from(note):
            forward(idx, targets, key)
        given = iter(masks)
        with rng.masks_from(lambda *_: next(given)), _Tape([idx, targets, *masks]) as tape:
            _, loss = forward(idx, targets, key)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        source, names = tape.compiled([loss, *gradients])
        return cls(source, names, rng.MasksAhead(requests)), loss.detach(), gradients

    def __call__(self, idx, targets, key) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The mean loss, and the gradient of every parameter; inference tensors, all of them."""
        with torch.inference_mode():
            loss, *gradients = self.run(idx, targets, *self.masks(key))
        return loss, gradients

    def prove(self, loss, gradients, expected_loss, expected_gradients) -> None:
        """Compare a replayed update with the same one computed by autograd.

        Raises: RuntimeError unless all bits agree, NaN with NaN.
        """
        pairs = list(zip([loss, *gradients], [expected_loss, *expected_gradients], strict=True))
        if any((a is None) != (b is None) for a, b in pairs) or not all(
            bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs if a is not None
        ):
            raise RuntimeError("its replay was another update")
        self.proven = True

    @contextlib.contextmanager
    def labelled(self, attention: str) -> Iterator[None]:
        """Within, the ops of attention show in a profile as `attention`."""
        mark = record_function(attention)
        names = {
            name: mark(function) if name.startswith("attention") else function
            for name, function in self.names.items()
        }
        before, self.run = self.run, _defined(self.source, names)
        try:
            yield
        finally:
            self.run = before


def _defined(source: str, names: dict[str, Any]) -> Callable:
    exec(source, names := dict(names))
    return names["run"]


class _Op(NamedTuple):
    function: Any
    args: tuple
    kwargs: dict
    result: Any
    of_attention: bool

    def reads(self) -> list[torch.Tensor]:
        return _tensors((self.args, self.kwargs))


class _Tape(TorchDispatchMode):
    """Notes the ops that reach the backends, and which tensor of one is which of another.

    Names: i, an input; v, the result of an op; c, what was there before: a weight, a constant.
    """

    def __init__(self, inputs: list[torch.Tensor]):
        super().__init__()
        self.ops: list[_Op] = []
        self.inputs = inputs
        self.kept = list(inputs)  # every tensor seen: no id and no memory is used twice
        self.names = {id(x): f"i{n}" for n, x in enumerate(inputs)}
        self.memory = {x.untyped_storage().data_ptr() for x in inputs}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        op = _Op(function, args, kwargs or {}, None, _called_by("kernels.attention"))
        for x in op.reads():
            if id(x) not in self.names:
                if x.untyped_storage().data_ptr() in self.memory:
                    raise RuntimeError(f"Replay: {function} reads what no op was seen to return")
                self._name(x, "c")
        result = function(*op.args, **op.kwargs)
        for x in _tensors(result):
            if id(x) not in self.names:
                self._name(x, "v")
                if not function.is_view and x.numel():
                    self.memory.add(x.untyped_storage().data_ptr())
        self.ops.append(op._replace(result=result))
        return result

    def _name(self, x, kind):
        self.kept.append(x)
        self.names[id(x)] = f"{kind}{len(self.kept)}"

    def compiled(self, outputs: list[torch.Tensor | None]) -> tuple[str, dict[str, Any]]:
        """Source of run(*inputs) -> outputs, and what it names but for its own variables."""
        before = {id(x): x for x in self.kept if self.names[id(x)].startswith("c")}
        ops, same = [], {}
        for op in self.ops:
            args, kwargs = tree_map_only(
                torch.Tensor, lambda x: same.get(id(x), x), (op.args, op.kwargs)
            )
            op = op._replace(args=args, kwargs=kwargs)
            if op.function in _SAME:
                same[id(op.result)] = args[0]
            elif op.function.is_view and all(id(x) in before for x in op.reads()):
                before.update({id(x): x for x in _tensors(op.result)})  # a weight, transposed
            else:
                ops.append(op)
        outputs = [same.get(id(x), x) for x in outputs]
        names = {self.names[key]: x.detach() for key, x in before.items()}
        return self._written(self._needed(ops, outputs), outputs, names), names

    def _needed(self, ops, outputs) -> list[_Op]:
        """The ops whose results the outputs depend on, or that write to memory."""
        live, needed = {id(x) for x in outputs}, []
        for op in reversed(ops):
            if op.function._schema.is_mutable or any(id(x) in live for x in _tensors(op.result)):
                live.update(id(x) for x in op.reads())
                needed.append(op)
        return needed[::-1]

    def _written(self, ops, outputs, names) -> str:
        """The source of a list of ops, which forgets every tensor after its last use."""
        returned = ["None" if x is None else self.names[id(x)] for x in outputs]
        last = {}
        for at, op in enumerate(ops):
            last.update({self.names[id(x)]: at for x in [*op.reads(), *_tensors(op.result)]})
        spent: dict[int, list[str]] = {}
        for name, at in last.items():
            if name.startswith("v") and name not in returned and name not in names:
                spent.setdefault(at, []).append(name)
        lines = [f"def run({', '.join(self.names[id(x)] for x in self.inputs)}):"]
        for at, op in enumerate(ops):
            call = f"{'attention' if op.of_attention else 'op'}{at}"
            names[call] = _binding(op.function)
            words = [self._word(x, names) for x in op.args]
            words += [f"{name}={self._word(x, names)}" for name, x in op.kwargs.items()]
            left = ", ".join("_" if x is None else self.names[id(x)] for x in _results(op.result))
            lines.append(f"    {left} = {call}({', '.join(words)})  # {op.function}")
            if at in spent:
                lines.append(f"    del {', '.join(spent[at])}")
        return "\n".join([*lines, f"    return {', '.join(returned)},"])

    def _word(self, x, names) -> str:
        """An argument, as Python."""
        if isinstance(x, torch.Tensor):
            return self.names[id(x)]
        if isinstance(x, list | tuple):
            return f"[{', '.join(self._word(item, names) for item in x)}]"
        if x is None or isinstance(x, bool | int | str):
            return repr(x)
        name = f"k{len(names)}"  # a dtype, a layout, a device; a float, which may be infinite
        names[name] = x
        return name


_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default)  # below autograd they return what they get


def _binding(op) -> Callable:
    """torch's own function for an op of ATen: called with the same arguments, and sooner."""
    name = op._schema.name.removeprefix("aten::")
    in_place = name.endswith("_") and not name.startswith("_")
    if hasattr(torch._C._VariableFunctions, name) and name != "_to_copy":
        return getattr(torch._C._VariableFunctions, name)
    if (in_place or name == "view") and hasattr(torch.Tensor, name):
        return getattr(torch.Tensor, name)
    return op


def _called_by(module: str) -> bool:
    """Whether a function of a module whose name starts like this is on the stack."""
    frame = sys._getframe(2)
    while frame and not frame.f_globals.get("__name__", "").startswith(module):
        frame = frame.f_back
    return frame is not None


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def _results(result) -> list[torch.Tensor | None]:
    """What an op returns, one after the other; a number is None, for nothing here reads one."""
    several = result if isinstance(result, list | tuple) else [result]
    return [x if isinstance(x, torch.Tensor) else None for x in several]

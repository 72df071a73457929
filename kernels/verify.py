"""The certificate: every op, dtype and shape against a float64 reference.

    python -m kernels.verify [--quick | --full | --self-test] [--ops OP ...] [--json FILE]

Rule (DESIGN.md section 5), per output and gradient, in max norm and in relative RMS:

    error(fused) <= 2 * error(same formula, plain PyTorch, same dtype) + tiny

error_max = max |a - r| / max |r|,   error_rms = ||a - r|| / ||r||,   r the float64 reference.
tiny is one rounding to nearest of the result's dtype at the largest magnitude: eps / 2 in max
norm, eps / 4 in RMS. It matters only where plain PyTorch happens to be exact. The error of a
few numbers is partly luck, so below 16 elements tiny is 2 eps in both norms. So is the largest
error of one draw: a problem that breaks the rule is drawn 15 more times (3, if it is large), each
error is averaged over all draws, and the averages must obey the rule. An error above 4 times the
allowed one fails at once.

On a GPU the kernels run there; without one, under Triton's interpreter on the CPU. `kernels.checks`
says what is checked, `kernels.damages` proves that the checks can fail.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

from kernels import backend
from kernels.command_line import Parser, rerun, table

ALLOWED_RATIO = 2.0
FEW_ELEMENTS = 16
# Of processes that share a GPU: how many, for each holds CUDA's own of the host's memory, too; and
# of the GPU's memory what CUDA and the largest problem in float64 take.
GPU_WORKERS, WORKER_BYTES = 8, 4 << 30
# Packages built on the ops; where installed, they add whole-model checks (checks.register_check).
PLUGINS = ("gptcore.verification",)


def _badness(figures: tuple[float, float, float]) -> tuple[bool, float]:
    """What tells the worst of several (error, plain, allowed): NaN, then the largest share."""
    error, _, allowed = figures
    return math.isnan(error), error / allowed


@dataclass(frozen=True)
class Comparison:
    """Errors of one tensor against float64, of the op and of plain PyTorch in the same dtype."""

    name: str
    error_max: float
    error_rms: float
    plain_max: float
    plain_rms: float
    tiny_max: float
    tiny_rms: float

    @classmethod
    def mean(cls, comparisons: Sequence["Comparison"]) -> "Comparison":
        """Of the same tensor over several draws: the mean of each figure."""
        name, *figures = zip(*map(astuple, comparisons), strict=True)
        return cls(name[0], *map(statistics.fmean, figures))

    @property
    def passed(self) -> bool:
        """Whether both norms obey the 2x rule; NaN never does."""
        return (
            self.error_max <= ALLOWED_RATIO * self.plain_max + self.tiny_max
            and self.error_rms <= ALLOWED_RATIO * self.plain_rms + self.tiny_rms
        )

    @property
    def figures(self) -> tuple[float, float, float]:
        """(error, plain, allowed) in the norm that leaves the least room."""
        norms = (
            (self.error_max, self.plain_max, ALLOWED_RATIO * self.plain_max + self.tiny_max),
            (self.error_rms, self.plain_rms, ALLOWED_RATIO * self.plain_rms + self.tiny_rms),
        )
        return max(norms, key=_badness)

    def __str__(self) -> str:
        return (
            f"{self.name}: max {self.error_max:.2e} (plain {self.plain_max:.2e}), "
            f"rms {self.error_rms:.2e} (plain {self.plain_rms:.2e}), tiny {self.tiny_max:.1e}"
        )


def relative_errors(actual: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(max-norm, RMS) error of `actual` relative to the float64 `reference`."""
    if actual.numel() == 0:
        return 0.0, 0.0
    difference = actual.detach().double() - reference.detach()
    magnitude, norm = reference.abs().max().item(), reference.norm().item()
    return (
        difference.abs().max().item() / (magnitude or 1.0),
        difference.norm().item() / (norm or 1.0),
    )


def compare(
    name: str, actual: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor
) -> Comparison:
    """Measure `actual` and `plain` PyTorch of the same dtype against a float64 `reference`.

    Raises: ValueError if shapes or dtypes disagree.
    """
    if actual.shape != reference.shape or plain.shape != reference.shape:
        raise ValueError(
            f"compare: {name}: shapes must agree; got {tuple(actual.shape)}, "
            f"{tuple(plain.shape)}, reference {tuple(reference.shape)}"
        )
    if reference.dtype != torch.float64 or actual.dtype != plain.dtype:
        raise ValueError(
            f"compare: {name}: reference must be float64 and dtypes agree; got "
            f"{reference.dtype}, {actual.dtype}, {plain.dtype}"
        )
    eps = torch.finfo(actual.dtype).eps
    few = actual.numel() < FEW_ELEMENTS
    return Comparison(
        name,
        *relative_errors(actual, reference),
        *relative_errors(plain, reference),
        tiny_max=2 * eps if few else eps / 2,
        tiny_rms=2 * eps if few else eps / 4,
    )


# ------------------------------------------------------------------------------ the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the certificate; the exit code: 0 all passed, 1 a check failed, 2 bad input."""
    from kernels import checks, damages  # they build on the rule above

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    load_plugins()
    known_ops = (*checks.OPS, *checks.registered())
    parser = Parser(prog="python -m kernels.verify", description="Prove the kernels.")
    parser.add_argument("--quick", action="store_true", help="small shapes (the default)")
    parser.add_argument("--full", action="store_true", help="all shapes")
    parser.add_argument("--self-test", action="store_true", help="damage ops, see it caught")
    parser.add_argument("--ops", nargs="+", metavar="OP", help=f"of {', '.join(known_ops)}")
    dtypes, backends = list(checks.DTYPES), ["triton", "eager"]
    known = f"of {', '.join(dtypes)}"
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", default=dtypes, help=known)
    known = f"of {', '.join(backends)}"
    parser.add_argument("--backend", nargs="+", metavar="B", default=backends, help=known)
    parser.add_argument("--seed", type=int, default=0, help="of inputs and drawn shapes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options = parser.parse_args(arguments)
    if options.quick + options.full + options.self_test > 1:
        parser.error("--quick, --full and --self-test exclude each other")
    parser.check_known("--ops", options.ops or (), known_ops)
    parser.check_known("--dtypes", options.dtypes, checks.DTYPES)
    parser.check_known("--backend", options.backend, ("triton", "eager"))
    parser.check_writable(options.json)
    if "triton" in options.backend and not backend.HAS_TRITON:
        parser.error("--backend triton needs the triton package; pip install triton")
    has_gpu = torch.cuda.is_available()
    if options.self_test:
        return damages.self_test(options.ops, options.json)
    if "triton" in options.backend and not has_gpu and not backend.interpreting():
        print("No GPU: starting again under Triton's interpreter (TRITON_INTERPRET=1).")
        rerun("kernels.verify", arguments, interpret=True)
    settings = checks.Settings(
        device=torch.device("cuda" if has_gpu else "cpu"),
        backends=tuple(options.backend),
        dtypes=tuple(options.dtypes),
        full=options.full,
        seed=options.seed,
    )
    try:
        return certify(options.ops or known_ops, settings, options.json)
    except BrokenProcessPool:
        print(
            "verify: a process died while it checked: out of memory, or a crash in the compiler or "
            "the driver; nothing is certified; narrow it down with --ops and --dtypes",
            file=sys.stderr,
        )
        return 1


def load_plugins() -> None:
    """Import those PLUGINS that are installed; they register their checks and damages."""
    for name in PLUGINS:
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) and importlib.util.find_spec(name):
            importlib.import_module(name)


def certify(ops: Sequence[str], settings, json_path: Path | None = None) -> int:
    """Run the checks of `ops`, print them as they come, write JSON; returns 0 or 1."""
    from kernels import checks

    started = time.perf_counter()
    about = _about(settings)
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(
        "\nError of each op's worst output or gradient (max or RMS norm, against float64), of plain"
        "\nPyTorch in the same dtype, their ratio, and the most it may be: twice the plain error"
        "\nand one rounding."
    )
    results = []
    parts = [checks.parts(op, settings) for op in ops]
    with _workers(settings) as run:
        computed = run(functools.partial(checks.check_part, settings=settings), sum(parts, []))
        for op, mine in zip(ops, parts, strict=True):
            rows = [result for _ in mine for result in next(computed)]
            _print_op(op, rows)
            results += rows
    seconds = time.perf_counter() - started
    failed = [result for result in results if not result.passed]
    if json_path is not None:
        content = about | {"seconds": seconds, "failed": len(failed)}
        rows = [_finite(asdict(result)) for result in results]
        json_path.write_text(json.dumps(content | {"results": rows}, indent=1) + "\n")
    verdict = f"{len(failed)} of {len(results)} checks FAILED" if failed else "all passed"
    print(f"\n{len(results)} checks of {len(ops)} ops in {seconds:.0f} s: {verdict}.")
    return int(bool(failed))


@contextlib.contextmanager
def _workers(settings):
    """A `map` over several processes that yields in order.

    Raises: BrokenProcessPool where one of them dies.
    """
    # Spawned, not forked: neither torch's thread pools nor CUDA survive a fork.
    context, count = multiprocessing.get_context("spawn"), _worker_count(settings.device)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker)
    try:
        yield pool.map
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _worker_count(device: torch.device) -> int:
    """A process a core, on a GPU too: there most of the time goes into compiling kernels."""
    count = os.cpu_count() or 1
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        count = max(1, min(count, GPU_WORKERS, free_bytes // WORKER_BYTES))
    return count


def _start_worker() -> None:
    torch.set_num_threads(1)
    load_plugins()


def _about(settings) -> dict[str, str]:
    """Where and with what the certificate was made."""
    on_gpu = settings.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {platform.machine()}"
    kernels_run = "on the GPU" if on_gpu else "under Triton's interpreter"
    return {
        "device": name,
        "kernels run": kernels_run if "triton" in settings.backends else "not at all",
        "torch": torch.__version__,
        "triton": backend.triton.__version__ if backend.HAS_TRITON else "none",
        "python": platform.python_version(),
        "seed": str(settings.seed),
        "size": "full" if settings.full else "quick",
    }


def _print_op(op: str, results: Sequence) -> None:
    """A table of the figures, a line for each other kind of check, and every failure."""
    print(f"\n{op}")
    accuracy = [result for result in results if result.check == "accuracy"]
    rows = []
    for result in accuracy:
        worst = max(result.comparisons, key=lambda c: _badness(c.figures))
        error, plain, allowed = worst.figures
        ratios = [f"{e / plain:.2f}" if plain else "" for e in (error, allowed)]
        verdict = "pass" if result.passed else "FAIL"
        figures = (f"{error:.1e}", f"{plain:.1e}", *ratios)
        rows.append([result.backend, result.dtype, result.case, worst.name, *figures, verdict])
    if rows:
        header = ("backend", "dtype", "case", "worst", "error", "plain", "ratio", "allowed", "")
        print(table(header, rows))
    for check, number in Counter(r.check for r in results if r.check != "accuracy").items():
        mine = [result for result in results if result.check == check]
        passed = sum(result.passed for result in mine)
        detail = f": {mine[0].detail}" if number == 1 and mine[0].detail else ""
        print(f"{check}: {passed} of {number} passed{detail}")
    for result in results:
        if not result.passed:
            where = " ".join(filter(None, (result.backend, result.dtype, result.case)))
            what = result.detail or "; ".join(map(str, result.comparisons))
            print(f"FAIL {op} {where}: {result.check}: {what}")


def _finite(value):
    """`value` with NaN and infinities, which JSON does not have, as strings."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    from kernels.verify import main as imported_main  # one copy of the classes above, not two

    sys.exit(imported_main())

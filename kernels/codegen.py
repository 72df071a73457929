"""What the compiler made of every kernel, on any machine: no GPU is needed.

    python -m kernels.codegen [--arch sm_90 ...] [--op layer_norm ...] [--check]

An op is called on meta tensors inside `backend.recording`, so its launches are seen exactly as
they are shipped; each is specialised as Triton specialises it, compiled for the architecture
asked for, disassembled and counted.

    registers, spills, stack, shared    of a thread, and of a program
    programs                            resident on one multiprocessor, and what limits them
    loop                                instructions of the hottest loop
    /element                            thread instructions of that loop per element it computes
    floor    max(bytes / bandwidth, matrix FLOP / tensor rate) on a named GPU
    bound    max(floor, warp instructions / issue rate, matrix FLOP / rate of the instructions that
             do them): what this code cannot beat
"""

import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import backend
from kernels.budgets import BUDGETS, CASES, OPS, WORK, Case
from kernels.command_line import Parser, rerun, table
from kernels.disassembly import Loop, count, find_loops, read_amdgcn, read_sass, wgmma_waits
from kernels.gpus import GPU, GPUS, MULTIPROCESSORS, occupancy

ARCHES = tuple(MULTIPROCESSORS)
DEFAULT_GPUS = {
    "sm_80": "A100",
    "sm_89": "RTX4090",
    "sm_90": "H200",
    "sm_100": "B200",
    "gfx942": "MI300X",
}
MEASUREMENTS = Path(__file__).resolve().parent.parent / "bench" / "results"
# Of the tensor cores' peak, what mma.sync (HMMA) reaches on Hopper on average, where wgmma comes
# within 5% of it: Luo et al. 2025, arXiv:2501.12084, section 6.2, as others quote it. Not measured
# here.
LEGACY_RATE = 0.629
Row = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """One launch as `backend.launch` received it; tensors are meta tensors."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def bytes(self) -> int:
        """Bytes that must move if every tensor argument crosses the memory bus once."""
        values = (*self.args, *self.kwargs.values())
        return sum(_distinct_bytes(v) for v in values if isinstance(v, torch.Tensor))


@dataclass(frozen=True)
class Report:
    """One kernel compiled for one architecture."""

    kernel: str
    arch: str
    grid: tuple[int, ...]
    constants: dict[str, Any]  # constexpr arguments
    warps: int
    stages: int
    registers: int  # of one thread
    spills: int  # loads and stores of thread-local memory
    stack: int  # bytes of one thread
    shared: int  # bytes of one program
    tensor_memory: int  # columns of one program (sm_100)
    occupancy: int  # programs on one multiprocessor
    limiter: str
    tensor_core: dict[str, int]  # opcode -> count
    wgmma_waits: int  # how many wgmma are waited for before the next
    global_loads: dict[str, int]  # "LDG.128" -> count
    transcendental: int
    instructions: int
    loops: tuple[Loop, ...]
    bytes: int

    @property
    def threads(self) -> int:
        """Threads of one program."""
        return self.warps * MULTIPROCESSORS[self.arch].warp_size

    def legacy_share(self) -> float:
        """Of the matrix FLOP on sm_90, those that mma.sync does, which is slower than wgmma."""
        if self.arch != "sm_90":
            return 0.0
        flop = {"HMMA": 0, "HGMMA": 0}
        for opcode, number in self.tensor_core.items():
            kind, shape = opcode.split(".")[:2]
            if kind == "HGMMA":  # M x N x K, by four warps
                flop[kind] += number * math.prod(map(int, shape.split("x"))) // 4
            else:  # 16816: 16 x 8 x 16
                flop[kind] += number * 16 * 8 * int(shape[3:])
        return flop["HMMA"] / max(1, sum(flop.values()))

    def loop_instructions(self, passes: int = 1) -> int:
        """Instructions of the `passes` hottest innermost loops; 0 in straight-line code."""
        sizes = sorted(loop.instructions for loop in self.loops if loop.innermost)
        return sum(sizes[-passes:])

    def instructions_per_element(self, tile: int, passes: int = 1) -> float:
        """Thread instructions of the hottest loop, or of all code, per element.

        `tile` is the number of elements that one iteration of the loop, or one program of straight
        code, computes; `passes` how many loops every element goes through.
        """
        instructions = self.loop_instructions(passes) or self.instructions
        return instructions * self.threads / tile

    def warp_instructions(self, elements: float, tile: int, passes: int = 1) -> float:
        """Warp instructions of a launch over `elements`, every branch of straight code taken."""
        inside = sum(loop.instructions for loop in self.loops if loop.innermost)
        once = math.prod(self.grid) * (self.instructions - inside)
        return self.warps * (once + elements / tile * self.loop_instructions(passes))


def record(function: Callable[[], Any], arch: str) -> list[Launch]:
    """The launches that `function`, which calls ops on meta tensors, makes on `arch`."""
    launches: list[Launch] = []
    with backend.recording(lambda *launch: launches.append(Launch(*launch)), arch):
        function()
    return launches


def compile_launch(kernel: Any, grid: tuple[int, ...], args, kwargs, arch: str) -> Report:
    """Compile one launch for `arch` and count what came out.

    Args:
        kernel: a `triton.jit` function; grid, args, kwargs: as given to `backend.launch`.
        arch: one of ARCHES.
    Raises: ValueError for an unknown architecture; RuntimeError if Triton is interpreting.
    """
    # Private names of triton.runtime.jit, the same in 3.6 and 3.7: the argument binder decides
    # what a launch is specialised on, and only it can be right about that.
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as triton_compile
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = _target(arch)
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            "compile_launch: kernel must be a triton.jit function, so TRITON_INTERPRET must be "
            f"unset before kernels are imported; got {type(kernel).__name__}"
        )
    compiler = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    knobs = backend.triton.knobs
    kwargs = {
        **kwargs,
        "debug": kwargs.get("debug", kernel.debug) or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        compiler, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton_compile(source, target=target, options=options.__dict__)
    metadata = compiled.metadata
    if target.backend == "cuda":
        code, resources = read_sass(compiled.asm["cubin"], knobs.nvidia.cuobjdump.path)
        # The driver's share is part of SHARED from sm_90 on; `occupancy` adds it for all.
        reserved = MULTIPROCESSORS[arch].shared_reserved
        shared = metadata.shared + max(0, resources.shared - reserved)
    else:
        code, resources = read_amdgcn(compiled.asm["amdgcn"])
        shared = max(metadata.shared, resources.shared)
    tensor_memory = getattr(metadata, "tmem_size", 0)
    programs, limiter = occupancy(
        arch, metadata.num_warps, resources.registers, shared, tensor_memory
    )
    return Report(
        kernel=kernel.__name__,
        arch=arch,
        grid=tuple(grid),
        constants={
            p.name: bound[p.name] for p in kernel.params if p.is_constexpr and p.name in bound
        },
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=resources.registers,
        spills=resources.spills,
        stack=resources.stack,
        shared=shared,
        tensor_memory=tensor_memory,
        occupancy=programs,
        limiter=limiter,
        tensor_core=dict(count([i for i in code if i.tensor_core])),
        wgmma_waits=wgmma_waits(code),
        global_loads=dict(Counter(i.global_load for i in code if i.global_load)),
        transcendental=sum(i.transcendental for i in code),
        instructions=count(code).total(),
        loops=tuple(find_loops(code)),
        bytes=Launch(kernel, grid, args, kwargs).bytes,
    )


def _target(arch: str):
    """Triton's name of an architecture."""
    from triton.backends.compiler import GPUTarget

    if arch not in ARCHES:
        raise ValueError(f"codegen: arch must be one of {', '.join(ARCHES)}; got {arch!r}")
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, MULTIPROCESSORS[arch].warp_size)


def _distinct_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that an expanded or plain tensor really has."""
    sizes = (n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s != 0)
    elements = 1 if tensor.numel() else 0
    for size in sizes:
        elements *= size
    return elements * tensor.element_size()


def examine(
    cases: Iterable[Case], arches: Iterable[str], gpus: dict[str, GPU], jobs: int | None = None
) -> list[Row]:
    """Compile every distinct launch of `cases` on those of `arches` that they are shipped for.

    Args:
        cases: as in kernels.budgets; arches: some of ARCHES; gpus: for each architecture the GPU
            to bound time on; jobs: compilers at a time, by default one a core.
    Returns: one dictionary a kernel, case and architecture, fit for JSON; where compilation
        failed it has "error" instead of figures.
    """
    from triton.errors import TritonError

    measured = measurements()

    def compile_row(work: tuple[Case, str, int, Launch]) -> Row:
        case, arch, number, launch = work
        row = {"op": case.op, "case": case.name, "kernel": launch.name, "arch": arch}
        try:
            report = compile_launch(launch.kernel, launch.grid, launch.args, launch.kwargs, arch)
        except (RuntimeError, TritonError) as error:  # the compiler's own: a row, not the end
            return row | {"error": _last_line(error)}
        row |= _figures(report, case, gpus[arch])
        key = row["gpu"], case.op, case.name, launch.name, number
        return row | {"measured_us": measured.get(key)}

    rows: list[Row] = []
    work: list[tuple[Case, str, int, Launch]] = []
    for case, arch in itertools.product(cases, arches):
        if arch not in case.arches:
            continue
        try:
            work.extend((case, arch, *found) for found in distinct_launches(record(case, arch)))
        except RuntimeError as error:
            row = {"op": case.op, "case": case.name, "kernel": "-", "arch": arch}
            rows.append(row | {"error": f"no launch recorded: {_last_line(error)}"})
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return rows + list(pool.map(compile_row, work))


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def distinct_launches(launches: Iterable[Launch]) -> list[tuple[int, Launch]]:
    """The launches that can differ in code: by kernel, dtypes, alignment, integers, constants.

    Each comes with its number, from 0, among those of its kernel.
    """

    def look(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16
        return value if not isinstance(value, int) else (value == 1, value % 16 == 0, value >> 31)

    distinct = {}
    for launch in launches:
        key = (launch.name, *map(look, launch.args), str(launch.kwargs))
        distinct.setdefault(key, launch)
    seen: Counter[str] = Counter()
    numbered = []
    for launch in distinct.values():
        numbered.append((seen[launch.name], launch))
        seen[launch.name] += 1
    return numbered


def _figures(report: Report, case: Case, gpu: GPU) -> Row:
    """A report as a row: its fields, instructions per element, and bounds on its time."""
    row = asdict(report) | {"gpu": gpu.name, "constants": _plain(report.constants)}
    row |= {"loop": report.loop_instructions(), "per_element": None}
    seconds = {"bytes": report.bytes / gpu.bandwidth}
    if work := WORK.get(report.kernel):
        constants, sizes = report.constants, case.sizes
        elements = work.elements(constants, sizes, math.prod(report.grid))
        rate = gpu.tensor_rate["tf32" if case.dtype == torch.float32 else "bfloat16"]
        seconds["FLOP"] = elements * work.flop(constants, sizes) / rate
        tile = work.tile(constants, sizes)
        issued = report.warp_instructions(elements, tile, work.passes)
        seconds["instructions"] = issued / gpu.issue_rate
        if share := report.legacy_share():
            seconds["mma.sync"] = seconds["FLOP"] * (1 + share * (1 / LEGACY_RATE - 1))
        row["per_element"] = report.instructions_per_element(tile, work.passes)
        row["loop"] = report.loop_instructions(work.passes)
    row["floor_us"] = 1e6 * max(seconds["bytes"], seconds.get("FLOP", 0.0))
    row["bound_us"] = 1e6 * max(seconds.values())
    return row | {"bound_by": max(seconds, key=lambda name: seconds[name])}


def _plain(constants: dict[str, Any]) -> dict[str, Any]:
    """Constants as JSON has them: numbers, booleans and None stay, the rest becomes a string."""
    keep = (bool, int, float, type(None))
    return {k: v if isinstance(v, keep) else str(v) for k, v in constants.items()}


def measurements(folder: Path = MEASUREMENTS) -> dict[tuple[str, str, str, str, int], float]:
    """Microseconds by (gpu, op, case, kernel, number), from the JSON files of `folder`.

    `python -m bench kernels --json FILE` writes them, as "kernel_times": a list of objects with
    these keys and "us"; number is that of `distinct_launches`.
    """
    times = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        for time in content.get("kernel_times", ()) if isinstance(content, dict) else ():
            key = (time[name] for name in ("gpu", "op", "case", "kernel", "number"))
            times[tuple(key)] = time["us"]
    return times


def check(rows: Iterable[Row]) -> list[str]:
    """One line for every budget that a row breaks; a row without a budget is a breach too."""
    breaches = []
    for row in rows:
        key = row["op"], row["case"], row["kernel"], row["arch"]
        if "error" in row:
            found = [f"must compile; got {row['error']}"]
        elif key not in BUDGETS:
            found = ["must have a row in kernels/budgets.py; got none"]
        else:
            found = BUDGETS[key].breaches(row)
        breaches.extend(f"{' '.join(key)}: {breach}" for breach in found)
    return breaches


def stale(rows: Iterable[Row], cases: Iterable[Case], arches: Iterable[str]) -> list[str]:
    """One line for every budget, among these cases and arches, whose kernel no longer runs."""
    seen = {(row["op"], row["case"], row["kernel"], row["arch"]) for row in rows}
    examined = {(case.op, case.name, arch) for case in cases for arch in arches}
    return [
        f"{' '.join(key)}: budget must belong to a kernel that is launched; got none"
        for key in BUDGETS
        if (key[0], key[1], key[3]) in examined and key not in seen
    ]


def difference(old: Iterable[Row], new: Iterable[Row]) -> list[list[str]]:
    """What changed from `old` to `new`: [op, case, kernel, arch, figure, old, new] as strings.

    A kernel launched several times in a case is named with the number of the launch, from 0.
    """
    figures = (
        "warps stages registers spills stack shared occupancy tensor_core global_loads "
        "transcendental instructions loop error"
    ).split()

    def index(rows: Iterable[Row]) -> dict[tuple[str, str, str, str, int], Row]:
        indexed, seen = {}, Counter()
        for row in rows:
            key = row["op"], row["case"], row["kernel"], row["arch"]
            indexed[(*key, seen[key])] = row
            seen[key] += 1
        return indexed

    before, after = index(old), index(new)
    changes = []
    for key in dict.fromkeys((*before, *after)):
        op, case, kernel, arch, number = key
        name = [op, case, f"{kernel} {number}" if number else kernel, arch]
        if key not in before or key not in after:
            had, has = ("", "launched") if key in after else ("launched", "")
            changes.append([*name, "kernel", had, has])
            continue
        a, b = (
            (row.get("constants") or {}) | {figure: row.get(figure) for figure in figures}
            for row in (before[key], after[key])
        )
        for figure in dict.fromkeys((*a, *b)):
            if a.get(figure) != b.get(figure):
                changes.append([*name, figure, _cell(a.get(figure)), _cell(b.get(figure))])
    return changes


def _cell(value: Any) -> str:
    """A figure as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return " ".join(f"{count}x{name}" for name, count in sorted(value.items()))
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _print_rows(rows: Sequence[Row], arch: str, gpu: GPU) -> None:
    """The table of one architecture."""
    print(f"\n{arch}, times in us on one {gpu.name}")
    columns = {
        "kernel": "kernel",
        "warps": "warps",
        "registers": "regs",
        "spills": "spills",
        "stack": "stack",
        "shared": "shared",
        "programs": "programs",
        "tensor": "tensor core",
        "loads": "loads",
        "transcendental": "mufu",
        "instructions": "instr",
        "loop": "loop",
        "per_element": "/element",
        "floor_us": "floor",
        "bound_us": "bound",
        "bound_by": "by",
        "measured_us": "measured",
    }
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["case"]) == (op, case)]
        print(f"\n{op} {case}")
        for row in mine:
            if "error" in row:
                print(f"  {row['kernel']}: does not compile: {row['error']}")
        cells = []
        for row in mine:
            if "error" in row:
                continue
            kinds = Counter()
            for opcode, number in row["tensor_core"].items():
                kinds[opcode.split(".")[0]] += number
            shown = row | {
                "programs": f"{row['occupancy']} ({row['limiter']})",
                "tensor": dict(kinds),
                "loads": row["global_loads"],
            }
            cells.append([_cell(shown[name]) for name in columns])
        if cells:
            print(table(list(columns.values()), cells))


def _budget_lines(rows: Iterable[Row]) -> list[str]:
    """Rows for kernels/budgets.py: what was compiled, with a little to spare."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            key = row["op"], row["case"], row["kernel"], row["arch"]
            groups.setdefault(key, []).append(row)
    lines, heading = [], None
    for (op, case, kernel, arch), group in groups.items():
        if heading != (heading := f"{op} {case}"):
            lines.append(heading)
        # Registers come in units of 8; no thread has more than 255 (512 on gfx942).
        most = 512 if arch.startswith("gfx") else 255
        registers = min(most, max(-(-row["registers"] // 8) * 8 + 8 for row in group))
        shared = max(row["shared"] for row in group)
        # As many programs as fit if the registers to spare were used.
        spare, _ = occupancy(arch, max(row["warps"] for row in group), registers, shared)
        programs = min(spare, *(row["occupancy"] for row in group))
        limits = registers, max(row["spills"] for row in group), shared, programs
        elements = [row["per_element"] for row in group if row["per_element"] is not None]
        per_element = f"{1.1 * max(elements):.1f}" if elements else "-"
        opcodes = {opcode for row in group for opcode in row["tensor_core"]}
        kinds = "+".join(sorted({re.match(r"[A-Z]+|v_mfma", o)[0] for o in opcodes})) or "-"
        lines.append(f"  {kernel} {arch} {' '.join(map(str, limits))} {per_element} {kinds}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 good, 1 a budget is broken, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="python -m kernels.codegen", description="What the compiler made.")
    parser.add_argument("--arch", nargs="+", metavar="ARCH", help=f"of {', '.join(ARCHES)}")
    parser.add_argument("--op", nargs="+", metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--gpu", nargs="+", metavar="GPU", help=f"of {', '.join(GPUS)}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows there")
    parser.add_argument("--check", action="store_true", help="hold the budgets: exit 1 on a breach")
    parser.add_argument("--diff", metavar="FILE", type=Path, help="compare with an earlier --json")
    parser.add_argument("--print-budgets", action="store_true", help="rows for kernels/budgets.py")
    options = parser.parse_args(arguments)
    parser.check_known("--arch", options.arch or (), ARCHES)
    parser.check_known("--op", options.op or (), OPS)
    parser.check_known("--gpu", options.gpu or (), GPUS)
    chosen = [GPUS[name].arch for name in options.gpu or ()]
    if len(set(chosen)) < len(chosen):
        parser.error("--gpu: one of each architecture; " + ", ".join(options.gpu))
    parser.check_writable(options.json)
    earlier = _read_rows(parser, options.diff) if options.diff else None
    if not backend.HAS_TRITON:
        parser.error("needs the triton package; pip install triton")
    if backend.interpreting():
        rerun("kernels.codegen", arguments, interpret=False)
    gpus = {arch: GPUS[name] for arch, name in DEFAULT_GPUS.items()}
    gpus |= {GPUS[name].arch: GPUS[name] for name in options.gpu or ()}
    if options.arch:
        arches = options.arch
    elif options.gpu:
        arches = chosen
    else:
        arches = [arch for arch in ARCHES if any(arch in case.arches for case in CASES)]
    cases = [case for case in CASES if not options.op or case.op in options.op]
    rows = examine(cases, arches, gpus)
    versions = {"triton": backend.triton.__version__, "torch": torch.__version__}
    if options.json:
        content = {"command": ["python", "-m", "kernels.codegen", *arguments], **versions}
        options.json.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")
    if options.print_budgets:
        print("\n".join(_budget_lines(rows)))
        return 0
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    for arch in arches:
        _print_rows([row for row in rows if row["arch"] == arch], arch, gpus[arch])
    failed = any("error" in row for row in rows)
    if earlier is not None:
        changes = difference(earlier, rows)
        header = ["op", "case", "kernel", "arch", "figure", options.diff.name, "now"]
        print("\n" + (table(header, changes) if changes else f"no change from {options.diff}"))
    if options.check:
        breaches = check(rows) + stale(rows, cases, arches)
        print("\n" + "\n".join(breaches or [f"all {len(rows)} kernels keep their budgets"]))
        failed = failed or bool(breaches)
    return int(failed)


def _read_rows(parser: Parser, path: Path) -> list[Row]:
    """The rows of an earlier --json file; bad input ends the program."""
    try:
        return json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--diff needs a file that --json wrote; got {path}: {error}")


if __name__ == "__main__":
    sys.exit(main())

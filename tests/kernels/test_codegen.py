"""What the compiler made: parsing, occupancy, budgets, and the command on real kernels.

The command runs in a process of its own, because under pytest kernels are interpreted ones.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import kernels
from kernels import codegen
from kernels.budgets import BUDGETS, CASES, Budget
from kernels.disassembly import (
    Instruction,
    Loop,
    find_loops,
    parse_amdgcn,
    parse_sass,
    wgmma_waits,
)
from kernels.gpus import GPU, GPUS, MULTIPROCESSORS, occupancy

triton = pytest.importorskip("triton", reason="codegen compiles Triton kernels")

COMPILED = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def run(*arguments, env=COMPILED):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=600
    )


# SASS and amdgcn ------------------------------------------------------------------------------

SASS = """
		Function : k
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000e620000000800 */
        /*0010*/               @P0 BRA 0x00a0 ;                           /* skips the loop */
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0050*/                   MUFU.EX2 R5, R5 ;
        /*0060*/               @P1 BRA 0x00c0 ;                           /* waits out of line */
        /*0070*/                   NOP ;
        /*0080*/              @!P0 BRA 0x0020 ;                           /* the loop */
        /*0090*/                   HFMA2.MMA R5, -RZ, RZ, 0, 0 ;          /* no tensor core */
        /*0098*/                   STL [R1], R5 ;
        /*00a0*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R4 ;
        /*00d0*/              @!P1 BRA 0x00c0 ;
        /*00e0*/                   BRA 0x0070 ;
        /*00f0*/                   BRA 0xf0;
        /*0100*/                   NOP;
"""

AMDGCN = """
k:                                      ; @k
	s_load_dwordx4 s[0:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	s_nop 1
.LBB0_2:                                ; =>  This Inner Loop Header: Depth=2
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[68:69], 0
	v_exp_f32_e32 v5, v5
	s_cbranch_scc1 .LBB0_2
	global_load_ushort v6, v[2:3], off
	s_cbranch_scc0 .LBB0_1
	s_endpgm
	.end_amdhsa_kernel
"""


def test_sass_is_counted():
    code = parse_sass(SASS)
    assert [i.opcode for i in code][-1] == "BRA"  # the guard `BRA .` and its padding are gone
    assert len(code) == 16
    assert [i.global_load for i in code if i.global_load] == ["LDG.128", "LDG.32", "LDG.16"]
    assert sum(i.tensor_core for i in code) == 1
    assert sum(i.transcendental for i in code) == 1
    assert sum(i.spill_store for i in code) == 1


def test_sass_loops_include_code_moved_out_of_line_and_leave_out_waiting():
    (loop,) = find_loops(parse_sass(SASS))
    # 0x20..0x80 without the NOP, and 0xc0..0xe0, which only the loop jumps to.
    assert loop.instructions == 6 + 3
    assert (loop.tensor_core, loop.transcendental, loop.global_loads) == (1, 1, 2)


@pytest.mark.parametrize(
    "code, waits",
    [("HW HW HW", 3), ("HHHW", 1), ("HWW HWW", 2), ("WHW", 1), ("HH", 0), ("", 0)],
    ids=["each", "three at once", "wait again", "nothing issued", "never", "no code"],
)
def test_waits_for_wgmma(code, waits):
    opcodes = {"H": "HGMMA.64x64x16.F32.BF16", "W": "WARPGROUP.DEPBAR.LE", " ": "FADD"}
    assert wgmma_waits([Instruction(opcodes[c], None, True) for c in code]) == waits


def test_amdgcn_is_counted():
    code = parse_amdgcn(AMDGCN)
    loads = [i.global_load for i in code if i.global_load]
    assert loads == ["buffer_load.128", "global_load.16"]
    outer, inner = find_loops(code)
    assert (outer.instructions, outer.innermost, outer.tensor_core) == (3, False, 0)
    assert (inner.instructions, inner.innermost, inner.tensor_core) == (3, True, 1)
    assert inner.transcendental == 1


# Occupancy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, warps, registers, shared, expected",
    [
        # NVIDIA's occupancy calculator
        ("sm_90", 4, 168, 49152, (3, "registers")),
        ("sm_90", 4, 128, 45 << 10, (4, "registers")),
        ("sm_90", 4, 32, 227 << 10, (1, "shared")),
        ("sm_90", 4, 32, 0, (16, "registers")),
        ("sm_90", 1, 16, 0, (32, "programs")),
        ("sm_90", 8, 24, 0, (8, "warps")),
        ("sm_80", 8, 255, 0, (1, "registers")),
        ("sm_80", 4, 96, 100 << 10, (1, "shared")),
        ("sm_89", 4, 64, 0, (8, "registers")),
        ("sm_90", 4, 32, 228 << 10, (0, "shared")),
        # 512 registers a lane and SIMD; 4 SIMDs
        ("gfx942", 4, 128, 0, (4, "registers")),
        ("gfx942", 4, 64, 32768, (2, "shared")),
        ("gfx942", 4, 512, 0, (1, "registers")),
    ],
)
def test_occupancy(arch, warps, registers, shared, expected):
    programs, limiter = occupancy(arch, warps, registers, shared)
    assert programs == expected[0]
    if limiter != expected[1]:  # a tie may be named either way
        assert occupancy(arch, warps, registers + 8, shared)[0] < programs


def test_tensor_memory_limits_occupancy():
    assert occupancy("sm_100", 4, 64, 0, tensor_memory=256) == (2, "tensor memory")


def test_every_gpu_has_limits_and_every_architecture_a_gpu():
    assert {gpu.arch for gpu in GPUS.values()} == set(MULTIPROCESSORS)
    for arch, name in codegen.DEFAULT_GPUS.items():
        assert GPUS[name].arch == arch
    # Issue rate: 132 multiprocessors x 4 schedulers x 1.83 GHz.
    assert GPUS["H200"].issue_rate == pytest.approx(132 * 4 * 1.83e9)


# Budgets --------------------------------------------------------------------------------------

BUDGET = Budget("op", "case", "_kernel", "sm_90", 128, 0, 49152, 2, 20.0, "HGMMA")
ROW = {
    "op": "op",
    "case": "case",
    "kernel": "_kernel",
    "arch": "sm_90",
    "registers": 128,
    "spills": 0,
    "stack": 0,
    "shared": 49152,
    "occupancy": 2,
    "per_element": 20.0,
    "tensor_core": {"HGMMA.64x64x16.F32.BF16": 8},
    "wgmma_waits": 2,
}


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"registers": 129}, "registers"),
        ({"spills": 1}, "spills"),
        ({"stack": 8}, "stack"),
        ({"shared": 49153}, "shared"),
        ({"occupancy": 1}, "programs"),
        ({"per_element": 20.1}, "instructions per element"),
        ({"per_element": None}, "instructions per element"),
        ({"tensor_core": {"HMMA.16816.F32.BF16": 32}}, "tensor core"),
        ({"wgmma_waits": 8}, "waits for 8 wgmma < 8"),
        ({"tensor_core": {"HGMMA.64x64x16": 8, "HMMA.16816.F32.BF16": 32}}, "tensor core"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_budget_is_held(change, rule):
    assert BUDGET.breaches(ROW) == []
    (breach,) = BUDGET.breaches(ROW | change)
    assert rule in breach


def test_without_a_tensor_core_in_the_budget_there_may_be_none():
    budget = replace(BUDGET, tensor_core=None)
    assert budget.breaches(ROW | {"tensor_core": {}}) == []
    assert "tensor core must be none" in budget.breaches(ROW)[0]


def test_a_budget_of_two_kinds_wants_both():
    budget = replace(BUDGET, tensor_core="HGMMA+HMMA")
    both = {"HGMMA.64x64x16": 8, "HMMA.16816.F32.BF16": 32}
    assert budget.breaches(ROW | {"tensor_core": both}) == []
    assert "tensor core" in budget.breaches(ROW)[0]


REPORT = codegen.Report(
    *("_kernel", "sm_90", (1,), {}, 4, 1, 128, 0, 0, 0, 0, 1, "registers"),
    tensor_core={"HGMMA.64x64x16.F32.BF16": 3, "HMMA.16816.F32.BF16": 8},
    **{"global_loads": {}, "transcendental": 0, "instructions": 1, "loops": (), "bytes": 0},
    wgmma_waits=1,
)


def test_the_share_of_the_slower_products():
    """A 64 x 64 x 16 product takes four warps one HGMMA, or each of them 8 HMMA."""
    assert REPORT.legacy_share() == 0.25
    assert replace(REPORT, arch="sm_80").legacy_share() == 0
    assert replace(REPORT, tensor_core={}).legacy_share() == 0


SLOWED = 0.75 + 0.25 / 0.629  # a quarter of the products by mma.sync


SIZES = {"B": 1, "H": 1, "T": 15, "D": 50, "V": 3000, "M": 16, "N": 16, "K": 100}


@pytest.mark.parametrize(
    "kernel, dtype, floor_us, bound_us, bound_by, loop, per_element",
    [
        ("_attention_forward_kernel", torch.bfloat16, 2.4, 2.4 * SLOWED, "mma.sync", 30, 30),
        ("_attention_dq_kernel", torch.bfloat16, 3.6, 3.6 * SLOWED, "mma.sync", 30, 30),
        ("_attention_dkdv_kernel", torch.bfloat16, 4.8, 4.8 * SLOWED, "mma.sync", 30, 30),
        ("_attention_dkdv_kernel", torch.float32, 9.6, 9.6 * SLOWED, "mma.sync", 30, 30),
        ("_linear_act_kernel", torch.bfloat16, 6.5536, 6.5536 * SLOWED, "mma.sync", 30, 30),
        ("_long_cross_entropy_kernel", torch.bfloat16, 1.0, 2.68, "instructions", 50, 50),
        ("_sum_partials_kernel", torch.bfloat16, 1.0, 1.0, "bytes", 30, None),
    ],
    ids=["forward", "dq", "dkdv", "tf32", "product", "two-passes", "bytes"],
)
def test_figures_by_hand(kernel, dtype, floor_us, bound_us, bound_by, loop, per_element):
    """In tiles of 128: 120 query-key pairs of D = 50, 256 outputs of 4 x 32, 2 x 3,072 logits.

    1,000 bytes; 1 GB/s, 10 GFLOP/s in bfloat16 and 5 in TF32, 4 warp instructions a nanosecond.
    """
    gpu = GPU("toy", "sm_90", 1, 1e9, 1e9, {"bfloat16": 10e9, "tf32": 5e9}, 0, 0)
    loops = [(100, False), (10, True), (30, True), (20, True)]
    report = replace(
        REPORT,
        kernel=kernel,
        grid=(2,),
        constants={"BLOCK_M": 8, "BLOCK_N": 16, "BLOCK_K": 32, "LANES": 16},
        instructions=200,
        loops=tuple(Loop(size, 0, 0, 0, innermost) for size, innermost in loops),
        bytes=1000,
    )
    case = replace(CASES[0], sizes=SIZES, dtype=dtype)
    row = codegen._figures(report, case, gpu)
    assert (row["bound_by"], row["loop"], row["per_element"]) == (bound_by, loop, per_element)
    assert (row["floor_us"], row["bound_us"]) == pytest.approx((floor_us, bound_us))


def test_budgets_have_a_little_to_spare():
    """8 registers, a tenth of the instructions; programs that fit with those registers."""
    row = ROW | {"registers": 121, "warps": 4, "occupancy": 4}
    other = row | {"registers": 100, "per_element": 18.0, "tensor_core": {"HMMA.16816": 1}}
    most = {"kernel": "_most_kernel", "registers": 253, "spills": 7, "shared": 0, "occupancy": 1}
    most |= {"per_element": None, "tensor_core": {}}
    assert codegen._budget_lines([row, other, row | most, {"error": "ptxas died"}]) == [
        "op case",
        "  _kernel sm_90 136 0 49152 3 22.0 HGMMA+HMMA",
        "  _most_kernel sm_90 255 7 0 1 - -",
    ]


def test_check_wants_a_budget_for_every_kernel_and_a_kernel_for_every_budget(monkeypatch):
    key = "op", "case", "_kernel", "sm_90"
    case = replace(CASES[0], op="op", name="case")
    monkeypatch.setattr(codegen, "BUDGETS", {key: BUDGET})
    assert codegen.check([ROW]) == []
    assert codegen.stale([ROW], [case], ["sm_90"]) == []
    assert "must have a row" in codegen.check([ROW | {"kernel": "_new_kernel"}])[0]
    assert "got none" in codegen.stale([], [case], ["sm_90"])[0]
    assert codegen.stale([], [case], ["sm_80"]) == []
    assert "must compile" in codegen.check([{**ROW, "error": "ptxas died"}])[0]


def test_difference_names_what_changed():
    row = ROW | {"constants": {"BLOCK_M": 64}, "instructions": 400}
    other = row | {"registers": 168, "tensor_core": {"HMMA.16816": 32}}
    assert codegen.difference([row], [row]) == []
    changes = codegen.difference([row], [other])
    assert [change[4:] for change in changes] == [
        ["registers", "128", "168"],
        ["tensor_core", "8xHGMMA.64x64x16.F32.BF16", "32xHMMA.16816"],
    ]
    assert codegen.difference([], [row])[0][4:] == ["kernel", "", "launched"]
    slower = row | {"constants": {"BLOCK_M": 32}, "warps": 8}
    assert [change[4:] for change in codegen.difference([row | {"warps": 4}], [slower])] == [
        ["BLOCK_M", "64", "32"],
        ["warps", "4", "8"],
    ]
    # Forward and backward by one kernel: each is held against its own.
    (change,) = codegen.difference([row, other], [row, other | {"registers": 170}])
    assert change[2:] == ["_kernel 1", "sm_90", "registers", "168", "170"]


def test_measurements_are_read(tmp_path):
    key = {"gpu": "H200", "op": "op", "case": "case", "kernel": "_kernel", "number": 1}
    (tmp_path / "a.json").write_text(json.dumps({"kernel_times": [key | {"us": 12.5}]}))
    (tmp_path / "b.json").write_text("[]")
    assert codegen.measurements(tmp_path) == {("H200", "op", "case", "_kernel", 1): 12.5}


def test_every_budget_belongs_to_a_case():
    cases = {(case.op, case.name): case for case in CASES}
    for op, case, _, arch in BUDGETS:
        assert arch in cases[op, case].arches


# The compiler ---------------------------------------------------------------------------------

TOY = """
import json, sys
from dataclasses import asdict
import torch, triton, triton.language as tl
from kernels import backend, codegen

@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)

@triton.jit
def _gram_kernel(x_ptr, y_ptr, K, stride, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, 64)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, 64):
        x = tl.load(x_ptr + rows[:, None] * stride + (start + cols)[None, :])
        acc += tl.exp2(tl.dot(x, x.T))
    tl.store(y_ptr + rows[:, None] * BLOCK + rows[None, :], acc)

def launches():
    half = lambda *shape: torch.empty(shape, device="meta", dtype=torch.bfloat16)
    copy = lambda x, y, n: backend.launch(_copy_kernel, (8,), x, y, n, BLOCK=2048, num_warps=4)
    copy(half(4096), half(4096), 4096)
    copy(half(4096)[1:], half(4095), 4095)
    gram = lambda block, warps: backend.launch(
        _gram_kernel, (1,), half(block, 1024), half(block, block).float(), 1024, 1024,
        BLOCK=block, num_warps=warps)
    gram(64, 4)
    gram(128, 2)

arch = sys.argv[1]
reports = [codegen.compile_launch(l.kernel, l.grid, l.args, l.kwargs, arch)
           for l in codegen.record(launches, arch)]
print(json.dumps([asdict(r) | {"loop": r.loop_instructions()} for r in reports]))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(TOY)

    def compile_toy(arch):
        environment = COMPILED | {"PYTHONPATH": os.pathsep.join(sys.path)}
        result = run(str(path), arch, env=environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return compile_toy


@pytest.mark.parametrize(
    "arch, wide, narrow, tensor_core",
    [
        ("sm_80", "LDG.128", "LDG.16", "HMMA"),
        ("sm_90", "LDG.128", "LDG.16", "HGMMA"),
        ("sm_100", "LDG.128", "LDG.16", "UTCHMMA"),
        ("gfx942", "buffer_load.128", "buffer_load.16", "v_mfma"),
    ],
)
def test_compiled_kernels_are_what_was_launched(toy, arch, wide, narrow, tensor_core):
    aligned, misaligned, gram, spilling = toy(arch)
    # Specialised as a launch would be: a base or a size off by one element costs the wide loads.
    assert set(aligned["global_loads"]) == {wide}
    assert set(misaligned["global_loads"]) == {narrow}
    assert aligned["bytes"] == 2 * 4096 * 2
    assert aligned["constants"] == {"BLOCK": 2048}
    assert aligned["loops"] == []
    assert all(kind.startswith(tensor_core) for kind in gram["tensor_core"])
    # Of Triton 3.7's code ptxas keeps a thread's index on the stack across sm_100's allocation of
    # tensor memory.
    assert gram["spills"] in ((0, 3) if arch == "sm_100" else (0,))
    assert 30 < gram["loop"] < gram["instructions"]
    assert sum(loop["transcendental"] for loop in gram["loops"]) == 64 * 64 // gram_threads(arch)
    # 128 x 128 float accumulators over 2 warps do not fit 255 registers.
    if arch in ("sm_80", "sm_90"):
        assert spilling["spills"] > 0


def gram_threads(arch):
    return 4 * MULTIPROCESSORS[arch].warp_size


# The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, known",
    [
        (["--op", "attention"], "causal_attention"),
        (["--arch", "sm_91"], "sm_100"),
        (["--gpu", "H20"], "H200"),
        (["--gpu", "H100", "A100", "H200"], "one of each architecture"),
        (["--diff", "no such file"], "--diff"),
        (["--json", "no/such/folder/file.json"], "writable"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, known, capsys):
    with pytest.raises(SystemExit) as exit:
        codegen.main(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and known in error and "Traceback" not in error


def test_an_unknown_architecture_raises():
    with pytest.raises(ValueError, match="arch must be one of sm_80.*got 'sm_70'"):
        codegen.compile_launch(None, (1,), (), {}, "sm_70")


def test_interpreted_kernels_are_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must be unset"):
        codegen.compile_launch(object(), (1,), (), {}, "sm_90")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--op", "rotary_qkv", "--arch", "sm_90"], id="rotary_qkv-sm_90"),
        pytest.param([], id="all", marks=pytest.mark.slow),
    ],
)
def test_shipped_kernels_keep_their_budgets(arguments, tmp_path):
    """Also with TRITON_INTERPRET set, which the command must get rid of by itself."""
    path = tmp_path / "rows.json"
    command = ["-m", "kernels.codegen", "--check", "--json", str(path), *arguments]
    result = run(*command, env=COMPILED | {"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stdout.split("\n\n")[-1] + result.stderr
    assert "keep their budgets" in result.stdout
    row = json.loads(path.read_text())["rows"][0]
    again = run("-m", "kernels.codegen", "--diff", str(path), *arguments)
    assert again.returncode == 0 and "no change from" in again.stdout
    assert 0 < row["floor_us"] <= row["bound_us"]


_COST_OF_DROPOUT = """
import json
from kernels import codegen
from kernels.budgets import CASES

name = "B64-T256-H6-D64-bf16"
names = name, name + "-p0.2"
cases = [case for case in CASES if case.op == "causal_attention" and case.name in names]
rows = codegen.examine(cases, ["sm_90"], {"sm_90": codegen.GPUS["H200"]})
cost = {(row["case"], row["kernel"]): row["per_element"] for row in rows}
kernels = {kernel for _, kernel in cost}
print(json.dumps({k: cost[name + "-p0.2", k] - cost[name, k] for k in kernels}))
"""


def test_random_numbers_cost_at_most_six_instructions_an_element():
    """Of a query-key pair, with dropout less without, in the hottest loop of each kernel."""
    result = run("-c", _COST_OF_DROPOUT)
    assert result.returncode == 0, result.stderr
    cost = json.loads(result.stdout)
    assert len(cost) == 3 and max(cost.values()) <= 6, cost


_SIZES_OF_ONE = """
import dataclasses
from triton.backends.nvidia.compiler import CUDABackend
from kernels import codegen
from kernels.budgets import CASES

class Typed(Exception): pass

def stop(*_): raise Typed

def first_stage_only(self, stages, *rest, add_stages=CUDABackend.add_stages):
    add_stages(self, stages, *rest)
    stages.update(dict.fromkeys(list(stages)[1:], stop))

CUDABackend.add_stages = first_stage_only
wanted = {case.op: case for case in CASES if "bf16" in case.name}
for case in wanted.values():
    sizes = {letter: 2 if letter == "D" else 1 for letter in case.sizes}
    ones = dataclasses.replace(case, sizes=sizes, dropout_p=0.2)
    for _, launch in codegen.distinct_launches(codegen.record(ones, "sm_90")):
        try:
            codegen.compile_launch(launch.kernel, launch.grid, launch.args, launch.kwargs, "sm_90")
        except Typed:
            print(launch.name)
"""


def test_every_op_compiles_at_sizes_of_one():
    """Triton then puts the number 1 in place of the argument, which the interpreter does not: what
    breaks on a number breaks in the first stage, where a kernel is typed."""
    result = run("-c", _SIZES_OF_ONE, env=COMPILED | {"TRITON_ALWAYS_COMPILE": "1"})
    assert result.returncode == 0, result.stderr
    launched = set(result.stdout.split())
    assert launched > {"_embed_kernel", "_attention_dq_kernel", "_rotary_kernel"}, launched


def test_a_breach_is_exit_code_1(monkeypatch, capsys):
    row = ROW | {"spills": 7, "error": "none"}
    monkeypatch.setattr(codegen, "examine", lambda *_: [row])
    monkeypatch.setattr(codegen.backend, "interpreting", lambda: False)
    assert codegen.main(["--check", "--arch", "sm_90", "--op", "embed"]) == 1
    assert "must compile" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}),
        (["--arch", "sm_90", "gfx942"], {"sm_90", "gfx942"}),
        (["--gpu", "A100"], {"sm_80"}),
    ],
    ids=["default", "arch", "gpu"],
)
def test_every_architecture_asked_for_is_examined(arguments, expected, monkeypatch, capsys):
    """By default all that some kernel is shipped for."""
    asked = []
    monkeypatch.setattr(codegen, "examine", lambda cases, arches, gpus: asked.extend(arches) or [])
    monkeypatch.setattr(codegen.backend, "interpreting", lambda: False)
    assert codegen.main(arguments) == 0
    assert set(asked) == expected


def test_spills_are_stated_exceptions_of_attention():
    """A budget may allow spills only where every plan without them is slower; not at 64 and 128."""
    spilling = {(case, arch) for (_, case, _, arch), b in BUDGETS.items() if b.spills}
    if triton.__version__.startswith("3.6."):
        spilling.remove(("B64-T256-H6-D50-bf16-p0.2", "sm_90"))
    assert spilling == {
        ("B64-T256-H6-D85-bf16-p0.2", "sm_90"),
        ("B64-T256-H6-D88-bf16-p0.2", "sm_90"),
        ("B4-T4096-H12-D256-bf16", "sm_80"),
        ("B4-T4096-H12-D256-bf16-p0.2", "sm_90"),
        ("B4-T4096-H12-D256-fp32", "sm_89"),
    }


def test_measured_times_fill_their_rows_only(tmp_path, monkeypatch):
    """What `bench kernels` writes ends up beside the bound of the same launch."""
    case = next(case for case in CASES if case.op == "rotary_qkv")
    gpu = GPUS["H200"]
    (first, launch), (second, backward) = codegen.distinct_launches(codegen.record(case, "sm_90"))
    assert (first, second) == (0, 1) and launch.name == backward.name == "_rotary_kernel"
    key = {"op": case.op, "case": case.name, "kernel": launch.name}
    times = [
        key | {"gpu": "H200", "number": 1, "us": 7.5},
        key | {"gpu": "H100", "number": 0, "us": 9.0},
        key | {"gpu": "H200", "number": 0, "us": 9.5, "case": "another"},
    ]
    (tmp_path / "h.json").write_text(json.dumps({"kernel_times": times}))
    measured = codegen.measurements(tmp_path)
    monkeypatch.setattr(codegen, "measurements", lambda: measured)
    monkeypatch.setattr(codegen, "compile_launch", lambda *launch: launch)
    monkeypatch.setattr(codegen, "_figures", lambda *_: {"gpu": gpu.name})
    rows = codegen.examine([case], ["sm_90"], {"sm_90": gpu}, jobs=1)
    assert [row["measured_us"] for row in rows] == [None, 7.5]


@pytest.fixture
def matmul_settings():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (lambda: None, "ieee"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"), "ieee"),
    ],
    ids=["default", "set_float32_matmul_precision", "allow_tf32", "fp32_precision", "all", "ieee"],
)
def test_pytorchs_setting_decides_how_float32_is_multiplied(matmul_settings, setting, expected):
    """By whichever of its names it was made; torch refuses to read some after others."""
    setting()
    q = torch.empty(1, 2, 64, 64, device="meta", requires_grad=True)
    launches = codegen.record(lambda: kernels.causal_attention(q, q, q).sum().backward(), "sm_90")
    found = [launch.kwargs["PRECISION"] for launch in launches if "PRECISION" in launch.kwargs]
    assert found == [expected] * 3
    halves = codegen.record(lambda: kernels.causal_attention(*[q.detach().half()] * 3), "sm_90")
    assert [launch.kwargs["PRECISION"] for launch in halves] == ["ieee"]


@pytest.mark.parametrize(("arch", "expected"), [("gfx942", "tf32"), ("gfx1100", "ieee")])
def test_amds_gpus_are_asked_for_tf32_only_where_triton_has_it(matmul_settings, arch, expected):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    q = torch.empty(1, 2, 64, 64, device="meta")
    launches = codegen.record(lambda: kernels.causal_attention(q, q, q), arch)
    assert [launch.kwargs["PRECISION"] for launch in launches] == [expected]


NAN = """
import torch
import kernels
from kernels import codegen

opcodes, read = [], codegen.read_sass

def noted(*arguments):
    code, resources = read(*arguments)
    opcodes.extend(instruction.opcode for instruction in code)
    return code, resources

codegen.read_sass = noted
x, w = (torch.empty(64, 64, device="meta", dtype=torch.bfloat16) for _ in range(2))
for launch in codegen.record(lambda: kernels.linear_act(x, w, None, activation="relu2"), "sm_90"):
    codegen.compile_launch(launch.kernel, launch.grid, launch.args, launch.kwargs, "sm_90")
print(*sorted({opcode for opcode in opcodes if "MNMX" in opcode}))
"""


def test_no_maximum_of_an_activation_hides_a_nan():
    """A plain one of a GPU's is the other number; the interpreter's is NaN, whichever is asked."""
    environment = COMPILED | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = run("-c", NAN, env=environment)
    assert result.returncode == 0, result.stderr
    maxima = result.stdout.split()
    assert maxima and all(".NAN" in opcode for opcode in maxima if opcode.startswith("F")), maxima

"""What a compiled kernel consists of: instructions, loops, resources; from SASS or amdgcn text.

SASS comes from `cuobjdump`, which the Triton wheel carries; amdgcn is the text Triton assembles.
Both are read into the same `Instruction`s, so that loops and counts are found once.

A loop is a natural loop: a back edge to a block that dominates its source, and every block that
reaches the source without passing that block (Aho, Sethi, Ullman, "Compilers", 10.4). Code that
the assembler moved out of line therefore belongs to the loop that jumps to it, or to none.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_SASS = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"(?P<operands>[^;]*);"
)
_AMDGCN = re.compile(r"^\s+(?P<opcode>(?:s|v|ds|global|buffer|flat|scratch)_\w+)(?P<operands>.*)")
_LABEL = re.compile(r"^(\.?\w+):")
_WIDTHS = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `target` is the index it may jump to, if it is a branch."""

    opcode: str
    target: int | None = None
    falls_through: bool = True

    @property
    def tensor_core(self) -> bool:
        """Whether it is a matrix multiply-accumulate."""
        kind = self.opcode.split(".")[0]
        return kind.endswith("MMA") or kind.startswith(("v_mfma", "v_smfmac"))

    @property
    def transcendental(self) -> bool:
        """Whether it runs on the special function unit: exp2, log2, rcp, rsqrt, tanh, sin, cos."""
        return self.opcode.startswith("MUFU") or bool(
            re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", self.opcode)
        )

    @property
    def global_load(self) -> str | None:
        """ "LDG.128", "LDGSTS.64", "UTMALDG", "buffer_load.128", ...; None if it loads nothing."""
        if self.opcode.startswith(("UTMALDG", "UBLKCP")):
            return self.opcode.split(".")[0]
        if self.opcode.startswith("LDG") and not self.opcode.startswith("LDGDEPBAR"):
            return _sass_width(self.opcode)
        match = re.match(
            r"(global|buffer|flat)_load_(?:lds_)?([a-z]+?)(?:x(\d))?(?:_|$)", self.opcode
        )
        if match and match[2] in _WIDTHS:
            return f"{match[1]}_load.{_WIDTHS[match[2]] * int(match[3] or 1)}"
        return None

    @property
    def spill_load(self) -> bool:
        """Whether it reads thread-local memory."""
        return self.opcode.startswith(("LDL", "scratch_load"))

    @property
    def spill_store(self) -> bool:
        """Whether it writes thread-local memory."""
        return self.opcode.startswith(("STL", "scratch_store"))


@dataclass(frozen=True)
class Loop:
    """A natural loop without the loops inside it; waiting on a barrier is not counted as a loop."""

    instructions: int
    tensor_core: int
    transcendental: int
    global_loads: int
    innermost: bool


@dataclass(frozen=True)
class Resources:
    """What one thread, or for `shared` one program, occupies; bytes unless a count."""

    registers: int
    stack: int
    shared: int
    spills: int


def _sass_width(opcode: str) -> str:
    """LDG.E.128.CONSTANT -> LDG.128; LDG.E.U16 -> LDG.16; LDG.E -> LDG.32."""
    kind, *modifiers = opcode.split(".")
    for modifier in modifiers:
        if match := re.fullmatch(r"[US]?(8|16|64|128|256)", modifier):
            return f"{kind}.{match[1]}"
    return f"{kind}.32"


def read_sass(cubin: bytes, cuobjdump: str) -> tuple[list[Instruction], Resources]:
    """Disassemble a cubin holding one kernel.

    Raises: RuntimeError if cuobjdump fails or its output is not understood.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [cuobjdump, "-res-usage", "-sass", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", result.stdout)
    if result.returncode or usage is None:
        raise RuntimeError(
            f"read_sass: cuobjdump must list the kernel; got {result.stderr.strip()}"
        )
    registers, stack, shared, local = map(int, usage.groups())
    instructions = parse_sass(result.stdout)
    spills = sum(i.spill_load or i.spill_store for i in instructions)
    return instructions, Resources(registers, stack + local, shared, spills)


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of the first function of a `cuobjdump -sass` listing."""
    function = text.split("Function :")[1] if "Function :" in text else text
    matches = [match for line in function.splitlines() if (match := _SASS.match(line))]
    index = {int(match["address"], 16): i for i, match in enumerate(matches)}
    instructions = []
    for match in matches:
        kind = match["opcode"].split(".")[0]
        target = None
        if kind in ("BRA", "JMP"):
            addresses = re.findall(r"\b0x[0-9a-f]+", match["operands"])
            target = index.get(int(addresses[-1], 16)) if addresses else None
        # `BRA.U UP0, 0x1c0` and `BRA.DIV ~URZ, 0x1c0` are conditional without an @predicate.
        conditional = match["predicate"] is not None or "DIV" in match["opcode"]
        conditional = conditional or "P" in match["operands"].split("0x")[0]
        ends = kind in ("EXIT", "RET", "BRA", "JMP", "BRX", "JMX") and not conditional
        instructions.append(Instruction(match["opcode"], target, not ends))
    while instructions and instructions[-1].opcode == "NOP":
        instructions.pop()
    if instructions and instructions[-1].target == len(instructions) - 1:
        instructions.pop()  # the `BRA .` that guards the end of every kernel
    return instructions


def read_amdgcn(text: str) -> tuple[list[Instruction], Resources]:
    """Read the amdgcn assembly of one kernel.

    Raises: RuntimeError if its metadata lacks a field.
    """

    def field(name: str) -> int:
        match = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"read_amdgcn: metadata must have .{name}; got none")
        return int(match[1])

    resources = Resources(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        shared=field("group_segment_fixed_size"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count"),
    )
    return parse_amdgcn(text), resources


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of an amdgcn listing, up to the end of its code."""
    labels, matches = {}, []
    for line in text.split(".end_amdhsa_kernel")[0].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(matches)
        elif match := _AMDGCN.match(line):
            matches.append(match)
    instructions = []
    for match in matches:
        opcode = match["opcode"]
        branches = opcode.startswith(("s_branch", "s_cbranch"))
        target = labels.get(match["operands"].split(";")[0].strip()) if branches else None
        falls_through = opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")
        instructions.append(Instruction(opcode, target, falls_through))
    return instructions


def count(instructions: list[Instruction]) -> Counter:
    """How often each opcode occurs, NOPs left out."""
    return Counter(i.opcode for i in instructions if i.opcode not in ("NOP", "s_nop"))


def wgmma_waits(instructions: list[Instruction]) -> int:
    """How many wgmma are waited for before the next is issued: one a product, or all if serial."""
    waits, issued = 0, False
    for instruction in instructions:
        if instruction.opcode.startswith("HGMMA"):
            issued = True
        elif issued and instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            waits, issued = waits + 1, False
    return waits


def find_loops(instructions: list[Instruction]) -> list[Loop]:
    """The natural loops in program order; see the module's docstring."""
    starts, successors = _blocks(instructions)
    dominators = _dominators(successors)
    predecessors = [[] for _ in starts]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(block)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for header in following:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(
                    _natural_loop(header, block, predecessors)
                )
    ends = starts[1:] + [len(instructions)]
    members = {
        header: {i for block in body for i in range(starts[block], ends[block])}
        for header, body in bodies.items()
    }
    members = {h: m for h, m in members.items() if not _waits([instructions[i] for i in m])}
    loops = []
    for header, body in sorted(members.items()):
        inner = [m for h, m in members.items() if h != header and m < body]
        own = [instructions[i] for i in body.difference(*inner)]
        loops.append(
            Loop(
                instructions=count(own).total(),
                tensor_core=sum(i.tensor_core for i in own),
                transcendental=sum(i.transcendental for i in own),
                global_loads=sum(i.global_load is not None for i in own),
                innermost=not inner,
            )
        )
    return loops


def _waits(body: list[Instruction]) -> bool:
    """True for the few instructions that spin on a barrier or on an allocation."""
    spins = ("SYNCS", "UTCATOMSWS", "s_sleep")
    return len(body) <= 8 and any(i.opcode.startswith(spins) for i in body)


def _blocks(instructions: list[Instruction]) -> tuple[list[int], list[list[int]]]:
    """First instruction and successors of every basic block."""
    leaders = {0} | {i.target for i in instructions if i.target is not None}
    leaders |= {n + 1 for n, i in enumerate(instructions) if i.target is not None}
    leaders |= {n + 1 for n, i in enumerate(instructions) if not i.falls_through}
    starts = sorted(n for n in leaders if n < len(instructions))
    block_of = {start: block for block, start in enumerate(starts)}
    successors = []
    for block, end in enumerate(starts[1:] + [len(instructions)]):
        last = instructions[end - 1]
        following = {block_of[last.target]} if last.target in block_of else set()
        if last.falls_through and block + 1 < len(starts):
            following.add(block + 1)
        successors.append(sorted(following))
    return starts, successors


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """For every block the blocks on all paths from block 0 to it; unreachable ones have none."""
    reached, stack = {0}, [0]
    while stack:
        new = set(successors[stack.pop()]) - reached
        reached |= new
        stack.extend(new)
    predecessors: dict[int, list[int]] = {block: [] for block in reached}
    for block in reached:
        for successor in successors[block]:
            predecessors[successor].append(block)
    dominators = [set(reached) if block in reached else set() for block in range(len(successors))]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def _natural_loop(header: int, source: int, predecessors: list[list[int]]) -> set[int]:
    """The blocks that reach `source` without passing `header`, and `source` itself."""
    body, stack = {header, source}, [source]
    while stack:
        block = stack.pop()
        if block == header:
            continue
        new = set(predecessors[block]) - body
        body |= new
        stack.extend(new)
    return body

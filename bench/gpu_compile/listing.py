"""What a kernel's machine code says: registers, spills, shared memory, loads and stores by width, instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Code:
    """One kernel for one target."""

    backend: str
    kernel: str
    target: str
    registers: int
    spills: int  # registers spilled (AMD), or instructions that load from or store to local memory
    stack: int  # bytes of local memory per thread
    shared: int  # bytes, those asked for at the launch not included
    loads: dict[int, int] = field(default_factory=dict)  # instructions by width in bits
    stores: dict[int, int] = field(default_factory=dict)
    instructions: int = 0
    shuffles: int = 0  # in straight code
    looped_shuffles: int = 0  # in the innermost loop with most arithmetic
    special: int = 0  # approximate functions (MUFU): none belongs to a sine or cosine
    scalar_spills: int = 0  # AMD: scalar registers kept in lanes of vector registers, no memory


def tool(name: str) -> str:
    """A program of CUDA's, from PATH or from Triton's package."""
    found = shutil.which(name)
    if found is None:
        import triton

        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


_WIDTH = re.compile(r"\.(8|16|32|64|128)\b|\.[US](8|16)\b")


def _widths(operations: list[str]) -> dict[int, int]:
    """Global loads or stores by the bits that an instruction moves for one thread."""
    found: Counter[int] = Counter()
    for operation in operations:
        width = _WIDTH.search(operation)
        found[int(width[1] or width[2]) if width else 32] += 1
    return dict(sorted(found.items()))


def _loop_with_most(lines: list[str], what: str) -> tuple[int, int]:
    """Where the innermost loop with most ``what`` instructions begins and ends, by labels and backward branches."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    loops = []
    for i, line in enumerate(lines):
        if (m := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and labels.get(m[1], i) < i:
            loops.append((labels[m[1]], i))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return max(inner, key=lambda loop: sum(what in line for line in lines[loop[0] : loop[1]]), default=(0, 0))


def of_cubin(backend: str, target: str, cubin: Path) -> list[Code]:
    """Every kernel of a file of machine code for an NVIDIA target."""
    usage = {}
    for name, numbers in re.findall(
        r"Function ([^\n:]+):\s*\n\s*([^\n]+)", run(tool("cuobjdump"), "-res-usage", str(cubin))
    ):
        usage[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
    found = []
    for text in re.split(r"\n\s*\.section\s+\.text\.", run(tool("nvdisasm"), "-c", str(cubin)))[1:]:
        name = re.match(r"[^,\s]+", text)
        assert name is not None
        lines = text.splitlines()
        operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
        first, last = _loop_with_most(lines, "FFMA")
        looped = sum("SHFL" in line for line in lines[first:last])
        numbers_of = usage[name[0]]
        found.append(
            Code(
                backend,
                name[0],
                target,
                numbers_of["REG"],
                sum(o.startswith(("LDL", "STL")) for o in operations),
                numbers_of["STACK"],
                numbers_of["SHARED"],
                _widths([o for o in operations if o.startswith("LDG")]),
                _widths([o for o in operations if o.startswith("STG")]),
                len(operations),
                sum(o.startswith("SHFL") for o in operations) - looped,
                looped,
                sum(o.startswith(("MUFU.SIN", "MUFU.COS")) for o in operations),
            )
        )
    return found


def of_amdgcn(backend: str, kernel: str, target: str, text: str) -> Code:
    """A kernel from its assembly for an AMD target."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    def widths(kind: str) -> dict[int, int]:
        counted: Counter[int] = Counter()
        for dwords in re.findall(rf"\b(?:global|buffer)_{kind}_(?:dword(?:x(\d))?|\w+)", text):
            counted[32 * int(dwords or 1)] += 1
        return dict(sorted(counted.items()))

    instructions = re.findall(r"^\t([vs]_\w+|global_\w+|buffer_\w+|ds_\w+)", text, re.MULTILINE)
    return Code(
        backend,
        kernel,
        target,
        number("vgpr_count"),
        number("vgpr_spill_count"),
        number("private_segment_fixed_size"),
        number("group_segment_fixed_size"),
        widths("load"),
        widths("store"),
        len(instructions),
        scalar_spills=number("sgpr_spill_count"),
    )

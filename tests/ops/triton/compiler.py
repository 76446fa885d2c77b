"""Compiles kernels for GPUs that are not there and reads from the machine code what they need.

`python -m tests.ops.triton.compiler [PART OF A NAME...]`: a process of its own, because in one whose kernels are interpreted
nothing can be compiled. Prints one JSON object a line. Which kernels, with which arguments and block sizes: `CASES` of the
modules `compiled_*.py` beside this one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes that one block may have, by architecture."""


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched.

    Attributes:
        kernel: the function under `triton.jit`, as "module:name" below `megatron_llm.ops.triton`.
        signature: the type of each run-time argument: "*bf16", "*fp32", "i32", "i64", "fp32".
        constants: the values of its constexpr arguments, and of pointers that are None.
        options: num_warps, num_stages.
        aligned: run-time arguments that are multiples of 16 (pointers: of 16 bytes), as Triton's launcher would find; without
            them loads are not vectorized.
        sixteen_bytes: loads and stores of global memory are of 16 bytes. tensor_cores: HGMMA on sm_90 and no HMMA.
        archs: to compile for. may_spill: those on which registers may spill.
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    sixteen_bytes: bool = False
    tensor_cores: bool = False
    archs: tuple[int, ...] = (80, 90, 100)
    may_spill: tuple[int, ...] = ()


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs. Counts are of instructions in the machine code.

    Attributes:
        registers: a thread; stack, local: bytes of local memory a thread. shared: bytes a block. warps: a block.
        spills: stores and loads of local memory; hgmma, hmma: of tensor cores, by warpgroup and by warp.
        loads, loads_16, stores, stores_16: of global memory (cp.async and TMA count as loads of 16 bytes where they are).
    """

    case: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    spills: int
    hgmma: int
    hmma: int
    loads: int
    loads_16: int
    stores: int
    stores_16: int


def compiled(case: Case, arch: int) -> Resources:
    """Compile with the Triton that is installed. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = case.kernel.split(":")
    fn = getattr(importlib.import_module(f"megatron_llm.ops.triton.{module}"), name)
    signature = {arg: "constexpr" if arg in case.constants else case.signature[arg] for arg in fn.arg_names}
    attrs = {(fn.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in case.aligned}
    source = ASTSource(fn=fn, signature=signature, constexprs=dict(case.constants), attrs=attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", cubin.name)
        code = _output(tools / "nvdisasm", "-c", cubin.name)

    def needs(what: str) -> int:
        found = re.search(rf"{what}:(\d+)", usage)
        assert found, usage
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Resources(
        case.name, arch, needs("REG"), needs("STACK"), needs("LOCAL"), kernel.metadata.shared, kernel.metadata.num_warps,
        count(r"\b(?:STL|LDL)\b"), count(r"\bHGMMA\b"), count(r"\bHMMA\b"),
        count(r"\bLDG\b|\bLDGSTS\b|\bUTMALDG\b"), count(r"\bLDG\.E(?:\.\w+)*\.128\b|\bLDGSTS\.E(?:\.\w+)*\.128\b|\bUTMALDG\b"),
        count(r"\bSTG\b|\bUTMASTG\b"), count(r"\bSTG\.E(?:\.\w+)*\.128\b|\bUTMASTG\b"),
    )  # fmt: skip


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def cases() -> list[Case]:
    """Those of all modules `compiled_*.py` beside this one."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("compiled_*.py"))
    return [case for name in names for case in importlib.import_module(f"tests.ops.triton.{name}").CASES]


def main(chosen: list[str]) -> None:
    """chosen: parts of names of cases; none: all."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for case in cases():
        if not chosen or any(part in case.name for part in chosen):
            for arch in case.archs:
                print(json.dumps(asdict(compiled(case, arch))), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main(sys.argv[1:])

"""Compiles kernels for GPUs that are not there and reads from the machine code what they need.

`python -m tests.ops.triton.compiler [PART OF A NAME...]`: a process of its own, because in one whose kernels are interpreted
nothing can be compiled. Prints one JSON object a line: what a kernel needs, and what is wrong with that. Which kernels, with
which arguments and block sizes: `CASES` of the modules `compiled_*.py` beside this one. `test_compiled.py` asks for all of them.

Kernels are kept in Triton's cache, and what was read from them as well: a second run compiles and disassembles nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes that one block may have, by architecture."""


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched.

    Attributes:
        kernel: the function under `triton.jit`, as "module:name" below `megatron_llm.ops.triton`, or below `tests`.
        signature: the type of each run-time argument: "*bf16", "*fp32", "i32", "i64", "fp32".
        constants: the values of its constexpr arguments, and of pointers that are None.
        options: num_warps, num_stages.
        aligned: run-time arguments that are multiples of 16 (pointers: of 16 bytes), as Triton's launcher would find; without
            them loads are not vectorized.
        sixteen_bytes: loads and stores of global memory are of 16 bytes, but for as many as `narrow`, of numbers that a row has
            one of. An operand that is not vectorized has at least as many as it would have elements in 16 bytes, and is found.
        tensor_cores: HGMMA on sm_90 and no HMMA.
        archs: to compile for. may_spill: those on which registers may spill.
    """

    name: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    sixteen_bytes: bool = False
    narrow: int = 4
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


def problems(case: Case, needs: Resources) -> list[str]:
    """What is wrong with a compiled kernel, a sentence each."""
    found = []
    if (needs.spills or needs.local) and needs.arch not in case.may_spill:
        found.append(
            f"{needs.spills} instructions spill registers ({needs.registers} are used), {needs.local} bytes of local memory"
        )
    if needs.shared > SHARED_MEMORY[needs.arch]:
        found.append(f"{needs.shared} bytes of shared memory; a block has {SHARED_MEMORY[needs.arch]}")
    if case.tensor_cores and needs.arch == 90 and (not needs.hgmma or needs.hmma):
        found.append(f"{needs.hgmma} matrix products of warpgroups (HGMMA) and {needs.hmma} of warps (HMMA)")
    if case.tensor_cores and needs.arch == 80 and not needs.hmma:
        found.append("no matrix products (HMMA)")
    if case.sixteen_bytes:
        for what, count, wide in (("loads", needs.loads, needs.loads_16), ("stores", needs.stores, needs.stores_16)):
            if count - wide > max(case.narrow, wide) or (what == "loads" and not wide):
                found.append(f"{wide} of {count} {what} are of 16 bytes")
    return found


def compiled(case: Case, arch: int) -> Resources:
    """Compile with the Triton that is installed. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.cache import get_cache_manager

    module, name = case.kernel.split(":")
    path = module if module.startswith("tests.") else f"megatron_llm.ops.triton.{module}"
    fn = getattr(importlib.import_module(path), name)
    signature = {arg: "constexpr" if arg in case.constants else case.signature[arg] for arg in fn.arg_names}
    attrs = {(fn.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in case.aligned}
    source = ASTSource(fn=fn, signature=signature, constexprs=dict(case.constants), attrs=attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    cache = get_cache_manager(hashlib.sha256(kernel.hash.encode() + Path(__file__).read_bytes()).hexdigest())
    if known := cache.get_file("resources.json"):
        return Resources(case.name, arch, **json.loads(Path(known).read_text()))
    read = _read(kernel.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin")
    read |= {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    cache.put(json.dumps(read), "resources.json", binary=False)
    return Resources(case.name, arch, **read)


def _read(cubin: bytes, tools: Path) -> dict[str, int]:
    """What the machine code says, by the names in `Resources`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)

    def needs(what: str) -> int:
        found = re.search(rf"{what}:(\d+)", usage)
        assert found, usage
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return {
        "registers": needs("REG"),
        "stack": needs("STACK"),
        "local": needs("LOCAL"),
        "spills": count(r"\b(?:STL|LDL)\b"),
        "hgmma": count(r"\bHGMMA\b"),
        "hmma": count(r"\bHMMA\b"),
        "loads": count(r"\bLDG\b|\bLDGSTS\b|\bUTMALDG\b"),
        "loads_16": count(r"\bLDG\.E(?:\.\w+)*\.128\b|\bLDGSTS\.E(?:\.\w+)*\.128\b|\bUTMALDG\b"),
        "stores": count(r"\bSTG\b|\bUTMASTG\b"),
        "stores_16": count(r"\bSTG\.E(?:\.\w+)*\.128\b|\bUTMASTG\b"),
    }


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def cases() -> list[Case]:
    """Those of all modules `compiled_*.py` beside this one."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("compiled_*.py"))
    return [case for name in names for case in importlib.import_module(f"tests.ops.triton.{name}").CASES]


def examine(case: Case, arch: int) -> dict[str, Any]:
    """What it needs and what is wrong, as it is printed: the fields of `Resources`, "problems", "seconds"."""
    begin = time.perf_counter()
    try:
        needs = compiled(case, arch)
    except Exception as error:  # the compiler's own, of any kind: those of other cases are wanted all the same
        result: dict[str, Any] = {"case": case.name, "arch": arch, "problems": [f"not compiled: {type(error).__name__}: {error}"]}
    else:
        result = asdict(needs) | {"problems": problems(case, needs)}
    return result | {"seconds": round(time.perf_counter() - begin, 2)}


def _examine(task: tuple[Case, int]) -> dict[str, Any]:
    return examine(*task)


def label(case: Case, arch: int) -> str:
    """By which a case on an architecture is asked for."""
    return f"{case.name}, sm_{arch}"


def examine_all(tasks: Sequence[tuple[Case, int]], processes: int) -> Iterator[dict[str, Any]]:
    """Each case on its architecture, as they become ready."""
    import torch  # noqa: F401  # before the fork, as triton: seconds for each process otherwise
    import triton  # noqa: F401

    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(_examine, tasks)


def main(chosen: list[str]) -> None:
    """chosen: parts of `label`; none: all but those that are broken on purpose."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    found = cases()
    if chosen:
        from tests.ops.triton.broken import CASES as broken

        found += broken
    tasks = [(case, arch) for case in found for arch in case.archs]
    tasks = [task for task in tasks if not chosen or any(part in label(*task) for part in chosen)]
    for result in examine_all(tasks, len(os.sched_getaffinity(0))):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main(sys.argv[1:])

"""Claim: import and export of a Hugging Face folder move bytes at 0.8 of the speed of a plain copy of its files or faster, and
hold less than 250 MiB, which is the largest tensor.

A Llama of --gigabytes in bfloat16, in files of 2 GB, is written tensor by tensor. In a round, in an order that alternates,

    copy                 reads the folder's files in blocks of 16 MB, writes each into a file, and syncs it
    import               `megatron-llm import`
    export               `megatron-llm export` of what was imported, which first compares every checksum: it reads all twice
    export_unverified    the same with --no-verify

What is read has been evicted from the page cache before, and what is written is synced, so all of them are at the disk's mercy.
GB/s count the folder's bytes once. Memory is what the process holds at most beyond what it held before (VmHWM).

    python benchmarks/hf_folders.py [--gigabytes 8] [--rounds 3] [--folder DIR]

Needs three times --gigabytes on the disk for the time it runs. Exits 1 if the claim does not hold.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint import forget_peak, memory
from common import Ranks, finish, machine, parser

from megatron_llm.cli.main import main as command
from megatron_llm.config import ModelConfig
from megatron_llm.hf import export_hf
from megatron_llm.models.names import logical_tensors
from megatron_llm.parallel.shard import Box, Part

LEAST, MOST_MIB, BLOCK = 0.8, 250, 1 << 24
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SHARD_SIZE = 2 * 10**9


def model_of(gigabytes: float) -> tuple[ModelConfig, int, float]:
    """A Llama of about that size; its bytes, and the MiB of its largest tensor."""

    def size(layers: int) -> int:
        shapes = [shape for _, shape in logical_tensors(ModelConfig(**SHAPE, num_hidden_layers=layers))]
        return sum(2 * Box.full(shape).numel for shape in shapes)

    layers = max(1, round((gigabytes * 1e9 - size(1)) / (size(2) - size(1))) + 1)
    model = ModelConfig(**SHAPE, num_hidden_layers=layers)
    largest = max(2 * Box.full(shape).numel for _, shape in logical_tensors(model))
    return model, size(layers), largest / 2**20


class Noise:
    """A source that costs nothing: every box is the beginning of one random block."""

    def __init__(self) -> None:
        self._block = torch.randn(1 << 23).bfloat16()

    def read(self, part: Part, box: Box) -> torch.Tensor:
        return self._block[: box.numel].view(box.shape)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def evict(folder: Path) -> None:
    """Take a folder's files, which are on the disk, out of the page cache."""
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    buffer = memoryview(bytearray(BLOCK))
    for path in files_of(source):
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", buffering=0) as written:
            while count := read.readinto(buffer):
                written.write(buffer[:count])
            os.fsync(written.fileno())


def process(place: str) -> Callable[[str], dict[str, float]]:
    """On a process of its own: what does one part of a round."""
    folder = Path(place)
    source, native, target = folder / "hf", folder / "native", folder / "target"

    def run(*arguments: str) -> Callable[[], None]:
        def work() -> None:
            status = command(list(arguments))
            assert status == 0, arguments

        return work

    out = ("export", str(native), str(target), "--shard-size", str(SHARD_SIZE))
    work: dict[str, tuple[Path, Callable[[], None]]] = {
        "copy": (source, lambda: copy(source, target)),
        "import": (source, run("import", str(source), str(native), "--overwrite")),
        "export": (native, run(*out)),
        "export_unverified": (native, run(*out, "--no-verify")),
    }

    def answer(what: str) -> dict[str, float]:
        read, do = work[what]
        if what == "import":
            shutil.rmtree(native, ignore_errors=True)
        evict(read)
        forget_peak()
        before, start = memory("VmRSS"), time.perf_counter()
        do()
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "extra_mib": memory("VmHWM") - before}
        shutil.rmtree(target, ignore_errors=True)
        return found

    return answer


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--gigabytes", type=float, default=8, help="of the folder (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    args = options.parse_args()
    model, size, largest = model_of(args.gigabytes)
    free = shutil.disk_usage(args.folder).free
    if free < 3.5 * size:
        sys.exit(f"{args.folder} has {free / 1e9:.0f} GB free; this needs {3.5 * size / 1e9:.0f} for {args.gigabytes:g} GB")
    conditions = machine("torch", "safetensors")
    times: dict[str, list[float]] = {}
    extra: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="benchmark-hf-folders-") as made:
        export_hf(Noise(), model, {}, Path(made) / "hf", default_dtype="BF16", shard_size=SHARD_SIZE)
        with Ranks(1, process, made) as call:
            for number in range(args.rounds):
                order = ["copy", "import", "export", "export_unverified"]
                for what in order if number % 2 == 0 else [*order[1:], "copy"]:
                    (answer,) = call(what)
                    times.setdefault(what, []).append(answer["seconds"])
                    extra[what] = max(extra.get(what, 0.0), answer["extra_mib"])
    ratios = {
        what: sorted(plain / mine for plain, mine in zip(times["copy"], seconds, strict=True)) for what, seconds in times.items()
    }
    figures = {
        what: {
            "gb_per_second": round(size / statistics.median(seconds) / 1e9, 3),
            "of_a_copy": round(statistics.median(ratios[what]), 3),
            "ratios": [round(ratio, 2) for ratio in ratios[what]],
            "extra_mib_at_most": round(extra[what], 1),
        }
        for what, seconds in times.items()
    }
    holds = {
        "speed": all(figures[what]["of_a_copy"] >= LEAST for what in ("import", "export_unverified")),
        "memory": all(found <= MOST_MIB for found in extra.values()),
    }
    claim = "import and export at 0.8 of a plain copy, holding 250 MiB at most"
    return finish(
        args.output, claim, all(holds.values()), conditions, claims=holds, bytes=size, largest_tensor_mib=round(largest, 1),
        figures=figures,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""Peak memory of import and export: small parts of tensors, however large the model and its matrices and however it is stored."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_llm.config import ModelConfig
from megatron_llm.hf.families import find_family

MODEL = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 5, "num_attention_heads": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
MEASURED = """
import sys
from pathlib import Path
import torch  # what is needed once
import megatron_llm.exchange, megatron_llm.hf
from megatron_llm.cli.main import main

def status(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024

before = status("VmRSS")
assert main(sys.argv[1:]) == 0
print(f"\\npeak {status('VmHWM') - before}")
"""


def peak(*arguments: str) -> float:
    """MiB that a command holds at most beyond what the interpreter and its imports hold."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rsplit("peak ", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_import_and_export_hold_less_than_the_largest_tensor(tmp_path: Path, form: str) -> None:
    model = ModelConfig(**MODEL)
    llama = find_family("LlamaForCausalLM")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(llama.config(model)))
    tensors = {stored.name: torch.zeros(stored.shape) for stored in llama.stored_tensors(model)}
    total = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    largest = max(tensor.nbytes for tensor in tensors.values()) / 2**20
    save_file(tensors, tmp_path / "hf" / form) if form.endswith("safetensors") else torch.save(tensors, tmp_path / "hf" / form)
    del tensors
    assert total > 1000 and largest == pytest.approx(250), "what is measured must not fit by chance"
    commands = {
        "import": ("import", str(tmp_path / "hf"), str(tmp_path / "native")),
        "export": ("export", str(tmp_path / "native"), str(tmp_path / "out")),
        "export to another dtype": ("export", str(tmp_path / "native"), str(tmp_path / "half"), "--dtype", "bf16"),
    }
    for name, command in commands.items():
        found = peak(*command)
        assert found < largest, (name, found)
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep

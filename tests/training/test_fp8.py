"""Runs with `precision.linear: fp8`: what they learn beside bfloat16, in which layouts, and what is refused before they start."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from megatron_llm.cli.main import main
from megatron_llm.config import Config, ConfigError
from megatron_llm.config.optimization import PrecisionConfig
from megatron_llm.data.writer import IndexedWriter
from megatron_llm.models.stages import build_stages
from megatron_llm.parallel.grid import Grid
from megatron_llm.training.changes import find_changes
from megatron_llm.training.fp8 import fp8_device_problems, fp8_size_problems
from megatron_llm.training.resolve import layout_problems, resolve
from tests.ranks import run_ranks
from tests.runs import TINY, config_of, train
from tests.training.commands import write_config

STEPS = 30
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
History = list[tuple[float, float, bool]]
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A run on numbers in arithmetic progression, which can be learned."""
    prefix = tmp_path_factory.mktemp("progressions") / "numbers"
    rng = np.random.default_rng(5)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(300):
            writer.add_document((rng.integers(97) + rng.integers(1, 4) * np.arange(17)) % 97)

    def make(linear: str, **sections: dict[str, Any]) -> Config:
        sections["training"] = {"steps": STEPS, "global_batch_size": 4, **sections.get("training", {})}
        rate = {"optimizer": {"lr": 3e-3}, "lr_schedule": {"kind": "constant", "warmup_steps": 0, "min_lr": 0.0}}
        data = {"kind": "pretrain", "train": [{"path": str(prefix)}]}
        return config_of(model=SIZES, precision={"compute": "bfloat16", "linear": linear}, data=data, **rate, **sections)

    return make


@pytest.fixture(scope="module")
def alone(config: Make) -> Callable[[str], History]:
    """What a run on one process makes of either way to multiply."""
    return functools.cache(lambda linear: run_ranks(1, train, config(linear))[0][0])


def _losses(history: History) -> torch.Tensor:
    assert not any(skipped for *_, skipped in history)
    return torch.tensor([loss for loss, *_ in history])


def test_the_loss_follows_that_of_bfloat16(alone: Callable[[str], History]) -> None:
    """Within 0.019 here, where 1.5 is learned."""
    wide, narrow = _losses(alone("compute")), _losses(alone("fp8"))
    learned = wide[0] - wide[-5:].mean()
    assert learned > 1.2
    assert ((narrow - wide).abs() < 0.03 * learned).all()
    assert (narrow - wide).abs().max() > 0, "nothing was in 8 bits"


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel": 2},
    "tp2 without sequence parallel": {"tensor_parallel": 2, "sequence_parallel": False},
    "pp2, weight gradients deferred": {"pipeline_parallel": 2, "pipeline_schedule": "zb_h1"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_learn_the_same(name: str, config: Make, alone: Callable[[str], History]) -> None:
    """To 0.004 in 6 steps, and in bfloat16 to 0.002: few numbers depend on which scale tensor parallelism leaves."""
    training = {"steps": 6, "micro_batch_size": 1}
    results = run_ranks(2, train, config("fp8", parallel=LAYOUTS[name], training=training))
    for history, _ in results:
        assert (_losses(history) - _losses(alone("fp8"))[:6]).abs().max() < 0.01
        assert history[0][0] == pytest.approx(alone("fp8")[0][0], abs=1e-3)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute: str, config: Make, alone: Callable[[str], History]) -> None:
    ((history, _),) = run_ranks(1, train, config("fp8", training={"recompute": recompute, "steps": 3}))
    assert history == alone("fp8")[:3]


def test_a_frozen_base_is_in_8_bits_and_its_adapters_are_not(config: Make) -> None:
    peft = {"rank": 4, "alpha": 8.0}
    wide, narrow = (run_ranks(1, train, config(linear, peft=peft, training={"steps": 5}))[0][0] for linear in ("compute", "fp8"))
    assert 0 < (_losses(wide) - _losses(narrow)).abs().max() < 0.02


def test_which_weights_are_multiplied_so(config: Make) -> None:
    def in_8_bits(linear: str) -> list[str]:
        run = config(linear, peft={"rank": 4, "alpha": 8.0})
        (stage,) = build_stages(run, Grid.single(), (0,), torch.bfloat16, torch.device("cpu")).values()
        return [name for name, parameter in stage.named_parameters() if hasattr(parameter, "fp8")]

    linears = ("attention.qkv", "attention.o", "mlp.up", "mlp.down")
    assert sorted(in_8_bits("fp8")) == sorted(f"layers.{layer}.{linear}.weight" for layer in (0, 1) for linear in linears)
    assert in_8_bits("compute") == []


# Refusals


def test_a_machine_that_cannot_is_refused_before_any_process_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = copy.deepcopy(TINY) | {"precision": {"linear": "fp8"}, "logging": {"run_dir": str(tmp_path / "run")}}
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group was made"))
    assert main(["train", str(write_config(tmp_path / "config.yaml", raw))]) == 1
    text = capsys.readouterr().err
    assert "precision.linear: fp8 needs an NVIDIA GPU of compute capability 8.9 or more" in text
    assert "model.(num_attention_heads + 2 * num_key_value_heads) * head_dim" not in text  # 48: that much is right
    assert not (tmp_path / "run").exists()


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    raw = copy.deepcopy(TINY) | {"precision": {"linear": "fp8"}, "logging": {"run_dir": str(tmp_path / "run")}}
    raw["model"] = {**raw["model"], "intermediate_size": 44}
    with pytest.raises(ConfigError) as error:
        resolve(write_config(tmp_path / "config.yaml", raw), None, world_size=1)
    assert "model.intermediate_size is 44, no multiple of 16; set precision.linear=compute" in str(error.value)
    assert "precision.linear: fp8 needs an NVIDIA GPU" in str(error.value)


def test_a_gpu_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch, config: Make) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    (problem,) = fp8_device_problems(config("fp8"), "cuda")
    assert problem.startswith("precision.linear: fp8 needs") and "NVIDIA A100 has 8.0; remove it, or set it to compute" in problem
    assert fp8_device_problems(config("compute"), "cuda") == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert fp8_device_problems(config("fp8"), "cuda") == []


@pytest.mark.parametrize("compute", ["float64", "float32", "float16"])
def test_other_dtypes_are_refused(compute: Any) -> None:
    with pytest.raises(ValidationError, match=f"linear fp8 has results in bfloat16, and compute is {compute}; set compute to"):
        PrecisionConfig(compute=compute, linear="fp8")
    PrecisionConfig(compute="bfloat16", linear="fp8")


def test_sizes_that_are_no_multiples_of_16_as_they_are_cut() -> None:
    def problems(tensor_parallel: int, **sizes: int) -> list[str]:
        precision, parallel = {"compute": "auto", "linear": "fp8"}, {"tensor_parallel": tensor_parallel}
        return fp8_size_problems(config_of(model=sizes, precision=precision, parallel=parallel))

    assert problems(1) == []
    (problem,) = problems(1, hidden_size=40, head_dim=8)
    assert problem == (
        "precision.linear: fp8 multiplies 16 numbers at a time, and model.hidden_size is 40, no multiple of 16; "
        "set precision.linear=compute"
    )
    heads, inner = problems(2)
    assert "(num_attention_heads + 2 * num_key_value_heads) * head_dim on tensor-parallel rank 0 of 2 is 24, no multiple" in heads
    assert inner == (
        "precision.linear: fp8 multiplies 16 numbers at a time, and model.intermediate_size on tensor-parallel rank 0 of 2 is "
        "24, no multiple of 16; choose another parallel.tensor_parallel, or set precision.linear=compute"
    )
    assert problems(2, intermediate_size=64, head_dim=8) == []
    (last,) = problems(2, intermediate_size=31, head_dim=8)  # cut in 16 and 15
    assert "model.intermediate_size on tensor-parallel rank 1 of 2 is 15" in last


def test_a_layout_that_is_impossible_anyway_is_told_alone() -> None:
    def fp8_problems(tensor_parallel: int) -> list[str]:
        run = config_of(precision={"compute": "auto", "linear": "fp8"}, parallel={"tensor_parallel": tensor_parallel})
        return [problem for problem in layout_problems(run, tensor_parallel) if "fp8" in problem]

    assert fp8_problems(2) and not fp8_problems(16)


def test_a_run_that_goes_on_must_mean_the_change(config: Make) -> None:
    changes = find_changes(config("compute"), {}, config("fp8"), {})
    assert changes.decides_numbers == ["precision.linear: compute -> fp8"] and not changes.free and not changes.of_another_run

"""Runs with adapters: they train as `peft` trains them, stop and go on, and everything else sees the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from megatron_llm.checkpoint import Checkpoint, find_checkpoint
from megatron_llm.cli.main import main
from megatron_llm.config import Config, PeftConfig, parse_config
from megatron_llm.config.peft import is_adapter
from megatron_llm.data.stream import build_train_stream
from megatron_llm.hf import HFFolder, export_adapter
from megatron_llm.models.lora import WithAdapters, adapted_layers
from megatron_llm.parallel.grid import Grid
from megatron_llm.parallel.shard import Box, Part
from megatron_llm.training.build import build_engine
from megatron_llm.training.recovery import load_run
from megatron_llm.training.resolve import load_config, resolve
from megatron_llm.training.sources import FreshWeights
from megatron_llm.training.step import RunState, train_step
from tests.decoders import AllRandom
from tests.families.cases import cases, make_folder
from tests.ranks import run_ranks
from tests.runs import Pieces, assemble, config_of, owned_weights, save_run
from tests.training.commands import read_metrics, write_config

CASES = cases()
CPU = torch.device("cpu")


# Against peft


def _config_of_folder(folder: Path, compute: str, peft: dict[str, Any]) -> Config:
    training = {"sequence_length": 16, "micro_batch_size": 1, "global_batch_size": 3, "steps": 4, "seed": 7}
    return parse_config(
        {
            "model": HFFolder(folder).model_fields(),
            "data": {"kind": "synthetic"},
            "training": training,
            "optimizer": {"lr": 0.01, "weight_decay": 0.1, "grad_clip": 0.5, "eps": 1e-6},
            "lr_schedule": {"kind": "constant"},
            "precision": {"compute": compute},
            "device": "cpu",
            "peft": peft,
        }
    )


def _theirs(model: PeftModel, config: Config) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, gradient norm) of every step of torch's AdamW on PEFT's model, and its adapters at the end."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    settings, stream, rows = config.optimizer, build_train_stream(config), config.training.global_batch_size
    assert not isinstance(settings.lr, str)
    optimizer = torch.optim.AdamW(trained.values(), settings.lr, tuple(settings.betas), settings.eps, settings.weight_decay)
    history = []
    for step in range(config.training.steps):
        total = weight = torch.zeros(())
        for row in range(step * rows, (step + 1) * rows):
            batch = stream.batch([row])
            starts = list(batch.cu_seqlens)
            lengths = [stop - start for start, stop in zip(starts, starts[1:], strict=False)]
            logits = torch.cat([model(tokens[None], use_cache=False).logits[0] for tokens in batch.tokens_T.split(lengths)])
            losses = torch.nn.functional.cross_entropy(logits, batch.labels_T, reduction="none")
            total, weight = total + (losses * batch.weights_T).sum(), weight + batch.weights_T.sum()
        optimizer.zero_grad()
        (total / weight).backward()
        gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.mul_(min(1.0, settings.grad_clip / float(norm)))  # torch's clip_grad_norm_ divides by 1e-6 more
        optimizer.step()
        history.append((float((total / weight).detach()), float(norm)))
    return history, {name.replace(".default.", "."): parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize(
    ("name", "compute", "targets", "theirs", "tolerance"),
    [
        # LayerNorm in float64, which transformers' RMSNorm is not; what has a matrix for itself there as here
        ("gpt2", "float64", ["attention.o", "mlp.*"], ["attn.c_proj", "c_fc", "mlp.c_proj"], 1e-9),
        ("opt", "float64", ["all-linear"], "all-linear", 1e-9),
        ("llama", "float32", ["all-linear"], "all-linear", 2e-4),
    ],
)
def test_training_is_that_of_peft(
    tmp_path: Path, name: str, compute: str, targets: list[str], theirs: Any, tolerance: float
) -> None:
    peft = {"rank": 4, "alpha": 6.0, "targets": targets}
    base = make_folder(CASES[name], tmp_path / "hf")
    base.set_attn_implementation("sdpa")  # the other one has its softmax in float32
    config = _config_of_folder(tmp_path / "hf", compute, peft)
    folder, model = HFFolder(tmp_path / "hf"), config.model
    assert config.peft is not None
    start = WithAdapters(folder.source(model), AllRandom(3, 0.1))  # B is not zero: A has a gradient from the first step on
    engine = build_engine(config, Grid.single(), CPU, start)
    assets = {"hf/config.json": (tmp_path / "hf/config.json").read_bytes()}
    export_adapter(start, model, config.peft, assets, tmp_path / "start", base=None, dtype="F64")
    expected_history, expected = _theirs(_loaded(base, tmp_path / "start", compute, theirs), config)

    stream, state = build_train_stream(config), RunState()
    results = [train_step(engine, stream, state) for _ in range(config.training.steps)]
    assert [(result.loss, result.grad_norm) for result in results] == [
        pytest.approx(line, rel=tolerance) for line in expected_history
    ]
    ours = _Assembled(assemble([owned_weights(engine)]))
    export_adapter(ours, model, config.peft, assets, tmp_path / "end", base=None, dtype="F64")
    from safetensors.torch import load_file

    written = load_file(tmp_path / "end" / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        assert (written[key] - value).norm() <= tolerance * value.norm(), key


def _loaded(base: Any, adapter: Path, compute: str, targets: Any) -> PeftModel:
    """PEFT's own adapters of those targets with the values of a folder."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    dtype = torch.float64 if compute == "float64" else torch.float32
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base.to(dtype), settings, autocast_adapter_dtype=False).to(dtype)
    result = set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    return model


class _Assembled:
    """A source made of whole tensors."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def read(self, part: Part, box: Box) -> Tensor:
        return self.tensors[part.name][box.slices]


# The start


def _fresh(config: Config) -> tuple[float, Pieces]:
    engine = build_engine(config, Grid.build(config.parallel, config.model.num_key_value_heads), CPU)
    weights = owned_weights(engine)
    return train_step(engine, build_train_stream(config), RunState()).loss, weights


def test_a_run_begins_as_the_model_does_in_any_layout() -> None:
    parallel = {"tensor_parallel": 2}
    ((alone, _),) = run_ranks(1, _fresh, config_of())
    ((loss, pieces),) = run_ranks(1, _fresh, config_of(peft={"rank": 8}))
    assert loss == alone
    expected = assemble([pieces])
    two = run_ranks(2, _fresh, config_of(peft={"rank": 8}, parallel=parallel))
    split = assemble([pieces for _, pieces in two])
    assert split.keys() == expected.keys() and all(torch.equal(split[name], expected[name]) for name in expected)
    matrices = [value for name, value in expected.items() if name.endswith("lora_a.weight")]
    assert len(matrices) == 5 * 7 and all(not value.any() for name, value in expected.items() if "lora_b" in name)
    scaled = torch.cat([(value * value.shape[1] ** 0.5).flatten() for value in matrices])  # uniform in [-1, 1)
    assert scaled.abs().max() <= 1 and scaled.abs().max() > 0.999
    assert abs(scaled.mean()) < 0.02 and scaled.square().mean() == pytest.approx(1 / 3, rel=0.02)


def test_a_fresh_matrix_is_distributed_as_that_of_peft() -> None:
    part = Part("layers.0.attention.q.lora_a.weight", (64, 200), (), "uniform")
    ours = FreshWeights(1, 0.02).read(part, Box.full(part.shape))
    theirs = get_peft_model(torch.nn.Sequential(torch.nn.Linear(200, 3)), LoraConfig(r=64, target_modules=["0"]))
    (a,) = [parameter for name, parameter in theirs.named_parameters() if "lora_A" in name]
    for moment in (1, 2, 4):
        mine, his = (value.double().abs().pow(moment).mean().item() for value in (ours, a))
        assert mine == pytest.approx(his, rel=0.04)


# Going on


def _steps(config: Config, steps: int, save: bool = False, resume: bool = False) -> tuple[list[float], list[Pieces]]:
    grid = Grid.build(config.parallel, config.model.num_key_value_heads)
    checkpoint = find_checkpoint(config.logging.run_dir) if resume else None
    engine = build_engine(config, grid, CPU, checkpoint.state("weights") if checkpoint else AllRandom(2, 0.1))
    state = load_run(engine, checkpoint) if checkpoint else RunState()
    stream = build_train_stream(config)
    losses = [train_step(engine, stream, state).loss for _ in range(steps)]
    if save:
        save_run(engine, state)
    return losses, [owned_weights(engine, kind) for kind in ("weights", "m", "v", "ema")]


def test_a_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    """Adapters, their moments and averages; of the frozen weights nothing but themselves is kept."""

    def config(**parallel: Any) -> Config:
        sections: dict[str, Any] = {"logging": {"run_dir": str(tmp_path)}, "optimizer": {"ema_decay": 0.7}}
        return config_of(parallel=parallel, peft={"rank": 3, "targets": ["q_proj", "mlp.*"]}, **sections)

    ((expected_losses, expected),) = run_ranks(1, _steps, config(), 4)
    first = run_ranks(4, _steps, config(tensor_parallel=4), 2, save=True)
    assert first[0][0] == pytest.approx(expected_losses[:2], rel=1e-9)
    checkpoint = find_checkpoint(tmp_path)
    assert all(map(is_adapter, checkpoint.tensors("m"))) and checkpoint.tensors("m").keys() == checkpoint.tensors("v").keys()
    assert checkpoint.tensors("weights").keys() == checkpoint.tensors("ema").keys() > checkpoint.tensors("m").keys()
    second = run_ranks(4, _steps, config(pipeline_parallel=2, zero_stage=0), 2, resume=True)
    assert second[0][0] == pytest.approx(expected_losses[2:], rel=1e-9)
    for number, kind in enumerate(expected):
        whole, again = assemble([kind]), assemble([kinds[number] for _, kinds in second])
        assert whole.keys() == again.keys()
        for name, value in whole.items():
            assert (again[name] - value).norm() <= 1e-9 * value.norm() + 1e-12, name


RAW: dict[str, Any] = {
    "model": {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2,
    },
    "data": {"kind": "synthetic"},
    "training": {"sequence_length": 16, "global_batch_size": 2, "steps": 3, "eval_rows": 4},
    "optimizer": {"lr": 0.05, "ema_decay": 0.5},
    "lr_schedule": {"kind": "constant"},
    "precision": {"compute": "float32"},
    "device": "cpu",
    "peft": {"rank": 3, "alpha": 4.0, "targets": ["attention.*", "layers.1.mlp.up"]},
}  # fmt: skip


def _train(tmp_path: Path, name: str, **sections: Any) -> Path:
    raw = json.loads(json.dumps(RAW)) | {"logging": {"run_dir": str(tmp_path / name)}}
    for section, values in sections.items():
        raw[section] = raw[section] | values if isinstance(values, dict) and isinstance(raw.get(section), dict) else values
    assert main(["train", str(write_config(tmp_path / f"{name}.yaml", raw))]) == 0
    return tmp_path / name


def _read(checkpoint: Checkpoint, kind: str, name: str, raw: bool = True) -> Tensor:
    shape = checkpoint.tensors(kind)[name].shape
    source = checkpoint.state(kind) if raw else checkpoint.source(kind)
    return source.read(Part(name, shape, ()), Box.full(shape))


@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_the_next_phase_begins_with_the_merged_model(tmp_path: Path, kind: str) -> None:
    first = find_checkpoint(_train(tmp_path, "first"))
    run = tmp_path / "second"
    raw = RAW | {
        "model": {"checkpoint": str(tmp_path / "first"), "checkpoint_ema": kind == "ema"},
        "training": RAW["training"] | {"steps": 0},
        "optimizer": {"lr": 0.05},
        "logging": {"run_dir": str(run)},
        "peft": None,
    }
    assert main(["train", str(write_config(tmp_path / "second.yaml", raw))]) == 0
    second = find_checkpoint(run)
    config = PeftConfig(**first.config["peft"])
    adapted = [f"{name}.weight" for name in adapted_layers(first.model, config)]
    assert len(adapted) == 9 and not any(map(is_adapter, second.tensors("weights")))
    for name in second.tensors("weights"):
        expected = _read(first, kind, name).double()
        if name in adapted:
            a, b = (_read(first, kind, name.replace(".weight", f".lora_{letter}.weight")).double() for letter in "ab")
            change = 4.0 / 3 * b @ a
            assert change.norm() > 0.01 * expected.norm()
            expected = expected + change
        torch.testing.assert_close(_read(second, "weights", name).double(), expected, rtol=1e-6, atol=1e-6)
    # the merged model is the one that was trained: the first loss of the second phase is the last of the first
    if kind == "weights":
        one, two = (read_metrics(folder) for folder in (tmp_path / "first", run))
        assert two[0]["valid_loss"] == pytest.approx(one[-1]["valid_loss"], rel=1e-5)


def test_a_run_goes_on_without_the_adapter_that_it_began_with(tmp_path: Path) -> None:
    make_folder(CASES["llama"], tmp_path / "hf")
    start = tmp_path / "start"
    raw = RAW | {"model": {"hf": str(tmp_path / "hf")}, "logging": {"run_dir": str(tmp_path / "one")}}
    assert main(["train", str(write_config(tmp_path / "one.yaml", raw))]) == 0
    assert main(["export", str(tmp_path / "one"), str(start), "--adapter", "--ema"]) == 0
    raw = raw | {"peft": {"init": str(start)}, "logging": {"run_dir": str(tmp_path / "two")}}
    config = write_config(tmp_path / "two.yaml", raw)
    assert main(["train", str(config), "training.steps=1"]) == 0
    one, two = find_checkpoint(tmp_path / "one"), find_checkpoint(tmp_path / "two")
    kinds = ["attention.q", "attention.k", "attention.v", "attention.o", "layers.1.mlp.up"]
    assert two.config["peft"] == one.config["peft"] | {"init": str(start), "targets": kinds}
    shutil.rmtree(start)
    shutil.rmtree(tmp_path / "hf")
    assert main(["train", str(config), "training.steps=2"]) == 0
    assert find_checkpoint(tmp_path / "two").step == 2


def test_the_merged_model_is_exported_to_megatron(tmp_path: Path) -> None:
    run = _train(tmp_path, "run")
    assert main(["export", str(run), str(tmp_path / "megatron"), "--to", "megatron", "--dtype", "fp32"]) == 0
    assert main(["import", "--from", "megatron", str(tmp_path / "megatron"), str(tmp_path / "native")]) == 0
    merged, back = find_checkpoint(run), find_checkpoint(tmp_path / "native")
    for name in back.tensors("weights"):
        torch.testing.assert_close(_read(back, "weights", name), _read(merged, "weights", name, raw=False), rtol=0, atol=1e-7)


def test_boxes_of_a_merged_weight_are_parts_of_the_whole(tmp_path: Path) -> None:
    checkpoint = find_checkpoint(_train(tmp_path, "run", training={"steps": 1}))
    name = "layers.1.mlp.up.weight"
    whole, part = _read(checkpoint, "weights", name, raw=False), Part(name, (31, 24), ())
    box = Box((5, 7), (11, 4))
    torch.testing.assert_close(checkpoint.source("weights").read(part, box), whole[box.slices], rtol=1e-6, atol=1e-7)
    assert whole.dtype is torch.float32 and not torch.equal(whole, _read(checkpoint, "weights", name))
    with pytest.raises(ValueError, match="adapters are merged"):
        _read(checkpoint, "weights", "layers.1.mlp.up.lora_a.weight", raw=False)


def test_rules_thaw_weights_beside_adapters(tmp_path: Path) -> None:
    rules = [{"match": "*attention_norm.weight", "frozen": False}, {"match": "layers.0.*.lora_?.weight", "frozen": True}]
    run = _train(tmp_path, "run", optimizer={"rules": rules})
    assert set(find_checkpoint(run).tensors("m")) == {
        "layers.0.attention_norm.weight", "layers.1.attention_norm.weight",
        *(f"layers.1.{kind}.lora_{x}.weight" for kind in ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up")
          for x in "ab"),
    }  # fmt: skip


def test_layers_without_adapters_at_the_front_take_no_part_in_the_backward(tmp_path: Path) -> None:
    """Also where they are a stage of their own."""
    peft = {"targets": ["layers.4.mlp.*"], "rank": 2}
    ((alone, expected),) = run_ranks(1, _steps, config_of(peft=peft, optimizer={"ema_decay": 0.5}), 2)
    parallel = {"pipeline_parallel": 2, "tensor_parallel": 2, "pipeline_schedule": "zb_h1"}
    results = run_ranks(4, _steps, config_of(peft=peft, optimizer={"ema_decay": 0.5}, parallel=parallel), 2)
    assert results[0][0] == pytest.approx(alone, rel=1e-9)
    whole, again = assemble([expected[0]]), assemble([kinds[0] for _, kinds in results])
    assert all((again[name] - value).norm() <= 1e-9 * value.norm() + 1e-12 for name, value in whole.items())


# Settings


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"rank": 0}, "peft.rank: Input should be greater than 0"),
        ({"targets": []}, "peft.targets"),
        ({"targets": ["q_proj", "attention.z"]}, "'attention.z' is the name of no linear layer; there are all-linear, att"),
        ({"targets": ["layers.7.attention.q"]}, "'layers.7.attention.q' is the name of no linear layer"),
        ({"kind": "ia3"}, "peft.kind"),
        ({"dropout": 0.1}, "peft.dropout: unknown key"),
        ({"init": "/nowhere"}, "peft.init: an adapter belongs to a model"),
    ],
)  # fmt: skip
def test_mistakes_are_told(tmp_path: Path, peft: dict[str, Any], message: str) -> None:
    raw = RAW | {"peft": peft, "logging": {"run_dir": str(tmp_path / "run")}}
    with pytest.raises(ValueError, match=message):
        resolve(write_config(tmp_path / "c.yaml", raw), [], 1)


def test_targets_mean_what_they_say(tmp_path: Path) -> None:
    model = load_config(write_config(tmp_path / "c.yaml", RAW)).config.model
    meant = {
        ("attention.q",): ["layers.0.attention.q", "layers.1.attention.q"],
        ("up_proj", "down_proj"): [f"layers.{layer}.mlp.{kind}" for layer in (0, 1) for kind in ("up", "down")],
        ("layers.[1-9].attention.[kv]",): ["layers.1.attention.k", "layers.1.attention.v"],
    }
    for targets, names in meant.items():
        assert adapted_layers(model, PeftConfig(targets=list(targets))) == names
    assert len(adapted_layers(model, PeftConfig())) == 14


def test_a_run_keeps_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _train(tmp_path, "run", training={"steps": 1})
    for changes in (["peft.alpha=9"], ["peft.rank=4"], ["peft=null"], ["peft.targets=[all-linear]"]):
        assert main(["train", str(tmp_path / "run.yaml"), "training.steps=2", *changes]) == 1
        assert "belongs to another run (peft" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run.yaml"), "training.steps=2"]) == 0
    assert find_checkpoint(run).step == 2

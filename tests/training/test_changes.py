"""What a run that goes on may change: every setting is classified, and what decides the numbers is refused or allowed by name."""

from __future__ import annotations

import copy
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from megatron_llm.cli.main import main
from megatron_llm.config import Config
from megatron_llm.training import recovery
from megatron_llm.training.changes import DECIDES_NUMBERS, FREE, OF_ANOTHER_RUN, class_of, find_changes
from tests.data.sources import write_pretrain
from tests.runs import TINY, config_of
from tests.training.commands import read_status, write_config


def settings_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """`section.key` of every setting there is; items of lists of sections by the number 0."""
    found = []
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        is_list = "list[" in str(field.annotation)
        found += settings_of(inner, f"{prefix}{name}.{'0.' * is_list}") if inner else [f"{prefix}{name}"]
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _section(part))), None)


def test_every_setting_is_classified_and_every_pattern_means_one() -> None:
    names = settings_of(Config)
    assert {"data.train.0.path", "optimizer.rules.0.match", "training.loss_spike.window", "device"} <= set(names)
    classes = {name: class_of(name) for name in names}
    assert set(classes.values()) == {"free", "of_another_run", "decides_numbers"}
    from fnmatch import fnmatchcase

    for pattern in (*FREE, *OF_ANOTHER_RUN, *DECIDES_NUMBERS):
        assert any(fnmatchcase(name, pattern) for name in names), f"{pattern} means no setting"
    with pytest.raises(ValueError, match="training.brand_new is not classified"):
        class_of("training.brand_new")


def test_the_rows_of_a_table_of_positions_are_part_of_the_model() -> None:
    for positions, expected in (("learned", "of_another_run"), ("rope", "free")):
        one, two = (config_of(model={"position_embedding": positions, "max_position_embeddings": n}) for n in (16, 32))
        changes = find_changes(one, {}, two, {})
        assert getattr(changes, expected) == ["model.max_position_embeddings: 16 -> 32"]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run of two steps that is saved."""
    raw = copy.deepcopy(TINY) | {"logging": {"run_dir": str(tmp_path / "run")}}
    raw["model"] |= {"num_hidden_layers": 1}
    raw["training"] |= {"steps": 2, "global_batch_size": 4}
    raw["lr_schedule"] = {"kind": "constant"}
    paths = [write_pretrain(tmp_path / name, [20, 30, 40], meta=None) for name in ("one", "two")]
    raw["data"] = {"kind": "pretrain", "train": [{"path": path} for path in paths]}
    assert main(["train", str(write_config(tmp_path / "config.yaml", raw))]) == 0
    return raw


FREELY = [
    "training.micro_batch_size=1",
    "training.eval_rows=3",
    "checkpoint.keep_last=1",
    "parallel.zero_stage=0",
    "training.steps=3",
]
MEANT = [
    "optimizer.lr=0.5",
    "optimizer.weight_decay=0.2",
    "optimizer.ema_decay=0.9",
    "training.seed=8",
    "training.global_batch_size=8",
    "data.train.0.weight=2",
    "data.order=file",
    "lr_schedule.kind=cosine",
    "precision.compute=float32",
    "training.document_isolation=false",
]
NEVER = ["training.sequence_length=8", "model.rope_theta=500.0", "model.num_hidden_layers=2"]


@pytest.mark.parametrize("change", FREELY)
def test_what_changes_no_numbers_is_free(tmp_path: Path, config: dict[str, Any], change: str, capsys: Any) -> None:
    assert main(["train", str(tmp_path / "config.yaml"), "training.steps=3", change]) == 0
    assert read_status(tmp_path / "run") == {"outcome": "done", "step": 3}
    name, value = change.split("=")
    assert f"changed since: {name}: " in capsys.readouterr().err


@pytest.mark.parametrize("change", MEANT)
def test_what_decides_numbers_must_be_meant(tmp_path: Path, config: dict[str, Any], change: str, capsys: Any) -> None:
    command = ["train", str(tmp_path / "config.yaml"), "training.steps=3", change]
    assert main(command) == 1
    name = change.split("=")[0]
    text = capsys.readouterr().err
    assert f"changed since {tmp_path}/run/checkpoints/step-00000002 was saved: {name}: " in text and "--allow-change" in text
    assert main([*command, "--allow-change"]) == 0
    (said, *_) = read_status(tmp_path / "run")["changes"]
    assert said.startswith(name)
    assert main(["train", str(tmp_path / "config.yaml"), change, "training.steps=3"]) == 0, "the new checkpoint knows it"


@pytest.mark.parametrize("change", NEVER)
def test_another_model_or_other_rows_are_another_run(tmp_path: Path, config: dict[str, Any], change: str, capsys: Any) -> None:
    assert main(["train", str(tmp_path / "config.yaml"), "training.steps=3", change, "--allow-change"]) == 1
    assert f"belongs to another run ({change.split('=')[0]}: " in capsys.readouterr().err


def test_data_may_move_but_not_change(tmp_path: Path, config: dict[str, Any], capsys: Any) -> None:
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("one.*"):
        file.rename(tmp_path / "moved" / file.name)
    moved = ["train", str(tmp_path / "config.yaml"), f"data.train.0.path={tmp_path}/moved/one"]
    assert main([*moved, "training.steps=3"]) == 0
    assert "changed since: data.train.0.path: " in capsys.readouterr().err
    write_pretrain(tmp_path / "moved/one", [20, 30, 40, 5], meta=None)
    assert main([*moved, "training.steps=4"]) == 1
    text = capsys.readouterr().err
    assert "data.train.0.documents: 3 -> 4. The run" in text and "data.train.0.tokens: 90 -> 95. The run" in text
    assert main([*moved, "training.steps=4", "--allow-change"]) == 0


def test_the_length_counts_where_the_rates_depend_on_it(tmp_path: Path, config: dict[str, Any], capsys: Any) -> None:
    cosine = ["train", str(tmp_path / "config.yaml"), "lr_schedule.kind=cosine"]
    assert main([*cosine, "training.steps=4", "--allow-change"]) == 0
    assert main([*cosine, "training.steps=6"]) == 1
    assert "training.steps: 4 -> 6" in capsys.readouterr().err


def test_what_is_gone_back_to_is_compared_as_well(tmp_path: Path, config: dict[str, Any], capsys: Any) -> None:
    """Step 3 was allowed to be another run; damaged, it leaves step 2, which was not."""
    changed = ["train", str(tmp_path / "config.yaml"), "optimizer.lr=0.5", "training.steps=3"]
    assert main([*changed, "--allow-change"]) == 0
    assert main(changed) == 0
    file = tmp_path / "run/checkpoints/step-00000003/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert main(changed) == 1
    assert "step-00000002 was saved: optimizer.lr: 0.01 -> 0.5. The run would go on as another one" in capsys.readouterr().err
    assert read_status(tmp_path / "run")["outcome"] == "failed"
    assert main([*changed, "--allow-change"]) == 0


def test_two_run_folders_do_not_share_one_place_by_mistake(tmp_path: Path, config: dict[str, Any], capsys: Any) -> None:
    command = ["train", str(tmp_path / "config.yaml"), f"checkpoint.path={tmp_path}/place", "training.steps=3"]
    assert main(command) == 0
    assert main([*command, f"logging.run_dir={tmp_path}/other"]) == 1
    assert f"logging.run_dir: {tmp_path}/run -> {tmp_path}/other. The run would go on as another one" in capsys.readouterr().err
    assert main([*command, f"logging.run_dir={tmp_path}/other", "--allow-change"]) == 0


def test_a_place_that_cannot_be_written_is_found_before_training(tmp_path: Path, config: dict[str, Any], capsys: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    command = ["train", str(tmp_path / "config.yaml"), f"checkpoint.path={tmp_path}/file/checkpoints", "training.steps=3"]
    assert main(command) == 1
    text = capsys.readouterr().err
    assert f"checkpoint.path: no checkpoint can be written to {tmp_path}/file/checkpoints: NotADirectoryError" in text


def test_data_of_equal_size_are_told_apart(tmp_path: Path, config: dict[str, Any], capsys: Any) -> None:
    write_pretrain(tmp_path / "one", [20, 30, 40], first=3, meta=None)
    assert main(["train", str(tmp_path / "config.yaml"), "training.steps=3"]) == 1
    assert "data.train.0.sample: " in capsys.readouterr().err


def test_what_auto_stands_for_is_compared(tmp_path: Path, config: dict[str, Any], monkeypatch: Any, capsys: Any) -> None:
    raw = config | {"precision": {"compute": "auto"}, "logging": {"run_dir": str(tmp_path / "auto")}}
    command = ["train", str(write_config(tmp_path / "auto.yaml", raw))]
    assert main(command) == 0
    assert main([*command, "training.steps=3", "precision.compute=float32"]) == 0, "it is the same"
    monkeypatch.setattr(recovery, "compute_dtype", lambda *_: torch.bfloat16)  # as on a GPU
    assert main([*command, "training.steps=4"]) == 1
    assert "precision.compute: float32 -> bfloat16. The run would go on" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["~/runs", "s3:/bucket/run", "s3:bucket", "memory://"])
def test_places_that_are_misspelt_are_refused(tmp_path: Path, config: dict[str, Any], place: str, capsys: Any) -> None:
    assert main(["train", str(tmp_path / "config.yaml"), f"checkpoint.path={place}"]) == 1
    assert f"checkpoint.path: {place} is neither a folder nor a whole URL" in capsys.readouterr().err

"""Mistakes in a configuration are found all at once, each with its place and the way out; nothing here needs torch."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_llm.config import ConfigError, parse_config, read_raw_config

VALID: dict[str, Any] = {
    "model": {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    },
    "data": {"train": [{"path": "a"}, {"path": "b", "weight": 2.0}]},
    "training": {"sequence_length": 32, "global_batch_size": 4, "steps": 10},
    "optimizer": {"lr": 1e-3},
}


def _raw(changes: dict[tuple[str | int, ...], Any]) -> dict[str, Any]:
    """VALID with the value at each path replaced."""
    raw = copy.deepcopy(VALID)
    for (*parents, last), value in changes.items():
        node: Any = raw
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[part]
        node[last] = value
    return raw


def _problems(changes: dict[tuple[str | int, ...], Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(_raw(changes))
    return caught.value.problems


def _read(folder: Path, text: str, *overrides: str) -> dict[str, Any]:
    path = folder / "config.yaml"
    path.write_text(text)
    return read_raw_config(path, list(overrides))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        (("modle",), "modle: unknown key; did you mean model?"),
        (("training", "sequence_lenght"), "training.sequence_lenght: unknown key; did you mean training.sequence_length?"),
        (("data", "train", 1, "wieght"), "data.train.1.wieght: unknown key; did you mean data.train.1.weight?"),
        (
            ("model", "rope_scaling", "low_freq"),
            "model.rope_scaling.low_freq: unknown key; did you mean model.rope_scaling.low_freq_factor?",
        ),
        (
            ("precision", "zzz"),
            "precision.zzz: unknown key; known keys: compute, gradient_reduction, gradients, linear, loss_scale, "
            "loss_scale_window",
        ),
    ],
)
def test_unknown_key_names_its_place_and_the_nearest_known_one(path: tuple[str | int, ...], hint: str) -> None:
    assert _problems({path: 1}) == [hint]


def test_all_problems_are_reported_at_once() -> None:
    problems = _problems(
        {
            ("parallel", "tensor_paralel"): 2,
            ("training", "steps"): -2,
            ("data", "train", 0, "weight"): 0,
            ("data", "kind"): "pictures",
            ("optimizer",): {"betas": [0.9, 1.0]},
            ("model", "num_key_value_heads"): 3,
        }
    )
    places = [problem.split(":")[0] for problem in problems]
    assert sorted(places) == [
        "data.kind",
        "data.train.0.weight",
        "model",
        "optimizer.lr",
        "parallel.tensor_paralel",
        "training.steps",
    ]
    by_place = dict(zip(places, problems, strict=True))
    assert by_place["training.steps"].endswith("(got -2)")
    assert by_place["optimizer.lr"] == "optimizer.lr: required, but not given"
    assert "num_attention_heads 4 is not a multiple of num_key_value_heads 3" in by_place["model"]
    assert "'synthetic'" in by_place["data.kind"] and "'pictures'" in by_place["data.kind"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({("optimizer", "betas"): [0.9, 1.0]}, r"betas \(0.9, 1.0\) must lie in \[0, 1\)"),
        ({("model", "hidden_size"): 66}, "hidden_size 66 is not divisible by num_attention_heads 4; set head_dim"),
        ({("model", "head_dim"): 7}, "head_dim 7 is odd"),
        ({("model", "rope_scaling", "low_freq_factor"): 4.0}, "high_freq_factor 4.0 must exceed low_freq_factor 4.0"),
        ({("training",): None}, "training: .*dictionary"),
    ],
)
def test_contradictions_inside_a_section_are_refused(changes: dict[tuple[str | int, ...], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(_raw(changes))


def test_derived_model_sizes() -> None:
    model = parse_config(VALID).model
    assert (model.num_key_value_heads, model.head_dim) == (4, 16)
    model = parse_config(_raw({("model", "num_key_value_heads"): 2, ("model", "head_dim"): 10})).model
    assert (model.num_key_value_heads, model.head_dim) == (2, 10)


def test_settings_are_read_only() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(VALID).training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("1.e-2", 0.01),
        ("3", 3),
        ("0.5", 0.5),
        ("1e", "1e"),
        ("e-4", "e-4"),
        ("'1e-4'", "1e-4"),
        ("runs/1e-4", "runs/1e-4"),
    ],
)
def test_scientific_notation_is_a_number(tmp_path: Path, text: str, value: Any) -> None:
    for raw in (_read(tmp_path, f"a: {text}"), _read(tmp_path, "a: 0", f"a={text}")):
        assert raw == {"a": value} and type(raw["a"]) is type(value)


def test_overrides_replace_add_and_index_lists(tmp_path: Path) -> None:
    text = "training: {steps: 1}\ndata: {train: [{path: a}, {path: b}], order: file}\nlogging:\n"
    raw = _read(
        tmp_path,
        text,
        "training.steps=2",
        "data.train.1.path=x=y",  # only the first equals sign separates
        "data.train.0={path: c, weight: 3}",
        "logging.run_dir=runs/x",  # the section is there but empty
        "model.rope_scaling.factor=2",  # neither the section nor the subsection is there
        "data.order=",
        "optimizer.betas=[0.9, 0.95]",
    )
    assert raw == {
        "training": {"steps": 2},
        "data": {"train": [{"path": "c", "weight": 3}, {"path": "x=y"}], "order": None},
        "logging": {"run_dir": "runs/x"},
        "model": {"rope_scaling": {"factor": 2}},
        "optimizer": {"betas": [0.9, 0.95]},
    }


def test_files_and_overrides_apply_from_left_to_right(tmp_path: Path) -> None:
    over, last = tmp_path / "over.yaml", tmp_path / "last.yml"
    over.write_text("training: {steps: 2}\ndata: {train: [{path: c}]}\noptimizer: {betas: [0.9, 0.99], eps: 1e-6}\nparallel:\n")
    last.write_text("optimizer: {eps: null}\npeft: {rank: 8}\ndata: {order: file}\nparallel: {tensor_parallel: 2}\n")
    text = "training: {steps: 1, seed: 3}\ndata: {train: [{path: a}, {path: b}]}\nparallel: {tensor_parallel: 4, zero_stage: 0}\n"
    raw = _read(tmp_path, text, str(over), "training.steps=5", "optimizer.eps=1e-3", str(last), "peft.alpha=1")
    assert raw == {
        "training": {"steps": 5, "seed": 3},
        "data": {"train": [{"path": "c"}], "order": "file"},
        "optimizer": {"betas": [0.9, 0.99], "eps": None},
        "parallel": {"tensor_parallel": 2},
        "peft": {"rank": 8, "alpha": 1},
    }
    assert over.read_text().startswith("training: {steps: 2}")


def test_what_is_put_over_an_alias_leaves_its_anchor_alone(tmp_path: Path) -> None:
    """YAML's aliases are one object in memory: training would read the validation set that an override names."""
    over = tmp_path / "over.yaml"
    over.write_text("b: {x: {y: 2}}\n")
    text = "data: {train: &files [{path: a}], valid: *files}\na: &a {x: {y: 1}}\nb: *a\n"
    raw = _read(tmp_path, text, "data.valid.0.path=v", str(over))
    assert raw["data"] == {"train": [{"path": "a"}], "valid": [{"path": "v"}]}
    assert (raw["a"], raw["b"]) == ({"x": {"y": 1}}, {"x": {"y": 2}})


def test_bad_overrides_are_reported_together(tmp_path: Path) -> None:
    overrides = {
        "steps": "'steps' is neither of the form section.key=value nor a file",
        "=3": "'=3' is neither of the form section.key=value nor a file",
        "training.steps=[1": "'[1' is not a YAML value",
        "training.steps.more=1": "cannot set 'more' there",
        "training.steps.more.still=1": "'more' lies below a plain value",
        "data.train.2.path=c": "'2' is not an index into a list of 2",
        "data.train.first.path=c": "'first' is not an index into a list of 2",
        "data.train.2=c": "cannot set '2' there",
        "model={{ template }}": "is not a YAML value",
        "nowhere.yaml": "config file nowhere.yaml does not exist",
    }
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, "training: {steps: 1}\ndata: {train: [{path: a}, {path: b}]}", *overrides)
    assert len(caught.value.problems) == len(overrides)
    for problem, expected in zip(caught.value.problems, overrides.values(), strict=True):
        assert expected in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "key 'a' appears twice.*line 3"),
        ("s: {t: {x: 1, 'x': 2}}", "key 'x' appears twice"),
        ("model: {{ template }}", "is not valid YAML: .*unhashable"),
        ("a: [1", "is not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("- 1\n- 2", "must hold a mapping of sections, got list"),
        ("", "must hold a mapping of sections, got NoneType"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path, text)


def test_missing_and_undecodable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        read_raw_config(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="latin.yaml is not valid YAML"):
        read_raw_config(tmp_path / "latin.yaml")


def test_anchors_and_merge_keys_work_and_may_be_overridden(tmp_path: Path) -> None:
    """The merged mapping lies deeper than its user and merges another: expanded first, it would look duplicated."""
    raw = _read(tmp_path, "a: {b: {c: &c {<<: &d {k: 1, l: 2}, k: 3}}}\ne: {<<: *c, l: 4}\nf: *d")
    assert raw == {"a": {"b": {"c": {"k": 3, "l": 2}}}, "e": {"k": 3, "l": 4}, "f": {"k": 1, "l": 2}}


def test_config_does_not_import_torch() -> None:
    code = "import sys, megatron_llm.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0

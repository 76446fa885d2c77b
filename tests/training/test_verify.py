"""`megatron-llm verify`: it finds what is equal equal, in layouts too, and above all it fails where the two sides differ."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_llm.cli.main import main
from megatron_llm.config import Config, ModelConfig
from megatron_llm.hf.reader import HFFolder, HFSource
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.training import verify as module
from megatron_llm.training.verify import Outputs, compare
from megatron_llm.training.verify_layouts import Layout, logits_of_layout, parse_layouts
from megatron_llm.training.verify_reference import reference
from megatron_llm.training.verify_text import TEXT, Documents, make_documents
from tests.families.cases import LLAMA, Case, cases, make_folder
from tests.ranks import run_ranks
from tests.training.commands import TORCHRUN, environment

CPU = torch.device("cpu")
LINE = re.compile(r"^(\S.*?) {2,}(\d\S*|nan) +(\d\S*|nan) +(\S+) +(\S+)   (\d+) of (\d+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama without a tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    make_folder(Case("LlamaForCausalLM", LLAMA), path)
    return path


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer of bytes that begins every text with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("reading")
    make_folder(Case("LlamaForCausalLM", LLAMA | {"vocab_size": 259, "max_position_embeddings": 4096}), path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, **{byte: place + 1 for place, byte in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    return path


def lines(out: str) -> dict[str, tuple[float, ...]]:
    """The numbers of every comparison by its name."""
    return {found[1]: tuple(map(float, found.groups()[1:])) for found in LINE.finditer(out)}


def change_fields(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let this engine read a config.json that says something else."""
    fields = HFFolder.model_fields
    monkeypatch.setattr(HFFolder, "model_fields", lambda self: {**fields(self), **changes})


def change_weight(name: str, by: float, folder: str = "", *arguments: Any) -> Any:
    """Let this engine read a tensor with one row changed, and go on with a layout if one is given."""
    read = HFSource.read

    def changed(self: HFSource, part: Any, box: Any) -> Tensor:
        values = read(self, part, box)
        if part.name == name and box.offset[0] == 0:
            values = values.clone()
            values[0] += by
        return values

    HFSource.read = changed  # type: ignore[method-assign]
    try:
        return logits_of_layout(folder, *arguments) if folder else None
    finally:
        if folder:
            HFSource.read = read  # type: ignore[method-assign]


def test_a_folder_is_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "random ids, as the folder has no tokenizer" in captured.out and captured.out.endswith("verified\n")
    (name,) = found = lines(captured.out)
    most, mean, loss, difference, same, tokens = found[name]
    assert name == "one process" and 0 < mean < most < 1e-4 and difference < 1e-5 and same == tokens == 256
    assert f"transformers float32 {loss:>37.6f}"[-12:] in captured.out


def test_the_numbers_are_those_of_an_independent_comparison() -> None:
    """transformers' logits moved by known amounts."""
    torch.manual_seed(0)
    expected = Outputs(torch.randn(150, 7), 2.0)
    moved = expected.logits_TV.clone()
    moved[130, 3] += 0.5
    moved[2, 6] -= 0.25
    found = compare(expected, Outputs(moved, 2.5))
    assert found.most == pytest.approx(0.5, rel=1e-5) and found.place == (130, 3)
    assert found.mean == pytest.approx(0.75 / (150 * 7), rel=1e-5)
    assert found.largest == float(expected.logits_TV.abs().max())
    assert found.same == int((moved.argmax(-1) == expected.logits_TV.argmax(-1)).sum())
    assert 0.5 / found.largest < found.relative == 0.25  # of the loss
    assert compare(expected, expected).relative == 0.0
    moved[140, 0] = torch.nan
    assert not compare(expected, Outputs(moved, 2.0)).relative <= 1e9
    assert not compare(expected, Outputs(expected.logits_TV, torch.nan)).relative <= 1e9
    assert compare(expected, Outputs(moved, 2.0)).place == (140, 0)


@pytest.mark.parametrize(
    "changes", [{"rope_theta": 11000.0}, {"norm_eps": 1e-5}, {"hidden_act": "gelu"}, {"logit_multiplier": 1.001}]
)
def test_another_meaning_of_the_config_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    change_fields(monkeypatch, **changes)
    assert main(["verify", str(folder)]) == 1
    captured = capsys.readouterr()
    assert "verified" not in captured.out
    assert re.fullmatch(
        r"FAILED: one process: a logit differs from transformers by \S+ \(id \d+ after token \d+ of document \d\), the loss by "
        r"\S+\. The largest logit is \S+, the loss \S+: \S+ of that, and 0.0001 is allowed\n",
        captured.err,
    )


@pytest.mark.parametrize("name", ["layers.1.attention.k.weight", "layers.2.mlp.down.weight", "final_norm.weight", "head.weight"])
def test_another_weight_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """One row of one matrix, or one element of a norm."""
    monkeypatch.setattr(HFSource, "read", HFSource.read)  # put back at the end
    change_weight(name, 0.02)
    assert main(["verify", str(folder)]) == 1
    assert "FAILED: one process" in capsys.readouterr().err
    assert main(["verify", str(folder), "--tolerance", "0.9"]) == 0


def test_numbers_that_are_not_finite_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HFSource, "read", HFSource.read)
    change_weight("layers.0.mlp.up.weight", float("nan"))
    assert main(["verify", str(folder), "--tolerance", "1e30"]) == 1
    assert "differs from transformers by nan" in capsys.readouterr().err


def test_a_wrong_loss_fails_though_the_logits_are_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = DecoderStage.loss
    monkeypatch.setattr(DecoderStage, "loss", lambda *arguments: loss(*arguments) * 1.001)
    assert main(["verify", str(folder)]) == 1
    assert "the loss by 0.00" in capsys.readouterr().err


def test_bfloat16_may_be_as_far_from_float32_as_transformers_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(folder), "--dtype", "bfloat16", "--tokens", "64"]) == 0
    found = lines(capsys.readouterr().out)
    theirs, ours = found["transformers bfloat16"], found["one process"]
    assert 1e-3 < theirs[1] < 0.1 and ours[1] < 1.5 * theirs[1]
    change_fields(monkeypatch, rope_theta=1e6)
    assert main(["verify", str(folder), "--dtype", "bfloat16", "--tokens", "64"]) == 1
    assert "FAILED: one process" in capsys.readouterr().err


def test_text_is_read_by_the_folders_tokenizer(reading: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("Ein Text. " * 30)
    assert main(["verify", str(reading), "--text", str(tmp_path / "text.txt"), "--tokens", "100"]) == 0
    out = capsys.readouterr().out
    assert "text.txt (100 of its 300 tokens; --tokens takes more)" in out and lines(out)["one process"][5] == 104  # and 4 <s>
    assert main(["verify", str(reading), "--tokens", "3000"]) == 0
    assert "a text of several languages" in capsys.readouterr().out


def test_documents_are_the_text_cut_and_begun_as_the_tokenizer_begins_texts(reading: Path) -> None:
    from transformers import AutoTokenizer

    model = ModelConfig(**HFFolder(reading).model_fields())
    made = make_documents(reading, model, None, 160)
    assert [len(document) for document in made.ids] == [2, 11, 41, 110]
    assert all(document[0] == 0 and 0 not in document[1:] for document in made.ids)
    text = AutoTokenizer.from_pretrained(reading)(TEXT)["input_ids"][1:161]
    assert [token for document in made.ids for token in document[1:]] == text


def test_documents_end_with_the_models_context_unless_rotation_changes_there(folder: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 20}
    for changes, longest in (({"position_embedding": "learned"}, 20), ({}, 20), ({"rope_scaling": dynamic}, 68)):
        made = make_documents(folder, ModelConfig(**LLAMA | {"max_position_embeddings": 20} | changes), None, 100)
        assert made.tokens == 100 and max(map(len, made.ids)) == longest


def test_the_batch_predicts_within_documents_and_is_filled_up_without_loss() -> None:
    batch = Documents(((5,), (6, 7, 8)), "").batch(3)
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 0, 0] and batch.cu_seqlens == (0, 1, 4, 6)
    assert batch.positions_T.tolist() == [0, 0, 1, 2, 0, 1] and batch.weights_T.tolist() == [0, 1, 1, 0, 0, 0]
    assert batch.labels_T[1:3].tolist() == [7, 8]


def test_ids_beyond_the_vocabulary_are_not_used(reading: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smaller = tmp_path / "smaller"
    make_folder(Case("LlamaForCausalLM", LLAMA), smaller)
    for file in reading.glob("tokenizer*"):
        shutil.copy(file, smaller)
    assert main(["verify", str(smaller)]) == 0
    assert "random ids, as the tokenizer makes ids up to" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("Über den Dächern zogen Möwen")
    assert main(["verify", str(smaller), "--text", str(tmp_path / "text.txt")]) == 1
    assert "leave --text out for random ids" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["falcon-rw", "mpt-storywriter", "gpt2-half-precision-bin", "llama-dynamic", "gemma2"])
def test_where_transformers_is_not_to_be_believed(tmp_path: Path, name: str) -> None:
    """Classes that need care: of ALiBi, of old .bin files, of rotation by length, of eager attention."""
    make_folder(cases()[name], tmp_path)
    assert main(["verify", str(tmp_path), "--tokens", "128"]) == 0


def test_what_longer_documents_would_show_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(cases()["mistral"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 50}))
    assert main(["verify", str(tmp_path), "--tokens", "64"]) == 0
    assert "note: the sliding window of 50 tokens hides nothing in 43" in capsys.readouterr().out
    assert main(["verify", str(tmp_path), "--tokens", "128"]) == 0
    assert "note: the sliding window" not in capsys.readouterr().out


# Layouts


def expected_and_config(folder: Path, layout: str, documents: Documents, dtype: str = "float32") -> tuple[Outputs, Config]:
    hf = HFFolder(folder)
    model = ModelConfig(**hf.model_fields())
    (parsed,) = parse_layouts([layout], model, 1)
    return reference(hf, model, documents, torch.float32, CPU), parsed.config(model, documents.tokens, dtype, 60.0)


DOCUMENTS = Documents(((7,), (1, 2, 3), tuple(range(4, 23)), tuple(range(100, 70, -1))), "")  # 53 tokens: no layout divides them


@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama", "tp2pp2"), ("llama", "tp4"), ("llama", "pp3"), ("gemma2", "tp2pp2"), ("gpt2", "tp3"), ("bloom", "tp2pp2")],
)
def test_layouts_gather_what_transformers_computes(tmp_path: Path, name: str, layout: str) -> None:
    """131 tokens of vocabulary, 6 heads and 53 tokens of text are cut unevenly; tied and untied."""
    make_folder(cases()[name], tmp_path)
    expected, config = expected_and_config(tmp_path, layout, DOCUMENTS)
    results = run_ranks(Layout.parse(layout).ranks, logits_of_layout, str(tmp_path), config, DOCUMENTS)
    assert results[0] is not None and results[1:] == [None] * (len(results) - 1)
    logits, loss = results[0]
    found = compare(expected, Outputs(torch.from_numpy(logits), loss))
    assert found.relative < module.FLOAT32_TOLERANCE and found.same == 53


def test_a_layout_with_another_weight_on_one_rank_differs(folder: Path) -> None:
    """The row of the last rank's vocabulary, which only it reads."""
    expected, config = expected_and_config(folder, "tp2", DOCUMENTS)
    for by, differs in ((0.0, False), (0.01, True)):
        results = run_ranks(2, change_weight, "head.weight", by, str(folder), config, DOCUMENTS)
        found = compare(expected, Outputs(torch.from_numpy(results[0][0]), results[0][1]))
        assert (found.relative > module.FLOAT32_TOLERANCE) == differs
        assert not differs or found.place[1] == 0


@pytest.mark.slow  # every rank imports torch
def test_layouts_in_processes_of_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder), "--layouts", "tp2", "tp2pp2dp8", "--tokens", "67"]) == 0
    found = lines(capsys.readouterr().out)
    assert list(found) == ["one process", "tp2", "tp2pp2dp8"]
    assert all(0 < numbers[0] < 1e-4 and numbers[4] == 67 for numbers in found.values())


@pytest.mark.slow
def test_a_layout_that_differs_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ranks find another config.json than the command did."""
    run = module.run_ranks

    def other_model(world: int, fn: Any, path: str, config: Config, *arguments: Any, **options: Any) -> Any:
        model = config.model.model_copy(update={"rope_theta": 11000.0})
        return run(world, fn, path, config.model_copy(update={"model": model}), *arguments, **options)

    monkeypatch.setattr(module, "run_ranks", other_model)
    assert main(["verify", str(folder), "--layouts", "tp2"]) == 1
    assert capsys.readouterr().err.startswith("FAILED: tp2: a logit differs from transformers by ")


@pytest.mark.slow
def test_the_command_as_a_user_starts_it(folder: Path, tmp_path: Path) -> None:
    settings = environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "megatron_llm", "verify", str(folder), "--tokens", "40"]
    done = subprocess.run([*command, "--layouts", "pp2"], env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and set(lines(done.stdout)) == {"one process", "pp2"}, done.stdout + done.stderr
    done = subprocess.run([*command, "--tolerance", "0"], env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.startswith("FAILED: one process"), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("tolerance", "code"), [("1e-4", 0), ("0", 1)])
def test_the_ranks_of_torchrun_are_used(folder: Path, tmp_path: Path, tolerance: str, code: int) -> None:
    command = [*TORCHRUN, "--nproc-per-node", "4", "-m", "megatron_llm", "verify", str(folder), "--tolerance", tolerance]
    settings = environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--layouts", "tp2pp2", "tp4"], env=settings, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert list(lines(done.stdout)) == ["one process", "tp2pp2", "tp4"]
    assert done.stderr.count("FAILED: ") == 3 * code and done.stdout.count("verified") == 1 - code


# Mistakes


def test_a_layout_has_a_name() -> None:
    assert Layout.parse("tp2") == Layout("tp2", 2, 1) and Layout.parse("pp3") == Layout("pp3", 1, 3)
    assert Layout.parse("pp2tp4dp8").ranks == 8
    for name in ("", "nonsense", "tp", "tp0", "tp2tp4", "tp2 pp2", "TP2", "cp2", "2", "tp-2", "tp2x", "tp1000000"):
        with pytest.raises(ValueError, match="is no layout such as tp2, pp2 or tp2pp2"):
            Layout.parse(name)


MISTAKES = [
    (["--layouts", "nonsense"], "'nonsense' is no layout"),
    (["--layouts", "tp2", "tp16"], "--layouts tp16: model.num_attention_heads: 6 are fewer than parallel.tensor_parallel 16"),
    (["--layouts", "tp5"], "tensor_parallel 5 is more than 2 and no multiple of it; possible: 1, 2, 4, 6"),
    (["--layouts", "pp65"], "65 ranks are more than 64"),
    (["--text", "nowhere.txt"], "--text needs the folder's tokenizer"),
    (["--tokens", "7"], "--tokens 7 are too few"),
    (["--tolerance", "-1"], "--tolerance -1.0 must be 0 or more"),
    (["--tolerance", "nan"], "--tolerance nan must be"),
    (["--timeout", "0"], "--timeout 0 must be"),
    pytest.param(["--device", "cuda"], "torch sees no GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="GPU")),
]


@pytest.mark.parametrize(("options", "said"), MISTAKES)
def test_mistakes_are_said_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    for name in ("reference", "run_ranks", "build_model"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something was computed"))
    assert main(["verify", str(folder), *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("megatron-llm verify: error: ") and said in captured.err and captured.out == ""


def test_text_that_cannot_be_read(reading: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(reading), "--text", str(tmp_path / "nowhere")]) == 1
    assert "nowhere: No such file" in capsys.readouterr().err
    for content, said in ((b"abc", "has 3 tokens; at least 8"), (b"\xff" * 30, "is not UTF-8"), (b"", "has 0 tokens")):
        (tmp_path / "text").write_bytes(content)
        assert main(["verify", str(reading), "--text", str(tmp_path / "text")]) == 1
        assert said in capsys.readouterr().err


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "config.json").read_text())

    def refused(name: str, **changes: Any) -> str:
        path = tmp_path / name
        if changes:
            shutil.copytree(folder, path)
            (path / "config.json").write_text(json.dumps(config | changes))
        assert main(["verify", str(path)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("megatron-llm verify: error: ")
        return captured.err

    assert "is not a folder" in refused("nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused("empty")
    assert "quantized weights cannot be trained" in refused("quantized", quantization_config={"quant_method": "gptq"})
    assert "architecture SomethingElse is not supported" in refused("foreign", architectures=["SomethingElse"])
    assert "lacks" in refused("too few tensors", num_hidden_layers=5)
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    file = tmp_path / "quantized" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "model.safetensors" in refused("quantized")


def test_transformers_may_fail_to_load(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    def broken(*arguments: Any, **options: Any) -> Any:
        assert options["trust_remote_code"] is False and options["weights_only"] and options["local_files_only"]
        raise OSError("planted")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", broken)
    assert main(["verify", str(folder)]) == 1
    assert "transformers cannot load it: OSError: planted" in capsys.readouterr().err


def test_torchrun_needs_layouts_of_its_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["verify", str(folder)]) == 1
    assert "start it without torchrun" in capsys.readouterr().err
    assert main(["verify", str(folder), "--layouts", "tp2", "tp2pp2"]) == 1
    assert "--layouts tp2pp2: it has 4 ranks, and 2 were started" in capsys.readouterr().err

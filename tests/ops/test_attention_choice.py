"""Which backend of attention runs: tables over models, GPUs and installed packages, all of them pretended."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_llm.config import KernelsConfig, ModelConfig
from megatron_llm.models.attention import SelfAttention
from megatron_llm.models.stages import whole_model
from megatron_llm.ops.attention import (
    BACKENDS,
    Available,
    Case,
    Choice,
    assert_supported,
    attention_problems,
    choose,
    described,
)
from megatron_llm.ops.attention_packed import LIBRARIES
from megatron_llm.ops.batch import Batch
from megatron_llm.ops.kernels import Kernels, deterministic_algorithms, prepare_deterministic_products
from megatron_llm.training.resolve import _setting_problems
from tests.decoders import DECODERS
from tests.runs import TINY, config_of

BF16 = torch.bfloat16
TORCH = frozenset({"varlen"})
AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)
WORLDS = {
    "ampere, nothing installed": Available("cuda", AMPERE, TORCH),
    "hopper, nothing installed": Available("cuda", HOPPER, TORCH),
    "hopper, an old torch": Available("cuda", HOPPER, frozenset()),
    "hopper, flash-attn 2": Available("cuda", HOPPER, TORCH | {"flash2"}),
    "hopper, flash-attn 2 and 3": Available("cuda", HOPPER, TORCH | {"flash2", "flash3"}),
    "hopper, all": Available("cuda", HOPPER, frozenset(LIBRARIES)),
    "ampere, all": Available("cuda", AMPERE, frozenset(LIBRARIES)),
    "blackwell, all": Available("cuda", BLACKWELL, frozenset(LIBRARIES)),
    "volta": Available("cuda", (7, 0), frozenset(LIBRARIES)),
}
BARE, ALL = WORLDS["hopper, nothing installed"], WORLDS["hopper, all"]
LLAMA, GEMMA2, GEMMA3 = Case(BF16, 128), Case(BF16, 256, softcap=True), Case(BF16, 256)
MISTRAL, BLOOM = Case(BF16, 128, window=True), Case(BF16, 128, alibi=True)
FALCON, PHI = Case(BF16, 64, alibi=True, coarse=True), Case(BF16, 80)
ODD = Case(BF16, 100)
EXPECTED = {  # by world, for the cases in this order
    "": (LLAMA, MISTRAL, GEMMA3, GEMMA2, BLOOM, FALCON, PHI, ODD),
    "ampere, nothing installed": "varlen varlen varlen triton triton triton varlen triton",
    "hopper, nothing installed": "varlen varlen varlen triton triton triton varlen triton",
    "hopper, an old torch": "cudnn triton triton triton triton triton cudnn triton",
    "hopper, flash-attn 2": "flash2 flash2 flash2 flash2 flash2 triton flash2 triton",
    "hopper, flash-attn 2 and 3": "flash3 flash3 flash3 flash3 flash2 triton flash3 triton",
    "hopper, all": "flash4 flash4 flash4 flash4 flash2 triton flash4 triton",
    "ampere, all": "flash2 flash2 flash2 flash2 flash2 triton flash2 triton",
    "blackwell, all": "flash4 flash4 flash2 flash2 flash2 triton flash4 triton",
    "volta": "sdpa sdpa sdpa sdpa sdpa sdpa sdpa sdpa",
}


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_llm.ops.kernels.find_spec", lambda name: object())


@pytest.mark.parametrize("world", WORLDS)
def test_auto_is_the_fastest_that_can(world: str) -> None:
    cases, names = EXPECTED[""], str(EXPECTED[world]).split()
    assert len(cases) == len(names)
    for case, name in zip(cases, names, strict=True):
        assert isinstance(case, Case)
        choice = choose("auto", case, WORLDS[world])
        assert choice.name == name, (case, choice)
        faster = [*BACKENDS][: [*BACKENDS].index(name)]
        assert [sentence.split(":")[0] for sentence in choice.passed_over] == faster
        assert choose(name, case, WORLDS[world]) == Choice(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_elsewhere_is_sdpa(device: str, dtype: torch.dtype) -> None:
    assert choose("auto", Case(dtype, 64, softcap=True), Available(device)) == Choice("sdpa")


def test_wide_numbers_on_a_gpu_are_for_ours_or_for_torch() -> None:
    """No library computes in float32, and no kernel of ours in float64."""
    assert choose("auto", Case(torch.float32, 128), WORLDS["hopper, all"]).name == "triton"
    assert choose("auto", Case(torch.float64, 128), WORLDS["hopper, all"]).name == "sdpa"


def test_without_triton_torch_does_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_llm.ops.kernels.find_spec", lambda name: None)
    choice = choose("auto", GEMMA2, WORLDS["hopper, nothing installed"])
    assert choice.name == "sdpa" and choice.passed_over[-1].startswith("triton: Triton is not installed")


def test_a_deterministic_backward_rules_out_cudnn_only() -> None:
    for world, expected in (
        ("hopper, an old torch", "triton"),
        ("hopper, nothing installed", "varlen"),
        ("hopper, all", "flash4"),
    ):
        assert choose("auto", Case(BF16, 128, deterministic=True), WORLDS[world]).name == expected


@pytest.mark.parametrize(
    ("name", "case", "available", "message"),
    [
        ("flash2", LLAMA, Available("cpu"), "flash2 cannot: it needs an NVIDIA GPU; take auto, or one of triton, sdpa"),
        (
            "cudnn",
            MISTRAL,
            BARE,
            "cudnn cannot: it has no sliding windows (model.sliding_window); take auto, or one of varlen, triton, sdpa",
        ),
        (
            "varlen",
            FALCON,
            BARE,
            "varlen cannot: it has no ALiBi in bfloat16 (model.alibi_scaled) and no ALiBi (model.position_embedding); take auto",
        ),
        ("flash3", BLOOM, ALL, "no ALiBi (model.position_embedding); take auto, or one of flash2, triton, sdpa"),
        ("flash3", LLAMA, WORLDS["ampere, all"], "flash3 cannot: it is not for GPUs of compute capability 8.0; take"),
        ("flash2", ODD, ALL, "a multiple of 8 and at most 256 channels here, not 100 (model.head_dim); take auto"),
        ("flash4", GEMMA3, WORLDS["blackwell, all"], "at most 128 channels here, not 256 (model.head_dim); take auto"),
        ("flash4", LLAMA, BARE, "flash_attn.cute is not installed (pip install flash-attn-4); take auto"),
        ("flash4", Case(torch.float32, 64), ALL, "in bfloat16 and float16, not in float32; take auto, or one of"),
        ("cudnn", Case(BF16, 64, deterministic=True), ALL, "it has no deterministic backward (kernels.deterministic)"),
        (
            "triton",
            Case(BF16, 288),
            ALL,
            "triton cannot: its heads have at most 256 channels here, not 288 (model.head_dim); take",
        ),
        ("triton", Case(torch.float64, 64), ALL, "kernels in Triton compute in float32, and the model in float64"),
    ],
)
def test_messages(name: str, case: Case, available: Available, message: str) -> None:
    with pytest.raises(ValueError) as error:
        assert_supported(name, case, available)
    assert message in str(error.value)


def test_problems_name_the_layers() -> None:
    model = ModelConfig(**DECODERS["gemma2"] | {"max_position_embeddings": 8, "head_dim": 64, "attn_logit_softcapping": None})
    config, available = KernelsConfig(attention="cudnn"), WORLDS["hopper, all"]
    (problem,) = attention_problems(config, model, BF16, available)
    assert problem.startswith("kernels.attention, layers 0, 2: cudnn cannot: it has no sliding windows")
    assert attention_problems(KernelsConfig(attention="flash2"), model, BF16, available) == []
    assert attention_problems(KernelsConfig(), model, BF16, available) == []
    deterministic = KernelsConfig(attention="cudnn", deterministic=True)
    assert len(attention_problems(deterministic, model, BF16, available)) == 2


def test_lines_for_the_log() -> None:
    flash, ours = Choice("flash2", ("flash4: it sleeps",)), Choice("triton", ("flash4: it sleeps", "flash2: so does it"))
    lines = described({0: flash, 1: flash, 2: ours, 3: flash, 5: ours, 6: ours})
    assert lines == [
        "flash2 in layers 0-1, 3 (not flash4: it sleeps)",
        "triton in layers 2, 5-6 (not flash4: it sleeps; not flash2: so does it)",
    ]
    assert described({4: Choice("sdpa")}) == ["sdpa in layer 4"]


def test_layers_choose_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would on a GPU: windows in some layers only, and what each is called with."""
    world = Available("cuda", HOPPER, frozenset())
    monkeypatch.setattr(Available, "on", lambda device: world)
    model = ModelConfig(**DECODERS["cohere2"] | {"max_position_embeddings": 8, "head_dim": 64, "hidden_size": 512})
    stage = whole_model(model, BF16, torch.device("cpu"), kernels=KernelsConfig(deterministic=True))
    choices = [layer.attention.choice for layer in stage.layers]
    assert [choice.name for choice in choices] == ["triton", "triton", "triton"]
    stage = whole_model(model, BF16, torch.device("cpu"))
    assert [layer.attention.choice.name for layer in stage.layers] == ["triton", "cudnn", "cudnn"]
    calls: list[tuple[str, int | None, bool]] = []

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *terms: object) -> torch.Tensor:
        _, _, name, scores, shared, deterministic = terms
        calls.append((name, scores.window, deterministic, id(shared)))  # type: ignore[attr-defined,arg-type]
        return q

    monkeypatch.setattr("megatron_llm.models.attention.attention", record)
    ids = torch.arange(4)
    stage(None, Batch(ids, ids, torch.ones(4), ids, (0, 4)))
    assert [call[:3] for call in calls] == [("triton", 5, False), ("cudnn", None, False), ("cudnn", None, False)]
    assert len({call[3] for call in calls}) == 1  # type: ignore[misc]


def test_a_backend_that_cannot_ends_before_the_run() -> None:
    config = KernelsConfig(attention="flash3")
    with pytest.raises(ValueError, match="flash3 cannot: it needs an NVIDIA GPU"):
        whole_model(ModelConfig(**TINY["model"], max_position_embeddings=8), BF16, torch.device("cpu"), kernels=config)
    assert _setting_problems(config_of(kernels={"attention": "flash3", "norm": "triton"})) == [
        "kernels.norm: kernels in Triton compute in float32, and the model in float64; take torch, or auto",
        "kernels.attention, layers 0-4: flash3 cannot: it needs an NVIDIA GPU; take auto, or one of sdpa, reference",
    ]
    meta = whole_model(ModelConfig(**TINY["model"], max_position_embeddings=8), BF16, torch.device("meta"), kernels=config)
    assert isinstance(meta.layers[0].attention, SelfAttention)  # plans for a GPU are made without one
    Kernels.choose(KernelsConfig(norm="triton"), torch.device("meta"), torch.float64)


def test_torch_is_told_to_be_deterministic_for_a_while() -> None:
    def told() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]

    before = told()
    with deterministic_algorithms(False):
        assert told() == before
    with pytest.raises(KeyError), deterministic_algorithms(True):
        assert told() == (True, False) and not torch.is_deterministic_algorithms_warn_only_enabled()
        raise KeyError
    assert told() == before


def test_work_space_of_products_is_left_as_a_user_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # to be as it was afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    prepare_deterministic_products()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_deterministic_products()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"

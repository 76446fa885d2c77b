"""How libraries are called: with what their released functions take by those names, and meaning what they say it means.

Stand-ins with the signatures of the packages compute in float64 what their docstrings say. What runs in the end is compared on a
GPU: `tests/gpu/test_attention.py`.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megatron_llm.ops.attention import BACKENDS, Available, Case, assert_supported, attention
from megatron_llm.ops.attention_packed import LIBRARIES
from megatron_llm.ops.scores import Scores
from tests.ops.test_attention import CASES, SLOPES, boundaries, inputs_of, loop

# The parameters of flash_attn_varlen_func in flash-attn 2.8.3.post2, in hopper/flash_attn_interface.py of flash-attention at
# 01afd16 (2026; the one in the former's source returns a pair), and in flash-attn-4 4.0.0b36.
_SEQLENS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES = {
    "flash2": (f"q k v {_SEQLENS}", "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
               "alibi_slopes=None deterministic=False return_attn_probs=False block_table=None"),
    "flash3": (f"q k v {_SEQLENS}", "seqused_q=None seqused_k=None softmax_scale=None causal=False qv=None q_descale=None "
               "k_descale=None v_descale=None window_size=(-1,-1) attention_chunk=0 softcap=0.0 num_splits=1 pack_gqa=None "
               "deterministic=False sm_margin=0 return_attn_probs=False"),
    "flash4": ("q k v", "qv=None cu_seqlens_q=None cu_seqlens_k=None max_seqlen_q=None max_seqlen_k=None min_seqlen_k=None "
               "seqused_q=None seqused_k=None gather_kv_indices=None page_table=None softmax_scale=None causal=False "
               "window_size=(None,None) learnable_sink=None softcap=0.0 num_splits=1 pack_gqa=None deterministic=False "
               "score_mod=None score_mod_bwd=None mask_mod=None block_sparse_tensors=None aux_tensors=None aux_scalars=None "
               "return_lse=False scheduler_metadata=None seqlen_k_per_split=None disable_scheduler_metadata=False "
               "gather_bwd_recompute_p=False gather_bwd_token_chunk=None"),
}  # fmt: skip
# Of varlen_attn: torch's here, and one between 2.10 and 2.13 (pytorch at 000459d).
OLD_VARLEN = ("query key value cu_seq_q cu_seq_k max_q max_k", "return_aux=None scale=None window_size=(-1,-1) k_cache=None "
              "v_cache=None cache_seqlens=None cache_batch_idx=None page_table=None seqused_k=None")  # fmt: skip

Documented = Callable[[dict[str, Any]], Any]


def _function(signature: inspect.Signature, calls: list[dict[str, Any]], documented: Documented) -> Callable[..., Any]:
    """One with that signature, which keeps what it is called with."""

    def call(*positional: Any, **named: Any) -> Any:
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return documented(bound.arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _signature(parts: tuple[str, str], keywords_only: bool = False) -> inspect.Signature:
    plain = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in parts[0].split()]
    kind = inspect.Parameter.KEYWORD_ONLY if keywords_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    texts = (text.split("=") for text in parts[1].split())
    return inspect.Signature(plain + [inspect.Parameter(name, kind, default=eval(value)) for name, value in texts])


def _as_documented(
    qkv: list[Tensor], cu_q: Tensor, cu_k: Tensor, scale: float, causal: bool, window: tuple[int | None, int | None],
    softcap: float = 0.0, slopes_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Query i of a document sees the keys from i + k_len - q_len - left to i + k_len - q_len + right; negative: all of them."""
    q_TND, k_SKD, v_SKD = qkv
    outputs = []
    for q_from, q_to, k_from, k_to in zip(*(x.tolist() for x in (cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])), strict=True):
        assert q_to > q_from or k_to > k_from, "a document without tokens"
        copies = q_TND.shape[1] // k_SKD.shape[1]
        k, v = (x[k_from:k_to].repeat_interleave(copies, 1) for x in (k_SKD, v_SKD))
        scores = torch.einsum("tnd,snd->nts", q_TND[q_from:q_to], k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(k_to - k_from) - torch.arange(q_to - q_from)[:, None] - (k_to - k_from) + (q_to - q_from)
        if slopes_N is not None:
            scores = scores - slopes_N[:, None, None] * distance.abs()
        left, right = (math.inf if side is None or side < 0 else side for side in window)
        seen = (distance >= -left) & (distance <= (0 if causal else right))
        outputs.append(torch.einsum("nts,snd->tnd", scores.masked_fill(~seen, -math.inf).softmax(-1), v))
    return torch.cat(outputs)


def _flash(arguments: dict[str, Any]) -> Tensor:
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        assert arguments[name].dtype is torch.int32 and arguments[name].is_contiguous()
        assert arguments[name.replace("cu_seqlens", "max_seqlen")] == arguments[name].diff().max()
    return _as_documented(
        [arguments[name] for name in "qkv"], arguments["cu_seqlens_q"], arguments["cu_seqlens_k"], arguments["softmax_scale"],
        arguments["causal"], arguments["window_size"], arguments["softcap"], arguments.get("alibi_slopes"),
    )  # fmt: skip


def _varlen(arguments: dict[str, Any]) -> Tensor:
    """torch's: causal only if the window is exactly (-1, 0), else the window alone hides keys."""
    cu_q, cu_k = arguments["cu_seq_q"], arguments["cu_seq_k"]
    assert cu_q.dtype is cu_k.dtype is torch.int32
    assert (arguments["max_q"], arguments["max_k"]) == (cu_q.diff().max(), cu_k.diff().max())
    qkv = [arguments[name] for name in ("query", "key", "value")]
    assert arguments.get("enable_gqa", True) or qkv[0].shape[1] == qkv[1].shape[1]
    window = arguments["window_size"]
    assert isinstance(window, tuple)
    return _as_documented(qkv, cu_q, cu_k, arguments["scale"], window == (-1, 0), window)


@pytest.fixture(params=["flash2", "flash3", "flash3 before", "flash4", "varlen", "varlen before"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[dict[str, Any]]]:
    """The name of a backend whose library is a stand-in, and what that is called with."""
    name, _, before = request.param.partition(" ")
    calls: list[dict[str, Any]] = []
    if name == "varlen":
        signature = _signature(OLD_VARLEN, keywords_only=True) if before else inspect.signature(varlen_attn)
        function = _function(signature, calls, _varlen)
    else:
        documented: Documented = (lambda arguments: (_flash(arguments), None)) if before else _flash
        function = _function(_signature(SIGNATURES[name]), calls, documented)
    module = ModuleType(LIBRARIES[name].module)
    setattr(module, LIBRARIES[name].function, function)
    if "." in module.__name__ and name != "varlen":
        monkeypatch.setitem(sys.modules, module.__name__.split(".")[0], ModuleType(module.__name__.split(".")[0]))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert LIBRARIES[name].problem() is None
    return name, calls


SETTINGS = {
    "plain": Scores(),
    "scale and window": Scores(scale=0.9, window=3),
    "window of one": Scores(window=1),
    "window beyond all": Scores(window=50),
    "soft cap": Scores(scale=2.0, softcap=1.5),
    "ALiBi": Scores(slopes_N=SLOPES),
    "all of them": Scores(0.9, 1.5, SLOPES, False, 2),
}


@pytest.mark.parametrize("case", ["runs of equal lengths", "prefill beside decoding", "empty documents", "keys without queries"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_libraries_are_asked_for_the_definition(setting: str, case: str, library: tuple[str, list[dict[str, Any]]]) -> None:
    (name, calls), scores, (q_lens, k_lens) = library, SETTINGS[setting], CASES[case]
    has = {"softcap": scores.softcap is not None, "alibi": scores.slopes_N is not None, "window": scores.window is not None}
    if any(present and feature in BACKENDS[name].lacks for feature, present in has.items()):
        available = Available("cuda", (9, 0), frozenset(LIBRARIES))
        with pytest.raises(ValueError, match=f"{name} cannot: it has no "):
            assert_supported(name, Case(torch.bfloat16, 64, **has), available)
        return
    inputs = inputs_of(q_lens, k_lens, 4, 2)
    expected, _ = loop(*inputs, q_lens, k_lens, scores)
    actual = attention(*inputs, boundaries(q_lens), boundaries(k_lens), name, scores)
    assert len(calls) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    dy = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    grads = [torch.autograd.grad(y, inputs, dy) for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)


def test_boundaries_are_sent_once_a_pass_and_rows_not_copied(library: tuple[str, list[dict[str, Any]]]) -> None:
    name, calls = library
    shared: dict[object, Any] = {}
    for dim in (6, 8):  # of layers that differ in everything else
        qkv = torch.randn(9, 8, dim, dtype=torch.float64)
        q, k, v = qkv.split([4, 2, 2], dim=1)
        attention(q, k, v, (0, 4, 9), (0, 4, 9), name, Scores(window=dim), shared)
    tensors = [[x for x in call.values() if isinstance(x, Tensor)] for call in calls]
    assert len(calls) == 2 and all(a is b for a, b in zip(tensors[0][3:5], tensors[1][3:5], strict=True))
    assert tensors[0][3] is tensors[0][4], "equal boundaries are sent once"
    assert tensors[1][0].data_ptr() == q.data_ptr() and tensors[1][2].stride() == v.stride()
    turned = torch.randn(9, 6, 4, dtype=torch.float64).transpose(1, 2)
    attention(turned, turned, turned, (0, 9), (0, 9), name)
    assert calls[2]["query" if name == "varlen" else "q"].stride(-1) == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_is_deterministic_if_asked_for(deterministic: bool, library: tuple[str, list[dict[str, Any]]]) -> None:
    name, calls = library
    q, k, v = inputs_of([3], [3], 4, 2)
    attention(q, k, v, (0, 3), (0, 3), name, deterministic=deterministic)
    assert name == "varlen" or calls[0]["deterministic"] is deterministic  # varlen asks torch: ops/kernels.py


def test_ours_is_asked_for_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists of tiles are made once for all layers with the same window."""
    made: list[tuple[Any, ...]] = []

    def tiles(*arguments: Any) -> tuple[Any, ...]:
        made.append(arguments)
        return arguments

    def flash_attention(
        q: Tensor, k: Tensor, v: Tensor, tiles: Any, scale: float, softcap: Any, slopes_N: Any, coarse: bool, window: Any
    ) -> Tensor:
        cu_q, cu_k, dim, tiles_window, device = tiles
        assert (dim, tiles_window, device) == (q.shape[-1], window, q.device)
        return attention(q, k, v, cu_q, cu_k, "reference", Scores(scale, softcap, slopes_N, coarse, window))

    module = ModuleType("megatron_llm.ops.triton.attention")
    module.tiles, module.flash_attention = tiles, flash_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    shared: dict[object, Any] = {}
    settings = [*SETTINGS.values(), Scores(slopes_N=SLOPES, coarse=True)]
    q_lens, k_lens = CASES["prefill beside decoding"]
    inputs = inputs_of(q_lens, k_lens, 4, 2)
    for scores in settings:
        expected, _ = loop(*inputs, q_lens, k_lens, scores)
        actual = attention(*inputs, boundaries(q_lens), boundaries(k_lens), "triton", scores, shared)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    assert [arguments[3] for arguments in made] == [None, 3, 1, 50, 2]


@pytest.mark.parametrize("case", CASES)
def test_cudnn_is_forced_on_square_documents_only(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never given a matrix there."""
    real, forced, free = functional.scaled_dot_product_attention, list[int](), list[int]()

    def fake(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        enabled = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math", "cudnn")]
        (forced if enabled == [False, False, False, True] else free).append(q.shape[2])
        if enabled != [False, False, False, True]:
            assert all(enabled) and (q.shape[2] == 1 or q.shape[2] < k.shape[2])
            return real(q, k, v, **named)
        assert q.shape[2] == k.shape[2] > 1 and named == {
            "attn_mask": None, "is_causal": True, "scale": 0.7, "enable_gqa": True,
        }  # fmt: skip
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return real(q, k, v, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", fake)
    q_lens, k_lens = CASES[case]
    inputs = inputs_of(q_lens, k_lens, 4, 2)
    actual = attention(*inputs, boundaries(q_lens), boundaries(k_lens), "cudnn", Scores(scale=0.7))
    expected, _ = loop(*inputs, q_lens, k_lens, Scores(scale=0.7))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    runs = {length for length, keys in zip(q_lens, k_lens, strict=True) if 1 < length == keys}
    assert set(forced) == runs


def test_libraries_that_cannot_be_called_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    flash4 = LIBRARIES["flash4"]
    for name in [name for name in sys.modules if name.split(".")[0].startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert flash4.problem() == "flash_attn.cute is not installed (pip install flash-attn-4)"
    package = tmp_path / "flash_attn/cute"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import no_such_cutlass")
    assert flash4.problem() == "flash_attn.cute cannot be imported: No module named 'no_such_cutlass'"
    (package / "__init__.py").write_text("raise OSError('libcudart.so.11: not found')")
    assert flash4.problem() == "flash_attn.cute cannot be imported: OSError: libcudart.so.11: not found"
    (package / "__init__.py").write_text("def flash_attn_varlen_func(q, cu_seqlens_q, cu_seqlens_k, causal, window_size): ...")
    problem = flash4.problem()
    assert problem is not None and problem.startswith(
        "flash_attn.cute.flash_attn_varlen_func has no max_seqlen_q, max_seqlen_k, softmax_scale, softcap, deterministic: another"
    )

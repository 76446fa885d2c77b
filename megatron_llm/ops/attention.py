"""Causal attention over packed documents, behind one function, and which of its backends runs where.

`models/attention.py` chooses a backend for each layer when it is made, and calls `attention`; `training/resolve.py` asks for
problems before anything is launched.

Queries and keys carry their own boundaries, so training (equal), a KV cache (few queries, many keys) and later context
parallelism fit one signature. Document i has queries cu_q[i]:cu_q[i+1] and keys cu_k[i]:cu_k[i+1]; its queries are the
*last* positions of its keys (bottom-right aligned causal mask). Documents never see each other, and may be empty.

Shape suffixes: T query tokens, S key tokens, N query heads, K key/value heads (N a multiple of K), D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.config import KernelsConfig, ModelConfig
from megatron_llm.ops import attention_dense, attention_packed
from megatron_llm.ops.attention_packed import LIBRARIES
from megatron_llm.ops.kernels import triton_problem
from megatron_llm.ops.scores import Attend, Scores, Shared, Terms


def attention(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    backend: str,
    scores: Scores = Scores(),
    shared: Shared | None = None,
    deterministic: bool = False,
) -> Tensor:
    """softmax(scores of q k^T) v inside every document: [T, N, D], [S, K, D], [S, K, D] -> [T, N, D].

    backend: a key of BACKENDS that can (`choose`). shared: where layers of one pass with the same heads keep what they make once
    for all of them.
    """
    if not q_TND.shape[0]:
        return q_TND.clone()
    terms = Terms(cu_q, cu_k, scores, {} if shared is None else shared, deterministic)
    return BACKENDS[backend].attend(q_TND, k_SKD, v_SKD, terms)


@dataclass(frozen=True)
class Case:
    """What a layer asks of attention, as far as a backend may not have it.

    Attributes:
        softcap, alibi, coarse, window: whether `Scores` has these. deterministic: whether backward makes the same bits again.
    """

    dtype: torch.dtype
    head_dim: int
    softcap: bool = False
    alibi: bool = False
    coarse: bool = False
    window: bool = False
    deterministic: bool = False

    @classmethod
    def of(cls, model: ModelConfig, layer: int, dtype: torch.dtype, deterministic: bool) -> Case:
        alibi = model.position_embedding == "alibi"
        return cls(
            dtype,
            model.head_dim,
            model.attn_logit_softcapping is not None,
            alibi,
            alibi and model.alibi_scaled,
            model.window(layer) is not None,
            deterministic,
        )


@dataclass(frozen=True)
class Available:
    """What there is to run on.

    Attributes:
        device: "cpu", "cuda", or "meta" where nothing runs. capability: of the GPU.
        libraries: the backends whose library is there; None: those that can be imported.
    """

    device: str
    capability: tuple[int, int] = (0, 0)
    libraries: frozenset[str] | None = None

    @classmethod
    @functools.cache
    def on(cls, device: torch.device) -> Available:
        return cls(device.type, torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0))

    def library_problem(self, name: str) -> str | None:
        if self.libraries is None:
            return _import_problem(name)
        return None if name in self.libraries else f"{LIBRARIES[name].module} is not installed ({LIBRARIES[name].install})"


@functools.cache
def _import_problem(name: str) -> str | None:
    return LIBRARIES[name].problem()


_FEATURES = {
    "softcap": "soft cap of scores (model.attn_logit_softcapping)",
    "coarse": "ALiBi in bfloat16 (model.alibi_scaled)",
    "alibi": "ALiBi (model.position_embedding)",
    "window": "sliding windows (model.sliding_window)",
    "deterministic": "deterministic backward (kernels.deterministic)",
}
"""Of a case, in the words of a config."""

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """Attributes:
    attend: how it is called.
    lacks: which of `_FEATURES` it has not.
    heads: by the first number of a compute capability the most channels of a head, of which libraries want a multiple of 8; it
        does not run on other GPUs. None: anything goes.
    """

    attend: Attend
    lacks: frozenset[str] = frozenset()
    heads: Mapping[int, int] | None = None


def _backend(attend: Attend, lacks: str = "", heads: Mapping[int, int] | None = None) -> Backend:
    return Backend(attend, frozenset(lacks.split()), heads)


_AMPERE_ON = dict.fromkeys((8, 9, 10, 11, 12), 256)
BACKENDS = {
    "flash4": _backend(attention_packed.flash4, "alibi coarse", {9: 256, 10: 128, 11: 128}),
    "flash3": _backend(attention_packed.flash3, "alibi coarse", {9: 256}),
    "flash2": _backend(attention_packed.flash2, "coarse", _AMPERE_ON),
    "varlen": _backend(attention_packed.varlen, "softcap alibi coarse", _AMPERE_ON),
    "cudnn": _backend(attention_dense.cudnn, "softcap alibi coarse window deterministic", dict.fromkeys(_AMPERE_ON, 128)),
    "triton": _backend(attention_packed.triton, heads=_AMPERE_ON),
    "sdpa": _backend(attention_dense.sdpa),
    "reference": _backend(attention_dense.reference),
}
"""By their names in `kernels.attention`, the fastest first. What they have the sources say: of the packages that
`attention_packed.py` names; of torch, in `aten/src/ATen/native/transformers/cuda`, `sdp_utils.cpp` for cuDNN, and for varlen
`attention_backward.cu`, by which it is deterministic where torch is told to be (`ops/kernels.py`)."""


@dataclass(frozen=True)
class Choice:
    """The backend of a layer. passed_over: why none of the faster ones, a sentence each, where something was left to choose."""

    name: str
    passed_over: tuple[str, ...] = ()


def choose(name: str, case: Case, available: Available) -> Choice:
    """What `kernels.attention` means for a layer: itself, or for `auto` the fastest that can on a GPU, and sdpa elsewhere.

    Raises ValueError where the named backend cannot.
    """
    if name != "auto":
        assert_supported(name, case, available)
        return Choice(name)
    if available.device != "cuda":
        return Choice("sdpa")
    passed_over: list[str] = []
    for candidate in BACKENDS:
        problem = _problem(candidate, case, available)
        if problem is None:
            return Choice(candidate, tuple(passed_over))
        passed_over.append(f"{candidate}: {problem}")
    raise AssertionError("the reference can everything")


def assert_supported(name: str, case: Case, available: Available) -> None:
    """Raises ValueError with the reason why a backend cannot run a case, and those that can."""
    if problem := _problem(name, case, available):
        able = [other for other in BACKENDS if other != name and _problem(other, case, available) is None]
        raise ValueError(f"{name} cannot: {problem}; take auto, or one of {', '.join(able)}")


def _problem(name: str, case: Case, available: Available) -> str | None:
    """Why a backend cannot run a case; None if it can. Libraries are imported last."""
    backend, ours = BACKENDS[name], name == "triton"
    if available.device == "meta" or backend.heads is None:
        return None
    if ours and (problem := triton_problem(available.device, case.dtype)):
        return problem
    if available.device != "cuda" and not ours:
        return "it needs an NVIDIA GPU"
    if case.dtype not in _NARROW and not ours:
        return f"it computes in bfloat16 and float16, not in {str(case.dtype).removeprefix('torch.')}"
    if available.device == "cuda" and available.capability[0] not in backend.heads:
        return f"it is not for GPUs of compute capability {'.'.join(map(str, available.capability))}"
    most = backend.heads.get(available.capability[0], 256)
    if case.head_dim > most or (case.head_dim % 8 and not ours):
        kind = "" if ours else "a multiple of 8 and "
        return f"its heads have {kind}at most {most} channels here, not {case.head_dim} (model.head_dim)"
    lacking = [text for feature, text in _FEATURES.items() if feature in backend.lacks and getattr(case, feature)]
    if lacking:
        return f"it has no {' and no '.join(lacking)}"
    return available.library_problem(name) if name in LIBRARIES else None


def attention_problems(config: KernelsConfig, model: ModelConfig, dtype: torch.dtype, available: Available) -> list[str]:
    """A sentence for every kind of layer that `kernels.attention` cannot run. dtype: what the model computes in."""
    if config.attention == "auto":
        return []
    cases: dict[Case, list[int]] = {}
    for layer in range(model.num_hidden_layers):
        cases.setdefault(Case.of(model, layer, dtype, config.deterministic), []).append(layer)
    problems = []
    for case, layers in cases.items():
        try:
            assert_supported(config.attention, case, available)
        except ValueError as error:
            problems.append(f"kernels.attention, {_layers(layers)}: {error}")
    return problems


def described(choices: Mapping[int, Choice]) -> list[str]:
    """A line for every kind of choice, of those of some layers by number: which backend runs, and why none of the faster ones."""
    kinds: dict[Choice, list[int]] = {}
    for layer, choice in choices.items():
        kinds.setdefault(choice, []).append(layer)
    return [
        f"{choice.name} in {_layers(layers)}" + (f" (not {'; not '.join(choice.passed_over)})" if choice.passed_over else "")
        for choice, layers in kinds.items()
    ]


def _layers(numbers: list[int]) -> str:
    """layers 0-3, 5, 7-9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(parts)

"""Continue token sequences with a model, greedily or by sampling. Called by `cli/generate.py`.

Prompts of different lengths are packed, not padded: the first pass is one flat batch with a document per prompt.
One process that holds the whole model; sequence parallelism is switched off for these calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.generation.cache import SequenceCache
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.positions import Rotary
from megatron_llm.ops.batch import Batch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; 1 samples from the model's distribution.
        top_k: sample among the k most likely tokens; 0: all.
        top_p: sample among the most likely tokens that together have this probability (Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} is negative or not finite; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]")

    def choose(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """One token id per row: float [B, V] -> int64 [B]."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        sorted_BV, order_BV = logits_BV.double().sort(-1, descending=True)
        # The largest becomes 0 first, so that a tiny temperature makes no inf - inf.
        probabilities_BV = ((sorted_BV - sorted_BV[:, :1]) / self.temperature).softmax(-1)
        if self.top_k:
            probabilities_BV[:, self.top_k :] = 0
        if self.top_p < 1:
            probabilities_BV /= probabilities_BV.sum(-1, keepdim=True)
            before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
            probabilities_BV[before_BV >= self.top_p] = 0
        return order_BV.gather(-1, torch.multinomial(probabilities_BV, 1, generator=generator)).squeeze(-1)


@torch.no_grad()
def generate(
    stage: DecoderStage,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    seed: int = 0,
) -> list[list[int]]:
    """The new ids of each prompt, ending with the first stop id if one came. `stage` must hold the whole model.

    Raises ValueError for an empty prompt, an id outside the vocabulary, or more tokens than a model with learned positions has.
    """
    assert stage.first and stage.last and stage.tp.size == 1
    vocab = stage.model.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no tokens")
        if max(prompt) >= vocab:
            raise ValueError(
                f"prompt {number} holds token id {max(prompt)}, but the model's vocabulary has {vocab}; "
                "the tokenizer is not the model's"
            )
    longest = max(map(len, prompts), default=0) + max_new_tokens - 1  # the last token is not read
    if stage.model.position_embedding == "learned" and longest > stage.model.max_position_embeddings:
        raise ValueError(
            f"the longest prompt has {max(map(len, prompts))} tokens and {max_new_tokens} are to follow, but the model has "
            f"{stage.model.max_position_embeddings} learned positions; ask for fewer"
        )
    device = stage.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = SequenceCache([len(prompt) + max_new_tokens for prompt in prompts])
    new: list[list[int]] = [[] for _ in prompts]
    feed: list[Sequence[int]] = list(prompts)
    for _ in range(max_new_tokens):
        logits_BV = _next_logits(stage, feed, cache, device)
        chosen = sampling.choose(logits_BV, generator).tolist()
        for ids, token in zip(new, chosen, strict=True):
            if not (ids and ids[-1] in stop_ids):
                ids.append(token)
        if all(ids[-1] in stop_ids for ids in new):
            break
        # Finished sequences ride along until all are done; what they produce is dropped.
        feed = [[token] for token in chosen]
        for index in _outdated(stage.rotary, cache):
            cache.forget(index)
            feed[index] = [*prompts[index], *new[index]]
    return new


def _outdated(rotary: Rotary, cache: SequenceCache) -> Iterator[int]:
    """The sequences whose cached keys were turned by other frequencies than those of one more token."""
    for index, length in enumerate(cache.lengths):
        if rotary.length_class(length) != rotary.length_class(length + 1):
            yield index


def _next_logits(stage: DecoderStage, feed: Sequence[Sequence[int]], cache: SequenceCache, device: torch.device) -> Tensor:
    """Float logits after the last fed token of each sequence: [B, V]."""
    positions_T = cache.begin([len(tokens) for tokens in feed])
    tokens_T = torch.tensor([token for tokens in feed for token in tokens])
    batch = Batch(tokens_T, tokens_T, torch.zeros(len(tokens_T)), positions_T, cache.cu_seqlens).to(device)
    hidden_TH = stage(None, batch, cache=cache, sequence_parallel=False)
    last_B = torch.tensor(cache.cu_seqlens[1:], device=device) - 1
    return stage.logits(hidden_TH[last_B], sequence_parallel=False).float()

"""Continue token sequences with a model, greedily or by sampling. Called by `training/samples.py`, `training/inference.py` and
`chat.py`.

Prompts of different lengths are packed, not padded: the first pass is one flat batch with a document per prompt.
Sequence parallelism is switched off for these calls, as there is one token a sequence.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.config import ModelConfig
from megatron_llm.generation.cache import SequenceCache
from megatron_llm.generation.relay import Relay
from megatron_llm.models.decoder import DecoderStage
from megatron_llm.models.positions import Rotary
from megatron_llm.ops.random import random_bits, stream_key


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

    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """One token id per row: float [B, V] and numbers in [0, 1), float64 [B], that decide -> int64 [B].

        Tokens are laid out by descending probability and the one at that place is taken, so equal numbers choose equal
        tokens whatever else is in the batch.
        """
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        sorted_BV, order_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
        # The largest becomes 0 first, so that a tiny temperature makes no inf - inf.
        probabilities_BV = ((sorted_BV - sorted_BV[:, :1]) / self.temperature).softmax(-1)
        if self.top_k:
            probabilities_BV[:, self.top_k :] = 0
        if self.top_p < 1:
            probabilities_BV /= probabilities_BV.sum(-1, keepdim=True)
            before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
            probabilities_BV[before_BV >= self.top_p] = 0
        ends_BV = probabilities_BV.cumsum(-1)
        total_B1 = ends_BV[:, -1:]
        place_B = (ends_BV <= uniform_B[:, None] * total_B1).sum(-1)
        last_B = (ends_BV < total_B1).sum(-1)  # of those with a probability, should the product be rounded up to the total
        return order_BV.gather(-1, torch.minimum(place_B, last_B)[:, None]).squeeze(-1)


def uniform(seed: int, sequences: Sequence[int], place: int) -> Tensor:
    """A number in [0, 1) for the new token at a place of each sequence, float64 [B]: a function of seed and address only."""
    bits = torch.cat([random_bits(stream_key(seed, "sample", number), torch.tensor([place])) for number in sequences])
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def generate(
    model: DecoderStage | Relay,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    seed: int = 0,
    first: int = 0,
    after_pass: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """The new ids of each prompt, ending with the first stop id if one came.

    Collective over a grid's model replica, whose ranks all get the same. Arguments as in `continuations`; after_pass: called
    after every token, for whoever watches that something goes on.
    """
    new: list[list[int]] = [[] for _ in prompts]
    passes = continuations(
        model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids, seed=seed, first=first
    )
    for tokens in passes:
        for ids, token in zip(new, tokens, strict=True):
            ids += [] if token is None else [token]
        after_pass()
    return new


@torch.no_grad()
def continuations(
    model: DecoderStage | Relay,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int] = frozenset(),
    seed: int = 0,
    first: int = 0,
) -> Iterator[list[int | None]]:
    """The next id of each prompt, again and again until all have ended; None for those that have.

    Args:
        model: a whole one, or one on a grid.
        stop_ids: end a sequence, and are its last id.
        seed, first: what is drawn depends on the seed, the number of the sequence, of which `first` is that of the first prompt,
            and the place in it; so batches may be cut anywhere.

    Raises ValueError as `check_prompts`.
    """
    relay = model if isinstance(model, Relay) else Relay.whole(model)
    check_prompts(relay.model, prompts, max_new_tokens)
    cache = SequenceCache([len(prompt) + max_new_tokens for prompt in prompts])
    new: list[list[int]] = [[] for _ in prompts]
    feed: list[Sequence[int]] = list(prompts)
    numbers = range(first, first + len(prompts))
    for place in range(max_new_tokens if prompts else 0):
        logits_BV = relay.logits(feed, cache)
        chosen_B = None
        if logits_BV is not None and relay.chooses:
            chosen_B = sampling.choose(logits_BV, uniform(seed, numbers, place).to(logits_BV.device))
        chosen = relay.share(chosen_B, len(prompts))
        fresh = [None if ids and ids[-1] in stop_ids else token for ids, token in zip(new, chosen, strict=True)]
        for ids, token in zip(new, fresh, strict=True):
            ids += [] if token is None else [token]
        yield fresh
        if all(ids[-1] in stop_ids for ids in new):
            return
        # Finished sequences ride along until all are done; what they produce is dropped.
        feed = [[token] for token in chosen]
        for index in _outdated(relay.rotary, cache):
            cache.forget(index)
            feed[index] = [*prompts[index], *new[index]]


def check_prompts(model: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError for an empty prompt, an id outside the vocabulary, or more tokens than there are learned positions."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no tokens")
        if max(prompt) >= model.vocab_size:
            raise ValueError(
                f"prompt {number} holds token id {max(prompt)}, but the model's vocabulary has {model.vocab_size}; "
                "the tokenizer is not the model's"
            )
    longest = max(map(len, prompts), default=0) + max_new_tokens - 1  # the last token is not read
    if model.position_embedding == "learned" and longest > model.max_position_embeddings:
        raise ValueError(
            f"the longest prompt has {max(map(len, prompts))} tokens and {max_new_tokens} are to follow, but the model has "
            f"{model.max_position_embeddings} learned positions; ask for fewer"
        )


def _outdated(rotary: Rotary, cache: SequenceCache) -> Iterator[int]:
    """The sequences whose cached keys were turned by other frequencies than those of one more token."""
    for index, length in enumerate(cache.lengths):
        if rotary.length_class(length) != rotary.length_class(length + 1):
            yield index

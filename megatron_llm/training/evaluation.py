"""What the model makes of validation rows: loss, perplexity and accuracy, by set and by who speaks. Called by `training/loop.py`.

The loss weighs tokens as the set does, so it is the loss that training lowers. By role every token of the role counts once,
whatever it weighs: a model that learns replies only still says something about its users' words.

Shape suffixes: T tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.data.indexed import ROLES
from megatron_llm.data.stream import TokenStream
from megatron_llm.ops.batch import Batch
from megatron_llm.parallel.collectives import all_reduce
from megatron_llm.pipeline.schedules import forward_only
from megatron_llm.training.build import Engine
from megatron_llm.training.microbatches import Microbatches

SPEAKERS = [role for role in ROLES if role != "none"]


@dataclass(frozen=True)
class Score:
    """Sums over tokens, which add up.

    Attributes:
        loss, weight: sum of weight * cross-entropy, and of weights.
        hits, tokens: how many tokens of a weight were the most likely one, and how many there are.
    """

    loss: float = 0.0
    weight: float = 0.0
    hits: int = 0
    tokens: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.loss + other.loss, self.weight + other.weight, self.hits + other.hits, self.tokens + other.tokens)

    def metrics(self, name: str = "") -> dict[str, float | None]:
        """`valid_loss`, `valid_perplexity` and `valid_accuracy`, or those of `/name`; None without a token of a weight.

        The perplexity of a loss beyond 709 is infinite.
        """
        loss = self.loss / self.weight if self.weight else None
        values = {"loss": loss, "perplexity": perplexity(loss), "accuracy": self.hits / self.tokens if self.tokens else None}
        return {f"valid_{kind}" + (f"/{name}" if name else ""): value for kind, value in values.items()}

    def __str__(self) -> str:
        if not self.weight:
            return "no tokens with loss"
        loss = self.loss / self.weight
        return f"{loss:.4f}, perplexity {perplexity(loss):.4g}, accuracy {self.hits / self.tokens:.1%}"


def perplexity(loss: float | None) -> float | None:
    """exp(loss), infinite where a float cannot hold it."""
    try:
        return None if loss is None else math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Evaluation:
    """A validation set's score, and those of its speakers, where it knows them and they speak."""

    score: Score
    roles: dict[str, Score]

    def metrics(self, name: str) -> dict[str, float | None]:
        """All of a set, those of roles as `valid_loss/name/user`."""
        values = self.score.metrics(name)
        for role, score in self.roles.items():
            values |= score.metrics(f"{name}/{role}")
        return values

    def __str__(self) -> str:
        roles = [f"{role} {score.loss / score.weight:.4f}" for role, score in self.roles.items()]
        return f"{self.score}" + (f" ({', '.join(roles)})" if roles else "")


@torch.no_grad()
def evaluate(engine: Engine, stream: TokenStream, progress: Callable[[float], object] = lambda _: None) -> Evaluation:
    """The scores of the first `eval_rows` rows of a validation set, or of all if it has fewer. Every rank gets the same.

    progress: called on ranks of the first stage with the part of the rows that has entered it.

    Rows are dealt to ranks like training rows; fill rows, which weigh nothing, complete the last micro-batches.
    """
    grid, training = engine.grid, engine.config.training
    rows: list[int | None] = list(range(min(training.eval_rows, stream.rows_per_epoch)))
    round_of_rows = training.micro_batch_size * grid.dp.size
    rows += [None] * (-len(rows) % round_of_rows)
    schedule = forward_only(engine.schedule.placement, len(rows) // round_of_rows)
    microbatches = Microbatches(engine, stream, rows)
    # float64, so that counts are exact and sums do not depend on how rows fall into micro-batches as much as the losses do.
    sums = torch.zeros(4 * (1 + len(SPEAKERS)), dtype=torch.float64, device=engine.device)

    def forward(number: int, microbatch: int, x: Tensor | None) -> Tensor:
        batch, stage = microbatches.batch(number, microbatch), engine.stages[number]
        hidden = stage(x, batch, before_layer=engine.runtime.before_layer)
        if stage.first:
            progress((microbatch + 1) / schedule.microbatches)
        if stage.last:
            losses_T, hits_T = stage.scores(hidden, batch)
            if grid.tp.first:
                sums.add_(_sums(losses_T, hits_T, batch))
        return hidden

    engine.runtime.run(schedule, forward)
    total, *spoken = _scores(all_reduce(sums, grid.world).tolist())
    return Evaluation(total, {role: score for role, score in zip(SPEAKERS, spoken, strict=True) if score.tokens})


def _sums(losses_T: Tensor, hits_T: Tensor, batch: Batch) -> Tensor:
    """The fields of a Score of all tokens by their weights, and then of each speaker's tokens: float64."""
    weights = [batch.weights_T.to(losses_T.dtype)]
    for role in SPEAKERS:
        spoken = torch.zeros_like(losses_T) if batch.roles_T is None else (batch.roles_T == ROLES[role]).to(losses_T.dtype)
        weights.append(spoken)
    sums = []
    for weight_T in weights:
        counts_T = weight_T != 0
        sums += [(losses_T * weight_T).sum(), weight_T.sum(), (hits_T & counts_T).sum(), counts_T.sum()]
    return torch.stack([value.double() for value in sums])


def _scores(sums: list[float]) -> Iterable[Score]:
    for at in range(0, len(sums), 4):
        loss, weight, hits, tokens = sums[at : at + 4]
        yield Score(loss, weight, int(hits), int(tokens))

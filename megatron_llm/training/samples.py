"""Replies of the model during training, for people to read: in the log and in RUN/samples.jsonl. Called by `training/loop.py`.

They are made by the stages that are being trained, in the run's layout; nothing of the run depends on them. `training/resolve.py`
asks for the prompts before a process group exists, so what cannot be sampled is found out first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_llm.config import Config, SourceConfig
from megatron_llm.data.indexed import ROLE_MASK, ROLES, IndexedDataset
from megatron_llm.data.tokenizer import load_pretrained
from megatron_llm.generation.generate import Sampling, check_prompts, generate
from megatron_llm.generation.model import model_files, stop_ids
from megatron_llm.generation.prompts import Prompt, encode, read_prompts
from megatron_llm.generation.relay import Relay
from megatron_llm.training.build import Engine
from megatron_llm.training.metrics import forget_lines_after

logger = logging.getLogger("megatron_llm")

CONVERSATIONS = 3  # of the validation set, whose beginnings are the prompts if none are given
_LOOKED_AT = 10_000  # conversations, until so many are found


@dataclass(frozen=True)
class SamplePrompts:
    """What is sampled from: the texts that people are shown, their ids, and the tokenizer that knows both."""

    texts: list[str]
    ids: list[list[int]]
    tokenizer: Any


def sample_prompts(config: Config) -> SamplePrompts:
    """The prompts of a config with `logging.sample_every`. Raises ValueError naming the setting if there are none to be had."""
    logging_ = config.logging
    tokenizer = _tokenizer(config)
    given = logging_.sample_prompts
    try:
        if given is None:
            prompts = _of_conversations(config)
            texts = [tokenizer.decode(ids) for ids in prompts]
        else:
            named: list[Prompt] = read_prompts(given) if isinstance(given, str) else list(given)
            if not named:
                raise ValueError("the list is empty; leave it out for the first conversations of the validation set")
            chat = bool(tokenizer.chat_template) and any(_is_chat(config, source) for source in _sources(config))
            prompts = [encode(tokenizer, prompt, chat) for prompt in named]
            texts = [
                prompt if isinstance(prompt, str) else tokenizer.decode(ids) for prompt, ids in zip(named, prompts, strict=True)
            ]
        check_prompts(config.model, prompts, logging_.sample_tokens)
    except OSError as error:
        raise ValueError(f"logging.sample_prompts: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"logging.sample_prompts: {error}") from error
    return SamplePrompts(texts, prompts, tokenizer)


def _sources(config: Config) -> list[SourceConfig]:
    return [] if config.data.kind == "synthetic" else [*config.data.valid, *config.data.train]


def _is_chat(config: Config, source: SourceConfig) -> bool:
    return (source.kind or config.data.kind) == "chat"


def _tokenizer(config: Config) -> Any:
    """`data.tokenizer`, or the one that a data set was made with."""
    if config.data.tokenizer is not None:
        return load_pretrained(config.data.tokenizer)
    metas = [IndexedDataset(source.path).meta for source in _sources(config)]
    named = next((meta.tokenizer for meta in metas if meta is not None), None)
    if named is None:
        raise ValueError("logging.sample_every: no data set says which tokenizer it was made with; set data.tokenizer")
    try:
        return load_pretrained(named)
    except ValueError as error:
        raise ValueError(f"logging.sample_every: the tokenizer of the data set: {error}; set data.tokenizer") from error


def _of_conversations(config: Config) -> list[list[int]]:
    """The first conversations of the first validation set that has any, up to the first reply."""
    source = next((source for source in _sources(config) if source in config.data.valid and _is_chat(config, source)), None)
    if source is None:
        raise ValueError("no validation set is of kind chat, whose conversations could be prompts; give a list or a file")
    longest = config.training.sequence_length
    if config.model.position_embedding == "learned":
        longest = config.model.max_position_embeddings + 1 - config.logging.sample_tokens
    found = []
    for ids in _beginnings(IndexedDataset(source.path)):
        found += [ids] if len(ids) <= longest else []
        if len(found) == CONVERSATIONS:
            break
    if not found:
        raise ValueError(
            f"{source.path}: no conversation begins with 1 to {longest} tokens before a reply; give a list or a file"
        )
    return found


def _beginnings(dataset: IndexedDataset) -> Iterator[list[int]]:
    """What is before the first reply of each conversation, if something is, the introduction of the reply included."""
    offsets = dataset.document_offsets()[: _LOOKED_AT + 1].tolist()
    for start, stop in zip(offsets, offsets[1:], strict=False):
        assert dataset.roles is not None, "check_data has refused chat data without roles"
        replies = np.flatnonzero((dataset.roles[start:stop] & ROLE_MASK) == ROLES["assistant"])
        if len(replies) and replies[0]:
            yield dataset.read(start, int(replies[0])).tolist()


def make_samples(engine: Engine, assets: Mapping[str, bytes], start: int, progress: Callable[[], object]) -> Samples:
    """What samples a run, whose prompts are known to be good. `assets`: the files that travel with the model."""
    prompts = sample_prompts(engine.config)
    return Samples(engine, prompts, stop_ids(prompts.tokenizer, model_files(assets)), start, progress)


class Samples:
    """Samples a run.

    Args:
        stop_ids: end a reply.
        start: step that the run continues from; what was written of later steps, which will be taken again, is removed.
        progress: called after every token.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: SamplePrompts,
        stop_ids: frozenset[int],
        start: int,
        progress: Callable[[], object],
    ):
        settings = engine.config.logging
        self._engine, self._prompts, self._stop_ids = engine, prompts, stop_ids
        self._speaks = engine.grid.world.first
        self._relay = Relay(engine.grid, engine.stages, engine.schedule.placement)
        self._sampling = Sampling(settings.sample_temperature, settings.sample_top_k, settings.sample_top_p)
        self._path, self._progress = Path(settings.run_dir) / "samples.jsonl", progress
        self.forget_after(start or -1)  # step 0 is sampled again

    def forget_after(self, step: int) -> None:
        """Remove what was written of later steps, which will be taken again."""
        if self._speaks:
            forget_lines_after(self._path, step)

    def take(self, step: int) -> None:
        """Make a reply to every prompt, and say them. Collective; the weights and all other state stay as they are."""
        self._engine.optimizer.wait_weights()
        replies = generate(
            self._relay,
            self._prompts.ids,
            max_new_tokens=self._engine.config.logging.sample_tokens,
            sampling=self._sampling,
            stop_ids=self._stop_ids,
            seed=self._engine.config.training.seed + step,
            after_pass=self._progress,
        )
        if self._speaks:
            self._say(step, replies)

    def _say(self, step: int, replies: list[list[int]]) -> None:
        lines = []
        for number, (prompt, ids) in enumerate(zip(self._prompts.texts, replies, strict=True), start=1):
            reply, ended = self._prompts.tokenizer.decode(ids, skip_special_tokens=True), ids[-1] in self._stop_ids
            how = f"ended by itself after {len(ids)} tokens" if ended else f"cut off after {len(ids)} tokens"
            shown = "\n".join((*_indented("prompt", prompt), *_indented("reply", reply)))
            logger.info("step %d | sample %d of %d, %s\n%s", step, number, len(replies), how, shown)
            lines.append(json.dumps({"step": step, "prompt": prompt, "reply": reply, "ended": ended}, ensure_ascii=False) + "\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def _indented(name: str, text: str) -> list[str]:
    """The lines of a text, each with what it is before it."""
    return [f"    {name:>6} | {line}" for line in text.splitlines() or [""]]

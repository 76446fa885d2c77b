"""What a run that goes on has changed since its checkpoint was saved, and which of it would make another run of it.

Called by `training/recovery.py`. Every setting is in one of three classes, by the names below: it says of which model and rows
the checkpoint is (then it is useless to this run), it decides which numbers come next (then a change must be meant:
`--allow-change`), or it is free: the layout, the machine, names of files, what is written and when.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from megatron_llm.config import Config

OF_ANOTHER_RUN = ("model.*", "peft*", "training.sequence_length")
DECIDES_NUMBERS = (
    "data.*",
    "lr_schedule.*",
    "optimizer.*",
    "precision.*",
    "training.batch_size_rampup*",
    "training.document_isolation",
    "training.global_batch_size",
    "training.loss_spike*",
    "training.regularization.*",
    "training.seed",
)
FREE = (
    "checkpoint.*",
    "data.tokenizer",
    "data.train.*.name",
    "data.valid*",
    "device",
    "kernels.*",
    "logging.*",
    "model.checkpoint*",
    "model.hf",
    "model.initializer_range",
    "model.max_position_embeddings",
    "parallel.*",
    "peft.init",
    "training.check_replicas_every",
    "training.eval_*",
    "training.hang_timeout",
    "training.max_*",
    "training.micro_batch_size",
    "training.recompute*",
    "training.steps",
)
"""Comes before the others: the exceptions of a section stand beside it."""


@dataclass(frozen=True)
class Changes:
    """Changed settings as `section.key: old -> new`, by class."""

    of_another_run: list[str] = field(default_factory=list)
    decides_numbers: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)


def class_of(setting: str) -> str:
    """The name of the field of `Changes` that a setting belongs to. Raises ValueError for one that nobody has classified."""
    for name, patterns in (("free", FREE), ("of_another_run", OF_ANOTHER_RUN), ("decides_numbers", DECIDES_NUMBERS)):
        if any(fnmatchcase(setting, pattern) for pattern in patterns):
            return name
    raise ValueError(f"{setting} is not classified in {__name__}")


def find_changes(saved: Config, saved_facts: dict[str, Any], config: Config, facts: dict[str, Any]) -> Changes:
    """What differs between the settings of a checkpoint and those of a run that wants to go on from it.

    saved_facts, facts: what stands in place of settings, as `recovery.known_facts` gives them; empty if nothing is known.
    """
    before, after = _flat(saved.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    if saved_facts and facts:
        before, after = before | _flat(saved_facts), after | _flat(facts)
    found = Changes()
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        kind = class_of(name)
        if name == "model.max_position_embeddings" and config.model.position_embedding == "learned":
            kind = "of_another_run"  # the rows of a weight
        if name == "training.steps" and _depends_on_steps(config):
            kind = "decides_numbers"
        if fnmatchcase(name, "data.train.*.path") and saved_facts and facts:
            kind = "free"  # what is in the files is compared
        if name == "logging.run_dir" and config.checkpoint.path is not None:
            kind = "decides_numbers"  # two run folders must not share one place by mistake: no lock keeps them apart
        getattr(found, kind).append(f"{name}: {old} -> {new}")
    return found


def changes_rates(changes: list[str]) -> bool:
    """Whether one of the changes moves the learning rate."""
    names = ("lr_schedule.", "optimizer.lr:", "training.global_batch_size:", "training.batch_size_rampup", "training.steps:")
    return any(change.startswith(names) for change in changes)


def _depends_on_steps(config: Config) -> bool:
    """Whether the length of a run decides what happens before its end."""
    schedule = config.lr_schedule
    falls = schedule.kind == "wsd" or (schedule.kind in ("linear", "cosine") and not schedule.decay)
    return falls or (config.data.kind != "synthetic" and config.data.order == "megatron")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by `section.key`; items of lists of sections by their number."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        items = {str(number): item for number, item in enumerate(value)}.items()
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat

"""From YAML files to a complete, checked configuration, without touching a GPU or a process group.

Called by `cli/train.py` on every rank before anything is launched, and by `cli/config.py`. Everything that can be found
wrong from the config, the world size and the headers of files is found here, and reported at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_llm.checkpoint.load import Checkpoint
from megatron_llm.config import (
    Config,
    ConfigError,
    LrScheduleConfig,
    ModelConfig,
    parse_config,
    read_raw_config,
)
from megatron_llm.data.stream import build_train_stream, check_data, steps_of_epochs, tokenizer_sizes
from megatron_llm.data.tokenizer import fingerprint, vocabulary_size
from megatron_llm.hf.assets import collect_assets, with_tokenizer
from megatron_llm.hf.peft import PeftFolder
from megatron_llm.hf.reader import HFFolder
from megatron_llm.models.heads import head_problem
from megatron_llm.models.lora import WithAdapters, target_problems
from megatron_llm.models.stages import whole_model
from megatron_llm.models.vocabulary import resized
from megatron_llm.ops.attention import Available, attention_problems
from megatron_llm.ops.kernels import kernel_problems
from megatron_llm.optim.rules import is_frozen, rule_problems
from megatron_llm.parallel.shard import TensorSource, TypedSource
from megatron_llm.pipeline.schedules import placement
from megatron_llm.planning.compare import GIB, Assumed, Assumptions, choose
from megatron_llm.training.build import compute_dtype
from megatron_llm.training.completion import complete_model, complete_peft, family_of_source, model_of_source
from megatron_llm.training.fp8 import fp8_device_problems, fp8_size_problems
from megatron_llm.training.run_folder import checkpoints_folder
from megatron_llm.training.samples import sample_prompts
from megatron_llm.training.sinks import sink_problems
from megatron_llm.training.sources import FreshWeights


@dataclass(frozen=True)
class ResolvedRun:
    """Attributes:
    config: complete and checked against the world.
    source: what `model.hf` or `model.checkpoint` names.
    notes: what a user should hear about the settings before the first step.
    """

    config: Config
    source: HFFolder | Checkpoint | None
    notes: tuple[str, ...] = ()

    def weights(self) -> TensorSource | None:
        """Where the first weights come from; None: they are made."""
        peft, weights = self.config.peft, self._model_weights()
        if peft is None or (weights is None and peft.init is None):
            return weights
        fresh = FreshWeights(self.config.training.seed, self.config.model.initializer_range)
        if peft.init is None:
            return WithAdapters(weights or fresh, fresh)
        assert self.source is not None
        adapters = PeftFolder(peft.init).source(family_of_source(self.source), self.stored_model(), peft)
        return WithAdapters(weights or fresh, adapters)

    def _model_weights(self) -> TensorSource | None:
        """Those without adapters."""
        if self.source is None:
            return None
        model, stored = self.config.model, self.stored_model()
        if isinstance(self.source, Checkpoint):
            source: TypedSource = self.source.source("ema" if model.checkpoint_ema else "weights")
        else:
            source = self.source.source(stored)
        return resized(source, stored.vocab_size, model.vocab_size, str(model.hf or model.checkpoint))

    def stored_model(self) -> ModelConfig:
        """The architecture as the source has it: `model.resize_vocab` changes the number of tokens."""
        if self.source is None:
            return self.config.model
        size = int(model_of_source(self.source).vocab_size)
        return self.config.model.model_copy(update={"vocab_size": size, "resize_vocab": 0})

    def assets(self) -> dict[str, bytes]:
        """The files that travel with the model. Raises ValueError if one is missing or damaged."""
        tokenizer = self.config.data.tokenizer
        if isinstance(self.source, Checkpoint):
            return with_tokenizer(self.source.assets, tokenizer)
        return collect_assets(self.source.path if self.source else None, tokenizer)


def load_config(path: str | Path, overrides: list[str] | None = None) -> ResolvedRun:
    """The configuration with architecture filled in from its source; overrides may be files (`read_raw_config`).

    Raises ConfigError; looks at no data and no world.
    """
    raw = read_raw_config(path, overrides)
    source = complete_model(raw)
    complete_peft(raw, source)
    config = parse_config(raw)
    if not config.model.max_position_embeddings:
        model = config.model.model_copy(update={"max_position_embeddings": config.training.sequence_length})
        config = config.model_copy(update={"model": model})
    return ResolvedRun(config, source)


def resolve(path: str | Path, overrides: list[str] | None, world_size: int) -> ResolvedRun:
    """The checked configuration of a run on `world_size` ranks. Raises ConfigError with every problem."""
    run = load_config(path, overrides)
    problems = layout_problems(run.config, world_size) + _setting_problems(run.config) + _schedule_problems(run.config)
    problems += name_problems(run.config) + check_data(run.config)
    if isinstance(run.source, HFFolder):
        problems += run.source.problems(run.stored_model())
    problems += _source_problems(run)
    if not problems and run.config.training.steps == -1:
        run, problems = _plan_steps(run)
    if not problems and run.config.optimizer.lr == "auto":
        run, problems = _find_rate(run)
    problems = problems or _schedule_problems(run.config)
    problems = problems or _sample_problems(run.config)
    if problems:
        raise ConfigError(problems)
    run = choose_schedule(run, world_size)
    notes = [*_without_effect(run.config.lr_schedule), *_spike_notes(run.config), *_vocabulary_notes(run.config)]
    notes += [*_sample_notes(run.config), *_new_row_notes(run)]
    if isinstance(run.source, HFFolder):
        notes += run.source.notes()
    return dataclasses.replace(run, notes=(*run.notes, *notes))


def _source_problems(run: ResolvedRun) -> list[str]:
    """A source that the run would move away before it reads it."""
    checkpoints = str(checkpoints_folder(run.config))
    if not isinstance(run.source, Checkpoint) or run.config.checkpoint.resume != "never":
        return []
    if not str(run.source.folder).startswith(f"{checkpoints}/"):
        return []
    return [
        f"model.checkpoint: {run.source.folder} is one of the run's own, which checkpoint.resume=never moves aside; choose "
        "another logging.run_dir"
    ]


def choose_schedule(run: ResolvedRun, world_size: int, assumed: Assumed = Assumptions()) -> ResolvedRun:
    """The run with `parallel.pipeline_schedule: auto` replaced by a name. Raises ConfigError if no schedule fits."""
    parallel = run.config.parallel
    if parallel.pipeline_schedule != "auto":
        return run
    limit = None if parallel.device_memory_gib is None else parallel.device_memory_gib * GIB
    if limit is None and run.config.device != "cpu" and torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory
    best, note = choose(run.config, world_size, limit, assumed)
    return dataclasses.replace(run, config=best.config, notes=(*run.notes, note))


def _plan_steps(run: ResolvedRun) -> tuple[ResolvedRun, list[str]]:
    """The run with `training.steps: -1` replaced by the number that the epochs of data.train take, and problems."""
    training = run.config.training
    steps = steps_of_epochs(run.config)
    if steps == 0:
        return run, [
            f"training.steps: the epochs of data.train take fewer rows than one training.global_batch_size "
            f"({training.batch_size(0)}); raise the epochs or lower the batch size"
        ]
    config = run.config.model_copy(update={"training": training.model_copy(update={"steps": steps})})
    return dataclasses.replace(run, config=config), []


def _find_rate(run: ResolvedRun) -> tuple[ResolvedRun, list[str]]:
    """The run with `optimizer.lr: auto` replaced by what the first rows of the training stream say, and problems.

    The rule is known from fine-tuning on packed conversations, where it bounds the rates that work.
    """
    config, training = run.config, run.config.training
    stream = build_train_stream(config)
    rows = min(training.global_batch_size, training.rows_after(max(1, training.steps)))  # the stream may end with the run
    weights = torch.cat([stream.batch([row]).weights_T for row in range(rows)]).double()
    total, squares = float(weights.sum()), float(weights.square().sum())
    if not total:
        return run, [f"optimizer.lr: auto, but none of the first {rows} rows of data.train has a token with loss; give a number"]
    # With weights of 0 and 1 their number; else as many equal ones as give a mean of the same variance (Kish 1965).
    tokens = total**2 / squares * training.global_batch_size / rows
    rate = 0.0003 * math.sqrt(tokens / 4e6)
    chat = config.data.kind == "chat" or any(source.kind == "chat" for source in config.data.train)
    all_tokens = training.global_batch_size * training.sequence_length
    note = (
        f"optimizer.lr: auto is {rate:.3g}, for {tokens:,.0f} of {all_tokens:,} tokens of a batch with loss. "
        "It is an upper bound, known from packed fine-tuning"
        + ("" if chat else ", and data.train has no conversations")
        + (": adapters want higher ones, some ten times that of all weights" if config.peft else ": try lower rates, too")
    )
    optimizer = config.optimizer.model_copy(update={"lr": rate})
    return dataclasses.replace(run, config=config.model_copy(update={"optimizer": optimizer}), notes=(*run.notes, note)), []


def layout_problems(config: Config, world_size: int) -> list[str]:
    """What is impossible about the layout, a sentence each with the numbers and the way out."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp, cp = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel
    problems = []
    if cp > 1:
        problems.append(
            f"parallel.context_parallel: {cp} is not supported yet; set it to 1 "
            "(shorter rows or more tensor_parallel save memory)"
        )
    if parallel.pipeline_schedule != "auto":
        try:
            placement(parallel.pipeline_schedule, pp, parallel.virtual_stages)
        except ValueError as error:
            problems.append(f"parallel.virtual_stages: {error}")
    ranks = tp * pp * cp
    if world_size % ranks:
        problems.append(
            f"parallel: tensor_parallel {tp} * pipeline_parallel {pp} * context_parallel {cp} = {ranks} does not divide the "
            f"world size {world_size}; launch a multiple of {ranks} ranks (torchrun --nproc-per-node) or change the layout"
        )
    else:
        replicas = world_size // ranks
        unit = training.micro_batch_size * replicas
        unequal = [size for size in training.batch_sizes if size % unit]
        if unequal:
            whole = training.global_batch_size
            key = "global_batch_size" if whole in unequal else "batch_size_rampup"
            problems.append(
                f"training.{key}: {whole if whole in unequal else unequal[0]} is not a multiple of micro_batch_size "
                f"{training.micro_batch_size} * data parallel size {replicas} = {unit}"
            )
    if problem := head_problem(model, tp):
        problems.append(f"model.{problem}")
    if model.intermediate_size < tp:
        problems.append(f"model.intermediate_size: {model.intermediate_size} is less than parallel.tensor_parallel {tp}")
    elif not problem:
        problems += fp8_size_problems(config)
    rows, length = training.micro_batch_size, training.sequence_length
    if parallel.sequence_parallel and rows * length % tp:
        problems.append(
            f"training: micro_batch_size {rows} * sequence_length {length} = {rows * length} tokens are not divisible by "
            f"parallel.tensor_parallel {tp}, which sequence parallelism needs; "
            "change them or set parallel.sequence_parallel=false"
        )
    return problems


def _setting_problems(config: Config) -> list[str]:
    """Contradictions between sections that have nothing to do with the layout."""
    problems = []
    model, length = config.model, config.training.sequence_length
    if model.position_embedding == "learned" and length > model.max_position_embeddings:
        problems.append(
            f"training.sequence_length: {length} positions, but model.max_position_embeddings, the model's table of learned "
            f"positions, has {model.max_position_embeddings}; shorten the rows"
        )
    by_epochs = config.data.kind != "synthetic" and any(source.epochs is not None for source in config.data.train)
    if config.training.steps == -1 and not by_epochs:
        problems.append(
            "training.steps: -1 stands for as many steps as the epochs of data.train take, but no source there has epochs; "
            "give every source its epochs, or give the number of steps"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        problems.append("device: cuda, but torch sees no GPU; use device: cpu or auto")
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config, device)
    problems += kernel_problems(config.kernels, device.type, dtype)
    problems += attention_problems(config.kernels, model, dtype, Available.on(device))
    problems += fp8_device_problems(config, device.type)
    if config.training.regularization.hidden_dropout_profile == "rising" and model.num_hidden_layers == 1:
        problems.append(
            "training.regularization.hidden_dropout_profile: rising begins with 0 in the first layer, and "
            "model.num_hidden_layers is 1: there would be no dropout; use constant"
        )
    if config.training.loss_spike and config.data.kind != "synthetic" and config.data.order == "megatron":
        problems.append(
            "training.loss_spike: data.order megatron plans exactly the rows of training.steps, and has none in place of those "
            "that are left out after a spike; change data.order to shuffled, or remove loss_spike"
        )
    if config.precision.compute == "float64" and config.optimizer.state_dtype == "bfloat16":
        problems.append(
            "optimizer.state_dtype: bfloat16 has no place in precision.compute float64, which is for proofs; remove it"
        )
    place = config.checkpoint.path
    if place is not None and (place.startswith("~") or re.match(r"\w+:(?!//.)", place)):
        problems.append(
            f"checkpoint.path: {place} is neither a folder nor a whole URL; write it out, as in /data/run or s3://bucket/run"
        )
    run_dir = Path(config.logging.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        problems.append(f"logging.run_dir: {run_dir} exists and is not a folder")
    problems += sink_problems(config.logging)
    if config.data.tokenizer is not None:
        try:
            fingerprint(config.data.tokenizer)
        except ValueError as error:
            problems.append(f"data.tokenizer: {error}")
    return problems


def _sample_problems(config: Config) -> list[str]:
    """Why the run could not be sampled, if it is to be."""
    if not config.logging.sample_every:
        return []
    try:
        sample_prompts(config)
    except ValueError as error:
        return [str(error)]
    return []


def _sample_notes(config: Config) -> list[str]:
    """Prompts that nobody replies to."""
    if config.logging.sample_every or config.logging.sample_prompts is None:
        return []
    return ["logging.sample_prompts: has no effect while logging.sample_every is 0; set it to the steps between replies"]


def name_problems(config: Config) -> list[str]:
    """What is wrong with targets and rules for parameters by name, which the whole model knows, without its weights."""
    peft = config.peft
    if peft is not None and (problems := target_problems(config.model, peft)):
        return problems
    if not config.optimizer.rules:
        return []
    model = whole_model(config.model, torch.float32, torch.device("meta"), peft)
    return rule_problems(list(model.parameters()), config.optimizer, peft is not None)


def _schedule_problems(config: Config) -> list[str]:
    """What is impossible about the learning rates, as far as the steps and the peak are known."""
    schedule, training, peak = config.lr_schedule, config.training, config.optimizer.lr
    problems, unit, warmup, decay = [], schedule.unit, schedule.warmup, schedule.decay
    if schedule.kind != "constant" and peak != "auto" and schedule.min_lr > peak:
        problems.append(f"lr_schedule.min_lr: {schedule.min_lr} exceeds optimizer.lr {peak}")
    # A run of fewer steps than its warm-up is a short trial or the first part of a longer run, and no mistake.
    if schedule.kind in ("linear", "cosine") and decay and warmup > decay:
        problems.append(
            f"lr_schedule.warmup_{unit}: {warmup} lie beyond the end of the decay at lr_schedule.decay_{unit} {decay}; "
            "lower the one or raise the other"
        )
    if schedule.kind == "wsd" and decay and training.steps >= 0:
        whole = training.steps if unit == "steps" else training.rows_after(training.steps) * training.sequence_length
        ends = [end for end in schedule.restarts if end < whole] + [whole]
        for start, end in zip([0, *ends], ends, strict=False):
            if warmup < end - start < warmup + decay:
                problems.append(
                    f"lr_schedule.decay_{unit}: a warm-up of {warmup} and a decay of {decay} do not fit into the {end - start} "
                    f"{unit} from {start} to {end}; shorten them, or raise training.steps"
                )
    return problems


def _without_effect(schedule: LrScheduleConfig) -> list[str]:
    """A sentence for every setting that the kind of schedule does not look at. Trying another kind is no mistake."""
    decay, least, restart = ("decay_steps", "decay_tokens"), ("min_lr", "min_lr_ratio"), ("restart_steps", "restart_tokens")
    unused: dict[str, tuple[str, ...]] = {
        "constant": (*decay, *least, *restart, "decay_shape"),
        "inverse_sqrt": (*decay, "decay_shape"),
        "linear": ("decay_shape",),
        "cosine": ("decay_shape",),
        "wsd": (),
    }
    given = [name for name in unused[schedule.kind] if getattr(schedule, name)]
    return [f"lr_schedule.{name}: {getattr(schedule, name)} has no effect with kind {schedule.kind}" for name in given]


def _vocabulary_notes(config: Config) -> list[str]:
    """A tokenizer that has more tokens than the model: those beyond may be missing from these data, but not from the next."""
    sizes = tokenizer_sizes(config)
    if config.data.tokenizer is not None and not sizes:  # else every rank would load it to hear what the data sets say
        with contextlib.suppress(ValueError):  # training does without its content
            sizes["data.tokenizer"] = (config.data.tokenizer, vocabulary_size(config.data.tokenizer))
    model = config.model
    setting = "resize_vocab" if model.hf or model.checkpoint else "vocab_size"
    return [
        f"{where}: the tokenizer {path} has {size} tokens, the model {model.vocab_size}; model.{setting}={size} gives it all"
        for where, (path, size) in sizes.items()
        if size > model.vocab_size
    ]


def _new_row_notes(run: ResolvedRun) -> list[str]:
    """New tokens whose rows, all of them the mean of the others, are frozen: the model could never tell one from another."""
    config, stored = run.config, run.stored_model().vocab_size
    if config.model.vocab_size <= stored or not is_frozen("embedding.weight", config.optimizer, config.peft is not None):
        return []
    return [
        f"model.resize_vocab: the rows of tokens {stored} to {config.model.vocab_size - 1} begin alike and are frozen, so the "
        'model cannot tell these tokens apart; optimizer.rules=[{match: "[eh]*.weight", frozen: false}] trains embedding and head'
    ]


def _spike_notes(config: Config) -> list[str]:
    """What going back after a spike of the loss will not do, or will do besides."""
    if not config.training.loss_spike:
        return []
    notes = []
    if not config.checkpoint.every_steps:
        notes.append("training.loss_spike: without checkpoint.every_steps a run has no checkpoint of its own to go back to")
    if config.data.kind != "synthetic" and any(source.epochs is not None for source in config.data.train):
        notes.append("training.loss_spike: rows left out after a spike are replaced by rows beyond the epochs of data.train")
    return notes

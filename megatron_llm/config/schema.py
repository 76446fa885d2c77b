"""The sections of a run's configuration, with their names, meanings, defaults and the checks local to one section.

Names follow Megatron for the layout (`tensor_parallel`, ...); the model's section is `config/model.py`.
Checks that involve two sections, the world size, files or an HF folder live in `training/resolve.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_llm.config.model import ModelConfig
from megatron_llm.config.optimization import LrScheduleConfig, OptimizerConfig, PrecisionConfig
from megatron_llm.config.peft import PeftConfig
from megatron_llm.config.regularization import RegularizationConfig
from megatron_llm.config.section import PositiveInt, Section


class ParallelConfig(Section):
    """The layout. Data parallelism is what is left of the world: world / (tensor * pipeline * context)."""

    tensor_parallel: int = Field(default=1, gt=0)
    pipeline_parallel: int = Field(default=1, gt=0)
    context_parallel: int = Field(default=1, gt=0)
    sequence_parallel: bool = Field(
        default=True, description="shard activations between TP regions along tokens; no effect at tensor_parallel 1"
    )
    pipeline_schedule: Literal[
        "gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "auto"
    ] = Field(default="1f1b", description="auto: the one with the shortest simulated step that fits into device_memory_gib")
    virtual_stages: int = Field(
        default=1,
        gt=0,
        description="pieces of the model on a pipeline rank: any number for interleaved and breadth_first, two for zb_v, v_half "
        "and v_min whether set or not, one for the others",
    )
    zero_stage: Literal[0, 1] = Field(
        default=1,
        description="1: a data-parallel rank keeps its share of masters and moments; 0: every rank keeps all of them",
    )
    bucket_size: int | None = Field(
        default=None,
        gt=0,
        description="elements of a gradient bucket, the unit of communication; if unset an eighth of a rank's parameters, but at "
        "least a million for each data-parallel rank, and at most 40 million or that",
    )
    overlap: bool = Field(
        default=True, description="exchange gradients during the backward and new weights during the next forward"
    )
    device_memory_gib: float | None = Field(
        default=None, gt=0, description="what pipeline_schedule: auto may use of a device; all that a GPU has if unset"
    )
    timeout_seconds: float = Field(default=600.0, gt=0, le=1e7, description="a collective that waits longer ends the run")

    @property
    def folded(self) -> bool:
        """Whether the layers run down the pipeline ranks and up again, which puts the first and the last on rank 0."""
        assert self.pipeline_schedule != "auto", "the schedule is chosen before anything is built"
        return self.pipeline_parallel == 1 or self.pipeline_schedule in ("zb_v", "v_half", "v_min")


class SourceConfig(Section):
    """One data set: the PREFIX of PREFIX.bin and PREFIX.idx."""

    path: str
    weight: float | None = Field(
        default=None, gt=0, description="share of the rows, relative to the other sources; 1 if neither this nor epochs is set"
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="how often the source is read, relative to the other sources, and exactly so with training.steps: -1; "
        "all sources of data.train have weights, or all have epochs",
    )
    name: str | None = Field(default=None, description="name in the metrics; the file name if unset")
    kind: Literal["pretrain", "chat"] | None = Field(default=None, description="data.kind if unset")

    @model_validator(mode="after")
    def _weight_or_epochs(self) -> SourceConfig:
        if self.weight is not None and self.epochs is not None:
            raise ValueError(f"weight {self.weight} and epochs {self.epochs} both say how much is read; remove one of them")
        return self


class ConversationAugmentConfig(Section):
    """Conversations of training that variants replace, for the whole run: data sets beside theirs that `preprocess-chat` makes.

    Attributes:
        rates: those that are not 0, by the name of the variant.
    """

    flip: float = Field(default=0.0, ge=0, le=1, description="share from whose reply the question is learned")
    predict_instruction: float = Field(
        default=0.0, ge=0, le=1, description="share from whose question and reply the instruction is learned"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**31, description="chooses them; training.seed if unset")

    @property
    def rates(self) -> dict[str, float]:
        rates = {"flip": self.flip, "predict_instruction": self.predict_instruction}
        return {name: rate for name, rate in rates.items() if rate}

    @model_validator(mode="after")
    def _rates_are_shares(self) -> ConversationAugmentConfig:
        if sum(self.rates.values()) > 1:
            raise ValueError(f"flip {self.flip} and predict_instruction {self.predict_instruction} are more than all; lower one")
        if self.seed is not None and not self.rates:
            raise ValueError(f"seed {self.seed} chooses nothing while all rates are 0; set one, or remove it")
        return self


class DataConfig(Section):
    """Where tokens come from and how they become rows of `training.sequence_length`."""

    kind: Literal["pretrain", "chat", "synthetic"] = "pretrain"
    train: list[SourceConfig] = []
    valid: list[SourceConfig] = []
    tokenizer: str | None = Field(default=None, description="tokenizer folder that travels with checkpoints and exports")
    packing: Literal["auto", "concat", "best_fit", "in_order", "none"] = Field(
        default="auto",
        description="how rows are filled. pretrain: concat (documents back to back, cut into rows) or best_fit (a document is "
        "cut only if it is longer than a row); chat: best_fit, in_order or none (one conversation a row). auto, or what a kind "
        "does not know: concat for pretrain, best_fit for chat",
    )
    order: Literal["shuffled", "file", "short_to_long", "megatron"] = Field(
        default="shuffled",
        description="of training rows. short_to_long: every epoch from short conversations to long ones, packed in_order or "
        "none, so that a row has like lengths. megatron: the rows of Megatron's GPTDataset in its order, for a run that moves "
        "here; depends on training.steps, which must not change during the run",
    )
    megatron_split: str = Field(
        default="1,0,0", description="order megatron: the shares of training, validation and test that the run was made with"
    )
    boundary_loss: Literal["auto", "masked", "trained"] = Field(
        default="auto",
        description="packing concat: does the last token of a document learn to predict the first of the next? "
        "auto: masked with training.document_isolation, else trained",
    )
    train_on: Literal["assistant", "all", "last_assistant"] = Field(
        default="assistant",
        description="chat: which tokens carry loss: those of replies, of the last reply, or all; never those of messages with "
        "train: false (validation: always replies, whatever the messages weigh)",
    )
    prompt_loss_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="chat: loss weight of tokens that train_on does not name: of system, user, tool, template, and of replies "
        "before the last one with last_assistant",
    )
    overlong: Literal["error", "drop", "truncate", "split_turns"] = Field(
        default="error",
        description="chat: those longer than a row. split_turns: cut where a user speaks, with BOS and system message repeated",
    )
    conversation_augment: ConversationAugmentConfig = ConversationAugmentConfig()

    @model_validator(mode="after")
    def _shares_are_comparable(self) -> DataConfig:
        with_epochs = [source.epochs is not None for source in self.train]
        if any(with_epochs) and not all(with_epochs):
            raise ValueError(
                f"train.{with_epochs.index(True)} has epochs and train.{with_epochs.index(False)} has not; "
                f"give all sources epochs, or all weights"
            )
        for index, source in enumerate(self.valid):
            if source.weight is not None or source.epochs is not None:
                raise ValueError(f"valid.{index} has weight or epochs, but a validation set is read once, by itself; remove it")
        return self

    @model_validator(mode="after")
    def _prompts_have_one_weight(self) -> DataConfig:
        if self.prompt_loss_weight and self.train_on == "all":
            raise ValueError(
                f"prompt_loss_weight {self.prompt_loss_weight} says what train_on all says with 1: remove it, or set train_on to "
                f"assistant"
            )
        return self


class BatchSizeRampupConfig(Section):
    """A global batch that grows from `start` to `training.global_batch_size`, as with Megatron's --rampup-batch-size."""

    start: int = Field(gt=0, description="rows of the first steps")
    increment: int = Field(gt=0, description="rows that each growth adds")
    rows: int = Field(gt=0, description="rows after which the batch is whole; every size lasts for an equal part of them")


class LossSpikeConfig(Section):
    """Going back to the last checkpoint, past the rows since then, when the loss leaps (as PaLM did: arXiv 2204.02311, 5.1)."""

    threshold: float = Field(default=6.0, gt=0, description="standard deviations above the mean of the last steps' losses")
    window: int = Field(default=64, gt=1, le=1024, description="steps that mean and deviation are taken over")
    max_rollbacks: int = Field(default=3, gt=0, description="one more ends the run")


class TrainingConfig(Section):
    """How long, on what batch. A row is `sequence_length` tokens; batch sizes count rows."""

    sequence_length: int = Field(gt=0)
    micro_batch_size: int = Field(default=1, gt=0, description="rows per forward pass of one model replica")
    global_batch_size: int = Field(gt=0, description="rows per optimizer step over all replicas")
    batch_size_rampup: BatchSizeRampupConfig | None = Field(default=None, description="smaller batches at the start of the run")
    steps: int = Field(ge=-1, le=10**9, description="-1: as many as the epochs of data.train take")
    seed: int = Field(default=1234, ge=0, lt=2**31)
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only after the last step")
    eval_rows: int = Field(default=64, gt=0, description="rows of each validation set")
    document_isolation: bool = Field(default=True, description="attention and positions restart at every document")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="what backward computes again instead of keeping it. full: whole layers, from their inputs; "
        "selective: recompute_modules. The numbers stay the same to the bit",
    )
    recompute_every: int = Field(default=1, gt=0, description="recompute in the layers whose index this divides")
    recompute_modules: list[Literal["attention", "norms", "activation"]] = Field(
        default=["attention", "norms", "activation"],
        description="of recompute: selective. attention: rotation, scores and their product with the values; norms: what "
        "normalized inputs of the projections are; activation: the product of gate and up",
    )
    regularization: RegularizationConfig = RegularizationConfig()
    max_skipped_steps: int = Field(
        default=50, ge=0, description="steps in a row without a finite loss or gradient that end the run; 0: never"
    )
    loss_spike: LossSpikeConfig | None = None
    check_replicas_every: int = Field(
        default=0, ge=0, description="steps between checks that all copies of weights are equal to the bit; 0: never"
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        le=1e7,
        description="after so many minutes since the launch the run finishes its step, saves and stops, as after a signal",
    )
    hang_timeout: float = Field(
        default=480.0,
        ge=0,
        le=1e7,
        description="seconds without any progress after which all ranks write their stacks to run_dir/stacks and end; 0: never. "
        "Less than parallel.timeout_seconds, or that ends the ranks that wait before",
    )

    @model_validator(mode="after")
    def _rampup_reaches_the_batch(self) -> TrainingConfig:
        ramp, whole = self.batch_size_rampup, self.global_batch_size
        if ramp and (ramp.start >= whole or (whole - ramp.start) % ramp.increment):
            raise ValueError(
                f"batch_size_rampup grows from {ramp.start} rows by {ramp.increment} at a time and never is global_batch_size "
                f"{whole}; choose a smaller start, and an increment that divides the difference"
            )
        return self

    @property
    def batch_sizes(self) -> range:
        """Every size that the global batch may have, in rows, the last of which is `global_batch_size`."""
        ramp, whole = self.batch_size_rampup, self.global_batch_size
        return range(ramp.start, whole + 1, ramp.increment) if ramp else range(whole, whole + 1)

    def batch_size(self, rows: int) -> int:
        """Rows of the step that begins when `rows` rows are consumed."""
        ramp, sizes = self.batch_size_rampup, self.batch_sizes
        return sizes[rows * (len(sizes) - 1) // ramp.rows] if ramp and rows < ramp.rows else self.global_batch_size

    def rows_after(self, steps: int, rows: int = 0) -> int:
        """Rows consumed when `steps` more steps are taken, from the moment when `rows` are."""
        for count, size in self._growth(rows):
            taken = min(count, steps)
            rows, steps = rows + taken * size, steps - taken
        return rows + steps * self.global_batch_size

    def steps_within(self, rows: int) -> int:
        """Whole steps from the start of a run that `rows` rows are enough for."""
        steps = 0
        for count, size in self._growth(0):
            if rows < count * size:
                return steps + rows // size
            steps, rows = steps + count, rows - count * size
        return steps + rows // self.global_batch_size

    def _growth(self, rows: int) -> Iterator[tuple[int, int]]:
        """(steps, rows of each of them) until the batch is whole, from the moment when `rows` rows are consumed."""
        ramp, growths = self.batch_size_rampup, len(self.batch_sizes) - 1
        while ramp and rows < ramp.rows:
            size = self.batch_size(rows)
            grows_at = -(-(rows * growths // ramp.rows + 1) * ramp.rows // growths)
            count = -(-(grows_at - rows) // size)
            yield count, size
            rows += count * size


class CheckpointConfig(Section):
    """When checkpoints are written, how many stay, and whether a run starts from the newest one in its folder."""

    every_steps: int = Field(default=0, ge=0, description="0: only after the last step or when stopped by a signal")
    keep_last: int = Field(default=3, gt=0, description="checkpoints; older ones are deleted")
    keep_every: int = Field(default=0, ge=0, description="those of steps that this divides are never deleted; 0: none")
    path: str | None = Field(
        default=None,
        description="where they are: a folder or a URL such as s3://bucket/run; logging.run_dir/checkpoints if unset",
    )
    asynchronous: bool = Field(
        default=True,
        description="write from a copy in host memory while training goes on; false: training waits, and there is no copy",
    )
    resume: Literal["auto", "strict", "never"] = Field(
        default="auto",
        description="go on from the newest checkpoint. A damaged one is named, and then auto: the one before is taken, "
        "strict: the run ends. never: start anew, and move an earlier run aside",
    )
    verify: bool = Field(
        default=True, description="compare all checksums before going on: each byte is read once more, by one rank"
    )


class WandbConfig(Section):
    """A run of Weights & Biases that gets the metrics; its id is made once and kept in run_dir/sinks."""

    project: str
    entity: str | None = Field(default=None, description="user or team; the default of the account if unset")
    name: str | None = Field(default=None, description="shown for the run; the last part of run_dir if unset")
    group: str | None = None
    tags: list[str] = []
    mode: Literal["online", "offline"] | None = Field(
        default=None, description="offline: into run_dir/wandb, for `wandb sync`; if unset what WANDB_MODE says, else online"
    )


class LoggingConfig(Section):
    """Where a run writes, and how often it says something."""

    run_dir: str = "runs/default"
    every_steps: int = Field(default=1, gt=0)
    trace_steps: list[Annotated[int, PositiveInt]] = Field(
        default=[], description="steps whose pipeline is measured, action by action, into run_dir/traces"
    )
    tensorboard: bool = Field(default=False, description="all metrics into run_dir/tensorboard, too")
    wandb: WandbConfig | None = Field(default=None, description="all metrics to Weights & Biases, too")
    straggler_every: int = Field(
        default=100, ge=0, description="steps between comparisons of the time that each rank works without waiting; 0: never"
    )
    straggler_factor: float = Field(
        default=1.2, gt=1, description="times the median of its peers of the same pipeline stage that a rank is warned of"
    )
    sample_every: int = Field(
        default=0,
        ge=0,
        description="steps between replies of the model to prompts, in the log and run_dir/samples.jsonl; 0: none",
    )
    sample_prompts: list[str] | str | None = Field(
        default=None,
        description="what it replies to: texts, which are a user's messages if the data are of kind chat, or a file as "
        "`generate --prompts` reads it; if unset the first conversations of the validation set up to the reply",
    )
    sample_tokens: int = Field(default=64, gt=0, description="length of a reply that does not end by itself")
    sample_temperature: float = Field(default=0.0, ge=0, le=1e3, description="0: always the most likely token")
    sample_top_k: int = Field(default=0, ge=0, description="sample among the k most likely tokens; 0: all")
    sample_top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample among the likeliest tokens with this total probability"
    )


Implementation = Literal["auto", "torch", "triton"]


class KernelsConfig(Section):
    """Which implementation of an operation runs. `auto`: the fused kernel in Triton on a GPU, torch on a CPU and in float64."""

    attention: Literal["auto", "flash4", "flash3", "flash2", "varlen", "cudnn", "triton", "sdpa", "reference"] = Field(
        default="auto",
        description="auto: on a GPU for each layer the first in this order that can; sdpa elsewhere. flash4, flash3, flash2: the "
        "packages of FlashAttention, if installed; varlen, cudnn, sdpa: torch's; triton: ours; reference: explicit matrices",
    )
    norm: Implementation = Field(default="auto", description="RMSNorm and LayerNorm, with the addition before them")
    rope: Implementation = Field(default="auto", description="rotary embeddings of queries and keys, in place")
    activation: Implementation = Field(default="auto", description="SwiGLU, GeGLU and plain activations")
    cross_entropy: Implementation = Field(default="auto", description="statistics of logits, and their gradient in place")
    embedding: Implementation = Field(default="auto", description="the gradient of the embedding, into the main gradients")
    optimizer: Implementation = Field(default="auto", description="the update, and the norm of gradients")
    deterministic: bool = Field(
        default=False,
        description="the same bits whenever a step is run again, on a GPU too; some kernels are slower then",
    )


class Config(Section):
    """A whole run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    optimizer: OptimizerConfig
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    peft: PeftConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    kernels: KernelsConfig = KernelsConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"

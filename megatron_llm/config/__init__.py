"""Every setting of a run: one pydantic model per section, loaded from YAML plus dotted overrides.

This level (L0) imports no torch, so configs can be checked on a login node in milliseconds. Everything above reads
settings from the `Config` object that is passed to it; nothing reads environment variables or globals.
"""

from megatron_llm.config.load import ConfigError, parse_config, read_raw_config, sentences
from megatron_llm.config.model import ModelConfig, RopeScalingConfig, with_present_names
from megatron_llm.config.optimization import LrScheduleConfig, OptimizerConfig, ParameterRuleConfig, PrecisionConfig
from megatron_llm.config.peft import PeftConfig
from megatron_llm.config.regularization import RegularizationConfig
from megatron_llm.config.schema import (
    BatchSizeRampupConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    KernelsConfig,
    LoggingConfig,
    LossSpikeConfig,
    ParallelConfig,
    SourceConfig,
    TrainingConfig,
    WandbConfig,
)

__all__ = [
    "BatchSizeRampupConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "KernelsConfig",
    "LoggingConfig",
    "LossSpikeConfig",
    "LrScheduleConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParameterRuleConfig",
    "PeftConfig",
    "PrecisionConfig",
    "RegularizationConfig",
    "RopeScalingConfig",
    "SourceConfig",
    "TrainingConfig",
    "WandbConfig",
    "parse_config",
    "read_raw_config",
    "sentences",
    "with_present_names",
]

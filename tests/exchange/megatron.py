"""The oracle of the exchange tests: megatron-core's own GPTModel, saved and loaded by its own dist_checkpointing, on CPU.

The functions run on worker ranks (`tests.ranks.run_ranks`). megatron-core expects CUDA in a few places that have nothing to do
with the numbers; `on_cpu` replaces those and nothing else:

- `torch.cuda.current_device`: RoPE moves its frequencies there; "cpu" is a device too.
- `Tensor.cuda`: the copy of a tied embedding on the last stage is summed there.
- `torch.cuda.synchronize`: waits for copies to the host before a save.
- the tracker of CUDA random states, forked around dropout, which is 0 here.
- the queue through which the writing process answers: by default a server process of its own, started by `spawn`.
"""

from __future__ import annotations

import contextlib
import io
import queue
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

MODEL: dict[str, Any] = {  # heads of 8 times 6 are 48, not the hidden size; three query heads share a key head
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-4,
}
VOCAB, PADDED = 67, 96
ROTARY_BASE = 5000


def arguments(tied: bool, **changes: Any) -> Namespace:
    """What Megatron-LM would have put into `args` of common.pt for this model."""
    values = {name: value for name, value in MODEL.items() if name != "layernorm_epsilon"}
    values |= {
        "norm_epsilon": MODEL["layernorm_epsilon"], "group_query_attention": True, "swiglu": True, "normalization": "RMSNorm",
        "add_bias_linear": False, "add_qkv_bias": False, "position_embedding_type": "rope", "rotary_base": ROTARY_BASE,
        "rotary_percent": 1.0, "rotary_interleaved": False, "use_rope_scaling": False, "max_position_embeddings": 64,
        "untie_embeddings_and_output_weights": not tied, "vocab_size": VOCAB, "padded_vocab_size": PADDED, 
        "make_vocab_size_divisible_by": 16, "tensor_model_parallel_size": 2,
        "params_dtype": torch.float32, "num_experts": None, "attention_dropout": 0.1,
    }  # fmt: skip
    return Namespace(**{**values, **changes})


@contextlib.contextmanager
def on_cpu(tp: int = 1, pp: int = 1) -> Iterator[None]:
    """megatron-core usable on CPU, its process groups made for this layout; see the top of the file."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer import dot_product_attention

    class NoTracker:
        def fork(self, *args: Any) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    with contextlib.ExitStack() as stack:
        if not dist.is_initialized():  # run_ranks makes no group for one rank
            store = stack.enter_context(tempfile.TemporaryDirectory())
            dist.init_process_group("gloo", store=dist.FileStore(f"{store}/store", 1), rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
        stack.enter_context(mock.patch.multiple(torch.cuda, current_device=lambda: "cpu", synchronize=lambda *args: None))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor))
        stack.enter_context(mock.patch.object(filesystem_async, "_results_queue", queue.Queue()))
        tracker = mock.Mock(get_cuda_rng_tracker=lambda *args: NoTracker())
        stack.enter_context(mock.patch.object(dot_product_attention, "tensor_parallel", tracker))
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        stack.callback(parallel_state.destroy_model_parallel)
        yield


def gpt_model(tied: bool, dtype: torch.dtype = torch.float32, vocab: int = PADDED, layers: int = 3, **settings: Any) -> Any:
    """A GPTModel with megatron-core's own layers, with random weights everywhere: norms of ones would hide a mix-up."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **{**MODEL, "num_layers": layers},
        use_cpu_initialization=True, normalization="RMSNorm",
        add_bias_linear=False, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0, params_dtype=dtype,
        pipeline_dtype=dtype, bias_activation_fusion=False, masked_softmax_fusion=False, bias_dropout_fusion=False,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )  # fmt: skip
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=vocab,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
        rotary_base=ROTARY_BASE,
        parallel_output=False,
        **settings,
    ).to(dtype)
    return model


def save(
    folder: str, tied: bool = False, dtype: torch.dtype = torch.float32, tp: int = 1, pp: int = 1, per_layer: bool = False,
    singleton: bool = False, with_args: bool = True, masters: bool = False,
    layers: int = 3, args: dict[str, Any] | None = None, **settings: Any,
) -> None:  # fmt: skip
    """Save random weights, the same in every layout, as megatron-core does, under `folder`/iter_0000007.

    Args:
        per_layer, singleton: keys with the layer's number in them; gate and up under keys of their own too.
        masters: with the optimizer's float32 masters, twice the weights so that they can be told apart.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    with on_cpu(tp, pp):
        model = gpt_model(tied, dtype, layers=layers, **settings)
        metadata = {"non_homogeneous_layers": per_layer, "singleton_local_shards": singleton}
        state = {"model": model.sharded_state_dict(metadata=metadata)}
        for entry in nested_values(state):
            if getattr(entry, "data", None) is not None:
                _fill(entry)
        if masters:
            entries = [entry for entry in state["model"].values() if getattr(entry, "data", None) is not None]
            prefix = "optimizer.state.fp32_param"
            state["optimizer"] = {
                str(i): make_sharded_optimizer_tensor(entry, entry.data.detach().float() * 2, prefix)
                for i, entry in enumerate(entries)
            }
        if with_args:
            state |= {"args": arguments(tied, num_layers=layers, **(args or {})), "iteration": 7, "checkpoint_version": 3.0}
        path = Path(folder) / "iter_0000007"
        if dist.get_rank() == 0:
            path.mkdir(parents=True)
            (Path(folder) / "latest_checkpointed_iteration.txt").write_text("7")
        dist.barrier()
        dist_checkpointing.save(state, str(path))


def _fill(entry: Any) -> None:
    """Values by tensor, layer and place, so that every layout and every form of keys holds parts of the same model."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    filled = []
    for part in parts:
        name, layer, half = re.fullmatch(r"(?:decoder\.layers\.(\d+)\.)?(.*?)(_w|_v)?", part.key).group(2, 1, 3)  # type: ignore
        first = part.prepend_axis_num
        shape, offset = list(part.global_shape[first:]), list(part.global_offset[first:])
        if half:
            shape[0], offset[0] = 2 * shape[0], offset[0] + (shape[0] if half == "_v" else 0)
        number = part.global_offset[0] if first else int(layer or 0)
        generator = torch.Generator().manual_seed(sum(name.removeprefix("decoder.layers.").encode()) * 100 + number)
        whole = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)
        filled.append(whole[tuple(slice(o, o + n) for o, n in zip(offset, part.local_shape, strict=True))])
    with torch.no_grad():
        entry.data.copy_(torch.cat(filled))


def save_and_run(folder: str, ids: list[int], rope: dict[str, Any], **options: Any) -> torch.Tensor:
    """`save` on one rank; returns the logits [tokens, vocabulary] of the very weights, by megatron-core's forward."""
    save(folder, **options, **rope)
    with on_cpu():
        model = gpt_model(options.get("tied", False), **rope)
        _load_into(model, Path(folder) / "iter_0000007")
        positions = torch.arange(len(ids))[None]
        mask = torch.triu(torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool), 1)
        with torch.no_grad():
            return model(torch.tensor([ids]), positions, mask)[0]


def _load_into(model: Any, folder: Path) -> tuple[set[str], set[str]]:
    """Load with every key compared. Returns (keys that the file lacks, keys that the model does not ask for).

    megatron-core sees it from the file: what the model asks for in vain is "unexpected" there.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    metadata = dist_checkpointing.load_content_metadata(str(folder))
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    loaded, unwanted, lacking = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    model.load_state_dict(loaded["model"])
    return lacking, unwanted


def load_exported(
    folder: str, tied: bool, dtype: torch.dtype, tp: int = 1, pp: int = 1, vocab: int = PADDED, layers: int = 3
) -> tuple[dict[str, torch.Tensor], set[str], set[str], int]:
    """What a GPTModel of this layout holds after loading an export: {name: this rank's part}, keys that the export lacks,
    keys that the model does not ask for, number of this rank's first layer."""
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    with on_cpu(tp, pp):
        model = gpt_model(tied, dtype, vocab, layers)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        lacking, unwanted = _load_into(model, Path(folder))
        offset = get_transformer_layer_offset(model.config)
        return {name: value.detach() for name, value in model.named_parameters()}, lacking, unwanted, offset


def common(folder: str) -> dict[str, Any]:
    """common.pt as megatron-core reads it, and the content's metadata."""
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(folder)


class Evil:
    """Pickled, it asks for a function that leaves a trace when called."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.trace, "w")


def as_bytes(value: Any) -> bytes:
    """What torch.save writes for `value`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

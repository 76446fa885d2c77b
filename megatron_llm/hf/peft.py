"""LoRA adapters in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Which module of transformers' model holds which of our linear layers is said by the family's table. Where a folder keeps several
in one matrix (GPT-NeoX's query_key_value, Phi-3's gate_up_proj), PEFT has one adapter, and ours, one for each part, are exactly

    A = the parts' A, one below the other [n R, I]        B = their B as blocks, zero elsewhere [O, n R]

with rank n R and an alpha that keeps the scale (`rank_pattern`, `alpha_pattern`). Such an adapter is read back as it was. One
that PEFT made there has one A for all parts, and each part begins with a copy of it: the same function, of which the copies
then learn apart. GPT-2's transposed matrices make no difference: PEFT keeps A and B as of a linear layer.

`cli/export.py` calls `export_adapter`; `training/resolve.py` and `training/completion.py` read with `PeftFolder`. Torch-free but
for the tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_llm.config import ModelConfig, PeftConfig
from megatron_llm.config.peft import LORA_A, LORA_B
from megatron_llm.hf.assets import CONFIG, exported_files
from megatron_llm.hf.export import family_of, json_bytes
from megatron_llm.hf.family import Family, Piece, Rows, StoredTensor
from megatron_llm.hf.files import open_adapter_file
from megatron_llm.hf.whole import whole_folder
from megatron_llm.models.lora import adapted_layers, linear_layers, shortest_targets, target_problems
from megatron_llm.ops.safetensors import Entry, write_bytes, write_safetensors
from megatron_llm.ops.storage import LocalFolder
from megatron_llm.ops.tensor_file import TensorFile, TensorInfo, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_llm.parallel.shard import Box, Part, TensorSource

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHOWN = 5

_REFUSED = {
    "use_dora": "DoRA", "lora_bias": "biases of B", "modules_to_save": "whole modules", "target_parameters": "target_parameters",
    "trainable_token_indices": "trained tokens", "layer_replication": "layer_replication", "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA", "alora_invocation_tokens": "aLoRA", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA", "arrow_config": "Arrow",
}  # fmt: skip
"""Keys of adapter_config.json that make it something else than LoRA of weights, and what."""
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model as it is."""


@dataclass(frozen=True)
class _Module:
    """A linear layer of transformers' model.

    Attributes:
        name: the module. stored: its matrix. pieces: the linear layers of ours in it that have an adapter.
    """

    name: str
    stored: StoredTensor
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        shape = self.stored.shape[::-1] if self.stored.transposed else self.stored.shape
        return shape[0], shape[1]


def _modules(family: Family, model: ModelConfig, adapted: Collection[str]) -> list[_Module]:
    """The modules that hold the linear layers `adapted`. Raises ValueError if the family spreads one over several."""
    found: list[_Module] = []
    missing = [f"{name}.weight" for name in adapted]
    for stored in family.stored_tensors(model):
        pieces = tuple(piece for piece in stored.pieces if piece.name in missing)
        if not pieces:
            continue
        for piece in pieces:
            if not stored.name.endswith(".weight") or sum(rows.count for rows in piece.rows) != piece.shape[0]:
                raise ValueError(
                    f"{family.architecture} keeps {piece.name} in several tensors, which no adapter of PEFT can be of"
                )
            missing.remove(piece.name)
        found.append(_Module(stored.name.removesuffix(".weight"), stored, pieces))
    return found


# Export


def export_adapter(
    source: TensorSource,
    model: ModelConfig,
    peft: PeftConfig,
    assets: Mapping[str, bytes],
    output: str | Path,
    *,
    base: str | None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write the adapters as a folder that `peft.PeftModel.from_pretrained` loads; return the names of its files.

    Args:
        source: of the adapters under their logical names. assets: as `collect_assets` made them; the tokenizer is copied.
        base: what the adapters belong to: `base_model_name_or_path`.
        dtype: safetensors' name of the dtype of the tensors, by default float32.

    Raises ValueError if `output` is in the way, or the adapters belong to no model that a folder describes.
    """
    family = family_of(assets, model)
    if CONFIG in assets:
        stored = family.fields(json.loads(assets[CONFIG]))["vocab_size"]
        if stored != model.vocab_size:
            raise ValueError(
                f"the base model has {stored} tokens and this one {model.vocab_size} (model.resize_vocab): the adapter alone "
                "would lack the new rows; leave out --adapter, which exports the whole model"
            )
    modules = _modules(family, model, adapted_layers(model, peft))
    entries = [entry for module in modules for entry in _entries(source, module, peft.rank, dtype or "F32")]
    files = {name: data for name, data in exported_files(assets).items() if name != "generation_config.json"}
    with whole_folder(output, overwrite, "adapter", _foreign) as folder:
        place = LocalFolder(folder)
        with place.create(_WEIGHTS) as sink:
            write_safetensors(sink, entries, {"format": "pt"}, None)
        for name, content in {**files, ADAPTER_CONFIG: json_bytes(_config(modules, family, model, peft, base))}.items():
            write_bytes(place, name, content)
    return sorted(path.name for path in Path(output).iterdir())


def _foreign(folder: Path) -> str | None:
    return None if (folder / ADAPTER_CONFIG).is_file() else f"has no {ADAPTER_CONFIG}"


def _entries(source: TensorSource, module: _Module, rank: int, dtype: str) -> list[Entry]:
    outputs, inputs = module.size
    whole = len(module.pieces) * rank
    return [
        Entry(
            f"{_PREFIX}{module.name}.lora_{letter}.weight", TensorInfo(dtype, shape), partial(make, source, module, rank, dtype)
        )
        for letter, shape, make in (("A", (whole, inputs), _stacked_a), ("B", (outputs, whole), _blocks_of_b))
    ]


def _stacked_a(source: TensorSource, module: _Module, rank: int, dtype: str) -> Tensor:
    import torch

    shape = (rank, module.size[1])
    return torch.cat([_whole(source, _adapter(piece, LORA_A), shape) for piece in module.pieces]).to(torch_dtype(dtype))


def _blocks_of_b(source: TensorSource, module: _Module, rank: int, dtype: str) -> Tensor:
    import torch

    result = torch.zeros(module.size[0], len(module.pieces) * rank, dtype=torch_dtype(dtype))
    for number, piece in enumerate(module.pieces):
        b = _whole(source, _adapter(piece, LORA_B), (piece.shape[0], rank))
        for rows in piece.rows:
            block = result[rows.stored : rows.stored + rows.count, number * rank : (number + 1) * rank]
            block.copy_(b[rows.logical : rows.logical + rows.count])
    return result


def _adapter(piece: Piece, suffix: str) -> str:
    return piece.name.removesuffix(".weight") + suffix


def _whole(source: TensorSource, name: str, shape: tuple[int, int]) -> Tensor:
    from megatron_llm.parallel.shard import Box, Part

    return source.read(Part(name, shape, ()), Box.full(shape))


def _config(modules: list[_Module], family: Family, model: ModelConfig, peft: PeftConfig, base: str | None) -> dict[str, Any]:
    """adapter_config.json."""
    targets = _target_modules(modules, family, model)
    several = {target: len(module.pieces) for module, target in zip(modules, targets, strict=True) if len(module.pieces) > 1}
    alpha = {target: peft.alpha * (math.sqrt(count) if peft.rslora else count) for target, count in several.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": peft.rank,
        "lora_alpha": _plain(peft.alpha),
        "rank_pattern": {target: count * peft.rank for target, count in several.items()},
        "alpha_pattern": {target: _plain(value) for target, value in alpha.items()},
        "use_rslora": peft.rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(module.stored.transposed for module in modules),
        "init_lora_weights": True,
        "target_modules": list(dict.fromkeys(targets)),
        "modules_to_save": None,
        "inference_mode": True,
    }


def _plain(number: float) -> float:
    """A whole number as an int, which is how PEFT writes it."""
    return int(number) if number == int(number) else number


def _target_modules(modules: list[_Module], family: Family, model: ModelConfig) -> list[str]:
    """What `target_modules` says for each: the end of its name, as short as it fits no other module, or the whole name.

    Those with one target have adapters of the same parts: rank and alpha go by it.
    """
    everything = {module.name: module for module in _modules(family, model, linear_layers(model))}
    chosen = {module.name: module for module in modules}

    def parts(module: _Module | None) -> list[str]:
        return [piece.name.split(".", 2)[2] for piece in module.pieces] if module else []

    def target(module: _Module) -> str:
        words = module.name.split(".")
        for length in range(1, len(words)):
            end = ".".join(words[-length:])
            if any(word.isdigit() for word in words[-length:]):
                break
            fitting = [name for name in everything if name.endswith(f".{end}")]
            if all(parts(chosen.get(name)) == parts(module) for name in fitting):
                return end
        return module.name

    return [target(module) for module in modules]


# Reading


class PeftFolder:
    """A folder with an adapter that PEFT, or `export_adapter`, wrote.

    Raises ValueError if it is none, or has what is no LoRA of weights: DoRA, biases, whole modules, ...
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / ADAPTER_CONFIG
        if not file.is_file():
            what = f"has no {ADAPTER_CONFIG}" if self.path.is_dir() else "is not a folder"
            raise ValueError(f"{self.path} {what}; expected a folder that peft's save_pretrained wrote")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            self.rank, self.alpha = int(config["r"]), float(config["lora_alpha"])
            self._alphas = {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}
            for key in self._alphas:
                re.compile(key)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, re.error) as error:
            raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error
        self.rslora = bool(config.get("use_rslora"))
        problems = _refusals(config)
        if self.rank < 1:
            problems.append(f"its rank is {self.rank}")
        self._tensors, wrong = open_adapter_file(self.path)
        if problems + wrong:
            raise ValueError("; ".join([*(f"{file}: {problem}" for problem in problems), *wrong]))

    def settings(self, family: Family, model: ModelConfig, targets: list[str] | None = None) -> dict[str, Any]:
        """Fields of PeftConfig.

        targets: what has an adapter, if the config says it; only a fused matrix leaves that open.

        Raises ValueError if the adapters are not of the model, not all of one rank and scale, or others than `targets`.
        """
        if targets and (problems := target_problems(model, self._peft(targets))):
            raise ValueError("; ".join(problems))
        layers = self._layers(family, model, targets)
        found = [piece.name.removesuffix(".weight") for _, pieces, _ in layers for piece in pieces]
        wanted = adapted_layers(model, self._peft(targets)) if targets else found
        if different := sorted(set(wanted) ^ set(found)):
            which = "has none" if different[0] in wanted else "has one"
            raise ValueError(
                f"{self.path}: peft.targets and the adapters differ in {_listed(different)}, of which the folder {which}; remove "
                "peft.targets to take those of the folder"
            )
        return {**self._peft(None).model_dump(), "targets": targets or shortest_targets(model, found)}

    def source(self, family: Family, model: ModelConfig, peft: PeftConfig) -> PeftSource:
        """The adapters as a `TensorSource`. Raises ValueError like `settings`."""
        self.settings(family, model, peft.targets)
        places: dict[str, tuple[_Module, Piece, int]] = {}
        for module, pieces, blocks in self._layers(family, model, peft.targets):
            for number, piece in enumerate(pieces):
                places[piece.name.removesuffix(".weight")] = (module, piece, number * self.rank if blocks else 0)
        return PeftSource(self._tensors, places, self.rank)

    def _peft(self, targets: list[str] | None) -> PeftConfig:
        return PeftConfig(rank=self.rank, alpha=self.alpha, rslora=self.rslora, targets=targets or ["all-linear"])

    def _layers(
        self, family: Family, model: ModelConfig, targets: list[str] | None
    ) -> list[tuple[_Module, tuple[Piece, ...], bool]]:
        """(module, the linear layers of ours with an adapter, whether each has a block of its own) of every adapter."""
        everything = {module.name: module for module in _modules(family, model, linear_layers(model))}
        wanted = set(adapted_layers(model, self._peft(targets))) if targets else None
        keys = {f"{_PREFIX}{name}.lora_{letter}.weight": name for name in everything for letter in "AB"}
        if unknown := sorted(set(self._tensors) - set(keys)):
            raise ValueError(
                f"{self.path} has {_listed(unknown)}, which {family.architecture} with {model.num_hidden_layers} layers has no "
                "linear layer for: it belongs to another model, or adapts what is no linear layer of the decoder"
            )
        names = dict.fromkeys(keys[key] for key in keys if key in self._tensors)
        found = [(everything[name], *self._parts(everything[name], wanted)) for name in names]
        for module, pieces, blocks in found:
            self._check_scale(module.name, self.rank * (len(pieces) if blocks else 1))
        return found

    def _parts(self, module: _Module, wanted: set[str] | None) -> tuple[tuple[Piece, ...], bool]:
        """Which linear layers the adapter of a module is of, and whether each has a block of its own in it."""
        outputs, inputs = module.size
        keys = [f"{_PREFIX}{module.name}.lora_{letter}.weight" for letter in "AB"]
        shapes = [self._tensors[key].infos[key].shape if key in self._tensors else () for key in keys]
        rank = shapes[0][0] if len(shapes[0]) == 2 else 0
        if shapes != [(rank, inputs), (outputs, rank)]:
            raise ValueError(
                f"{self.path}: A and B of {module.name} have shapes {shapes[0]} and {shapes[1]}, no adapter of {module.size}"
            )
        if len(module.pieces) == 1 and rank == self.rank:
            return module.pieces, False
        b = self._tensors[keys[1]].read(keys[1], (slice(0, outputs), slice(0, rank)))
        used = tuple(piece for piece in module.pieces if any(b[_slice(rows)].any() for rows in piece.rows))
        if wanted is not None:
            chosen = tuple(piece for piece in module.pieces if piece.name.removesuffix(".weight") in wanted)
        else:
            chosen = used if used and (rank == self.rank or rank == len(used) * self.rank) else module.pieces
        if any(piece not in chosen for piece in used) or not chosen:
            used_names = ", ".join(piece.name for piece in used)
            raise ValueError(f"{self.path}: the adapter of {module.name} changes {used_names}, which peft.targets leaves out")
        if rank == self.rank:
            return chosen, False
        if rank == len(chosen) * self.rank and _is_of_blocks(b, chosen, self.rank):
            return chosen, True
        raise ValueError(
            f"{self.path}: the adapter of {module.name} has rank {rank} and others {self.rank} (rank_pattern); here all have one "
            "rank: merge it into the model with peft (merge_and_unload), and start from that"
        )

    def _check_scale(self, name: str, rank: int) -> None:
        pattern = next((key for key in self._alphas if re.match(rf"(.*\.)?({key})$", name)), None)  # as PEFT looks it up
        alpha = self.alpha if pattern is None else self._alphas[pattern]
        root = math.sqrt if self.rslora else float
        scale, common = alpha / root(rank), self.alpha / root(self.rank)
        if not math.isclose(scale, common, rel_tol=1e-6):
            raise ValueError(
                f"{self.path}: the adapter of {name} has scale {scale:g} and others {common:g} (alpha_pattern); here all have "
                "one: merge it into the model with peft (merge_and_unload), and start from that"
            )


def _is_of_blocks(b: Tensor, pieces: tuple[Piece, ...], rank: int) -> bool:
    """Whether every piece has columns of B of its own, and zeros in those of the others."""
    for number, piece in enumerate(pieces):
        for rows in piece.rows:
            others = b[_slice(rows)].clone()
            others[:, number * rank : (number + 1) * rank] = 0
            if others.any():
                return False
    return True


class PeftSource:
    """The adapters of a checked folder as a `TensorSource`; made by `PeftFolder.source`."""

    def __init__(self, tensors: dict[str, TensorFile], places: dict[str, tuple[_Module, Piece, int]], rank: int):
        self._tensors, self._places, self._rank = tensors, places, rank

    def read(self, part: Part, box: Box) -> Tensor:
        """Values of a box of A or B of a linear layer, in the dtype of the file. Raises ValueError if the folder has none."""
        import torch

        suffix = LORA_A if part.name.endswith(LORA_A) else LORA_B
        place = self._places.get(part.name.removesuffix(suffix))
        if place is None:
            raise ValueError(f"the adapter folder has no {part.name}")
        module, piece, first = place
        key = f"{_PREFIX}{module.name}.lora_{'A' if suffix == LORA_A else 'B'}.weight"
        rows, columns = box.slices
        if suffix == LORA_A:
            return self._tensors[key].read(key, (slice(first + rows.start, first + rows.stop), columns))
        everything = slice(0, module.size[0])
        whole = self._tensors[key].read(key, (everything, slice(first + columns.start, first + columns.stop)))
        ordered = torch.cat([whole[_slice(found)] for found in sorted(piece.rows, key=lambda found: found.logical)])
        return ordered[rows]


def _slice(rows: Rows) -> slice:
    return slice(rows.stored, rows.stored + rows.count)


def _refusals(config: Mapping[str, Any]) -> list[str]:
    """What makes it something else than LoRA of weights."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')} is not supported, only LORA")
    problems += [f"{what} ({key}) are not supported" for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias {config['bias']}: trained biases are not supported")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        problems.append(
            f"init_lora_weights {start} changes the base model; let PEFT convert it (path_initial_model_for_weight_conversion)"
        )
    if problems:
        problems[-1] += ". Merge it into the model with peft (merge_and_unload), and start from that"
    return problems


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

"""Small random Llama folders, written by transformers: the oracle of the import and export tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_folder(
    path: Path,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    shard: str = "5GB",
    rope: dict[str, Any] | None = None,
    old_spelling: bool = False,
) -> dict[str, torch.Tensor]:
    """Write a model of 2 layers, 4 query heads and 2 key heads; returns its tensors as stored."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 5e5, **(rope or {"rope_type": "default"})},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))  # norms too: ones would hide a mix-up
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    if old_spelling:
        file = path / "config.json"
        written = json.loads(file.read_text())
        parameters = written.pop("rope_parameters")
        written |= {"rope_theta": parameters.pop("rope_theta"), "torch_dtype": written.pop("dtype")}
        if rope is not None:
            parameters["type" if rope["rope_type"] == "linear" else "rope_type"] = parameters.pop("rope_type")
        written["rope_scaling"] = parameters if rope else None
        written["a_field_of_the_user"] = {"kept": [1, 2.5, None, "ü"]}
        file.write_text(json.dumps(written, indent=4, ensure_ascii=False))
    return stored_tensors(path)


def make_tokenizer(path: Path) -> None:
    """A word tokenizer whose end-of-text id is not Llama's."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    inner = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", unk_token="?")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(path)


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, read by the safetensors library; without any, of its .bin files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        for file in sorted(path.glob("*.bin")):
            tensors |= torch.load(file, weights_only=True)
    return tensors


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Same names, shapes, dtypes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)), name

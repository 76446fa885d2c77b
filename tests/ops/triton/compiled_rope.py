"""As Llama, Gemma-3 (heads of 256), GPT-NeoX (a quarter is rotated), Phi-3 (96 channels) and GLM-4 (half, interleaved) do."""

from megatron_llm.ops.triton.rope import launch_options
from tests.ops.triton.compiler import Case

_STRIDES = ("q_token", "q_head", "k_token", "k_head", "yq_token", "yk_token", "table_token")
_POINTERS = ("Q", "K", "YQ", "YK")
_MODELS = {  # query heads, key/value heads, channels, pairs, interleaved, dtype
    "Llama 8B": (32, 8, 128, 64, False, "bf16"),
    "Llama 8B float32": (32, 8, 128, 64, False, "fp32"),
    "Gemma 3 4B": (8, 4, 256, 128, False, "bf16"),
    "GPT-NeoX 20B": (64, 64, 96, 12, False, "bf16"),
    "Pythia 6.9B": (32, 32, 128, 16, False, "bf16"),
    "Phi-3 mini": (32, 32, 96, 48, False, "bf16"),
    "GLM-4 9B": (32, 2, 128, 32, True, "bf16"),
    "Command-R": (64, 64, 128, 64, True, "bf16"),
}


def _case(name: str, join: bool) -> Case:
    queries, keys, dim, pairs, interleaved, dtype = _MODELS[name]
    options = launch_options(queries, keys, dim, pairs, join)
    warps = options.pop("num_warps")
    pointers = (*_POINTERS, "V", "YV") if join else _POINTERS
    strides = (*_STRIDES, "v_token", "v_head") if join else _STRIDES
    constants = {
        "QUERIES": queries, "KEYS": keys, "DIM": dim, "PAIRS": pairs, "INTERLEAVED": interleaved, "BACK": join, "COPY": join,
        **options,
    }  # fmt: skip
    constants |= {} if join else {"V": None, "YV": None, "v_token": 0, "v_head": 0}
    signature = dict.fromkeys(pointers, f"*{dtype}") | {"COS": "*fp32", "SIN": "*fp32"} | dict.fromkeys(strides, "i32")
    aligned = tuple(arg for arg in signature if arg != "table_token" or pairs % 16 == 0)
    # Twelve pairs are no multiple of 8: those channels are read 4 at a time.
    return Case(
        f"rope {'join' if join else 'in place'} {name}", "rope:rotate_kernel", signature, constants, {"num_warps": warps},
        aligned, sixteen_bytes=pairs % 16 == 0,
    )  # fmt: skip


CASES = [_case(name, join) for name in _MODELS for join in (False, True)]

"""Plan the layouts of examples/recipes anew: `python tools/plan_recipes.py [MODEL ...]` (some minutes for all models).

For every model and number of GPUs the layout that `megatron-llm plan --device h100` puts first becomes N-gpu(s).yaml, which goes
over continue.yaml and sft.yaml, and a line of the table in examples/recipes/README.md. Where all weights do not fit as they are
trained by default, cheaper ways are tried in the order of WAYS. `tests/test_recipes.py` holds files and table to this module.

A plan needs a model's dimensions only: they are those of the published config.json, without weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_llm.config import Config
from megatron_llm.planning.compare import GIB, Candidate, candidate
from megatron_llm.planning.hardware import DEVICES
from megatron_llm.planning.layouts import Ranking, rank_layouts
from megatron_llm.planning.step_time import Modelled
from megatron_llm.training.resolve import layout_problems, load_config

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
GPUS = (1, 8, 64)
DEVICE = DEVICES["h100"]
BEGIN, END = "<!-- python tools/plan_recipes.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Model:
    """Attributes:
    title: what the table calls it. repository: where its config.json is published; parameters: how many it has.
    kind, dimensions: `model_type` and the other fields of that file which say what a step costs.
    """

    title: str
    repository: str
    parameters: int
    kind: str
    dimensions: dict[str, Any]

    @property
    def lora_rate(self) -> str:
        """Learning rate of adapters: QLoRA's (arXiv 2305.14314), 2e-4 up to 13B and 1e-4 for 33B and 65B."""
        return "2.0e-4" if self.parameters < 20e9 else "1.0e-4"


def _llama(hidden: int, inner: int, layers: int, heads: int, tied: bool = False) -> dict[str, Any]:
    return {
        "vocab_size": 128_256, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "tie_word_embeddings": tied,
    }  # fmt: skip


def _starcoder2(hidden: int, layers: int, heads: int, keys: int, tied: bool = True) -> dict[str, Any]:
    return {
        "vocab_size": 49_152, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "max_position_embeddings": 16_384, "sliding_window": 4096,
        "use_bias": True, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip


MODELS = {
    "llama-3.2-1b": Model(
        "Llama 3.2 1B", "meta-llama/Llama-3.2-1B", 1_235_814_400, "llama", _llama(2048, 8192, 16, 32, tied=True)
    ),
    "llama-3.1-8b": Model("Llama 3.1 8B", "meta-llama/Llama-3.1-8B", 8_030_261_248, "llama", _llama(4096, 14_336, 32, 32)),
    "llama-3.1-70b": Model("Llama 3.1 70B", "meta-llama/Llama-3.1-70B", 70_553_706_496, "llama", _llama(8192, 28_672, 80, 64)),
    "qwen2.5-7b": Model(
        "Qwen2.5 7B", "Qwen/Qwen2.5-7B", 7_615_616_512, "qwen2",
        {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131_072, "tie_word_embeddings": False},
    ),
    "mistral-7b": Model(
        "Mistral 7B v0.3", "mistralai/Mistral-7B-v0.3", 7_248_023_552, "mistral",
        {"vocab_size": 32_768, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32_768, "sliding_window": None,
         "tie_word_embeddings": False},
    ),
    "pythia-1.4b": Model(
        "Pythia 1.4B", "EleutherAI/pythia-1.4b", 1_414_647_808, "gpt_neox",
        {"vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
         "num_attention_heads": 16, "max_position_embeddings": 2048, "rotary_pct": 0.25, "tie_word_embeddings": False},
    ),
    "falcon-40b": Model(
        "Falcon 40B", "tiiuae/falcon-40b", 41_303_293_952, "falcon",
        {"vocab_size": 65_024, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
         "new_decoder_architecture": True, "parallel_attn": True, "bias": False, "alibi": False},
    ),
    "starcoder2-3b": Model("StarCoder2 3B", "bigcode/starcoder2-3b", 3_030_371_328, "starcoder2", _starcoder2(3072, 30, 24, 2)),
    "starcoder2-7b": Model("StarCoder2 7B", "bigcode/starcoder2-7b", 7_173_923_840, "starcoder2", _starcoder2(4608, 32, 36, 4)),
    "starcoder2-15b": Model(
        "StarCoder2 15B", "bigcode/starcoder2-15b", 15_957_889_024, "starcoder2", _starcoder2(6144, 40, 48, 4, tied=False)
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A way to train, from the dearest to the cheapest: what it is called, and its settings."""

    name: str
    settings: tuple[str, ...] = ()

    def overrides(self, model: Model) -> list[str]:
        return [setting.format(lora_rate=model.lora_rate) for setting in self.settings]


WAYS = (
    Way("all weights"),
    Way("all weights, bfloat16 moments", ("optimizer.state_dtype=bfloat16",)),
    Way("LoRA", ("peft={{rank: 16, alpha: 32}}", "optimizer.lr={lora_rate}")),
)


@dataclass(frozen=True)
class Plan:
    """Attributes:
    way, row: the first way with a layout that fits, and the fastest such layout; None if there is none.
    refused: (way, GiB of its smallest layout, GiB that it has too many) of those before.
    """

    way: Way | None
    row: Candidate | None
    refused: list[tuple[Way, float, float]]


def model_folder(name: str, parent: Path) -> Path:
    """A Hugging Face folder with the config.json of a model, as far as dimensions go, and no weights."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = MODELS[name]
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.kind]
    AutoConfig.for_model(model.kind, architectures=[architecture], **model.dimensions).save_pretrained(parent / name)
    return parent / name


def layout_file(name: str, gpus: int) -> Path:
    """Of the recipes: the file that goes over the other two on so many GPUs."""
    return RECIPES / name / f"{gpus}-gpu{'s' * (gpus > 1)}.yaml"


def recipe(name: str, phase: str, folder: Path, settings: Sequence[str] = ()) -> Config:
    """The configuration of a phase, "continue" or "sft", for a GPU, of the model in `folder`."""
    return load_config(RECIPES / name / f"{phase}.yaml", [*settings, f"model.hf={folder}", "device=cuda"]).config


def figures(config: Config, gpus: int) -> Candidate:
    """What is predicted of a layout, as `plan` does it."""
    parallel = config.parallel
    return candidate(config, gpus, parallel.pipeline_schedule, parallel.virtual_stages, Modelled(DEVICE), brief=True)


def plan(name: str, gpus: int, folder: Path) -> Plan:
    """The first of WAYS that fits, with its fastest layout."""
    refused = []
    for way in WAYS:
        config = recipe(name, "continue", folder, way.overrides(MODELS[name]))
        ranking: Ranking = rank_layouts(config, gpus, Modelled(DEVICE), layout_problems)
        if ranking.best:
            return Plan(way, ranking.best[0], refused)
        least, over = ranking.refused[0]
        refused.append((way, least.peak / GIB, over))
    return Plan(None, None, refused)


def _too_large(planned: Plan) -> list[str]:
    return [f"{way.name}: {needed:.0f} GiB, {over:.0f} too many" for way, needed, over in planned.refused]


def layout_text(name: str, gpus: int, planned: Plan) -> str:
    """The content of `layout_file`."""
    assert planned.way is not None and planned.row is not None
    model, config = MODELS[name], planned.row.config
    parallel: dict[str, Any] = {
        "tensor_parallel": config.parallel.tensor_parallel,
        "pipeline_parallel": config.parallel.pipeline_parallel,
    }
    if config.parallel.pipeline_parallel > 1:
        parallel["pipeline_schedule"] = config.parallel.pipeline_schedule
        if config.parallel.virtual_stages > 1:
            parallel["virtual_stages"] = config.parallel.virtual_stages
    training = {"micro_batch_size": config.training.micro_batch_size, "recompute": config.training.recompute}
    sections: dict[str, dict[str, Any]] = {"parallel": parallel, "training": training}
    for setting in planned.way.overrides(model):
        key, _, text = setting.partition("=")
        section, _, field = key.partition(".")
        value = yaml.safe_load(text)
        sections.setdefault(section, {}).update({field: value} if field else value)
    count = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
    lines = [
        f"# {model.title} on {count} of 80 GB (planned for {DEVICE.name}), over continue.yaml or sft.yaml beside this file.",
        f"# Predicted, not measured: {_memory(planned.row)} of {DEVICE.memory:g} GiB, {_speed(planned.row)} tokens/s and GPU.",
    ]
    lines += [f"# Does not fit: {reason}." for reason in _too_large(planned)]
    if planned.way.name == "LoRA":
        lines.append("# So adapters are trained, at the rate of QLoRA (arXiv 2305.14314) for this size.")
    for section, values in sections.items():
        flow = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=1000).strip()
        lines.append(f"{section}: {flow}")
    return "\n".join(lines) + "\n"


def _memory(row: Candidate) -> str:
    return f"{row.peak / GIB:.1f}"


def _speed(row: Candidate) -> str:
    training = row.config.training
    return f"{training.global_batch_size * training.sequence_length / row.seconds / row.world:,.0f}"


def layout_name(row: Candidate) -> str:
    """TP2 PP4 DP8, interleaved with 2 stages a rank, ..."""
    parallel, training = row.config.parallel, row.config.training
    tp, pp = parallel.tensor_parallel, parallel.pipeline_parallel
    name = f"TP{tp} PP{pp} DP{row.world // (tp * pp)}"
    if pp > 1:
        name += f", {row.name}" + (f" x {row.chunks}" if row.chunks > 1 else "")
    return f"{name}; {training.micro_batch_size} row{'s' * (training.micro_batch_size > 1)}, recompute {training.recompute}"


def line(name: str, gpus: int, way: str, row: Candidate) -> str:
    """Of the table, for a layout."""
    file = layout_file(name, gpus)
    link = f"[{file.name}]({name}/{file.name})"
    return f"| {MODELS[name].title} | {gpus} | {way} | {layout_name(row)} | {_memory(row)} | {_speed(row)} | {link} |\n"


def table_line(name: str, gpus: int, planned: Plan) -> str:
    """Of the table, for a plan."""
    if planned.row is None or planned.way is None:
        return f"| {MODELS[name].title} | {gpus} | nothing fits; {_too_large(planned)[-1]} | | | | |\n"
    return line(name, gpus, planned.way.name, planned.row)


def table_lines(text: str) -> dict[tuple[str, int], str]:
    """The lines of the table in README.md by model and GPUs."""
    names = {model.title: name for name, model in MODELS.items()}
    rows = {}
    for text_line in text.split(BEGIN)[1].split(END)[0].splitlines(keepends=True):
        title, count = (cell.strip() for cell in text_line.split("|")[1:3])
        if title in names:
            rows[names[title], int(count)] = text_line
    return rows


def main() -> None:
    """Write the files and lines of the models that are named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], metavar="MODEL", help=f"of {', '.join(MODELS)}")
    chosen = parser.parse_args().models or list(MODELS)
    page = RECIPES / "README.md"
    with tempfile.TemporaryDirectory() as parent, tqdm(total=len(chosen) * len(GPUS), unit="plan") as bar:
        for name in chosen:
            folder = model_folder(name, Path(parent))
            for gpus in GPUS:
                bar.set_description(f"{name}, {gpus}")
                planned, file = plan(name, gpus, folder), layout_file(name, gpus)
                if planned.row is None:
                    file.unlink(missing_ok=True)
                else:
                    file.write_text(layout_text(name, gpus, planned), encoding="utf-8")
                text = page.read_text(encoding="utf-8")
                rows = table_lines(text) | {(name, gpus): table_line(name, gpus, planned)}
                head = text.split(BEGIN)[1].splitlines(keepends=True)[:2]
                ordered = [rows[key] for key in ((name, n) for name in MODELS for n in GPUS) if key in rows]
                page.write_text(
                    text.split(BEGIN)[0] + BEGIN + "".join([*head, *ordered]) + END + text.split(END)[1], encoding="utf-8"
                )
                bar.update()


if __name__ == "__main__":
    main()

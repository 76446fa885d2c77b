"""The whole road on two CPU cores in a few minutes: text -> tokenizer -> pretraining -> continued pretraining -> instructions.

`make quickstart` runs it. Everything lands in one folder (`--out`, default runs/quickstart). Stop it whenever you like: run
again, it skips the steps that are done and training goes on from its last checkpoint. A step whose recipe has changed since
(or an earlier one's) is done anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STAGES = {
    "stage1": "stage 1: pretraining",
    "stage2": "stage 2: continued pretraining",
    "stage3": "stage 3: instruction tuning",
}
HELD_OUT = 100  # prompts that the tuned model replies to


@dataclass(frozen=True)
class Step:
    """One step of the recipe.

    Attributes:
        title: what a reader sees.
        makes: its outputs in the output folder; whatever another recipe left there is deleted before it starts.
        depends: recipe files that decide what it makes.
        run: does it; returns a line about the result. It must cope with what its own interruption left behind.
    """

    title: str
    makes: str
    depends: tuple[str, ...]
    run: Callable[[], str | None]


def main() -> int:
    """Run the recipe; 0 if every stage improved its validation loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="output folder (default: %(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated; run again to go on from here"))
    try:
        run_steps(recipe())
    except subprocess.CalledProcessError as error:
        print(f"\nthis command failed with exit code {error.returncode}; its messages are above. Run again to go on from here.")
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run again to go on from here")
        return 130
    improved = report()
    print(f"everything is in {out}; this run took {time.monotonic() - start:.0f} s")
    return 0 if improved else 1


def recipe() -> list[Step]:
    """The steps in order. Paths are relative to the output folder."""
    steps = [
        Step("corpus: Python's standard library", "text", ("corpus.py",), make_corpus),
        Step("tokenizer: byte-level BPE with a chat template", "tokenizer", ("tokenizer.py",), make_tokenizer),
        Step("instructions: signature and docstring -> body", "instructions", ("corpus.py",), make_instructions),
        Step("tokenize everything", "data", (), preprocess),
    ]
    for stage, layout, ranks in (("stage1", "TP2 x PP2", 4), ("stage2", "DP2", 2), ("stage3", "DP2", 2)):
        title = f"{STAGES[stage]}, {layout} ({ranks} ranks)"
        steps += [
            Step(title, stage, (f"{stage}.yaml",), lambda stage=stage, ranks=ranks: train(stage, ranks)),  # type: ignore[misc]
            Step(f"{stage}: export to Hugging Face", f"hf/{stage}", (), lambda stage=stage: export(stage)),  # type: ignore[misc]
        ]
    return [*steps, Step("stage3: replies to held-out prompts", "replies", (), reply)]


def run_steps(steps: list[Step]) -> None:
    """Do what is not done yet. `progress.json` maps outputs to (digest of the recipe up to there, done)."""
    file = Path("progress.json")
    progress: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    start, digest = time.monotonic(), ""

    def record(step: Step, done: bool) -> None:
        progress[step.makes] = {"recipe": digest, "done": done}
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps(progress, indent=1))
        partial.replace(file)  # at once: an interruption leaves the old or the new file

    for number, step in enumerate(steps, 1):
        content = b"".join((HERE / name).read_bytes() for name in step.depends)
        digest = hashlib.sha256(digest.encode() + step.makes.encode() + content).hexdigest()[:16]
        known = progress.get(step.makes, {})
        same = known.get("recipe") == digest
        headline = f"[{number}/{len(steps)}] {step.title}"
        if same and known["done"]:
            print(f"{headline}: done before", flush=True)
            continue
        print(f"{headline}   ({time.monotonic() - start:.0f} s)", flush=True)
        if not known and Path(step.makes).exists():
            raise SystemExit(f"{Path(step.makes).resolve()} is in the way and not from this recipe; choose another --out")
        if not same:
            shutil.rmtree(step.makes, ignore_errors=True)
            record(step, done=False)
        result = step.run()
        record(step, done=True)
        if result:
            print(f"      {result}", flush=True)


def command(*arguments: str, ranks: int = 1) -> None:
    """Run a `megatron-llm` command, under torchrun if on several ranks. Raises CalledProcessError if it fails."""
    shown = "megatron-llm" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m megatron_llm"
    print(f"      $ {shown} {' '.join(arguments)}", flush=True)
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if ranks > 1 else None
    with subprocess.Popen([sys.executable, *launcher, "-m", "megatron_llm", *arguments], env=environment) as process:
        try:
            code = process.wait()
        except (KeyboardInterrupt, SystemExit) as stop:
            print("\nstopping when the step is finished and saved; once more to stop at once", flush=True)
            if isinstance(stop, SystemExit):  # after Ctrl-C the terminal has told the command already
                process.terminate()
            process.wait()
            raise
    if code:
        raise subprocess.CalledProcessError(code, process.args)


def make_corpus() -> str:
    import corpus

    return corpus.write_documents(Path("text"))


def make_tokenizer() -> str:
    import tokenizer

    return tokenizer.train_tokenizer([Path("text/stage1.jsonl"), Path("text/stage2.jsonl")], Path("tokenizer"))


def make_instructions() -> str:
    import corpus
    import yaml
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("tokenizer")

    def count_tokens(conversations: list[corpus.Messages]) -> list[int]:
        return [len(ids) for ids in tokenizer.apply_chat_template(conversations, return_dict=False)]

    longest = yaml.safe_load((HERE / "stage3.yaml").read_text())["training"]["sequence_length"]
    return corpus.write_instructions(Path("text"), Path("instructions"), count_tokens, longest)


def preprocess() -> None:
    Path("data").mkdir(exist_ok=True)
    for name in ("stage1", "stage2", "valid"):
        command("preprocess", "--input", f"text/{name}.jsonl", "--tokenizer", "tokenizer", "--output", f"data/{name}")
    for name, output in (("train", "chat"), ("valid", "chat_valid")):
        source = f"instructions/{name}.jsonl"
        command("preprocess-chat", "--input", source, "--tokenizer", "tokenizer", "--output", f"data/{output}")


def train(stage: str, ranks: int) -> str:
    command("train", str(HERE / f"{stage}.yaml"), ranks=ranks)
    before, after = validation_losses(stage)
    return f"validation loss {before:.3f} -> {after:.3f}"


def export(stage: str) -> None:
    shutil.rmtree(f"hf/{stage}", ignore_errors=True)  # from an interrupted export
    command("export", stage, f"hf/{stage}")


def reply() -> str:
    """Replies to questions that training has not seen; says how many end by themselves, as a tuned model must know to do."""
    Path("replies").mkdir(exist_ok=True)
    records = [json.loads(line) for line in Path("instructions/valid.jsonl").read_text().splitlines()[:HELD_OUT]]
    with open("replies/prompts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": record["messages"][:1]}) + "\n" for record in records)
    options = ["--temperature", "0.7", "--top-k", "50", "--max-new-tokens", "256"]
    files = ["--prompts", "replies/prompts.jsonl", "--output", "replies/replies.jsonl"]
    command("generate", "--hf", "hf/stage3", *files, *options)
    replies = [json.loads(line) for line in Path("replies/replies.jsonl").read_text().splitlines()]
    return f"{sum(line['ended'] for line in replies)} of {len(replies)} replies end by themselves"


def validation_losses(stage: str) -> tuple[float, float]:
    """(before the first step, after the last step) of a stage."""
    lines = map(json.loads, Path(stage, "metrics.jsonl").read_text().splitlines())
    losses = [line["valid_loss"] for line in lines if line.get("valid_loss") is not None]
    return losses[0], losses[-1]


def report() -> bool:
    """Print a sample and the losses of every stage and make the page; whether every stage improved."""
    for stage, title in STAGES.items():
        prompt, answer = sample(stage)
        print(f"\n--- {title}: transformers goes on after >>>\n{prompt}>>>{answer}")
    print(flush=True)
    command("report", *STAGES, "--output", "report.html")
    print(f"\n{'validation loss':34} {'before':>8} {'after':>8}")
    improved = True
    for stage, title in STAGES.items():
        before, after = validation_losses(stage)
        improved = improved and after < before
        print(f"{title:34} {before:8.3f} {after:8.3f}   {'improved' if after < before else 'NOT IMPROVED'}")
    print(f"\ncurves, samples and settings of all stages, for a browser: {Path('report.html').resolve()}")
    return improved


def sample(stage: str) -> tuple[str, str]:
    """(prompt, continuation) of an exported model, loaded with transformers as anybody would."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = f"hf/{stage}"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = 'class Reader:\n    """Read lines from a file."""\n\n    def __init__(self, '
    if stage == "stage3":
        record = json.loads(Path("instructions/valid.jsonl").read_text().splitlines()[0])
        prompt = tokenizer.apply_chat_template(record["messages"][:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    stop = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 50, "eos_token_id": stop, "pad_token_id": stop[0]}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, **options)
    return prompt, tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())

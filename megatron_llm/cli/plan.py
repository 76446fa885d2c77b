"""`megatron-llm plan`: what a step of a configuration would look like, without a GPU, a process group or data."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_llm.cli.settings import add_config

if TYPE_CHECKING:
    from megatron_llm.config import Config
    from megatron_llm.planning.compare import Candidate
    from megatron_llm.planning.layouts import Ranking
    from megatron_llm.planning.step_time import Modelled

HELP = "simulate the step of a configuration (time, bubble, memory, a picture), or find the best layout for a device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration as `train` takes it, and what it does not say: GPUs, their speed, their network."""
    add_config(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="world size (default: the least that the layout needs)")
    parser.add_argument(
        "--memory", type=_positive, metavar="X", help="GiB of a device (default: parallel.device_memory_gib): what fits into it"
    )
    parser.add_argument(
        "--device",
        choices=("a100-80", "h100", "h200", "b200"),
        help="find the layout that trains fastest on --gpus of these, whatever section parallel says",
    )
    parser.add_argument(
        "--nodes-of", type=int, default=8, metavar="N", help="GPUs of a node, with --device (default: %(default)s)"
    )
    parser.add_argument("--write", metavar="FILE.yaml", help="with --device: write the configuration with the best layout")
    parser.add_argument("--timeline", metavar="FILE.png|pdf|svg", help="draw what every pipeline rank does when")
    parser.add_argument(
        "--tflops", type=_positive, default=400.0, metavar="X", help="TFLOP/s that one GPU achieves (default: %(default)g)"
    )
    parser.add_argument(
        "--bandwidth", type=_positive, default=25.0, metavar="X", help="GB/s between pipeline neighbours (default: %(default)g)"
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def run(args: argparse.Namespace) -> int:
    """Print the step of the configuration, rank by rank, and then of every other schedule, the fastest first.

    Raises ConfigError with every problem of the configuration or of its layout on that many GPUs.
    """
    from megatron_llm.config import ConfigError
    from megatron_llm.planning.compare import Assumptions, alternatives, chosen
    from megatron_llm.planning.timeline import counted, draw, held_over_time, picture_format
    from megatron_llm.training.resolve import choose_schedule, layout_problems, load_config, name_problems

    if args.timeline:
        picture_format(args.timeline)  # a mistake is told before the simulation
    if args.write and not Path(args.write).absolute().parent.is_dir():
        raise ConfigError([f"--write {args.write}: there is no folder {Path(args.write).parent}; make it first"])
    run = load_config(args.config, args.overrides)
    if problems := name_problems(run.config):
        raise ConfigError(problems)
    if args.device:
        return _find_layout(run.config, args)
    config, parallel, training = run.config, run.config.parallel, run.config.training
    least = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    gpus = least if args.gpus is None else args.gpus
    problems = layout_problems(config, gpus) if gpus > 0 else [f"--gpus {gpus}: give at least the {least} of the layout"]
    if problems:
        raise ConfigError(problems)
    microbatches = training.global_batch_size * least // (training.micro_batch_size * gpus)
    assumed = Assumptions(args.tflops * 1e12, args.bandwidth * 1e9)

    limit = parallel.device_memory_gib if args.memory is None else args.memory
    notes = []
    if parallel.pipeline_schedule == "auto":
        limited = config.model_copy(update={"parallel": parallel.model_copy(update={"device_memory_gib": limit})})
        run = choose_schedule(dataclasses.replace(run, config=limited), gpus, assumed)
        config, notes = run.config, list(run.notes)
    plan = chosen(config, gpus, assumed)
    print(_heading(config, gpus, microbatches, args))
    for note in notes:
        print(note + "\n")
    print(_ranks(config, plan))
    print(_memory(plan))
    if parallel.pipeline_parallel > 1:
        print(_comparison(plan, list(alternatives(config, gpus, assumed)), limit))
    if args.timeline:
        title = f"{_name(plan)}: {counted(parallel.pipeline_parallel, 'rank')}, {counted(microbatches, 'micro-batch')}"
        timeline = plan.simulation.timeline
        draw(args.timeline, title, {"simulated": timeline}, held_over_time(timeline, plan.costs))
        print(f"wrote {args.timeline}")
    return 0


def _find_layout(config: Config, args: argparse.Namespace) -> int:
    """Rank the layouts of so many GPUs, say why the others are not among the best, and write the first.

    Raises ConfigError if none is possible or none fits.
    """
    import yaml
    from tqdm import tqdm

    from megatron_llm.config import ConfigError
    from megatron_llm.planning.hardware import DEVICES
    from megatron_llm.planning.layouts import rank_layouts
    from megatron_llm.planning.step_time import Modelled
    from megatron_llm.training.resolve import layout_problems

    if args.gpus is None or args.gpus < 1 or args.nodes_of < 1:
        raise ConfigError(["plan --device: say how many there are: --gpus N, and --nodes-of N of them in a node"])
    device = dataclasses.replace(DEVICES[args.device], node=args.nodes_of)
    device = dataclasses.replace(device, memory=_memory_of(args))
    assumed = Modelled(device)
    place, config = config.device, config.model_copy(update={"device": "cuda"})
    with tqdm(total=100, desc="layouts", unit="%", leave=False, mininterval=1) as bar:
        ranking = rank_layouts(config, args.gpus, assumed, layout_problems, lambda part: bar.update(int(100 * part) - bar.n))
    if not ranking.best:
        raise ConfigError([_nothing_fits(config, ranking, args)])
    print(_layouts(config, ranking, assumed, args))
    if args.write:
        best = ranking.best[0].config.model_copy(update={"device": place})
        Path(args.write).write_text(yaml.safe_dump(best.model_dump(mode="json"), sort_keys=False), "utf-8")
        print(f"wrote {args.write}")
    return 0


def _nothing_fits(config: Config, ranking: Ranking, args: argparse.Namespace) -> str:
    from megatron_llm.planning.compare import GIB, SPARE

    where = f"plan: no layout of {args.gpus} {args.device}"
    batch = config.training.global_batch_size
    if not ranking.refused:
        nearest = sorted({near for dp in ranking.replicas for near in (batch // dp * dp, -(-batch // dp) * dp)} - {0, batch})
        if nearest:
            below, above = ([near for near in nearest if (near < batch) is less] for less in (True, False))
            found = " or ".join(map(str, [*below[-1:], *above[:1]]))
            return (
                f"{where} can have training.global_batch_size {batch}: it must be a multiple of the data-parallel size times the "
                f"micro-batch; the nearest that can is {found}, or take another --gpus"
            )
        return f"{where} is possible: " + "; ".join(ranking.problems)
    least, over = ranking.refused[0]
    optimizer, precision = config.optimizer, config.precision
    ways = ["more GPUs", "shorter rows (training.sequence_length)"]
    ways += ["adapters (section peft)"] if config.peft is None else []
    ways += ["optimizer.state_dtype: bfloat16"] if optimizer.state_dtype != "bfloat16" else []
    ways += ["precision.gradients: bfloat16"] if precision.gradients != "bfloat16" else []
    return (
        f"{where} holds this model: the nearest, {_layout_name(least)}, needs {least.peak / GIB:.4g} GiB, {over:.3g} more than "
        f"the {(1 - SPARE) * _memory_of(args):.4g} that can be used of each. It recomputes all it can; take {', '.join(ways)}"
    )


def _memory_of(args: argparse.Namespace) -> float:
    from megatron_llm.planning.hardware import DEVICES

    return float(DEVICES[args.device].memory if args.memory is None else args.memory)


def _layout_name(row: Candidate) -> str:
    parallel, training = row.config.parallel, row.config.training
    replicas = row.world // (parallel.tensor_parallel * parallel.pipeline_parallel)
    name = f"TP{parallel.tensor_parallel} PP{parallel.pipeline_parallel} DP{replicas}, "
    if parallel.pipeline_parallel > 1:
        name += _name(row) + ", "
    recompute = "" if training.recompute == "none" else f", {training.recompute} recomputation"
    return f"{name}micro-batch {training.micro_batch_size}{recompute}"


def _layouts(config: Config, ranking: Ranking, assumed: Modelled, args: argparse.Namespace) -> str:
    """The three fastest with what their time goes to, and a line of reasons for every other."""
    from megatron_llm.planning.compare import GIB
    from megatron_llm.planning.flops import model_flops_per_token
    from megatron_llm.planning.layouts import shares

    training, best = config.training, ranking.best
    tokens = training.global_batch_size * training.sequence_length
    flops = model_flops_per_token(config.model, training.sequence_length, config.peft)

    def line(row: Candidate) -> str:
        speed = tokens / row.seconds / row.world
        mfu = speed * flops / assumed.device.flops
        return f"{row.seconds:.3g} s a step, {speed:,.0f} tokens/s and GPU, MFU {mfu:.1%}, {row.peak / GIB:.3g} GiB"

    def cost(row: Candidate) -> str:
        parts = sorted(shares(row, assumed).items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {share:.1%}" for name, share in parts if share >= 0.001)

    lines = [
        f"{tokens:,} tokens a step on {args.gpus} {args.device} in nodes of {args.nodes_of}; predicted, not measured "
        f"(docs/pipeline.md says how well)",
        "",
    ]
    for number, row in enumerate(best[:3], 1):
        lines += [f"{number}. {_layout_name(row)}: {line(row)}", f"   besides products and scores: {cost(row)}"]
    if others := best[3:]:
        lines += ["", "slower:"]
        lines += [f"  {_layout_name(row)}: {row.seconds / best[0].seconds - 1:+.0%} ({cost(row)})" for row in others]
    if ranking.refused:
        lines += ["", f"do not fit into {assumed.device.memory:g} GiB less what must be spared:"]
        lines += [f"  {_layout_name(row)}: {row.peak / GIB:.4g} GiB, {over:.3g} too many" for row, over in ranking.refused]
    sections = best[0].config.model_dump()
    chosen = {
        "parallel": (
            *("tensor_parallel", "pipeline_parallel", "context_parallel"),
            *("pipeline_schedule", "virtual_stages", "sequence_parallel"),
        ),
        "training": ("micro_batch_size", "recompute"),
    }
    settings = [f"{section}.{key}={str(sections[section][key]).lower()}" for section, keys in chosen.items() for key in keys]
    lines += ["", f"the first: {' '.join(settings)}"]
    return "\n".join(lines)


def _heading(config: Config, gpus: int, microbatches: int, args: argparse.Namespace) -> str:
    from megatron_llm.planning.timeline import counted

    parallel, training = config.parallel, config.training
    tp, pp = parallel.tensor_parallel, parallel.pipeline_parallel
    layers, micro = counted(config.model.num_hidden_layers, "layer"), counted(microbatches, "micro-batch")
    return (
        f"{layers} on {counted(gpus, 'GPU')}: tensor {tp}, pipeline {pp}, data {gpus // (tp * pp)}; "
        f"{micro} of {training.micro_batch_size * training.sequence_length:,} tokens a step and replica\n"
        f"assumed: {args.tflops:g} TFLOP/s a GPU (matrix products and attention), "
        f"{args.bandwidth:g} GB/s between pipeline neighbours\n"
    )


def _name(plan: Candidate) -> str:
    return plan.name + (f", {plan.chunks} stages a rank" if plan.chunks > 1 else "")


def _ranks(config: Config, plan: Candidate) -> str:
    """A line a rank: its layers, its work, its idle time, its memory."""
    from megatron_llm.planning.stages import stage_layers
    from megatron_llm.planning.timeline import byte_unit, idle_share, time_unit

    timeline, placement = plan.simulation.timeline, plan.schedule.placement
    scale, unit = time_unit(timeline.makespan)
    size, size_unit = byte_unit(max(plan.simulation.peak_bytes))
    layers = stage_layers(config, placement)
    names = [
        " + ".join(
            _held(layers[stage], stage == 0, stage == len(placement) - 1) for stage, r in enumerate(placement) if r == rank
        )
        for rank in range(timeline.ranks)
    ]
    width = max(len("layers"), *map(len, names))
    peak = f"peak, {size_unit}"
    head = f"{'rank':>4}  {'layers':{width}}  {'work':>8}  {'idle, own span':>14}  {'idle, step':>10}  {peak:>10}"
    lines = [
        f"{_name(plan)}: {timeline.makespan * scale:,.4g} {unit} a step; idle time in % of the work; peak of activations",
        head,
    ]
    for rank, name in enumerate(names):
        busy = timeline.busy(rank)
        lines.append(
            f"{rank:>4}  {name:{width}}  {busy * scale:>8.4g}  {idle_share(timeline.span(rank), busy):>14}  "
            f"{idle_share(timeline.makespan, busy):>10}  {plan.simulation.peak_bytes[rank] / size:>10.3g}"
        )
    return "\n".join(lines) + "\n"


def _held(layers: range, first: bool, last: bool) -> str:
    """What a stage holds, in few letters."""
    parts = ["embedding"] * first
    if len(layers):
        parts.append(str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}")
    return ", ".join(parts + ["head"] * last) or "none"


def _memory(plan: Candidate) -> str:
    """A line a rank: what its memory is for, and the peak, at which not everything is there at once."""
    from megatron_llm.planning.compare import GIB
    from megatron_llm.planning.memory import items

    tables = [items(memory) for memory in plan.memory]
    lines = ["predicted memory, GiB", f"{'rank':>4}" + "".join(f"  {name:>11}" for name in tables[0])]
    lines += [f"{rank:>4}" + "".join(f"  {size / GIB:>11.3g}" for size in table.values()) for rank, table in enumerate(tables)]
    return "\n".join(lines) + "\n"


def _comparison(plan: Candidate, others: list[Candidate], limit: float | None) -> str:
    """A line a schedule, the fastest first. Of the step it has the busiest rank's idle time, of its own span the worst rank's.

    The peak is that of the activations alone. limit: GiB of a device.
    """
    from megatron_llm.planning.compare import GIB
    from megatron_llm.planning.timeline import byte_unit, time_unit

    rows = sorted([plan, *others], key=lambda row: (row.simulation.timeline.makespan, max(row.simulation.peak_bytes)))
    scale, unit = time_unit(plan.simulation.timeline.makespan)
    size, size_unit = byte_unit(max(plan.simulation.peak_bytes))
    step, peak = f"step, {unit}", f"peak, {size_unit}"
    head = f"{'schedule':14}  {'stages a rank':>13}  {step:>18}  {'idle, step':>10}  {'idle, own span':>14}  {peak:>10}"
    lines = [f"{head}  {'memory, GiB':>11}"]
    for row in rows:
        timeline = row.simulation.timeline
        lines.append(
            f"{row.name:14}  {row.chunks:>13}  {timeline.makespan * scale:>18.4g}  {timeline.bubble_of_makespan:>10.1%}  "
            f"{timeline.bubble_of_span:>14.1%}  {max(row.simulation.peak_bytes) / size:>10.3g}  {row.peak / GIB:>11.3g}"
            + "  <- configured" * (row is plan)
            + ("" if row.fits(None if limit is None else limit * GIB) else f"  more than {limit:g}")
        )
    return "\n".join(lines) + "\n"

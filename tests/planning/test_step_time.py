"""The step-time model against training speeds that others published: two are fitted, the others predicted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_llm.models.stages import build_stages
from megatron_llm.models.stages import parameters as model_parameters
from megatron_llm.optim.layout import bucket_layout
from megatron_llm.parallel.grid import Grid
from megatron_llm.pipeline.simulate import Costs
from megatron_llm.planning.compare import candidate, chosen
from megatron_llm.planning.hardware import DEVICES, SHARES, Shares
from megatron_llm.planning.layouts import shares
from megatron_llm.planning.stages import rank_weights
from megatron_llm.planning.step_time import Modelled
from tests.planning.published import FITTED, PREDICTED, Published
from tests.runs import config_of


def _predicted(row: Published, shares: Shares = SHARES) -> float:
    """Tokens per second and GPU."""
    parallel, training = row.config.parallel, row.config.training
    name, loops = parallel.pipeline_schedule, parallel.virtual_stages
    step = candidate(row.config, row.world, name, loops, Modelled(DEVICES["h100"], shares), brief=True)
    return training.global_batch_size * training.sequence_length / step.seconds / row.world


def test_the_constants_are_the_fit() -> None:
    """Each of the two numbers makes its row exact, given the other."""
    for row in FITTED:
        assert _predicted(row) == pytest.approx(row.tokens_per_second, rel=2e-3), row.name
    products, exposed = FITTED
    assert _predicted(products, replace(SHARES, products=SHARES.products * 1.02)) > 1.01 * products.tokens_per_second
    assert _predicted(exposed, replace(SHARES, exposed=SHARES.exposed * 1.5)) < 0.99 * exposed.tokens_per_second


UNKNOWN = {"Megatron 1.7B": 0.25, "Megatron 314B": 0.12, "Megatron 462B": 0.28}
"""Rows that it misses by more than a tenth. The smallest model is bound by what is not modelled, launches and the host; the batch
of all is taken to be the one that is published, that of 177B, and larger models had larger ones."""


@pytest.mark.parametrize("name, batch", [("Megatron 314B", 1536), ("Megatron 462B", 2304)])
def test_what_is_missed_depends_on_the_batch_that_is_not_published(name: str, batch: int) -> None:
    row = next(row for row in PREDICTED if row.name == name)
    training = row.config.training.model_copy(update={"global_batch_size": batch})
    other = replace(row, config=row.config.model_copy(update={"training": training}))
    assert _predicted(other) == pytest.approx(row.tokens_per_second, rel=0.10)


@pytest.mark.parametrize("row", PREDICTED, ids=lambda row: row.name)
def test_the_others_are_predicted_within_a_tenth(row: Published) -> None:
    assert _predicted(row) == pytest.approx(row.tokens_per_second, rel=UNKNOWN.get(row.name, 0.10))


def test_what_a_step_is_made_of_grows_with_what_makes_it() -> None:
    row = next(row for row in PREDICTED if row.name == "Llama-3 70B, 64 GPUs")
    assumed = Modelled(DEVICES["h100"])
    slow = replace(DEVICES["h100"], link=100e9)
    usual, slower = (chosen(row.config, row.world, Modelled(device)) for device in (DEVICES["h100"], slow))
    assert shares(slower, Modelled(slow))["tensor parallel"] > 2 * shares(usual, assumed)["tensor parallel"]
    assert slower.seconds > usual.seconds
    parts = shares(usual, assumed)
    assert set(parts) == {"idle", "memory", "tensor parallel", "data parallel", "optimizer"} and all(
        p >= 0 for p in parts.values()
    )
    assert sum(parts.values()) < 0.3


@pytest.mark.parametrize("replicas, exposed", [(4, 1 / 8), (512, 1.0)])
def test_what_is_in_one_bucket_hides_behind_nothing(replicas: int, exposed: float) -> None:
    """Where everything else is endless, all but the last of the buckets that a run would have is hidden."""
    config = config_of(
        training={"micro_batch_size": 1, "global_batch_size": replicas},
        model={"num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 4096},
        precision={"compute": "bfloat16"},
    )  # fmt: skip
    model = Modelled(DEVICES["h100"])
    parameters = rank_weights(config, (0,))[0]
    stages = build_stages(config, Grid.imagined(config.parallel, 4, 1, 0), (0,), torch.float32, torch.device("meta"))
    buckets = len(bucket_layout(model_parameters(stages), replicas))
    assert 1 / buckets == pytest.approx(exposed, abs=0.03)
    endless = Costs.uniform(1, 1e3, 1e3, 1e3)
    outside = model.outside(config, replicas, endless, parameters)
    whole = model.collective(4 * parameters, replicas, replicas, 1 if exposed == 1 else 8)
    assert outside["gradients"] == pytest.approx(exposed * whole, rel=0.01)


def test_few_micro_batches_stand_for_many() -> None:
    """Where only the middle of a step is left out, its time is that of all."""
    for schedule, loops in (("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zb_v", 1), ("v_half", 1)):
        config = config_of(
            parallel={"pipeline_parallel": 4, "pipeline_schedule": schedule, "virtual_stages": loops},
            training={"micro_batch_size": 1, "global_batch_size": 64}, model={"num_hidden_layers": 8},
            precision={"compute": "bfloat16"},
        )  # fmt: skip
        whole, brief = (candidate(config, 4, schedule, loops, Modelled(DEVICES["h100"]), brief) for brief in (False, True))
        assert brief.seconds == pytest.approx(whole.seconds, rel=0.01), schedule
        assert max(brief.simulation.peak_bytes) == pytest.approx(max(whole.simulation.peak_bytes), rel=0.01), schedule


def test_unequal_stages_are_not_taken_to_be_faster_than_the_busiest() -> None:
    """Few micro-batches are through before the rank with most to do holds up the others, and more of them do not stay so fast."""
    config = config_of(
        parallel={"pipeline_parallel": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2},
        training={"micro_batch_size": 1, "global_batch_size": 64}, model={"num_hidden_layers": 9, "vocab_size": 97},
        precision={"compute": "bfloat16"},
    )  # fmt: skip
    whole, brief = (candidate(config, 2, "interleaved", 2, Modelled(DEVICES["h100"]), brief) for brief in (False, True))
    assert brief.seconds == pytest.approx(whole.seconds, rel=0.02)
    assert brief.seconds >= brief.shortest and whole.seconds >= whole.shortest * 0.999999


def test_a_ring_takes_a_hop_over_the_network_for_each_node() -> None:
    """Against sums of NCCL's table by hand: 8.4 us a call, 3.4 us a hop inside a node and 9.6 us between nodes."""
    model = Modelled(DEVICES["h100"])
    assert model.collective(0.0, 8, 8) == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    assert model.collective(0.0, 16, 16) == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 9.6e-6)
    assert model.collective(0.0, 48, 384) == pytest.approx(8.4e-6 + 47 * 9.6e-6)  # a rank in each node
    assert model.collective(0.0, 2048, 16_384, calls=8) == pytest.approx(8 * (8.4e-6 + 2047 * 9.6e-6))
    assert model.collective(0.0, 12, 12) == pytest.approx(8.4e-6 + 10 * 3.4e-6 + 9.6e-6)  # a node and a half
    for ranks, span, bandwidth in ((8, 8, 450e9), (16, 128, 50e9), (16, 32, 200e9), (16, 16, 400e9)):  # 8, 1, 4, 8 in a node
        one, two = (model.collective(size, ranks, span) for size in (1e9, 2e9))
        assert two - one == pytest.approx(1e9 * (ranks - 1) / ranks / (0.8 * bandwidth))


def test_recomputation_costs_what_it_reads_and_writes() -> None:
    rows = {}
    for recompute, modules in (("none", []), ("selective", ["norms"]), ("selective", ["norms", "activation"]), ("full", [])):
        training = {"recompute": recompute} | ({"recompute_modules": modules} if modules else {})
        config = config_of(training=training, precision={"compute": "bfloat16"})
        rows[recompute, len(modules)] = chosen(config, 1, Modelled(DEVICES["h100"])).costs.backward[0]
    assert sorted(rows, key=lambda row: rows[row]) == list(rows)
    config = config_of(precision={"compute": "bfloat16"})
    model, device = config.model, DEVICES["h100"]
    tokens = config.training.micro_batch_size * config.training.sequence_length
    moved = model.num_hidden_layers * 2 * 2 * 2 * tokens * model.hidden_size  # two norms, read and written, of two bytes
    assert rows["selective", 1] - rows["none", 0] == pytest.approx(moved / (0.87 * device.stream))

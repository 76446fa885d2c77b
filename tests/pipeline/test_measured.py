"""A measured step takes as long as the simulated one: the runtime adds nothing to what the schedule makes a rank wait."""

from __future__ import annotations

import pytest
from pipeline_schedules import Case, Measured, measure, summary

from megatron_llm.pipeline.schedules import NAMES
from tests.ranks import run_ranks
from tests.tiers import slow_among

# Of an F, in one attempt after the other: other programs may slow one, but make none faster. What a busy machine takes for a
# message does not grow with the sleeps.
SECONDS = (0.2, 0.2, 0.4, 0.4, 0.8, 0.8, 0.8, 0.8)


@pytest.mark.parametrize("name", slow_among(("1f1b", "interleaved", "zb_v"), NAMES))
def test_sleeping_stages_take_as_long_as_simulated(name: str) -> None:
    rows = []
    for seconds in SECONDS:
        case = Case(name, ranks=4, microbatches=8, seconds=seconds)
        runs: list[Measured] = run_ranks(4, measure, [case], 1)[0][0]
        rows.append(summary(case, runs))
        assert rows[-1]["ratio"] > 0.999, "a step cannot be faster than its sleeps"
        if rows[-1]["holds"]:
            return
    pytest.fail("\n".join(f"measured / simulated {row['ratio']:.3f}, noise {row['noise']:.3f}" for row in rows))

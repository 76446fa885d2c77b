"""Fixtures and hooks for all tests: one thread per process, no network, kernels interpreted where there is no GPU, and the
template of the rank pool.
"""

from __future__ import annotations

import gc
import os
from typing import Any

# Before anything imports a Hugging Face library: a test that would reach for the hub fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from tests import ranks  # noqa: E402

torch.set_num_threads(1)
# An example may wait for a core longer than the 200 ms that it would have.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """The test modules are imported and no test has run: the moment to fork the template of the rank pool."""
    ranks.start_template()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share what they have made, so they stay together; those on a SLURM share its two nodes and their ports."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else nodeid.partition("::")[0]

    return ByFile(config, log)


def pytest_unconfigure() -> None:
    """What `ranks` froze is collected at exit again: Triton's library calls every object that is left over then a leak."""
    gc.unfreeze()

"""Fixtures and hooks for all tests: one thread per process, no network, kernels interpreted where there is no GPU, and the
template of the rank pool.
"""

from __future__ import annotations

import gc
import os

# Before anything imports a Hugging Face library: a test that would reach for the hub fails at once instead of waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import ranks  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """The test modules are imported and no test has run: the moment to fork the template of the rank pool."""
    ranks.start_template()


def pytest_unconfigure() -> None:
    """What `ranks` froze is collected at exit again: Triton's library calls every object that is left over then a leak."""
    gc.unfreeze()

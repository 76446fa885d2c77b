"""Documents that are shorter and longer than the rows of `small.py`, so that they cross rows and micro-batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_llm.data.writer import IndexedWriter
from tests.training.small import LENGTHS

pytest.register_assert_rewrite("tests.training.blends")  # so that what its assertions compare is shown


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "documents"
    rng = np.random.default_rng(11)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in LENGTHS:
            writer.add_document(rng.integers(0, 37, length))
    return prefix


@pytest.fixture(scope="session")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second source, for blends."""
    prefix = tmp_path_factory.mktemp("data") / "more"
    rng = np.random.default_rng(12)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in LENGTHS[:8]:
            writer.add_document(rng.integers(0, 37, length))
    return prefix

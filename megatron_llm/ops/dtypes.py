"""The one rule that maps the compute dtype to the dtype of statistics, main gradients, masters and moments."""

from __future__ import annotations

import torch


def stat_dtype(compute: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what anything that is summed over many terms is kept in."""
    return torch.promote_types(compute, torch.float32)

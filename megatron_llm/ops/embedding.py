"""The gradient of an embedding: the gradients of tokens, added to the rows that they looked up. Called by
`parallel/weight_grad.py`.

Shape suffixes: T tokens, V rows of the table, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_to_rows_(table_VH: Tensor, rows_T: Tensor, dy_TH: Tensor, kernel: str = "torch") -> None:
    """Add dy of each token to its row of the table, in place.

    rows: int64. kernel: "torch", which adds in the dtype of the table, on a GPU in any order; or "triton", which sums the
    tokens of a row in float32 in one fixed order, adds once, and leaves out rows that the table does not have.
    """
    if kernel == "triton":
        from megatron_llm.ops.triton.embedding import add_to_rows

        order = torch.sort(rows_T.to(torch.int32), stable=True)
        add_to_rows(table_VH, order.values, order.indices, dy_TH if dy_TH.stride(-1) == 1 else dy_TH.contiguous())
    else:
        table_VH.index_add_(0, rows_T, dy_TH.to(table_VH.dtype))

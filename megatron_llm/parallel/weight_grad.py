"""Where weight gradients go. Called from the backward passes in `parallel/linear.py` and `parallel/embedding.py`.

When an optimizer has given a parameter a `main_grad` buffer (`optim/buffers.py`), its gradient is added there, in the
buffer's dtype, and autograd gets None: gradients of many micro-batches accumulate without a rounded copy. Without a
buffer (plain module use) the gradient is returned to autograd as usual.
"""

from __future__ import annotations

from torch import Tensor

from megatron_llm.ops.matmul import accumulate_matmul, matmul


def linear_weight_gradient(weight_OI: Tensor, dy_TO: Tensor, x_TI: Tensor) -> Tensor | None:
    """dW = dy^T x of a linear layer: [T, O], [T, I] -> added to `weight.main_grad` [O, I], or returned."""
    main_grad: Tensor | None = getattr(weight_OI, "main_grad", None)
    if main_grad is None:
        return matmul(dy_TO.t(), x_TI, weight_OI.dtype)
    accumulate_matmul(main_grad, dy_TO.t(), x_TI)
    return None


def embedding_weight_gradient(weight_VH: Tensor, rows_T: Tensor, dy_TH: Tensor) -> Tensor | None:
    """Add dy of each token to the row that it looked up: into `weight.main_grad` [V, H], or returned as a dense [V, H]."""
    main_grad: Tensor | None = getattr(weight_VH, "main_grad", None)
    if main_grad is None:
        return weight_VH.new_zeros(weight_VH.shape).index_add_(0, rows_T, dy_TH)
    main_grad.index_add_(0, rows_T, dy_TH.to(main_grad.dtype))
    return None

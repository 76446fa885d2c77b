"""One decoder layer: attention and MLP one after the other, or side by side. Called by `models/decoder.py`.

    norm_placement      input   x + f(norm(x))          output     x + norm(f(x))
                        both    x + norm(f(norm(x)))    residual   norm(x + f(x))
    parallel_block      x + attention(norm(x)) + mlp(norm(x)): one gather, one reduction; with one norm also one gather of inputs
                        for all products (GPT-J; Chowdhery et al. 2022, 2)

f(x) passes through dropout before it is added, in training steps that have it; in a parallel block the sum does.
`models/names.py` says which norms a layer has.

The addition behind attention is one operation with the norm of its sum (`Norm.of_sum`), where that norm is not made again: its
kernel reads both terms, which recomputation would have to keep for it instead of the sum. The addition at the end of a layer
stands alone: its sum crosses to the next layer, and maybe to the next stage, whose input is one tensor.
"""

from __future__ import annotations

from functools import partial as bind

from torch import Tensor, nn

from megatron_llm.models.attention import SelfAttention
from megatron_llm.models.context import ForwardContext
from megatron_llm.models.mlp import MLP
from megatron_llm.models.names import norm_names
from megatron_llm.models.norm import Norm, hidden_norm
from megatron_llm.models.recompute import recomputed
from megatron_llm.models.regularization import Site
from megatron_llm.models.setup import Setup
from megatron_llm.parallel.linear import ColumnParallelLinear, column_parallel, row_parallel


class DecoderLayer(nn.Module):
    """[S, H] or [T, H] -> the same shape.

    Args:
        layer: the index in the whole model.
        recompute: what backward makes again (`models/recompute.py`); "layer" is everything but the last product.
    """

    def __init__(self, setup: Setup, layer: int, recompute: frozenset[str]):
        super().__init__()
        self.model, self.layer, self.recompute = setup.model, layer, recompute
        before, after = norm_names(setup.model)

        def norm(name: str, there: bool) -> Norm | None:
            return hidden_norm(f"layers.{layer}.{name}", setup) if there else None

        self.attention_norm = norm("attention_norm", "attention" in before)
        self.attention = SelfAttention(setup, layer)
        self.attention_post_norm = norm("attention_post_norm", "attention" in after)
        self.mlp_norm = norm("mlp_norm", "mlp" in before)
        self.mlp = MLP(setup, layer)
        self.mlp_post_norm = norm("mlp_post_norm", "mlp" in after)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        side_by_side = self.model.parallel_block != "none"
        if "layer" in self.recompute:
            make = self._into_sum if side_by_side else self._into_down
            return recomputed(True, bind(make, context=context), bind(self._out, context=context), x)
        return self._side_by_side(x, context) if side_by_side else self._one_after_the_other(x, context)

    def _attention(self, x: Tensor, context: ForwardContext) -> Tensor:
        """What is to be added to x."""
        (qkv,) = self._project(x, self.attention_norm, context, self.attention.qkv)
        out = recomputed(
            "attention" in self.recompute,
            bind(self.attention, context=context),
            lambda out: row_parallel([out], [self.attention.o], context.sequence_parallel),
            *self.attention.split(qkv, context),
        )
        return self._term(out, "attention", self.attention_post_norm, context)

    def _one_after_the_other(self, x: Tensor, context: ForwardContext) -> Tensor:
        x, up = self._into_up(x, context)
        return recomputed("activation" in self.recompute, self.mlp, lambda product: self._out(x, product, context=context), up)

    def _side_by_side(self, x: Tensor, context: ForwardContext) -> Tensor:
        *heads, up = self._project_both(x, context)
        attend = bind(self.attention, context=context)
        out = bind(self._out, context=context)
        again = self.recompute & {"attention", "activation"}
        if again == {"attention", "activation"}:
            return recomputed(True, lambda *to: (attend(*to[:-1]), self.mlp(to[-1])), lambda a, p: out(x, a, p), *heads, up)
        if "activation" in again:
            attended = attend(*heads)
            return recomputed(True, self.mlp, lambda product: out(x, attended, product), up)
        product = self.mlp(up)
        return recomputed("attention" in again, attend, lambda attended: out(x, attended, product), *heads)

    def _into_down(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """All of a layer before its last product: (residual, input of the product)."""
        x, up = self._into_up(x, context)
        return x, self.mlp(up)

    def _into_sum(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """The same where the last product is that of attention and MLP together."""
        *heads, up = self._project_both(x, context)
        return x, self.attention(*heads, context=context), self.mlp(up)

    def _out(self, x: Tensor, *products: Tensor, context: ForwardContext) -> Tensor:
        """The last product of the layer, added to the residual: of the MLP alone, or of attention and MLP."""
        linears = [self.attention.o, self.mlp.down] if len(products) == 2 else [self.mlp.down]
        out = row_parallel(products, linears, context.sequence_parallel)
        return self._add(x, self._term(out, "mlp", self.mlp_post_norm, context), self.mlp_post_norm)

    def _into_up(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """All before the MLP: (its residual, the product with its first matrix)."""
        if self.mlp_norm is None or "norms" in self.recompute:
            x = self._add(x, self._attention(x, context), self.attention_post_norm)
            (up,) = self._project(x, self.mlp_norm, context, self.mlp.up)
        else:
            x, n = self.mlp_norm.of_sum(x, self._attention(x, context))
            (up,) = column_parallel(n, [self.mlp.up], context.sequence_parallel)
        return x, up

    def _project_both(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, ...]:
        """(q, k, v, what goes into the MLP's activation)."""
        if self.model.parallel_block == "one_norm":
            qkv, up = self._project(x, self.attention_norm, context, self.attention.qkv, self.mlp.up)
        else:
            (qkv,) = self._project(x, self.attention_norm, context, self.attention.qkv)
            (up,) = self._project(x, self.mlp_norm, context, self.mlp.up)
        return *self.attention.split(qkv, context), up

    def _project(
        self, x: Tensor, norm: Norm | None, context: ForwardContext, *linears: ColumnParallelLinear
    ) -> tuple[Tensor, ...]:
        """Products of the normalized input, which is kept for backward by them, or made again."""
        shard = context.sequence_parallel
        if norm is None:
            return column_parallel(x, linears, shard)
        return recomputed("norms" in self.recompute, norm, lambda n: column_parallel(n, linears, shard), x)

    def _term(self, out: Tensor, site: Site, post_norm: Norm | None, context: ForwardContext) -> Tensor:
        """What is added to the residual."""
        if post_norm is not None and self.model.norm_placement != "residual":
            out = post_norm(out)
        if self.model.residual_multiplier != 1.0:
            out = out * self.model.residual_multiplier
        return out if context.noise is None else context.noise.drop(out, site, self.layer)

    def _add(self, x: Tensor, term: Tensor, post_norm: Norm | None) -> Tensor:
        if post_norm is not None and self.model.norm_placement == "residual":
            return post_norm.of_sum(x, term)[1]
        return x + term

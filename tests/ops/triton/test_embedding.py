"""The gradient of an embedding in Triton: rows of a table that grow by sums over tokens, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from megatron_llm.ops.embedding import add_to_rows_
from megatron_llm.ops.triton import embedding
from megatron_llm.ops.triton.embedding import add_to_rows
from megatron_llm.parallel.embedding import VocabParallelEmbedding, lookup
from megatron_llm.parallel.grid import Axis
from megatron_llm.parallel.linear import OutputShard, sharded_weight
from megatron_llm.parallel.weight_grad import WeightGradients
from tests.ops.triton.common import DEVICE, assert_near, randn
from tests.ops.triton.far import sparse

W, JOINED = 4, 2  # small windows do: the interpreter takes a millisecond a token
V = 23
# Rows of tokens. Sorted, their runs lie in windows, end at their ends, span several, and more than are read at a time
BATCHES = {
    "one token": [5],
    "all different": list(range(V))[::-1],
    "one row": [7] * 3,
    "a window of one row": [7] * W,
    "two windows of a row each": [7] * W + [2] * W,
    "a row over an end": [3, 9] * (W // 2 + 2),
    "a row from window to window": [4] * (W - 1) + [9] * 2 + [11] * (W - 2) + [20] * (W + 1),
    "one long row": [1, *[6] * (3 * W), 22],
    "many partial sums": [9] * (W * (JOINED + 3) + 1) + [0] * 3 + [22] * W,
    "as many as are read at a time": [9] * (W * (JOINED + 1)),
}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "WINDOW", W)
    monkeypatch.setattr(embedding, "JOINED", JOINED)


def _rows(name: str) -> Tensor:
    rows = torch.tensor(BATCHES[name])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].to(DEVICE)


def _expected(table: Tensor, rows: Tensor, dy: Tensor) -> Tensor:
    """In float64; rows that are not in the table are left out."""
    held = (rows >= 0) & (rows < len(table))
    return table.double().index_add_(0, rows[held], dy[held].double())


@pytest.mark.parametrize("name", BATCHES)
def test_is_the_sum_in_float64(name: str) -> None:
    rows = _rows(name)
    table, dy = randn(V, 13), randn(len(rows), 13, seed=1)
    expected = _expected(table, rows, dy)
    add_to_rows_(table, rows, dy, "triton")
    assert_near(table, expected)


@pytest.mark.parametrize("narrow", [False, True], ids=["float32 table", "bfloat16 table"])
@pytest.mark.parametrize("hidden", [1, 512, 1100])
def test_bfloat16_gradients(hidden: int, narrow: bool) -> None:
    """They are added in float32, and a narrow table rounds once, whatever torch's kernel does."""
    rows = _rows("a row over an end")
    table = randn(V, hidden, dtype=torch.bfloat16 if narrow else torch.float32)
    dy = randn(len(rows), hidden, dtype=torch.bfloat16, seed=1)
    expected = _expected(table, rows, dy)
    add_to_rows_(table, rows, dy, "triton")
    assert_near(table, expected, 1.0)


def test_rows_of_others_and_of_no_one_are_left_out() -> None:
    """Nothing is read for them either: their gradients are no numbers here."""
    rows = torch.tensor([-1, 3, V, 3, -V, *[V + 7] * (2 * W), *[-9] * (2 * W), V - 1, 0], device=DEVICE)
    table, dy = randn(V, 8), randn(len(rows), 8, seed=1)
    expected = _expected(table, rows, dy)
    dy[(rows < 0) | (rows >= V)] = torch.nan
    before = table.clone()
    add_to_rows_(table, rows, dy, "triton")
    assert_near(table, expected)
    untouched = [row for row in range(V) if row not in (0, 3, V - 1)]
    assert torch.equal(table[untouched], before[untouched])


def test_the_same_bits_every_time_and_no_more_than_two_roundings_apart_from_torchs() -> None:
    rows = _rows("many partial sums")
    dy, tables = randn(len(rows), 16, seed=1), [torch.zeros(V, 16, device=DEVICE) for _ in range(2)]
    for table in tables:
        add_to_rows_(table, rows, dy, "triton")
    assert torch.equal(*tables)
    reference = torch.zeros(V, 16, device=DEVICE)
    add_to_rows_(reference, rows, dy)
    torch.testing.assert_close(tables[0], reference, rtol=1e-5, atol=1e-4)


def test_tables_and_gradients_that_are_parts_of_others() -> None:
    rows = _rows("one long row")
    whole, wide = randn(V, 40), randn(len(rows), 60, seed=1)
    for dy in (wide[:, 7:27], wide[:, :40:2], wide[0, 0].expand(len(rows), 20)):
        expected = _expected(whole[:, 3:23], rows, dy)
        before = whole.clone()
        add_to_rows_(whole[:, 3:23], rows, dy, "triton")
        assert_near(whole[:, 3:23], expected)
        assert torch.equal(whole[:, :3], before[:, :3]) and torch.equal(whole[:, 23:], before[:, 23:])


def test_no_tokens() -> None:
    table = randn(V, 8)
    before = table.clone()
    add_to_rows_(table, torch.zeros(0, dtype=torch.int64, device=DEVICE), randn(0, 8), "triton")
    assert torch.equal(table, before)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="memory that is never touched is the host's")
def test_more_elements_than_32_bits_count(tmp_path: Path) -> None:
    """Strides fit into 32 bits, and what they make of row 2 and token 2 does not; the memory between is never touched."""
    far = 2**30 + 16

    table, dy = (sparse(tmp_path / name, 2 * far + 4).as_strided((3, 4), (far, 1)) for name in ("table", "dy"))
    dy.copy_(randn(3, 4, seed=1))
    add_to_rows_(table, torch.tensor([2, 0, 2]), dy, "triton")
    assert torch.equal(table, torch.stack([dy[1], torch.zeros(4), dy[0] + dy[2]]))


def test_real_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operator launches them: a token that fills a tenth of the batch, and one that fills half."""
    monkeypatch.undo()
    assert embedding.WINDOW > W
    rows = torch.randint(0, V, (5 * embedding.WINDOW,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows[::2], rows[::10] = 5, 8
    table, dy = randn(V, 24), randn(len(rows), 24, dtype=torch.bfloat16, seed=1)
    expected = _expected(table, rows, dy)
    add_to_rows_(table, rows, dy, "triton")
    assert_near(table, expected)


def test_operator() -> None:
    rows = torch.tensor([0, 2, 2], device=DEVICE, dtype=torch.int32)
    torch.library.opcheck(add_to_rows, (randn(4, 8), rows, torch.tensor([1, 0, 2], device=DEVICE), randn(3, 8)))


# As the layer calls it


def _layer(rank: int, size: int, main_grad: bool) -> VocabParallelEmbedding:
    """One rank's rows of a table that is the same for every size of tp. Ranks lack a group: their outputs are partial."""
    tp = Axis("tp", rank, size)
    shard = OutputShard.even("embedding.weight", V, tp)
    weight = sharded_weight(12, [shard], torch.bfloat16, DEVICE)
    if main_grad:
        weight.main_grad = torch.zeros(weight.shape, device=DEVICE)  # type: ignore[attr-defined]
    return VocabParallelEmbedding(weight, shard.start, tp, "triton")


@pytest.mark.parametrize("main_grad", [True, False], ids=["main gradients", "autograd"])
@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_gets_the_gradients_of_its_rows(size: int, main_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_llm.parallel.embedding.reduce_from", lambda x, _: x)
    rows = torch.tensor([0, V - 1, 3, 3, V // 2, 3, 1, V - 2], device=DEVICE)
    dy = randn(len(rows), 12, dtype=torch.bfloat16, seed=4)
    parts = []
    for rank in range(size):
        layer = _layer(rank, size, main_grad)
        for _ in range(2):
            layer(rows, False).backward(dy)
        gradient = layer.weight.main_grad if main_grad else layer.weight.grad
        assert gradient is not None and (main_grad is (layer.weight.grad is None))
        parts.append(gradient)
    expected = _expected(torch.zeros(V, 12, device=DEVICE), rows, torch.cat([dy])) * 2
    assert_near(torch.cat(parts)[:V], expected)


def test_a_table_that_is_whole_and_gradients_left_to_w() -> None:
    """Learned positions; and what waits for W is added there."""
    weight = nn.Parameter(randn(V, 12))
    weight.main_grad = torch.zeros_like(weight.data)  # type: ignore[attr-defined]
    module = nn.Module()
    module.weight = weight
    queue = WeightGradients([module])
    rows, dy = torch.tensor([4, 4, 0, V - 1], device=DEVICE), randn(4, 12, seed=4)
    queue.begin_step(1)
    with queue.deferred(0):
        y = lookup(rows, weight, "triton")
        y.backward(dy)
    assert torch.equal(y, functional.embedding(rows, weight)) and not weight.main_grad.any()  # type: ignore[attr-defined]
    queue.run(0)
    queue.end_step()
    assert_near(weight.main_grad, _expected(torch.zeros(V, 12, device=DEVICE), rows, dy))  # type: ignore[attr-defined]

"""The memory table: what is looked up, and that only what was looked up is paid for and changed."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsemem.config import Train
from sparsemem.memory.table import MemoryTable, Reads
from sparsemem.parameter import initialize
from sparsemem.train.optim import Optimizer, RowAdam

ROWS = (5, 7, 11)


@pytest.fixture(scope="module", autouse=True)
def _some_rows_at_a_time() -> Iterator[None]:
    """Rows are multiplied some at a time: here so few that several portions and a rest are in every test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsemem.memory.table.CPU_NUMBERS", 12)
        yield


class _Holder(nn.Module):
    """A table and one backbone weight, as the optimiser expects a model to be."""

    def __init__(self, rows: tuple[int, ...] = ROWS) -> None:
        super().__init__()
        self.table = MemoryTable(rows, 4, 0.5)
        self.scale = nn.Parameter(torch.ones(4, 4))
        initialize(self.table, seed=0)


def _lookup(batch: int = 2, length: int = 6) -> Tensor:
    return torch.stack([torch.randint(rows, (batch, length)) for rows in ROWS], dim=-1)


def test_each_head_reads_its_own_table() -> None:
    table, rows = _Holder().table, _lookup()
    parts = table.rows_RC.detach().split(ROWS)
    expected = torch.cat([part[rows[..., h]] for h, part in enumerate(parts)], dim=-1)
    assert torch.equal(table(rows), expected)
    assert table(rows).shape == (2, 6, 12)


def test_the_last_row_of_every_table_can_be_read() -> None:
    table = _Holder().table
    last = table(torch.tensor([[[rows - 1 for rows in ROWS]]]))
    assert torch.equal(last.view(3, 4), table.rows_RC.detach()[torch.tensor(ROWS).cumsum(0) - 1])


def test_the_gradient_is_sparse_and_equals_the_dense_one() -> None:
    table, rows, target = _Holder().table, _lookup(3, 40), torch.randn(3, 40, 12)  # 120 reads of 23 rows: many repeats
    (table(rows) * target).sum().backward()
    gradient = table.rows_RC.grad
    assert gradient is not None
    assert gradient.is_sparse
    dense = table.rows_RC.detach().clone().requires_grad_()
    first = torch.tensor([0, *torch.tensor(ROWS).cumsum(0)[:-1].tolist()])
    (dense[(rows + first).flatten()].view(3, 40, 12) * target).sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(gradient.to_dense(), dense.grad)
    read = {int(row) for row in (rows + first).flatten()}
    assert set(gradient.coalesce().indices()[0].tolist()) == read


def _train(**changes: float) -> Train:
    return Train.model_validate({"batch_tokens": 64, "lr": 0.01, "table_lr_factor": 5, "weight_decay": 0.5} | changes)


def _step(holder: _Holder, optimizer: Optimizer, rows: Tensor, target: Tensor, rate: float = 0.01) -> None:
    ((holder.table(rows) * target).sum() + holder.scale.sum()).backward()
    optimizer.step(rate, done=0.0)


def test_a_step_changes_touched_rows_only_without_decay() -> None:
    holder = _Holder()
    optimizer = Optimizer(holder, _train())
    _step(holder, optimizer, _lookup(4, 20), torch.randn(4, 20, 12))
    adam = optimizer.parts[-1]
    assert isinstance(adam, RowAdam)
    before = [tensor.clone() for tensor in (holder.table.rows_RC.detach(), adam.mean_RC, adam.square_RC)]

    _step(holder, optimizer, torch.zeros(1, 3, 3, dtype=torch.int64), torch.ones(1, 3, 12))
    touched = torch.zeros(sum(ROWS), dtype=torch.bool)
    touched[[0, 5, 12]] = True
    for now, then in zip((holder.table.rows_RC, adam.mean_RC, adam.square_RC), before, strict=True):
        assert torch.equal((now != then).any(1), touched)


def test_equals_dense_adam_when_every_row_is_read_in_every_step() -> None:
    """Same moments, same bias correction, table_lr_factor times the rate, no decay; repeated rows are summed before
    they are squared.
    """
    holder = _Holder()
    optimizer = Optimizer(holder, _train())
    dense = holder.table.rows_RC.detach().clone().requires_grad_()
    adam = torch.optim.Adam([dense], lr=0.0, betas=(0.9, 0.95))
    first = torch.tensor([0, 5, 12])
    for rate in (0.01, 0.02, 0.005):
        every = torch.stack([torch.arange(22) % rows for rows in ROWS], dim=-1).unsqueeze(0)
        target = torch.randn(1, 22, 12)
        _step(holder, optimizer, every, target, rate)
        (dense[(every + first).flatten()].view(1, 22, 12) * target).sum().backward()
        adam.param_groups[0]["lr"] = 5 * rate
        adam.step()
        adam.zero_grad()
    torch.testing.assert_close(holder.table.rows_RC.detach(), dense.detach(), rtol=1e-4, atol=1e-6)


def test_the_table_stays_out_of_the_gradient_norm() -> None:
    holder = _Holder()
    optimizer = Optimizer(holder, _train())
    ((holder.table(_lookup()) * 1e6).sum() + (holder.scale * 0.5).sum()).backward()
    assert optimizer.step(0.01, done=0.0) == pytest.approx(2.0)  # sixteen gradients of a half


@pytest.mark.parametrize("rows", [(2,), (2, 3), (1009, 1013, 1019, 1021)])
def test_any_number_of_tables(rows: tuple[int, ...]) -> None:
    table = _Holder(rows).table
    assert table(torch.zeros(1, 1, len(rows), dtype=torch.int64)).shape == (1, 1, 4 * len(rows))
    assert table.rows_RC.shape == (sum(rows), 4)


# --- pooling and dot products -----------------------------------------------------------------------------------------

SHAPES = [  # tokens, reads a token, rows, width, slices, groups
    (1, 1, 1, 1, 1, 1),
    (5, 3, 7, 4, 1, 1),
    (6, 20, 4, 6, 2, 1),  # most reads repeat a row
    (7, 5, 9, 6, 3, 4),
    (4, 6, 50, 8, 1, 9),  # most groups are empty
]


def _pooling(
    tokens: int, count: int, rows: int, width: int, slices: int, groups: int
) -> tuple[MemoryTable, Tensor, Tensor, Tensor]:
    """A table in float64, row numbers, groups and weights."""
    table = MemoryTable((rows,), width, 1.0).double()
    initialize(table, seed=0)
    weights_SMG = torch.randn(tokens, count, slices, dtype=torch.float64, requires_grad=True)
    return table, torch.randint(rows, (tokens, count)), torch.randint(groups, (tokens, count)), weights_SMG


def _pooled_one_by_one(
    table_RC: Tensor, rows_SM: Tensor, groups_SM: Tensor, weights_SMG: Tensor, groups: int
) -> Tensor:
    (S, M, G), width = weights_SMG.shape, table_RC.shape[1]
    sums = [[torch.zeros(width, dtype=torch.float64) for _ in range(groups)] for _ in range(S)]
    for s in range(S):
        for m in range(M):
            weights_C = weights_SMG[s, m].repeat_interleave(width // G)
            sums[s][groups_SM[s, m]] = sums[s][groups_SM[s, m]] + weights_C * table_RC[rows_SM[s, m]]
    return torch.stack([torch.stack(of_token) for of_token in sums])


@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_equals_the_sum_one_by_one_with_its_gradients(shape: tuple[int, ...]) -> None:
    table, rows, groups, weights = _pooling(*shape)
    target = torch.randn(shape[0], shape[5], shape[3], dtype=torch.float64)
    (table.pool(Reads(rows, groups, shape[5]), weights) * target).sum().backward()
    dense, plain = table.rows_RC.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    expected = _pooled_one_by_one(dense, rows, groups, plain, shape[5])
    (expected * target).sum().backward()
    torch.testing.assert_close(table.pool(Reads(rows, groups, shape[5]), weights), expected)
    torch.testing.assert_close(weights.grad, plain.grad)
    assert table.rows_RC.grad is not None
    torch.testing.assert_close(table.rows_RC.grad.to_dense(), dense.grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_dot_products_equal_those_of_gathered_rows_with_their_gradients(shape: tuple[int, ...]) -> None:
    table, rows, *_ = _pooling(*shape)
    x = torch.randn(shape[0], shape[3], dtype=torch.float64, requires_grad=True)
    target = torch.randn(rows.shape, dtype=torch.float64)
    (table.dot(Reads(rows), x) * target).sum().backward()
    dense, plain = table.rows_RC.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    expected = (dense[rows] * plain.unsqueeze(1)).sum(-1)
    (expected * target).sum().backward()
    torch.testing.assert_close(table.dot(Reads(rows), x), expected)
    torch.testing.assert_close(x.grad, plain.grad)
    assert table.rows_RC.grad is not None
    torch.testing.assert_close(table.rows_RC.grad.to_dense(), dense.grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_pooling_and_products_are_finite_differences(shape: tuple[int, ...]) -> None:
    table, rows, groups, weights = _pooling(*shape)
    reads, x = Reads(rows, groups, shape[5]), torch.randn(shape[0], shape[3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda weights: table.pool(reads, weights), weights)
    assert torch.autograd.gradcheck(lambda x: table.dot(reads, x), x)


def test_one_group_is_the_default_and_a_float32_table_takes_weights_of_any_precision() -> None:
    table, rows, _, weights = _pooling(5, 3, 7, 4, 1, 1)
    assert torch.equal(table.pool(Reads(rows), weights), table.pool(Reads(rows, torch.zeros_like(rows), 1), weights))
    pooled = table.float().pool(Reads(rows), weights.bfloat16())
    assert pooled.dtype == table.dot(Reads(rows), torch.ones(5, 4, dtype=torch.bfloat16)).dtype == torch.float32
    pooled.sum().backward()
    assert weights.grad is not None


def test_pooled_gradients_hold_the_rows_that_were_read_once_each_and_sorted() -> None:
    """Also when layers share the table: the optimiser need not sort again."""
    table, rows, _, weights = _pooling(30, 20, 400, 4, 2, 1)
    others = torch.randint(400, (30, 20))
    (
        table.pool(Reads(rows), weights).sum()
        + table.pool(Reads(others), weights).sum()
        + table.dot(Reads(rows), torch.ones(30, 4)).sum()
    ).backward()
    gradient = table.rows_RC.grad
    assert gradient is not None
    assert gradient.is_coalesced()
    assert gradient.indices()[0].tolist() == sorted({*rows.flatten().tolist(), *others.flatten().tolist()})
    gathered = torch.cat([table.rows_RC.detach()[rows], table.rows_RC.detach()[others]], dim=1).requires_grad_()
    (gathered * torch.cat([weights, weights], dim=1).detach().repeat_interleave(2, -1)).sum().backward()
    assert gathered.grad is not None
    expected = torch.zeros(400, 4, dtype=torch.float64).index_add_(
        0, torch.cat([rows, others], dim=1).flatten(), gathered.grad.flatten(0, 1)
    )
    expected.index_add_(0, rows.flatten(), torch.ones(600, 4, dtype=torch.float64))
    torch.testing.assert_close(gradient.to_dense(), expected)


@pytest.mark.parametrize("kind", ["pool", "dot"])
def test_a_step_on_pooled_rows_changes_touched_rows_only(kind: str) -> None:
    holder = _Holder((40,))
    optimizer = Optimizer(holder, _train())

    def step(rows: Tensor) -> None:
        reads, ones = Reads(rows), torch.ones(len(rows), 4)
        y = (
            holder.table.pool(reads, ones[:, : rows.shape[1]].unsqueeze(-1))
            if kind == "pool"
            else holder.table.dot(reads, ones)
        )
        (y.square().sum() + holder.scale.sum()).backward()
        optimizer.step(0.01, done=0.0)

    step(torch.arange(40).view(10, 4))
    adam = optimizer.parts[-1]
    assert isinstance(adam, RowAdam)
    before = [tensor.clone() for tensor in (holder.table.rows_RC.detach(), adam.mean_RC, adam.square_RC)]

    step(torch.tensor([[3, 3, 17, 39], [17, 3, 3, 3]]))
    touched = torch.zeros(40, dtype=torch.bool)
    touched[[3, 17, 39]] = True
    for now, then in zip((holder.table.rows_RC, adam.mean_RC, adam.square_RC), before, strict=True):
        assert torch.equal((now != then).any(1), touched)


def test_rows_that_repeat_are_summed_before_they_are_squared() -> None:
    """As dense Adam does with the gradient of a gather."""
    holder, rows = _Holder((6,)), torch.arange(24).view(4, 6) % 6
    optimizer, dense = Optimizer(holder, _train()), holder.table.rows_RC.detach().clone().requires_grad_()
    adam = torch.optim.Adam([dense], lr=0.05, betas=(0.9, 0.95))
    for _ in range(3):
        weights, target = torch.randn(4, 6, 1), torch.randn(4, 4)
        ((holder.table.pool(Reads(rows), weights).squeeze(1) * target).sum() + holder.scale.sum()).backward()
        optimizer.step(0.01, done=0.0)
        (((dense[rows] * weights).sum(1)) * target).sum().backward()
        adam.step()
        adam.zero_grad()
    torch.testing.assert_close(holder.table.rows_RC.detach(), dense.detach(), rtol=1e-4, atol=1e-6)


def test_a_table_may_have_a_rate_of_its_own() -> None:
    assert MemoryTable((4,), 2, 0.1).rows_RC.rate is None  # type: ignore[attr-defined]
    assert MemoryTable((4,), 2, 0.1, rate=(4.0, 1.0)).rows_RC.rate == (4.0, 1.0)  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 30),
    width=st.integers(1, 9),
    reads=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_lookups_and_their_updates_equal_float64_adam_row_by_row(
    rows: int, width: int, reads: list[int], seed: int
) -> None:
    """Steps that read rows several times, once, or none at all; a row's moments move only in steps that read it."""
    table = MemoryTable((rows,), width, 0.5)
    initialize(table, seed)
    adam = RowAdam(table.rows_RC, (0.9, 0.95), (2.0, 1.0))
    stream = torch.Generator().manual_seed(seed)
    weights = table.rows_RC.detach().double()
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    for number, count in enumerate(reads, 1):
        read, done = torch.randint(rows, (1, count, 1), generator=stream), number / len(reads)
        target = torch.randn(1, count, width, generator=stream)
        found = table(read)
        assert found.double().equal(table.rows_RC.detach().double()[read.flatten()].view(1, count, width))
        (found * target).sum().backward()
        adam.step(0.01, done)
        gradient = torch.zeros_like(weights).index_add_(0, read.flatten(), target.double().flatten(0, 1))
        touched = read.flatten().unique()
        mean[touched] = 0.9 * mean[touched] + 0.1 * gradient[touched]
        square[touched] = 0.95 * square[touched] + 0.05 * gradient[touched] ** 2
        change = (mean / (1 - 0.9**number)) / (
            (square / (1 - 0.95**number)).sqrt() + 1e-8 / math.sqrt(1 - 0.95**number)
        )
        weights[touched] -= 0.01 * (2 - done) * change[touched]
        torch.testing.assert_close(table.rows_RC.detach().double(), weights, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 30),
    slices=st.integers(1, 3),
    width=st.integers(1, 5),
    tokens=st.integers(1, 6),
    reads=st.integers(1, 7),
    groups=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_pooled_sums_and_products_equal_float64_loops(
    rows: int, slices: int, width: int, tokens: int, reads: int, groups: int, seed: int
) -> None:
    """With their gradients; more reads than rows repeat some, fewer leave some unread, as some groups stay empty."""
    table, stream = MemoryTable((rows,), slices * width, 0.5), torch.Generator().manual_seed(seed)
    initialize(table, seed)
    read, group = (
        torch.randint(rows, (tokens, reads), generator=stream),
        torch.randint(groups, (tokens, reads), generator=stream),
    )
    weights = torch.randn(tokens, reads, slices, generator=stream).requires_grad_()
    x = torch.randn(tokens, slices * width, generator=stream).requires_grad_()
    up = torch.randn(tokens, groups, slices * width, generator=stream), torch.randn(tokens, reads, generator=stream)
    found = Reads(read, group, groups)
    pooled, products = table.pool(found, weights), table.dot(found, x)
    ((pooled * up[0]).sum() + (products * up[1]).sum()).backward()

    table_64, weights_64, x_64 = (leaf.detach().double().requires_grad_() for leaf in (table.rows_RC, weights, x))
    gathered = table_64[read]
    weighted = gathered * weights_64.repeat_interleave(width, -1)
    expected = torch.zeros(tokens, groups, slices * width, dtype=torch.float64)
    expected = expected.scatter_add(1, group.unsqueeze(-1).expand(-1, -1, slices * width), weighted)
    dots = (gathered * x_64.unsqueeze(1)).sum(-1)
    ((expected * up[0]).sum() + (dots * up[1]).sum()).backward()
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(products.double(), dots, rtol=1e-4, atol=1e-5)
    assert table.rows_RC.grad is not None
    for ours, theirs in (
        (table.rows_RC.grad.to_dense(), table_64.grad),
        (weights.grad, weights_64.grad),
        (x.grad, x_64.grad),
    ):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


STEP_IN_A_NEW_PROCESS = """
import resource, torch
from sparsemem.config import Train
from sparsemem.memory.table import MemoryTable, Reads
from sparsemem.parameter import initialize
from sparsemem.train.optim import Optimizer
from sparsemem.train.process import make_as_new

for rows in (1000, {rows}):  # what the first step of a process takes is taken by the small table
    table = MemoryTable((rows,), {width}, 0.02)
    initialize(table, seed=0)
    optimizer = Optimizer(table, Train(batch_tokens=256, lr=0.01))
    reads = torch.randint(rows // 16, (256, 4))
    make_as_new()  # forgets the largest memory so far
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (table(reads.unsqueeze(-1)).sum() + table.pool(Reads(reads), torch.ones(256, 4, 1)).sum()).backward()
    optimizer.step(0.01, 0.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the largest memory in KiB, and forgets it")
def test_a_step_takes_no_memory_for_rows_that_it_did_not_read() -> None:
    """The table is 128 MiB, and so would be a dense gradient or a pass over a moment, whose pages do not exist before
    they are written.
    """
    script = STEP_IN_A_NEW_PROCESS.format(rows=2**22, width=8)
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 2**17 / 4

"""The memory table: what is looked up, and that only what was looked up is paid for and changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsemem.config import Train
from sparsemem.memory.table import MemoryTable
from sparsemem.parameter import initialize
from sparsemem.train.optim import Optimizer

ROWS = (5, 7, 11)


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
    optimizer.step(rate)


def test_a_step_changes_touched_rows_only_without_decay() -> None:
    holder = _Holder()
    optimizer = Optimizer(holder, _train())
    _step(holder, optimizer, _lookup(4, 20), torch.randn(4, 20, 12))
    weights, state = holder.table.rows_RC.detach().clone(), optimizer.parts[1][0].state[holder.table.rows_RC]
    moments = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor) and value.ndim}
    assert {"exp_avg", "exp_avg_sq"} <= set(moments)

    _step(holder, optimizer, torch.zeros(1, 3, 3, dtype=torch.int64), torch.ones(1, 3, 12))
    touched = torch.zeros(sum(ROWS), dtype=torch.bool)
    touched[[0, 5, 12]] = True
    assert torch.equal((holder.table.rows_RC != weights).any(1), touched)
    for name, before in moments.items():
        assert torch.equal((state[name] != before).any(1), touched), name


def test_equals_dense_adam_when_every_row_is_read_in_every_step() -> None:
    """Same moments, same bias correction, table_lr_factor times the rate, no decay; repeated rows are summed before they are squared."""
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
    assert optimizer.step(0.01) == pytest.approx(2.0)  # sixteen gradients of a half


@pytest.mark.parametrize("rows", [(2,), (2, 3), (1009, 1013, 1019, 1021)])
def test_any_number_of_tables(rows: tuple[int, ...]) -> None:
    table = _Holder(rows).table
    assert table(torch.zeros(1, 1, len(rows), dtype=torch.int64)).shape == (1, 1, 4 * len(rows))
    assert table.rows_RC.shape == (sum(rows), 4)

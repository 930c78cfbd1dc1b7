"""Every count of an account against real tensors, for every pool that is registered and every value of its fields, by
construction.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from sparsemem import model
from sparsemem.accounting import Account
from sparsemem.config import MEMORY_POOLS, POOLS, Model, load_study
from sparsemem.config.model import MANY_STREAMS
from sparsemem.mechanisms.moe import layer as moe
from sparsemem.mechanisms.product_key import PRODUCT_KEY
from sparsemem.memory.table import MemoryTable, Reads
from sparsemem.model import Sizes, Transformer, check_account, count_model, memory_params, memory_rows_read
from sparsemem.study.plan import plan

VOCABULARY, CONTEXT = 40, 16
BASE: dict[str, Any] = {"layers": 3, "width": 16, "heads": 2}
VALUES = (True, False, 1, 2, 3, 4, 8, 9, 16, 0.5, "all", (1, 2), (2,), (2, 4), (2.0, 0.5), None)
MOST = 2  # other values of a field than its default


def _values(field: FieldInfo) -> list[Any]:
    """Those of `VALUES`, and of the field's own words, that its type takes."""
    words = [
        word
        for part in (field.annotation, *get_args(field.annotation))
        for word in get_args(part)
        if isinstance(word, str)
    ]
    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    found: list[Any] = []
    for value in (*words, *VALUES):
        try:
            parsed = adapter.validate_python(value)
        except ValidationError:
            continue
        if (type(parsed), parsed) not in [(type(other), other) for other in found]:
            found.append(parsed)
    return found


def _build(changes: dict[str, Any]) -> Model | None:
    try:
        return Model.model_validate(BASE | changes)
    except ValidationError:
        return None


def _pool_class(pool: str) -> Any:
    return next(part for part in get_args(Model.model_fields[pool].annotation) if part is not type(None))


@functools.cache
def _least(pool: str) -> dict[str, Any]:
    """The first values of a pool's required fields that make a model."""
    required = {name: _values(field) for name, field in _pool_class(pool).model_fields.items() if field.is_required()}
    points = (dict(zip(required, values, strict=True)) for values in itertools.product(*required.values()))
    extra = (
        {"layers": (1, 2), "top_m": 3, "init": "flat"} if pool in PRODUCT_KEY else {}
    )  # small tables, whose start is not simulated
    extra |= {"leading_dense": 1} if pool == "moe" else {}
    return next(point | extra for point in points if _build({pool: point | extra}))


def _points() -> Iterator[tuple[str, str, Model]]:
    """(pool, field, model): each field of each pool at other values than its default, and those of the model beside
    every pool at once.
    """
    every = {pool: _least(pool) | ({"placement": "parallel"} if pool in PRODUCT_KEY else {}) for pool in POOLS}
    for pool in POOLS:
        for name, field in _pool_class(pool).model_fields.items():
            changed = ({pool: _least(pool) | {name: value}} for value in _values(field) if value != field.default)
            yield from ((pool, name, config) for config in itertools.islice(filter(None, map(_build, changed)), MOST))
    for residual in MANY_STREAMS:
        streams = {"residual": residual, "streams": 3}
        for pool in POOLS:
            yield "model", "streams", Model.model_validate(BASE | streams | {pool: _least(pool)})
        branches = {"engram": _least("engram") | {"fusion": "per_branch", "bias": True}}
        yield "engram", "fusion", Model.model_validate(BASE | streams | branches)
    for name, field in Model.model_fields.items():
        changed = (every | {name: value} for value in _values(field) if name not in POOLS and value != field.default)
        yield from (("model", name, config) for config in itertools.islice(filter(None, map(_build, changed)), MOST))


def _sizes(config: Model) -> Sizes:
    pools = [pool for pool in MEMORY_POOLS if getattr(config, pool)]
    tables = {
        pool: POOLS[pool].given(config)
        if pool in config.on_top
        else POOLS[pool].tables(config, 2 * POOLS[pool].least(config))
        for pool in pools
    }
    return Sizes(config.moe.top_k + 3 if config.moe else 0, 5, tables)


POINTS = [(pool, name, config, _sizes(config)) for pool, name, config in _points()]


def test_every_pool_and_every_field_has_a_case() -> None:
    """A field that no pool can be built with, or a pool without a case, is a hole in this file."""
    covered = {(pool, name) for pool, name, *_ in POINTS}
    assert {pool for pool, _ in covered} == {*POOLS, "model"}
    for pool in POOLS:
        kin = (
            PRODUCT_KEY if pool in PRODUCT_KEY else (pool,)
        )  # one family: a field may need others that only some of its points have
        for name in _pool_class(pool).model_fields:
            assert any((one, name) in covered for one in kin), f"no case has another {pool}.{name} than its default"
    assert {name for pool, name in covered if pool == "model"} == Model.model_fields.keys() - {*POOLS}


def _reads(config: Model, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str], int]:
    """Of one token's forward pass: numbers that it reads of tables, and the most of them that may be distinct, by pool;
    and rows.
    """
    network = Transformer(config, sizes, CONTEXT, torch.arange(VOCABULARY), separator=0).initialize(0).eval()
    parts = model.owners(network)
    owner = {id(module): parts[module.rows_RC] for module in network.modules() if isinstance(module, MemoryTable)}
    by_table: Counter[int] = Counter()
    numbers: Counter[str] = Counter()
    size = {id(module): len(module.rows_RC) for module in network.modules() if isinstance(module, MemoryTable)}
    width = {id(module): module.rows_RC.shape[1] for module in network.modules() if isinstance(module, MemoryTable)}
    lookup, pool, dot = MemoryTable.forward, MemoryTable.pool, MemoryTable.dot

    def note(table: MemoryTable, count: int) -> None:
        by_table[id(table)] += count
        numbers[owner[id(table)]] += count * width[id(table)]

    def looked_up(table: MemoryTable, rows_BTH: Tensor) -> Tensor:
        note(table, rows_BTH.numel())
        return lookup(table, rows_BTH)

    def pooled(table: MemoryTable, reads: Reads, weights_SMG: Tensor) -> Tensor:
        note(table, reads.rows_A.numel())
        return pool(table, reads, weights_SMG)

    def multiplied(table: MemoryTable, reads: Reads, x_SC: Tensor) -> Tensor:
        note(table, reads.rows_A.numel())
        return dot(table, reads, x_SC)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(MemoryTable, "forward", looked_up)
        patch.setattr(MemoryTable, "pool", pooled)
        patch.setattr(MemoryTable, "dot", multiplied)
        network(torch.tensor([[7]]))
    distinct: Counter[str] = Counter()
    for table, count in by_table.items():
        distinct[owner[table]] += min(count, size[table]) * width[table]
    values = {
        id(module)
        for name, module in network.named_modules()
        if name.endswith(("values", "table")) and "pre_" not in name
    }
    return numbers, distinct, sum(count for table, count in by_table.items() if table in values)


def _faults(config: Model, sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts of the account and of the plan that are not those of the tensors."""
    account = count_model(config, sizes, CONTEXT, VOCABULARY)
    with torch.device("meta"):
        network = Transformer(config, sizes, CONTEXT, torch.arange(VOCABULARY, device="cpu"), separator=0)
    weights = dict(network.named_parameters())
    assert all(weight.is_meta for weight in weights.values())
    numbers, distinct, rows_read = _reads(config, sizes, monkeypatch)
    total, rows, row_numbers = Counter[str](), Counter[str](), Counter[str]()
    vocabulary, parts = 0, model.owners(network)
    for name, weight in weights.items():
        if name in ("embedding", "head"):
            vocabulary += weight.numel()
            continue
        part = parts.get(weight, "backbone")
        total[part] += weight.numel()
        if name.endswith("rows_RC"):
            row_numbers[part] += weight.numel()
            rows[part] += 0 if "pre_values" in name else len(weight)
    experts = sum(weight.numel() for name, weight in weights.items() if name.endswith(("gate_up_EDF", "down_EFD")))
    chosen = experts // sizes.routed_experts * config.moe.top_k if config.moe else 0
    idle = {part: row_numbers[part] - distinct[part] for part in total} | (
        {"moe": experts - chosen} if config.moe else {}
    )
    real: dict[str, Any] = {
        "embedding": vocabulary,
        "total": sum(total.values()),
        "rows": sum(rows.values()),
        "rows read": rows_read,
    }
    real |= {
        "memory": sum(row_numbers.values()),
        "active": sum(total.values()) - sum(idle.values()),
        "sparse": sum(idle.values()),
    }
    real |= {
        "bytes": 4 * (sum(numbers.values()) + chosen),
        "parts": {part: (total[part], idle[part]) for part in total},
    }
    stated: dict[str, Any] = {
        "embedding": account.embedding_params,
        "total": account.total_params,
        "rows": sizes.memory_rows,
    }
    stated |= {
        "rows read": memory_rows_read(config, sizes),
        "memory": memory_params(config, sizes),
        "active": account.active_params,
    }
    stated |= {"sparse": account.sparse_params, "bytes": account.memory_bytes_per_token}
    stated |= {"parts": {part: (one.total, one.idle) for part, one in account.parts.items()}}
    return [f"{name}: {stated[name]} stated, {real[name]} held" for name in real if stated[name] != real[name]]


@pytest.mark.parametrize("pool", [*POOLS, "model"])
def test_every_count_is_that_of_the_tensors(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, config, sizes in POINTS:
        if owner == pool:
            fault = f"{pool}.{name}, {config.model_dump(exclude_defaults=True)}: "
            assert not (faults := _faults(config, sizes, monkeypatch)), fault + "; ".join(faults)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("doubled", ["total", "active"])
def test_an_account_that_counts_double_is_seen(pool: str, doubled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this file, by the check of a plan, and by the plan itself."""
    real = model.count_model

    def wrong(*arguments: Any, **named: Any) -> model.ModelAccount:
        account = real(*arguments, **named)
        part = account.parts.get(pool)
        extra = {"total": Account(total=part.idle), "active": Account(active=part.sparse_bytes // 4)} if part else {}
        return model.ModelAccount(
            account.parts | ({pool: part + extra[doubled]} if part else {}),
            account.embedding_params,
            account.head_flops,
        )

    monkeypatch.setattr(model, "count_model", wrong)
    monkeypatch.setitem(globals(), "count_model", wrong)
    owner, _, config, sizes = next(point for point in POINTS if point[0] == pool and point[2].on_top == ())
    assert owner == pool
    assert _faults(config, sizes, monkeypatch)
    with pytest.raises(RuntimeError, match=f"`{pool}`"):
        check_account(config, sizes)


def test_a_plan_holds_its_accounts_against_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(Path(__file__).parents[1] / "sweeps" / "allocation-quick.yaml")
    plan(study)
    real = moe.moe_account
    monkeypatch.setattr(moe, "moe_account", lambda *sizes: real(*sizes) + Account(total=1))
    with pytest.raises(RuntimeError, match="account of `moe`"):
        plan(study)

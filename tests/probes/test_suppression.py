"""A suppressed model is one whose weights say so, and afterwards it is whole again."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from small import MEMORIES, model_of

from sparsemem.memory.table import MemoryTable
from sparsemem.model import Transformer
from sparsemem.probes.reading import read
from sparsemem.probes.sample import Sample
from sparsemem.probes.suppression import KINDS, MEAN_ROW, OTHER_NGRAM, ZERO, mean_rows, suppression_rows


def increases(model: Transformer, sample: Sample) -> dict[tuple[str, str], float | None]:
    losses, readings = read(model, *sample.windows, torch.float32)
    rows = list(suppression_rows(model, sample, losses, readings, torch.float32))
    again, _ = read(model, *sample.windows, torch.float32)
    assert torch.equal(losses, again)
    return {(row["pool"], row["suppression"]): row["increase"] for row in rows if row["order"] is None}


def loss_with(model: Transformer, sample: Sample, change: Callable[[Transformer], object]) -> float:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return float(read(other, *sample.windows, torch.float32)[0].mean())


def without_experts(model: Transformer) -> None:
    for layer in model.layers_of("moe"):
        layer.down_EFD.zero_()


def without_values(model: Transformer) -> None:
    """No memory adds anything: rows of zeros do not, where neither bias nor gain is between them and the output."""
    for layer in model.layers_of(*MEMORIES):
        for module in layer.modules():
            if isinstance(module, MemoryTable):
                module.rows_RC.zero_()


@pytest.mark.parametrize("memory", list(MEMORIES))
def test_zero_is_a_model_of_zeros(memory: str, sample: Sample) -> None:
    model = model_of(memory)
    plain, found = loss_with(model, sample, lambda same: None), increases(model, sample)
    for pool, change in (("moe", without_experts), (memory, without_values)):
        wanted = loss_with(model, sample, change) - plain
        assert found[pool, ZERO] == pytest.approx(wanted, abs=1e-6)
        assert abs(wanted) > 1e-4
    assert found["moe", MEAN_ROW] is None
    assert found["moe", OTHER_NGRAM] is None


@pytest.mark.parametrize("memory", list(MEMORIES))
def test_the_mean_row_is_that_of_what_is_read(memory: str, sample: Sample) -> None:
    model = model_of(memory)

    def level(other: Transformer) -> None:
        reads = dict[MemoryTable, torch.Tensor]()
        _, readings = read(other, *sample.windows, torch.float32)
        for reading in readings:
            for module in reading.layer.modules():
                if isinstance(module, MemoryTable):
                    reads[module] = reads.get(module, 0) + reading.reads_N
        for table, counts in reads.items():
            bounds = [*table.first_H.tolist(), len(table.rows_RC)]
            for first, end in itertools.pairwise(bounds):
                listed = [row for row in range(first, end) for _ in range(int(counts[row]))]
                table.rows_RC[first:end] = table.rows_RC[listed].double().mean(0).float()

    wanted = loss_with(model, sample, level) - loss_with(model, sample, lambda same: None)
    assert increases(model, sample)[memory, MEAN_ROW] == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted) > 1e-4


def test_rows_of_a_table_that_is_never_read_count_alike() -> None:
    rows = torch.arange(12.0).view(6, 2)
    found = mean_rows(rows, torch.tensor([3, 1, 0, 0, 0, 0]), torch.tensor([0, 2]))
    assert found.tolist() == [[0.5, 1.5]] * 2 + [[7.0, 8.0]] * 4


@pytest.mark.parametrize("memory", ["engram", "ngram_embedding"])
def test_another_n_gram_is_another_positions_rows(memory: str, sample: Sample) -> None:
    model = model_of(memory)

    def exchange(other: Transformer) -> None:
        draws = torch.Generator().manual_seed(0)
        for layer in other.layers_of(memory):
            hashed = layer.hash.forward

            def exchanged(tokens: torch.Tensor, hashed: Callable[..., torch.Tensor] = hashed) -> torch.Tensor:
                rows = hashed(tokens)
                return rows.flatten(0, 1)[torch.randperm(rows.shape[0] * rows.shape[1], generator=draws)].view_as(rows)

            layer.hash.forward = exchanged

    wanted = loss_with(model, sample, exchange) - loss_with(model, sample, lambda same: None)
    assert increases(model, sample)[memory, OTHER_NGRAM] == pytest.approx(wanted, abs=1e-6)
    assert abs(wanted) > 1e-4


@pytest.mark.parametrize("memory", ["pkm", "ultramem_v2"])
def test_rows_that_scores_find_have_no_n_gram(memory: str, sample: Sample) -> None:
    assert increases(model_of(memory), sample)[memory, OTHER_NGRAM] is None


def test_a_dense_model_has_nothing_to_suppress(sample: Sample) -> None:
    assert increases(model_of(None), sample) == {}


def test_bins_by_frequency_add_up(sample: Sample) -> None:
    model = model_of("engram")
    losses, readings = read(model, *sample.windows, torch.float32)
    rows = [row for row in suppression_rows(model, sample, losses, readings, torch.float32) if row["pool"] == "engram"]
    for kind in KINDS:
        counts = sample.occurrences_P(2)
        own = [row for row in rows if (row["suppression"], row["order"]) == (kind, 2)]
        assert sum(row["tokens"] for row in own) == int((counts >= 0).sum())
        never = next(row for row in own if row["least"] == 0)
        assert (never["tokens"], never["most"]) == (int((counts == 0).sum()), 0)
        assert never["loss"] == pytest.approx(float(losses.flatten()[counts == 0].mean()))

"""Gates against their formula in float64, and what they are held against, counted one by one."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from small import CONTEXT, SEPARATOR, model_of

from sparsemem.probes.gates import gate_rows, text_rows
from sparsemem.probes.reading import read
from sparsemem.probes.sample import Sample


def by_hand(model, inputs):  # type: ignore[no-untyped-def]
    """Gate and |gate x value| / |hidden| of the Engram layer of block 1, from the equations of the paper."""
    layer = model.blocks[0].memory
    hidden = torch.nn.functional.embedding(inputs, model.embedding).double()
    memory = (
        torch.nn.functional.embedding(layer.hash(inputs) + layer.table.first_H, layer.table.rows_RC)
        .flatten(-2)
        .double()
    )
    key, value = memory @ layer.key.double().T, memory @ layer.value.double().T

    def normed(x, norm):  # type: ignore[no-untyped-def]
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.gain.double()

    score = (normed(hidden, layer.hidden_norm) * normed(key, layer.key_norm)).sum(-1) / math.sqrt(hidden.shape[-1])
    gate = torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())
    return gate.flatten(), (gate * value.norm(dim=-1) / hidden.norm(dim=-1)).flatten()


@torch.no_grad()
def test_gates_and_parts_are_those_of_the_papers_equations(sample: Sample) -> None:
    model = model_of("engram")
    losses, readings = read(model, *sample.windows, torch.float32)
    assert losses.shape == (6, CONTEXT)
    first = next(each for each in readings if each.pool == "engram")
    gate, part = by_hand(model, sample.windows[0])
    assert torch.allclose(torch.cat(first.gates)[:, 0], gate, atol=1e-5)
    assert torch.allclose(torch.cat(first.parts)[:, 0], part, rtol=1e-4)
    rows = {
        (row["measure"], row["order"], row["least"]): row for row in gate_rows(sample, readings) if row["layer"] == 1
    }
    assert rows["mean", None, None]["value"] == pytest.approx(float(gate.mean()), abs=1e-5)
    assert rows["part", None, None]["value"] == pytest.approx(float(part.mean()), rel=1e-4)
    assert rows["quantile_0.25", None, None]["value"] == pytest.approx(float(gate.quantile(0.25)), abs=1e-5)
    for order in (2, 3):
        counts, information = counted(sample, order)
        for name, values in (("frequency", counts), ("information", information)):
            known = ~np.isnan(values)
            row = rows[f"rank_correlation_{name}", order, None]
            wanted = stats.spearmanr(torch.cat(first.gates)[known, 0], values[known]).statistic
            assert (row["value"], row["tokens"]) == (pytest.approx(wanted), int(known.sum()))
        once = counts == 1
        assert rows["by_frequency", order, 1]["tokens"] == int(once.sum()) > 0
        assert rows["by_frequency", order, 1]["value"] == pytest.approx(float(gate[once].mean()), abs=1e-5)
    assert {layer["layer"] for layer in gate_rows(sample, readings)} == {1, 2}


def counted(sample: Sample, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Occurrences of the n-gram that ends at each position, and its information; not numbers where there is none."""
    train, ids = sample.train().tolist(), sample.ids.tolist()
    grams = Counter(
        tuple(train[place : place + order])
        for place in range(len(train) - order + 1)
        if SEPARATOR not in train[place : place + order]
    )
    single, total = Counter(train), len(train)
    counts, information = [], []
    for place in range(sample.positions):
        gram = tuple(ids[place - order + 1 : place + 1])
        within = place % CONTEXT >= order - 1 and SEPARATOR not in gram
        count = grams[gram] if within else math.nan
        counts.append(count)
        chance = math.prod(single[token] / total for token in gram) if within else math.nan
        information.append(round(math.log(count / total / chance), 9) if within and count else math.nan)
    return np.array(counts), np.array(information)


def test_a_passage_is_chosen_by_its_place_alone(sample: Sample) -> None:
    _, readings = read(model_of("engram"), *sample.windows, torch.float32)
    rows = list(text_rows(sample, readings))
    assert [row["token"] for row in rows] == sample.ids[3 * CONTEXT : 4 * CONTEXT].tolist()
    assert list(rows[0])[2:] == ["gate 1.1", "gate 2.1"]
    gates = torch.cat(readings[0].gates if readings[0].gates else readings[1].gates)
    assert rows[5]["gate 1.1"] == float(gates[3 * CONTEXT + 5, 0])


@pytest.mark.parametrize("memory", [None, "pkm"])
def test_without_gates_nothing_is_said(memory: str | None, sample: Sample) -> None:
    _, readings = read(model_of(memory), *sample.windows, torch.float32)
    assert list(gate_rows(sample, readings)) == list(text_rows(sample, readings)) == []

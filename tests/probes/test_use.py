"""Load, entropy and collisions, counted one by one; and the closed forms by every way to throw."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from small import model_of

from sparsemem.probes.reading import read
from sparsemem.probes.sample import Sample
from sparsemem.probes.use import collisions, usage_rows


@pytest.mark.parametrize(("n", "rows"), [(1, 3), (2, 3), (4, 3), (3, 5)])
def test_closed_forms_are_the_mean_of_every_way_to_throw(n: int, rows: int) -> None:
    ways = [Counter(way) for way in itertools.product(range(rows), repeat=n)]
    covered = sum(len(way) / rows for way in ways) / len(ways)
    shared = sum(sum(count for count in way.values() if count > 1) / n for way in ways) / len(ways)
    found = collisions(torch.arange(n).unsqueeze(1), torch.zeros(n, dtype=torch.int64), rows)
    assert (found["coverage_random"], found["shared_random"]) == (pytest.approx(covered), pytest.approx(shared))
    assert found["shared"] == (1.0 if n > 1 else 0.0)


@pytest.mark.parametrize("memory", ["engram", "ngram_embedding"])
def test_collisions_are_counted_of_what_the_hash_sees(memory: str, sample: Sample) -> None:
    model = model_of(memory)
    _, readings = read(model, *sample.windows, torch.float32)
    rows = [row for row in usage_rows(readings) if row["table"]]
    layer = model.layers_of(memory)[0]
    numbers = layer.hash(sample.windows[0])
    tokens = sample.windows[0].tolist()
    fold = (lambda token: token // 2) if memory == "engram" else (lambda token: token)  # canonical ids of the fixture
    for table, row in enumerate(rows[: numbers.shape[2]]):
        order = (2, 2, 3, 3)[table]
        homes = dict[tuple[int, ...], int]()
        for sequence, found in zip(tokens, numbers[..., table].tolist(), strict=True):
            for place, number in enumerate(found):
                gram = list[int]()
                for back in range(order):  # up to the document's begin, then separators
                    over = place - back < 0 or 0 in sequence[place - back : place]
                    gram.append(fold(0 if over else sequence[place - back]))
                homes[tuple(gram)] = number
        count = Counter(homes.values())
        assert (row["order"], row["ngrams"]) == (order, len(homes))
        assert row["shared"] == pytest.approx(sum(each for each in count.values() if each > 1) / len(homes))
        assert row["coverage"] == pytest.approx(len(count) / row["entries"])


@pytest.mark.parametrize("memory", ["engram", "ultramem_v2"])
def test_reads_are_those_of_the_router_and_the_table(memory: str, sample: Sample) -> None:
    model, inputs = model_of(memory), sample.windows[0]
    _, readings = read(model, *sample.windows, torch.float32)
    rows = [row for row in usage_rows(readings) if not row["table"]]
    experts, seen = model.layers_of("moe")[0], list[torch.Tensor]()
    hook = experts.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(inputs)
    hook.remove()
    chosen = Counter(experts.route(seen[0].flatten(0, 1))[1].flatten().tolist())
    first = next(row for row in rows if row["pool"] == "moe")
    shares = [count / inputs.numel() / 2 for count in chosen.values()]
    assert first["reads"] == 2 * inputs.numel()
    assert first["coverage"] == len(chosen) / first["entries"]
    assert first["entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert first["largest_over_mean"] == pytest.approx(max(shares) * first["entries"])
    own = [row for row in rows if row["pool"] == memory]
    assert [row["entries"] for row in own] == [layer.rows for layer in model.layers_of(memory)]
    assert all(row["reads"] == inputs.numel() * (4 if memory == "engram" else 8) for row in own)


def test_a_dense_model_has_no_usage(sample: Sample) -> None:
    _, readings = read(model_of(None), *sample.windows, torch.float32)
    assert list(usage_rows(readings)) == []

"""What is held out, what is dropped, how the cap is shared."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.data.corpus import Document
from sparsemem.data.selection import (
    MIN_UNITS,
    SHINGLE_WORDS,
    Selection,
    ShingleTable,
    choose_held_out,
    fair_share,
    hold_out_by_size,
    select,
    share_seen,
    shingles_of,
)

from .conftest import prose


def document(unit: str, name: str, text: str) -> Document:
    return Document(unit, unit, name, len(text.encode()), text.encode())


@pytest.fixture(scope="module")
def packages() -> list[Document]:
    """Twenty packages of four files of 5 kB."""
    return [document(f"package{p}", f"{f}.py", prose(10 * p + f, 5000)) for p in range(20) for f in range(4)]


def names(selection: Selection) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    train, validation = (
        [(k.document.unit, k.document.name) for k in side] for side in (selection.train, selection.validation)
    )
    return train, validation


def test_whole_units_are_held_out_at_least_four_of_them(packages: list[Document]) -> None:
    selection = select(packages, 400_000, 60_000)
    train, validation = ({unit for unit, _ in side} for side in names(selection))
    assert not train & validation
    assert len(validation) >= 4
    assert sum(len(k.text) for k in selection.validation) == pytest.approx(60_000, rel=0.1)
    assert selection.duplicates_exact == selection.duplicates_near == 0


def test_the_order_of_the_documents_does_not_matter(packages: list[Document]) -> None:
    shuffled = random.Random(0).sample(packages, len(packages))
    assert names(select(shuffled, 250_000, 60_000)) == names(select(packages, 250_000, 60_000))


def test_a_new_package_moves_no_other_across_the_split() -> None:
    sizes = {f"package{i}": 20_000 for i in range(40)}
    before = choose_held_out(sizes, 60_000)
    for i in range(20):
        after = choose_held_out({**sizes, f"new{i}": 20_000}, 60_000)
        assert len(before - after) <= 1  # at most one makes room for the new one
        assert len(after - before) <= 1


def test_units_of_moderate_size_are_held_out_first() -> None:
    sizes = (
        {f"big{i}": 10_000_000 for i in range(20)}
        | {f"tiny{i}": 300 for i in range(20)}
        | {f"mid{i}": 50_000 for i in range(5)}
    )
    assert choose_held_out(sizes, 100_000) < {f"mid{i}" for i in range(5)}


def test_at_most_half_of_the_units_are_held_out() -> None:
    assert len(choose_held_out({f"u{i}": 1000 for i in range(6)}, 10**9)) == 3


@given(st.lists(st.integers(0, 1000), max_size=9), st.integers(1, 3000))
def test_fair_shares_reach_the_total_where_it_can_be_reached(sizes: list[int], total: int) -> None:
    share = fair_share(sizes, total)
    assert sum(min(size, share) for size in sizes) >= min(total, sum(sizes))


def test_fair_shares_by_hand() -> None:
    assert fair_share([100, 100, 100, 100, 100], 400) == 100  # a quarter each
    assert fair_share([10, 1000], 400) == 390  # the small one gives all, the other the rest
    assert fair_share([1000], 400) == 400


def test_copies_and_near_copies_are_dropped_across_the_split_and_within(packages: list[Document]) -> None:
    held_out = select(packages, 400_000, 60_000).validation[0].document
    text = held_out.read().decode()  # type: ignore[union-attr]
    words = text.split(" ")
    words[::60] = ["changed"] * len(words[::60])
    own = next(
        d for d in packages if d.unit not in {k.document.unit for k in select(packages, 400_000, 60_000).validation}
    )
    # In units that are too large to be held out, so that all of these stand on the training side.
    bulk = [document("vendor", f"bulk{i}", prose(1000 + i, 60_000)) for i in range(5)]
    added = [
        document("vendor", "exact", text),
        document("vendor", "near", " ".join(words)),
        document("vendor", "respaced", text.replace(" ", "\n\t")),
        document("vendor", "own", (own.read() or b"").decode() + " and a few words more"),
    ]
    selection = select([*packages, *bulk, *added], 2_000_000, 60_000)
    train, validation = names(selection)
    assert (held_out.unit, held_out.name) in validation
    assert not {name for unit, name in train if unit == "vendor"} & {"exact", "near", "respaced"}
    assert (("vendor", "own") in train) != ((own.unit, own.name) in train)
    assert (selection.duplicates_exact, selection.duplicates_near) == (1, 3)


def test_a_held_out_document_inside_a_training_document_is_dropped(packages: list[Document]) -> None:
    inside = select(packages, 400_000, 60_000).validation[0].document
    whole = document("vendor", "all", prose(77, 150_000) + (inside.read() or b"").decode() + prose(78, 150_000))
    train, validation = names(select([*packages, whole], 2_000_000, 60_000))
    assert ("vendor", "all") in train
    assert (inside.unit, inside.name) not in validation


def test_the_cap_is_met_and_a_giant_does_not_crowd_out_the_rest(packages: list[Document]) -> None:
    giant = [document("giant", f"{i}", prose(2000 + i, 5000)) for i in range(200)]
    selection = select([*packages, *giant], 150_000, 20_000)
    assert sum(len(k.text) for k in selection.train + selection.validation) == pytest.approx(150_000, abs=10)
    per_unit = Counter(unit for unit, _ in names(selection)[0])
    assert max(per_unit.values()) - min(per_unit.values()) <= 1


def test_no_more_is_read_than_is_kept(packages: list[Document], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Document.read

    def reading(self: Document) -> bytes | None:
        read.append(self.name)
        return original(self)

    monkeypatch.setattr(Document, "read", reading)
    select(packages, 50_000, 10_000)
    assert len(read) <= 12


def test_one_document_is_cut_at_a_line() -> None:
    text = prose(0, 20_000)
    train, held_out = hold_out_by_size([document("book", "", text)], 5_000)
    selection = select(train, 100_000, 5_000, held_out)
    assert selection.train[0].text + selection.validation[0].text == text.encode()
    assert selection.train[0].text.endswith(b"\n")
    assert len(selection.validation[0].text) == pytest.approx(5_000, abs=200)


def test_a_text_cut_by_the_cap_stays_utf8() -> None:
    texts = [document(f"u{i}", "", "é" * 5 + "".join(chr(0x4E00 + 97 * i + j) for j in range(900))) for i in range(4)]
    for cap in range(4000, 4010):
        for kept in select(texts, cap, 500).train:
            kept.text.decode()


def test_near_duplicates_need_no_words() -> None:
    """Text without a single word (a banner, say) has no shingle: nothing of it is new."""
    selection = select([document(f"u{i}", "", "-+" * (100 + i)) for i in range(4)], 10_000, 500)
    assert not selection.train


def reference_shingles(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
    count = min(SHINGLE_WORDS, len(words))
    return {tuple(words[i : i + count]) for i in range(len(words) - count + 1)} if words else set()


@given(st.text(alphabet="ab_ .,\n", max_size=200))
def test_shingles_are_those_of_a_plain_implementation(text: str) -> None:
    assert len(shingles_of(text.encode())) == len(reference_shingles(text))


@given(st.text(alphabet="ab .", max_size=80), st.text(alphabet="ab .", max_size=80))
def test_equal_shingles_have_equal_hashes_wherever_they_stand(first: str, second: str) -> None:
    shared = len(np.intersect1d(shingles_of(first.encode()), shingles_of(second.encode())))
    assert shared == len(reference_shingles(first) & reference_shingles(second))


def test_the_table_remembers_all_and_mistakes_few() -> None:
    table = ShingleTable(1_000_000)
    seen = np.random.default_rng(0).integers(0, 2**63, 150_000).astype(np.uint64)
    table.add(seen)
    assert share_seen(seen, [table]) == 1
    assert share_seen(np.random.default_rng(1).integers(0, 2**63, 150_000).astype(np.uint64), [table]) < 0.05


def test_of_many_long_documents_few_give_their_end_and_no_crumbs() -> None:
    texts = [prose(seed, 5000).encode() for seed in range(60)]
    documents = [Document("f", "f", str(i), len(text), text) for i, text in enumerate(texts)]
    train, held = hold_out_by_size(documents, 12_000)
    assert (
        min(document.size for document in held) >= 12_000 // MIN_UNITS // MIN_UNITS // 2
    )  # a line's start may come later
    assert 4000 < sum(document.size for document in held) <= 12_000
    assert sum(document.size for document in (*train, *held)) == sum(map(len, texts))

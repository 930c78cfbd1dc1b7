"""`sparsemem bench data`: what a training step waits for besides the model, as shares of that step, taken in one run.

- `batch`: the windows of the next batch out of a memory-mapped text; `hash`: row numbers of the n-grams of one, for
  every hashed memory.
- `tokenise`: encoding the text of a batch. A study does so once, before its trials: nothing waits for it.
"""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch

from sparsemem.bench.measure import ON_CPU, Place, Row, measurement, over, progress, take_turns, timed
from sparsemem.bench.step import ROUNDS, SHAPES, SHARES, TAKEN_APART
from sparsemem.config import Trial
from sparsemem.data import Batches
from sparsemem.data.tokenizer import encode, train_tokenizer
from sparsemem.train.step import StepTimer

TEXT_BYTES, TEXT_TOKENS = 2_000_000, 10_000_000


def bench_data() -> Iterator[Row]:
    """Measurements of each shape."""
    for shape, fields in SHAPES.items():
        progress(f"data: {shape}")
        trial = Trial.model_validate({**fields, "shares": SHARES[TAKEN_APART]})
        with tempfile.TemporaryDirectory() as folder:
            yield from _shares(shape, trial, Path(folder))


def _shares(shape: str, trial: Trial, folder: Path) -> Iterator[Row]:
    data, tokens = trial.data, trial.train.batch_tokens
    np.save(folder / "train.npy", np.random.default_rng(0).integers(data.vocab_size, size=TEXT_TOKENS, dtype=np.uint16))
    batches, steps = Batches(np.load(folder / "train.npy", mmap_mode="r"), data.context, tokens, seed=0), count()
    batches.batch(0)  # draws the order of the epoch
    timer = StepTimer(trial, torch.get_num_threads())
    hashes = [module for name, module in timer.model.named_modules() if name.endswith(".hash")]
    texts = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    tokenizer = train_tokenizer(texts, data.vocab_size)
    text, sample = (
        b"".join(texts)[:TEXT_BYTES].decode(errors="ignore").encode(),
        torch.randint(data.vocab_size, (tokens,), device=timer.device),
    )
    place = Place(timer.device, timer.precision)
    encoded = sum(len(document.ids) for document in encode(tokenizer, [text]))
    seconds = take_turns(
        {
            "step": timer.step,
            "batch": lambda: place.timed(lambda: [part.to(timer.device) for part in batches.batch(next(steps))]),
            "hash": lambda: place.timed(lambda: [module(sample.view(-1, data.context)) for module in hashes]),
            "tokenise": lambda: timed(lambda: list(encode(tokenizer, [text]))) * tokens / encoded,
        },
        ROUNDS[shape],
    )
    for name in ("batch", "hash", "tokenise"):
        milliseconds = [1e3 * spent for spent in seconds[name]]
        yield measurement(
            f"data/{name}",
            shape,
            milliseconds,
            "ms",
            ON_CPU if name == "tokenise" else place.in_fp32(),
            share_of_step=over(seconds[name], seconds["step"]),
        )

"""`sparsemem bench eval`: tokens/s of the held-out loss and of training, and their ratio, taken in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sparsemem.bench.measure import Place, Row, measurement, over, progress, take_turns
from sparsemem.bench.step import ROUNDS, SHAPES, SHARES
from sparsemem.config import Trial
from sparsemem.train.evaluate import TOKENS_AT_ONCE, sequence_losses
from sparsemem.train.step import StepTimer


def bench_eval() -> Iterator[Row]:
    """Measurements of each shape and model."""
    for shape, fields in SHAPES.items():
        for name, shares in SHARES.items():
            progress(f"eval: {shape}, {name}")
            trial = Trial.model_validate({**fields, "shares": shares})
            timer = StepTimer(trial, torch.get_num_threads())
            place = Place(timer.device, timer.precision)
            seconds = take_turns({"training": timer.step, "evaluation": _evaluation(timer, place)}, ROUNDS[shape])
            training = [trial.train.batch_tokens / spent for spent in seconds["training"]]
            evaluation = [TOKENS_AT_ONCE / spent for spent in seconds["evaluation"]]
            yield measurement(
                f"eval/{name}", shape, evaluation, "tokens/s", place, ratio_to_training=over(evaluation, training)
            )


def _evaluation(timer: StepTimer, place: Place) -> Callable[[], float]:
    """On random tokens, as many as are evaluated at once."""
    data = timer.trial.data
    windows_ST = torch.randint(
        data.vocab_size, (TOKENS_AT_ONCE // data.context, data.context + 1)
    )  # held-out text waits in main memory
    return lambda: place.timed(
        lambda: sequence_losses(timer.model, windows_ST[:, :-1], windows_ST[:, 1:], timer.precision)
    )

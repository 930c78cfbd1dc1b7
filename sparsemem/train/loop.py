"""One trial from its config to its result: resumable, deterministic, without Ray. It must not know studies.

- The token budget is met exactly: targets beyond it in the last batch carry no loss.
- The batch is a function of (seed, step), so the data cursor is the step.
- A trial killed at any moment goes on from its last checkpoint and ends as if nothing had happened, bit for bit on a
  CPU.
- A disk that is full for a while costs nothing: what a running trial writes is tried again later. Only its end must be
  written.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsemem import parallel
from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.data import Batches, Tokens, validation_windows
from sparsemem.failure import record_failure
from sparsemem.files import or_warn, remove_temporaries, write_json, write_text
from sparsemem.kernels.matmul import library, use_library
from sparsemem.locks import locked
from sparsemem.model import Sizes, Transformer, check_account, usage_of
from sparsemem.results import TrialStatus
from sparsemem.train import checkpoint
from sparsemem.train.allocator import claim_gpus, is_out_of_memory
from sparsemem.train.curve import Curve
from sparsemem.train.evaluate import sequence_losses, why_diverged
from sparsemem.train.kept import keep_model
from sparsemem.train.optim import Optimizer, learning_rate
from sparsemem.train.ranks import spawn_ranks
from sparsemem.train.step import default_device, precision_on, prepare_process, train_step
from sparsemem.trial_files import TOKENIZER

CURVE_ROWS = 50
CHECKPOINT_SECONDS = 20.0
CHECKPOINT_TIMES = (
    10  # a checkpoint waits for so many times what the last one took: tables of gigabytes take a while to write
)
PARTIAL_EVALUATION = 8  # an evaluation before the last one uses every so many-th part of the held-out set


def run_trial(
    trial: Trial,
    tokens_folder: Path,
    trial_folder: Path,
    *,
    threads: int,
    device: str | None = None,
    ranks: int = 1,
    gpu_share: float = 1.0,
    keep: bool = False,
) -> dict[str, Any]:
    """Train a trial to its end and return its result; at once if `trial_folder` holds one already.

    Args:
        tokens_folder: what `data.prepare` built.
        trial_folder: receives `curve.csv`, `usage.csv` (what each memory read at each evaluation), `val_losses.csv`
            and, last, `result.json`; `failure.json` in place of it on an error.
        threads: processor threads to use.
        device: a torch device; by default the GPU where there is one.
        ranks: processes that train it together, each on its part of every batch, with its part of the threads and a GPU
            of its own (`parallel`); more than one ask for as many sequences in a batch.
        gpu_share: of the GPU's memory that this process may take, its context included.
        keep: leave the model too (`kept`), unless it has diverged.

    Raises:
        MemoryError: out of memory, of the processor or of the GPU; `failure.json` then has the status `out_of_memory`.
        Exception: whatever else went wrong, after `failure.json` was written.
    """
    trial_folder.mkdir(parents=True, exist_ok=True)
    with locked(
        trial_folder / "lock"
    ):  # it waits for a worker that is still there, such as one whose driver was killed
        (trial_folder / "failure.json").unlink(missing_ok=True)
        remove_temporaries(trial_folder)
        try:
            finished = trial_folder / "result.json"
            if finished.exists():
                checkpoint.remove(trial_folder)  # where a kill came between the two
                return dict(json.loads(finished.read_text(encoding="utf-8")))
            threads = max(1, threads // ranks)
            prepare_process(threads)
            first = torch.device(device or default_device())
            if first.type == "cuda":
                claim_gpus(ranks, gpu_share)
            with spawn_ranks(trial, tokens_folder, trial_folder, threads, first, ranks) as own:
                return _Run(trial, tokens_folder, trial_folder, own, keep).run()
        except Exception as error:
            _leave_word(trial_folder, error)
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise


def follow(trial: Trial, tokens_folder: Path, trial_folder: Path, threads: int, device: torch.device) -> None:
    """Train as another rank than the first: only weights come of it."""
    try:
        prepare_process(threads)
        _Run(trial, tokens_folder, trial_folder, device).follow()
    except Exception as error:
        _leave_word(trial_folder, error)
        raise


def _leave_word(trial_folder: Path, error: Exception) -> None:
    """Of what went wrong first: the end of one rank is an error of all others."""
    status = TrialStatus.OUT_OF_MEMORY if is_out_of_memory(error) else TrialStatus.FAILED
    record_failure(trial_folder, str(error) or type(error).__name__, status, traceback.format_exc(), unless_known=True)


class _Run:
    """The state of a trial between its first and its last step."""

    def __init__(
        self, trial: Trial, tokens_folder: Path, folder: Path, device: torch.device, keep: bool = False
    ) -> None:
        self.trial, self.folder, self.device = trial, folder, device
        self.tokenizer = tokens_folder / TOKENIZER if keep else None
        self.precision = precision_on(device, trial.train)
        self.tokens = Tokens.load(tokens_folder)
        self.sizes: Sizes = solve(trial.model, trial.budget, trial.shares)
        unscored_after = self.tokens.separator_id if trial.data.mask_document_start else None
        self.batches = Batches(
            self.tokens.train, trial.data.context, trial.train.batch_tokens, trial.seed, unscored_after
        )
        sequences = (min(trial.data.validation_tokens, len(self.tokens.val)) - 1) // trial.data.context
        self.held_out = validation_windows(self.tokens.val, trial.data.context, sequences, unscored_after)
        self.steps = -(-trial.budget.tokens // trial.train.batch_tokens)
        self.row_steps = _spread(self.steps, CURVE_ROWS)
        self.evaluation_steps = _spread(self.steps, trial.train.evaluations)
        self.step, self.curve = 0, Curve()
        loaded = parallel.rank() == 0 and self._load()
        step = parallel.broadcast(self.step, device)
        if parallel.rank() > 0 and step > 0:  # the first has found it sound, and cannot replace it before all have it
            loaded = self._load()
        if not loaded:
            self._build()  # also where an unusable checkpoint was taken over in part
            self.model.initialize(trial.seed)
        if self.step != step:
            raise ValueError(f"rank {parallel.rank()} is at step {self.step}, the first one at {step}")

    def follow(self) -> None:
        """The steps of another rank, up to the first loss that is not finite."""
        while self.step < self.steps and math.isfinite(self._advance()[0]):
            pass

    def run(self) -> dict[str, Any]:
        saved, spent = time.monotonic(), 0.0
        final: torch.Tensor | None = None
        or_warn(lambda: self.curve.write(self.folder))
        while self.step < self.steps:
            start = time.perf_counter()
            loss, norm, rate = self._advance()
            self.curve.gather(loss, norm, self._busiest(), time.perf_counter() - start, self._tokens_done())
            if not math.isfinite(loss):
                self.curve.end_row(self.step, self._tokens_done(), rate, None)
                return self._finish(loss, None, f"the loss of step {self.step} is {loss}")
            if self.step in self.row_steps or self.step in self.evaluation_steps:
                evaluation = self._evaluate() if self.step in self.evaluation_steps else None
                final = evaluation if self.step == self.steps else None
                val_loss = None if evaluation is None else float(evaluation.mean())
                self.curve.end_row(self.step, self._tokens_done(), rate, val_loss)
                if self.step < self.steps:
                    or_warn(lambda: self.curve.write(self.folder))
            if self.step < self.steps and (began := time.monotonic()) - saved > max(
                CHECKPOINT_SECONDS, CHECKPOINT_TIMES * spent
            ):
                or_warn(self._save)
                saved = time.monotonic()
                spent = saved - began
        assert final is not None
        why = why_diverged(
            final, min(row["train_loss"] for row in self.curve.rows), math.log(self.trial.data.vocab_size)
        )
        return self._finish(self.curve.rows[-1]["train_loss"], final, why)

    # --- one step ---

    def _advance(self) -> tuple[float, float, float]:
        config, budget = self.trial.train, self.trial.budget.tokens
        inputs_BT, targets_BT = self.batches.batch(self.step)
        tokens = min(config.batch_tokens, budget - self.step * config.batch_tokens)
        needed = -(-tokens // self.trial.data.context)
        inputs_BT, targets_BT = inputs_BT[:needed].to(self.device), targets_BT[:needed].to(self.device)
        self.step += 1
        done = self._tokens_done() / budget
        rate = learning_rate(config, done)
        loss, norm = train_step(self.model, self.optimizer, inputs_BT, targets_BT, tokens, rate, done, self.precision)
        return loss, norm, rate

    def _tokens_done(self) -> int:
        return min(self.step * self.trial.train.batch_tokens, self.trial.budget.tokens)

    def _busiest(self) -> float:
        """Load of the busiest expert, next to an even one; NaN without experts."""
        loads = (layer.imbalance for layer in self.model.layers_of())
        return max((load for load in loads if not math.isnan(load)), default=math.nan)

    def _evaluate(self) -> torch.Tensor:
        inputs_ST, targets_ST = self.held_out
        if self.step < self.steps:
            inputs_ST, targets_ST = inputs_ST[::PARTIAL_EVALUATION], targets_ST[::PARTIAL_EVALUATION]
        losses_S = sequence_losses(self.model, inputs_ST, targets_ST, self.precision)
        self.curve.usage += [
            {"step": self.step, "tokens": self._tokens_done(), **usage} for usage in usage_of(self.model)
        ]
        return losses_S

    # --- stop and go ---

    def _load(self) -> bool:
        return checkpoint.load(self.folder, self.trial.id, self.tokens.digest, self._resume)

    def _save(self) -> None:
        state = {
            "trial_id": self.trial.id,
            "corpus": self.tokens.digest,
            "precision": str(self.precision),
            "library": library(),
            "step": self.step,
            **self.curve.state(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(self.folder, state)

    def _build(self) -> None:
        """The model, its weights not yet drawn, and its optimiser."""
        canonical = torch.from_numpy(self.tokens.canonical)
        model = Transformer(self.trial.model, self.sizes, self.trial.data.context, canonical, self.tokens.separator_id)
        check_account(self.trial.model, self.sizes, model)
        self.model = model.to(self.device)
        self.optimizer = Optimizer(self.model, self.trial.train)

    def _resume(self, state: dict[str, Any]) -> None:
        if state["precision"] != str(self.precision):
            raise ValueError(f"it was trained in {state['precision']}, not {self.precision}")
        curve = Curve.of(state)
        use_library(state.get("library", "onednn"))  # which multiplied before there was a choice
        self._build()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.curve = state["step"], curve  # nothing of another version's state is left in this run

    def _finish(self, train_loss: float, final: torch.Tensor | None, why: str) -> dict[str, Any]:
        """Write the result down.

        Args:
            why: it has diverged; '' where it has not.
        """
        self.curve.write(self.folder)
        result: dict[str, Any] = {
            "trial_id": self.trial.id,
            "status": TrialStatus.DIVERGED if why else TrialStatus.FINISHED,
        }
        result |= {"val_loss": None, "val_loss_se": None, "val_bpb": None} | ({"why": why} if why else {})
        if final is not None and not why:
            rows = "".join(f"{number},{loss:.9g}\n" for number, loss in enumerate(final.tolist()))
            write_text(self.folder / "val_losses.csv", "sequence,nats_per_token\n" + rows)
            scored = (self.held_out[1].flatten() >= 0).numpy()
            text_bytes = int(self.tokens.val_bytes[1 : len(scored) + 1][scored].sum())
            result["val_loss"] = float(final.mean())
            result["val_loss_se"] = float(final.std() / math.sqrt(len(final))) if len(final) > 1 else None
            result["val_bpb"] = float(final.mean()) * int(scored.sum()) / text_bytes / math.log(2)
        result |= {
            "train_loss": train_loss if math.isfinite(train_loss) else None,
            "tokens": self._tokens_done(),
            "steps": self.step,
            "tokens_per_second": self._tokens_done() / self.curve.seconds,
            "peak_memory_bytes": _peak_memory(self.device),
            "seconds": self.curve.seconds,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": _device_name(self.device),
            "threads": torch.get_num_threads() * parallel.ranks(),
            "precision": "fp32" if self.precision == torch.float32 else "bf16",
            "versions": {"python": platform.python_version(), "torch": version("torch"), "sparsemem": _own_version()},
        }
        if self.tokenizer and result["val_loss"] is not None:
            self._keep(self.tokenizer.read_bytes(), result["val_loss"])
        write_json(self.folder / "result.json", result)
        checkpoint.remove(self.folder)
        return result

    def _keep(self, tokenizer: bytes, val_loss: float) -> None:
        """Before the result: a trial that has one is not trained again."""
        keep_model(
            self.folder,
            self.model,
            self.trial,
            self.sizes,
            tokenizer,
            torch.from_numpy(self.tokens.canonical),
            self.tokens.separator_id,
            self.precision,
            self.tokens.digest,
            val_loss,
        )


# --- small parts ------------------------------------------------------------------------------------------------------


def _spread(steps: int, points: int) -> frozenset[int]:
    """At most `points` steps, evenly spaced, the last one included."""
    return frozenset(-(-steps * (number + 1) // points) for number in range(points))


def _own_version() -> str | None:
    """None where the code runs out of its checkout, without having been installed."""
    try:
        return version("sparsemem")
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    """Of the device, or of all devices."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return name if parallel.ranks() == 1 else f"{parallel.ranks()} x {name}"


def _peak_memory(device: torch.device) -> int:
    """Largest memory of the device; on a CPU, of this process. Of several ranks, the first one's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

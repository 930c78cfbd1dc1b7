"""How the trials of a study are placed and what they leave; none of it changes what is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from sparsemem.values import Count, Quantity, Real, Size, Strict, parse_kept, parse_storage

if TYPE_CHECKING:
    from sparsemem.config.trial import Trial

Probe = Literal["logit_lens", "gates", "suppression", "usage"]


def _parse_probe(value: Any) -> Any:
    """Refuses what names no probe in one message; the types alone give one for each of the two forms."""
    names = get_args(Probe)
    if isinstance(value, bool) or (isinstance(value, list | tuple) and all(name in names for name in value)):
        return value
    raise ValueError(f"write true, false, or some of [{', '.join(names)}]")


class Run(Strict):
    """How trials are placed. None of it enters a trial's identity; the ledger refuses to mix precisions, which the
    device decides.
    """

    cpus_per_trial: Size = 1
    """Processor slots and threads of a trial."""
    gpus_per_trial: Annotated[Real, Field(ge=0)] = 0.0
    """Below 1, trials share a GPU and each may take that share of its memory; above 1, a trial is trained on so many,
    data-parallel.
    """
    memory_per_trial: Quantity | None = None
    """Bytes of main memory, such as `2G`, by which trials are placed: no more start together than fit. A trial is not
    held to it.
    """
    max_concurrent: Size | None = None
    """Trials at once at most; without it, as many as fit."""
    priority: Literal["longest-first", "as-planned"] = "longest-first"
    """Order in which trials start. `longest-first`, by their planned FLOPs, keeps the last ones from running alone;
    `as-planned` is the order of the axes, which trials of equal length keep in either. The searches of `tune` have
    their own.
    """
    max_failures: Count = 2
    """Times that a failing trial is started again, from its checkpoint."""
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Experiment trackers that are told of each trial's config, curve and result; each needs the extra of its name."""
    storage: Annotated[str | None, BeforeValidator(parse_storage)] = None
    """A place that every machine reaches, where trials may run on machines that do not share the driver's disk: a
    folder (a relative path starts at the study's file),
    `s3://bucket/prefix?region=...&endpoint_override=...&scheme=...` or `gs://bucket/prefix`. Trials go on from there;
    the results folder stays the driver's. `tune` trains on the driver's machine and has no use for it.
    """

    keep_models: Annotated[bool | tuple[float | str, ...], BeforeValidator(parse_kept)] = False
    """Leave each trial's model (`model.safetensors`, `config.json`, `tokenizer.json`) beside its result; or of the
    trials with one of these shares (`rho`, or `dense`) or ids. Diverged trials and those of `tune` leave none.
    """
    probe: Annotated[bool | tuple[Probe, ...], BeforeValidator(_parse_probe)] = False
    """Look inside each kept model at the end of its trial, as `sparsemem probe` does, which also compares pairs: with
    all probes, or with these.
    """

    @model_validator(mode="after")
    def _whole_gpus(self) -> Run:
        if self.gpus_per_trial > 1 and self.gpus_per_trial != int(self.gpus_per_trial):
            raise ValueError(
                f"`gpus_per_trial` has the value {self.gpus_per_trial:g}: above 1 it must be a whole number"
            )
        return self

    @model_validator(mode="after")
    def _probed(self) -> Run:
        if self.probe and not self.keep_models:
            raise ValueError("`probe` reads kept models; add `keep_models: true`, or leave `probe` out")
        if self.probe and self.storage:
            raise ValueError("`probe` does not go with `storage`; leave it out and run `sparsemem probe` afterwards")
        return self

    def keeps(self, trial: Trial) -> bool:
        """Whether the trial's model is kept."""
        if isinstance(self.keep_models, bool):
            return self.keep_models
        return any(trial.is_named(name) for name in self.keep_models)

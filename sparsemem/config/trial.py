"""One trial, fully resolved: data, model, budget, training and shares; and its identity, the hash of its fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sparsemem.config.data import Data
from sparsemem.config.model import Model
from sparsemem.config.nearest import nearest_name
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS, POOLS
from sparsemem.values import (
    Count,
    Quantity,
    Real,
    Share,
    Size,
    Strict,
    brief,
    parse_quantity,
    parse_real,
    parse_share,
)

WIDEST_TOLERANCE = 0.1
TOKENS_PER_ACTIVE_PARAM = "tokens_per_active_param"
"""How `budget.tokens` may be written: so many times `budget.active_params`, to the nearest whole number."""
REPLACED_BY = {
    **{"rho": "shares", "shares": "rho"},
    **{"budget.tokens": f"budget.{TOKENS_PER_ACTIVE_PARAM}", f"budget.{TOKENS_PER_ACTIVE_PARAM}": "budget.tokens"},
}
"""Two ways to write one field: a varied or overridden one takes the place of the other."""


class Budget(Strict):
    """What is held fixed while shares vary. Parameters exclude the vocabulary embedding and the LM head."""

    total_params: Quantity
    active_params: Quantity
    tokens: Quantity
    """Training tokens, met exactly: the last batch is cut short. Or write `tokens_per_active_param`, such as 15: so
    many times `active_params`, to the nearest whole number.
    """
    flops_per_token: Quantity | None = None
    """Of a training step without the LM head. It is not solved for: a plan that misses it is refused."""
    tolerance: Annotated[Share, Field(gt=0, le=WIDEST_TOLERANCE)] = 0.005
    """Largest relative error of each of these counts; a plan that misses it is refused."""

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, raw: Any) -> Any:
        """The number of tokens: a trial is the same however they are written."""
        if not isinstance(raw, dict) or TOKENS_PER_ACTIVE_PARAM not in raw:
            return raw
        raw = dict(raw)
        written = raw.pop(TOKENS_PER_ACTIVE_PARAM)
        if "tokens" in raw:
            raise ValueError(
                f"`tokens` {brief(raw['tokens'])} and `{TOKENS_PER_ACTIVE_PARAM}` {brief(written)} both say how long "
                "to train; leave out one of them"
            )
        try:
            ratio = parse_real(written)
        except ValueError:
            ratio = None
        if not isinstance(ratio, int | float) or ratio <= 0:
            raise ValueError(
                f"`{TOKENS_PER_ACTIVE_PARAM}` is {brief(written)}; write a number above 0, such as 15 or 0.5"
            )
        try:
            active = parse_quantity(raw.get("active_params"))
        except ValueError:  # refused under its own name
            active = 1
        return raw | {"tokens": max(round(ratio * active), 1)}

    @model_validator(mode="after")
    def _sparse(self) -> Budget:
        if self.active_params > self.total_params:
            raise ValueError(f"`active_params` {self.active_params:,} exceeds `total_params` {self.total_params:,}")
        return self


class Train(Strict):
    """AdamW for the backbone, Adam without decay on the touched rows of the tables."""

    batch_tokens: Quantity
    lr: Annotated[Real, Field(gt=0)]
    table_lr_factor: Annotated[Real, Field(gt=0)] = 5.0
    """Learning rate of the memory tables over `lr` (Engram sec. 2.4)."""
    warmup: Share = 0.02
    """Share of the tokens over which the rate rises from 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """`wsd`: constant, then linear to `final_lr` over the last `decay` share."""
    decay: Share = 0.2
    """Share of the tokens in the falling part of `wsd`."""
    final_lr: Share = 0.1
    """Rate at the end as a share of `lr`."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.1
    """Of the backbone's matrices; never of norms, biases or tables."""
    betas: tuple[Annotated[Share, Field(lt=1)], Annotated[Share, Field(lt=1)]] = (0.9, 0.95)
    grad_clip: Annotated[Real, Field(gt=0)] = 1.0
    """Largest norm of the backbone's gradient. Table gradients stay out of it: Adam rescales them row by row."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 autocast on a GPU, fp32 on a CPU."""
    evaluations: Annotated[Size, Field(le=10_000)] = 8
    """Points of the validation curve, evenly spaced; the last one is the result and uses the whole held-out set."""

    def precision_on(self, gpu: bool) -> Literal["fp32", "bf16"]:
        """What `precision` comes to on a GPU or a CPU."""
        if self.precision == "auto":
            return "bf16" if gpu else "fp32"
        return self.precision

    @model_validator(mode="after")
    def _phases(self) -> Train:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"`warmup` {self.warmup:g} and `decay` {self.decay:g} together exceed the budget")
        return self


class Trial(Strict):
    """One training run, fully resolved."""

    data: Data
    model: Model
    budget: Budget
    train: Train
    shares: dict[str, Share]
    """Share of P_sparse that each pool holds; empty: the dense baseline of the same P_act."""
    seed: Count = 0
    """Seeds the data order and the initial weights, alike for every share."""

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        if isinstance(raw.get("model"), Model):
            raw["model"] = raw["model"].model_dump()
        model = raw.get("model") if isinstance(raw.get("model"), dict) else {}
        if "rho" in raw:
            if "shares" in raw:
                raise ValueError("give `rho` or `shares`, not both")
            raw["shares"] = _shares_of(raw.pop("rho"), _without_rows(model))
        if isinstance(raw.get("shares"), dict):
            raw["shares"] = {k: s for k, v in raw["shares"].items() if (s := parse_share(v)) != 0}
            # A pool without a share is not built: dropping it makes rho = 1 the same trial whatever the memory's
            # settings are.
            unused = [pool for pool in _without_rows(model) if pool not in raw["shares"]]
            if unused:
                raw["model"] = {key: None if key in unused else value for key, value in model.items()}
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Trial:
        total = sum(self.shares.values())
        if self.shares and abs(total - 1) > 1e-6:
            way = "lower" if total > 1 else "raise"
            raise ValueError(
                f"`shares` {self.shares} sum to {total:g} and must sum to 1; {way} one of them by {abs(total - 1):.6g}"
            )
        for pool in self.shares:
            if pool not in POOLS:
                raise ValueError(f"`shares` names the pool {brief(pool)}; {nearest_name(pool, list(POOLS))}")
            if getattr(self.model, pool) is None:
                raise ValueError(
                    f"`shares` gives {self.shares[pool]:g} to {pool}, which `model` does not configure; add "
                    f"`model.{pool}`"
                )
            if pool in self.model.on_top:
                raise ValueError(
                    f"`shares` gives {self.shares[pool]:g} to {pool}, whose `rows` are given: it comes on top of the "
                    "budget; leave out one of them"
                )
        for pool in self.model.pools:
            POOLS[pool].check_trial(self)
        if self.train.batch_tokens % self.data.context:
            raise ValueError(
                f"`train.batch_tokens` {self.train.batch_tokens:,} must be a multiple of `data.context` "
                f"{self.data.context}"
            )
        if self.data.validation_tokens <= self.data.context:
            raise ValueError(
                f"`data.validation_tokens` {self.data.validation_tokens:,} holds no sequence of "
                f"`data.context` {self.data.context} tokens; hold out more"
            )
        if self.budget.tokens < self.data.context:
            raise ValueError(
                f"`budget.tokens` {self.budget.tokens:,} is less than one sequence of `data.context` "
                f"{self.data.context}"
            )
        return self

    @property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON of the fields that differ from their default.

        A new field whose default keeps the old behaviour leaves every id as it is. A default must therefore never
        change its meaning.
        """
        fields = self.model_dump(
            mode="json", exclude_defaults=True, exclude={"budget": {"flops_per_token"}}
        )  # a check, no setting
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def rho(self) -> float | None:
        """Share of the sparse parameters held by routed experts; None for the dense baseline."""
        return self.shares.get(EXPERTS.name, 0.0) if self.shares else None

    def is_named(self, name: float | str) -> bool:
        """Whether it has this share of routed experts, is the dense baseline (`dense`) or has this id."""
        if isinstance(name, float):
            return self.rho is not None and abs(self.rho - name) < 1e-6
        return self.rho is None if name == "dense" else self.id == name

    def at(self, paths: Iterable[str]) -> dict[str, Any]:
        """Dotted path -> value, units resolved; None where its shares do not use the field, and for the `rho` of the
        dense baseline.
        """
        fields = self.model_dump(mode="json") | {"rho": self.rho}
        fields["budget"][TOKENS_PER_ACTIVE_PARAM] = self.budget.tokens / self.budget.active_params
        found = {}
        for path in paths:
            value: Any = fields
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            found[path] = value
        return found


def _without_rows(model: Mapping[str, Any]) -> list[str]:
    """Memories configured in a model as written whose rows a share must solve."""
    return [pool for pool in MEMORY_POOLS if isinstance(memory := model.get(pool), dict) and not memory.get("rows")]


def _shares_of(rho: Any, memories: list[str]) -> dict[str, float]:
    """`rho` is short for shares of routed experts and the one memory configured; `dense` for no sparse parameters."""
    if rho == "dense":
        return {}
    try:
        rho = float(parse_share(rho))
    except (TypeError, ValueError):
        raise ValueError(
            f"`rho` is {brief(rho)}; write a share between 0 and 1, or 'dense' for the dense baseline"
        ) from None
    if not 0 <= rho <= 1:
        percent = f"; for {rho:g}% write {rho / 100:g}" if 1 < rho <= 100 else ""
        raise ValueError(
            f"`rho` is {rho:g}; it is a share of the sparse parameters, between 0 (all memory) and 1 (all routed "
            f"experts){percent}"
        )
    if rho == 1:
        return {EXPERTS.name: 1.0}
    if len(memories) != 1:
        raise ValueError(
            f"`rho` below 1 needs exactly one memory in `model`, found {memories or 'none'}; write `shares` instead"
        )
    return {EXPERTS.name: round(rho, 12), memories[0]: round(1 - rho, 12)}

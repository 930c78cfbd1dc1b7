"""Routed experts: DeepSeekMoE's shared and fine-grained ones (arXiv 2401.06066). The memories are weighed against them:
rho is their share.

Their size is the number of routed experts of a block; the shared experts' width is what the budget leaves of the
activated parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictBool

from sparsemem.accounting import BYTES_PER_PARAMETER, Account
from sparsemem.mechanisms.mechanism import Mechanism, Placed, Tables, Vocabulary
from sparsemem.values import BudgetError, Count, Real, Size, Strict, refuse_partial_rows

if TYPE_CHECKING:
    from sparsemem.config import Budget, Model, Trial
    from sparsemem.model import Sizes


class MoE(Strict):
    """DeepSeekMoE layer (arXiv 2401.06066). The number of routed experts and the shared width are solved from the
    budget.
    """

    expert_width: Size = Field(examples=["48"])
    """Inner width of one routed expert (SwiGLU)."""
    top_k: Size = Field(examples=["2"])
    """Routed experts that a token activates."""
    shared_experts: Count = 1
    """Experts that every token passes; their width is what the budget solves for."""
    leading_dense: Count = 0
    """First blocks that hold a dense feed-forward in place of experts."""
    dense_width: Size | None = None
    """Inner width of those; default: the activated width, of the shared and the top-k experts together."""
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity: `sigmoid` (DeepSeek-V3) or `softmax` (DeepSeekMoE, OLMoE)."""
    normalize_gates: StrictBool = True
    """Divide the top-k gates by their sum."""
    bias_rate: Annotated[Real, Field(ge=0)] = 1e-3
    """Step of the loss-free balancing bias (arXiv 2408.15664); 0 turns it off."""
    balance_loss: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the switch-style auxiliary balance loss, summed over the MoE blocks; trainers that take their mean,
    such as OLMoE's, write so many times as much.
    """
    z_loss: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the router z-loss (mean squared logsumexp of the router logits), summed over the MoE blocks."""


class RoutedExperts(Mechanism):
    """They fill the feed-forwards of all blocks after the leading dense ones, but for those that a memory stands in
    place of.
    """

    name, label, fields = "moe", "routed experts", MoE
    called: ClassVar[Mapping[str, str]] = {
        "expert_width": "intermediate_size moe_intermediate_size ffn_dim ffn_hidden_size d_ff mlp_dim expert_dim",
        "top_k": "k moe_top_k router_topk experts_per_token num_experts_per_tok num_experts_per_token",
        "shared_experts": "n_shared_experts num_shared_experts",
        "balance_loss": "aux_loss router_aux_loss_coef aux_loss_coef load_balancing_loss",
        "z_loss": "router_z_loss_coef z_loss_coef",
    }

    def field(self, name: str) -> str:
        """Dotted path of one of their fields."""
        return f"model.{self.name}.{name}"

    def holds(self, model: Model, block: int) -> bool:
        """Whether this 1-based block has room for them."""
        experts: MoE | None = self.of(model)
        return block > (experts.leading_dense if experts else 0) and block not in model.replaced

    def blocks(self, model: Model, sizes: Sizes) -> list[int]:
        """1-based blocks that hold them."""
        return [block for block in range(1, model.layers + 1) if sizes.routed_experts and self.holds(model, block)]

    def activated_width(self, model: Model, sizes: Sizes) -> int:
        """Inner width of a feed-forward that a token passes: all of a dense model's; with experts, of the shared and
        the top-k ones.
        """
        experts: MoE | None = self.of(model)
        return sizes.shared_width + (experts.top_k * experts.expert_width if experts and sizes.routed_experts else 0)

    def dense_width(self, model: Model, sizes: Sizes, block: int) -> int:
        """Inner width of the dense feed-forward of this 1-based block; `dense_width` holds beside routed
        experts only.
        """
        experts: MoE | None = self.of(model)
        if experts and experts.dense_width and sizes.routed_experts and block <= experts.leading_dense:
            return experts.dense_width
        return self.activated_width(model, sizes)

    def check(self, model: Model) -> None:
        experts: MoE = self.of(model)
        refuse_partial_rows("moe.expert_width", experts.expert_width)
        if experts.leading_dense >= model.layers:
            raise ValueError(
                f"`moe.leading_dense` {experts.leading_dense} leaves no MoE block among {model.layers} layers"
            )
        if experts.dense_width and not experts.leading_dense:
            raise ValueError(f"`moe.dense_width` {experts.dense_width} needs a `moe.leading_dense` of 1 or more")

    def check_trial(self, trial: Trial) -> None:
        experts: MoE = self.of(trial.model)
        if experts.top_k == 1 and experts.normalize_gates and trial.shares:
            raise ValueError(
                "`model.moe.top_k` 1 with `normalize_gates` makes every gate 1: the router learns nothing; set "
                "`normalize_gates: false`"
            )

    def least(self, model: Model) -> int:
        return int(self.of(model).top_k)

    def tables(self, model: Model, size: int) -> Tables:
        return ((size,),)

    def solve(self, model: Model, budget: Budget, share: float, one_expert: int) -> int:
        """Routed experts of a block: the top-k and as many idle ones as their share of the sparse parameters comes to.

        Args:
            one_expert: idle parameters of one, over all blocks.
        """
        idle = round(share * (budget.total_params - budget.active_params) / one_expert)
        if share > 0 and idle == 0:
            raise BudgetError(
                "total_params",
                f"field `budget.total_params` has the value {budget.total_params:,}: the routed experts' share does "
                "not hold one of them; raise it to {} or more, or make `model.moe.expert_width` smaller",
                budget.active_params + math.ceil(one_expert / share),
            )
        return self.least(model) + idle

    def account(self, model: Model, sizes: Sizes) -> Account:
        from sparsemem.mechanisms.moe.layer import moe_account

        return moe_account(model, sizes.routed_experts, sizes.shared_width) * len(self.blocks(model, sizes))

    def row_width(self, model: Model) -> int:
        from sparsemem.layers.feed_forward import feed_forward_account

        return feed_forward_account(model.width, self.of(model).expert_width).total

    def rows_read(self, model: Model, sizes: Sizes) -> int:
        return self.least(model) * len(self.blocks(model, sizes))

    def row_bytes(self, model: Model, sizes: Sizes, batch: int) -> float:
        read = len(self.blocks(model, sizes)) * min(batch * self.least(model), sizes.routed_experts)
        return read * self.row_width(model) * BYTES_PER_PARAMETER / batch

    def build(self, model: Model, sizes: Sizes, vocabulary: Vocabulary) -> Iterator[Placed]:
        from sparsemem.mechanisms.moe.layer import MixtureOfExperts

        for block in self.blocks(model, sizes):
            yield Placed(
                block, "feed_forward", "ffn", MixtureOfExperts(model, sizes.routed_experts, sizes.shared_width)
            )


EXPERTS = RoutedExperts()

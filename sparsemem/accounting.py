"""What a part of a model costs, as closed-form counts. Each mechanism states its own `Account` beside its code.

Conventions (the README's "What is counted" repeats them for readers):

- `total` and `active` count trainable parameters. Active are those that one token is multiplied with or reads.
- `flops` counts the multiplications and additions of every product in the forward pass, per token; a training step is
  three times that, but for those of `selection_flops`, which choose rows and have no backward pass. They are part of
  `flops`.
- `sparse_bytes` is what one token, alone in its batch, reads of the routed experts and of the memory's rows, as fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_PARAMETER = 4
STEP_OVER_FORWARD = 3  # the backward pass computes two products for each one of the forward pass


@dataclass(frozen=True)
class Account:
    """Parameters, activated parameters, forward FLOPs per token and sparse bytes read per token."""

    total: int = 0
    active: int = 0
    flops: int = 0
    sparse_bytes: int = 0
    selection_flops: int = 0

    def __add__(self, other: Account) -> Account:
        return Account(
            self.total + other.total,
            self.active + other.active,
            self.flops + other.flops,
            self.sparse_bytes + other.sparse_bytes,
            self.selection_flops + other.selection_flops,
        )

    def __mul__(self, times: int) -> Account:
        return Account(
            self.total * times,
            self.active * times,
            self.flops * times,
            self.sparse_bytes * times,
            self.selection_flops * times,
        )

    @property
    def step_flops(self) -> int:
        """FLOPs of a training step, per token."""
        return STEP_OVER_FORWARD * self.flops - (STEP_OVER_FORWARD - 1) * self.selection_flops

    @property
    def idle(self) -> int:
        """Parameters that one token does not touch: this part's contribution to P_sparse."""
        return self.total - self.active


def always_active(parameters: int, flops: int | None = None) -> Account:
    """Parameters that every token is multiplied with; by default, two FLOPs each."""
    return Account(parameters, parameters, 2 * parameters if flops is None else flops)

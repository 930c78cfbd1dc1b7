"""Causal grouped-query attention with rotary positions and QK-norm.

Shape letters: B sequences, T positions, D model width, H query heads, G key-value heads, K width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.kernels.matmul import linear
from sparsemem.kernels.rotary import rotate
from sparsemem.layers.norm import RMSNorm, norm_account
from sparsemem.parameter import parameter, residual_std

if TYPE_CHECKING:
    from sparsemem.config import Model


class Attention(nn.Module):
    """Attention of one block; the queries, keys and values come from one fused projection."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_width
        self.project_in = parameter((self.heads + 2 * self.kv_heads) * self.head_dim, config.width, std=config.init_std)
        self.project_out = parameter(
            config.width, self.heads * self.head_dim, std=residual_std(config.init_std, config.layers)
        )
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, cos_sin_2THK: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); `cos_sin` comes from `kernels.rotary`."""
        B, T, _ = x_BTD.shape
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        qkv_BTNK = linear(x_BTD, self.project_in).view(B, T, sum(sizes), self.head_dim)
        q_BTHK, k_BTGK, v_BTGK = qkv_BTNK.split(sizes, dim=2)
        q_BTHK, k_BTGK = rotate(self.query_norm(q_BTHK), cos_sin_2THK), rotate(self.key_norm(k_BTGK), cos_sin_2THK)
        q_BHTK, k_BGTK, v_BGTK = (heads.transpose(1, 2) for heads in (q_BTHK, k_BTGK, v_BTGK))
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return linear(out_BHTK.transpose(1, 2).flatten(2), self.project_out)


def attention_account(config: Model, context: int) -> Account:
    """Closed form. Scores and weighted sums are counted over the causal triangle: (context + 1) / 2 keys on average."""
    head_dim, kv_heads = config.head_width, config.kv_heads or config.heads
    matrices = config.width * 2 * (config.heads + kv_heads) * head_dim
    over_keys = 2 * config.heads * head_dim * (context + 1)  # two products, two FLOPs each, over (context + 1) / 2 keys
    return always_active(matrices) + norm_account(head_dim) * 2 + Account(flops=over_keys)

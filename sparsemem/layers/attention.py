"""Causal grouped-query attention with rotary positions and QK-norm.

Shape letters: B sequences, T positions, D model width, H query heads, G key-value heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.config import Model
from sparsemem.layers.norm import RMSNorm, norm_account
from sparsemem.layers.product import linear
from sparsemem.parameter import parameter, residual_std


class Attention(nn.Module):
    """Attention of one block; the queries, keys and values come from one fused projection."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.width // config.heads
        self.project_in = parameter((self.heads + 2 * self.kv_heads) * self.head_dim, config.width, std=config.init_std)
        self.project_out = parameter(config.width, config.width, std=residual_std(config.init_std, config.layers))
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, rotation_TK: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); `rotation_TK` comes from `rotations`."""
        B, T, D = x_BTD.shape
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        qkv_BTNK = linear(x_BTD, self.project_in).view(B, T, sum(sizes), self.head_dim)
        q_BTHK, k_BTGK, v_BTGK = qkv_BTNK.split(sizes, dim=2)
        q_BHTK = rotate(self.query_norm(q_BTHK).transpose(1, 2), rotation_TK)
        k_BGTK = rotate(self.key_norm(k_BTGK).transpose(1, 2), rotation_TK)
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BTGK.transpose(1, 2), is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return linear(out_BHTK.transpose(1, 2).reshape(B, T, D), self.project_out)


def attention_account(config: Model, context: int) -> Account:
    """Closed form. Scores and weighted sums are counted over the causal triangle: (context + 1) / 2 keys on average."""
    head_dim, kv_heads = config.width // config.heads, config.kv_heads or config.heads
    matrices = config.width * (config.heads + 2 * kv_heads) * head_dim + config.width * config.width
    over_keys = 2 * config.width * (context + 1)  # two products, two FLOPs each, over (context + 1) / 2 keys
    return always_active(matrices) + norm_account(head_dim) * 2 + Account(flops=over_keys)


def rotations(context: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles of RoPE (arXiv 2104.09864): position times theta^(-2 i / head_dim), as (context, head_dim / 2) fp32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    return torch.outer(torch.arange(context, device=device, dtype=torch.float32), frequencies)


def rotate(x_BHTK: Tensor, angles_TK: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of the last dimension by the angle of their position."""
    cos, sin = angles_TK.cos().to(x_BHTK.dtype), angles_TK.sin().to(x_BHTK.dtype)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

"""Causal grouped-query attention with rotary positions and QK-norm.

Shape letters: B sequences, T positions, D model width, H query heads, G key-value heads, K width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.layers.norm import RMSNorm, norm_account
from sparsemem.layers.product import linear
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
        self.project_out = parameter(config.width, self.heads * self.head_dim, std=residual_std(config.init_std, config.layers))
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, turns_2THK: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); `turns` come from `rotations`."""
        B, T, _ = x_BTD.shape
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        qkv_BTNK = linear(x_BTD, self.project_in).view(B, T, sum(sizes), self.head_dim)
        q_BTHK, k_BTGK, v_BTGK = qkv_BTNK.split(sizes, dim=2)
        q_BTHK, k_BTGK = rotate(self.query_norm(q_BTHK), turns_2THK), rotate(self.key_norm(k_BTGK), turns_2THK)
        q_BHTK, k_BGTK, v_BGTK = (heads.transpose(1, 2) for heads in (q_BTHK, k_BTGK, v_BTGK))
        out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return linear(out_BHTK.transpose(1, 2).flatten(2), self.project_out)


def attention_account(config: Model, context: int) -> Account:
    """Closed form. Scores and weighted sums are counted over the causal triangle: (context + 1) / 2 keys on average."""
    head_dim, kv_heads = config.head_width, config.kv_heads or config.heads
    matrices = config.width * 2 * (config.heads + kv_heads) * head_dim
    over_keys = 2 * config.heads * head_dim * (context + 1)  # two products, two FLOPs each, over (context + 1) / 2 keys
    return always_active(matrices) + norm_account(head_dim) * 2 + Account(flops=over_keys)


def rotations(context: int, heads: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and signed sines of RoPE's angles (arXiv 2104.09864), position times theta^(-2 i / head_dim): (2, context, heads, head_dim).

    The same for each head, side by side, so that a product with them runs along memory.
    """
    # Powers and sines in float64, rounded once: in float32 each vector width of a processor rounds them in its own way.
    frequencies = (theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)).float()
    angles_TK = torch.outer(torch.arange(context, device=device, dtype=torch.float32), frequencies).double()
    turns_2TK = torch.stack((torch.cat((angles_TK.cos(),) * 2, -1), torch.cat((-angles_TK.sin(), angles_TK.sin()), -1)))
    return turns_2TK.float().unsqueeze(2).expand(-1, -1, heads, -1).contiguous()


def rotate(x_BTHK: Tensor, turns_2THK: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of the last dimension by the angle of their position; `turns` are those of as many heads or more."""
    cos_THK, sin_THK = turns_2THK[:, :, : x_BTHK.shape[2]].to(x_BTHK.dtype)
    return _Rotate.apply(x_BTHK, cos_THK, sin_THK)


class _Rotate(torch.autograd.Function):
    """y = x cos + swap(x) sin, swap exchanging the halves; the gradient turns back: dx = dy cos - swap(dy) sin."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos_THK: Tensor, sin_THK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_THK, sin_THK)
        return (x_BTHK * cos_THK).addcmul_(_swap(x_BTHK), sin_THK)

    @staticmethod
    def backward(ctx: Any, gradient_BTHK: Tensor) -> tuple[Tensor, None, None]:
        cos_THK, sin_THK = ctx.saved_tensors
        return (gradient_BTHK * cos_THK).addcmul_(_swap(gradient_BTHK), sin_THK, value=-1), None, None


def _swap(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)

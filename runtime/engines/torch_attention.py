"""Dense attention of the tile encoder: torch's own, or flash-attn where that is installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, T, H, D] -> [B, T, H, D]
HALF = (torch.float16, torch.bfloat16)


def choose_attention(device: torch.device, dtype: torch.dtype) -> tuple[str, Attention]:
    """(name, function): flash-attn on a GPU in half precision where it is installed, else scaled_dot_product_attention,
    which chooses among torch's own kernels. The name is told in the engine's facts."""
    if device.type == "cuda" and dtype in HALF:
        try:
            from flash_attn import __version__, flash_attn_func
        except ImportError:
            pass
        else:
            return f"flash-attn {__version__}", flash_attn_func
    return "scaled_dot_product_attention", _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # [B, H, T, D]
    return y.transpose(1, 2)

"""The gated activation in plain fp32 torch (SPEC 5)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F], gate first -> [T, F] fp32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up

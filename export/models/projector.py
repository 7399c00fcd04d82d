"""Projector in fp32 torch: LLaVA's mm_projector (SPEC 4)."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from wsi_rt.export.arch import ProjectorConfig


class Projector(nn.Module):
    """tokens [T, widths[0]] fp32 -> [T, widths[-1]]; exact GELU between the Linears."""

    def __init__(self, c: ProjectorConfig) -> None:
        super().__init__()
        self.model = nn.Module()
        linears = [nn.Linear(a, b) for a, b in pairwise(c.widths)]
        if len(linears) == 1:
            self.model.mm_projector = linears[0]
        else:
            self.model.mm_projector = nn.ModuleDict({str(2 * i): layer for i, layer in enumerate(linears)})
        self._linears = [(layer,) for layer in linears]  # tuples: not registered twice

    def forward(self, tokens: Tensor) -> Tensor:
        for i, (layer,) in enumerate(self._linears):
            tokens = layer(tokens if i == 0 else F.gelu(tokens))
        return tokens

"""What the encoders in torch are made of: layers on a device, in a type, from the tensors that a bundle stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from wsi_rt.runtime.llm.torch_weights import StoredTensors

Layer = Callable[[Tensor], Tensor]

# timm's activations by their names; "gelu" is the exact (erf) one.
ACTIVATIONS: Mapping[str, Layer] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}


class Layers:
    """Makes a component's layers. On the CPU in fp32 their weights are the bundle's files, mapped."""

    def __init__(self, tensors: StoredTensors, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._tensors, self._names = device, dtype, tensors, frozenset(tensors.names())

    def tensor(self, name: str) -> Tensor:
        """Raises EngineMismatchError when the bundle has none of that name."""
        return self._tensors.floats(name).to(self.device, self.dtype)

    def norm(self, name: str, eps: float) -> Layer:
        """LayerNorm over the last axis."""
        weight, bias = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")
        return lambda x: F.layer_norm(x, weight.shape, weight, bias, eps)

    def linear(self, name: str, bias: bool) -> Layer:
        """[..., in] -> [..., out]. Integer weights stay as they are stored, a fourth of fp32 or less, and become
        floats whenever the layer is used: little beside a product of hundreds of rows. No activation is rounded."""
        offset = self.tensor(f"{name}.bias") if bias else None
        rows = f"{name}.weight.int8xrow"
        if f"{rows}.columns" in self._names:
            return self._row_linear(rows, offset)
        if f"{name}.weight.T" in self._names:
            weight = self.tensor(f"{name}.weight.T").T  # a view: [out, in]
            return lambda x: F.linear(x, weight, offset)
        blocks = self._tensors.linear(name).to(self.device, self.dtype)
        return blocks if offset is None else lambda x: blocks(x) + offset

    def _row_linear(self, kind: str, offset: Tensor | None) -> Layer:
        """codes i8 [in, out] around 0, one scale for an output: what the CPU's integer products take."""
        scales = self.tensor(f"{kind}.scales")
        codes = torch.from_numpy(self._tensors.bytes(f"{kind}.columns")).view(torch.int8).view(-1, len(scales))
        codes = codes.to(self.device)
        return lambda x: F.linear(x, (codes * scales).T, offset)

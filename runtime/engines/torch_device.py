"""Where the torch target runs, and in which type: chosen here, for encoders and decoder alike, and told."""

from __future__ import annotations

import torch

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device() -> torch.device:
    """The first NVIDIA GPU where there is one and torch was built for CUDA, else the CPU: the torch target is plain
    torch there. `describe` says which it was, and why."""
    return torch.device("cuda", 0) if _has_cuda() else torch.device("cpu")


def describe(device: torch.device) -> str:
    """As answers tell it: "cuda:0 (NVIDIA ..., sm_90)", or "cpu" and why it is that."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"
    if _has_cuda():
        return "cpu (chosen, although torch has a GPU)"
    without = "finds no NVIDIA GPU" if torch.version.cuda else "is built without CUDA"
    return f"cpu (torch {torch.__version__} {without})"


def compute_dtype(precision: str) -> torch.dtype:
    """Of activations, and of weights that are not stored as integers: fp16 or bf16 where the component was compiled so,
    else fp32 (integer weights are made fp32 again)."""
    return _DTYPES.get(precision, torch.float32)


def _has_cuda() -> bool:
    """ROCm's torch calls itself CUDA as well; the kernels here do not run on it."""
    return torch.version.hip is None and torch.cuda.is_available()

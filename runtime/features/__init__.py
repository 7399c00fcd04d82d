"""Files of features: slide tokens (`.pt`, without torch) and tile features (`.h5`), both read as untrusted input."""

from wsi_rt.runtime.features.slide_tokens import read_slide_tokens, write_slide_tokens
from wsi_rt.runtime.features.tile_features import (
    read_tile_features,
    read_tile_file,
    write_tile_features,
    write_tile_grid,
)
from wsi_rt.runtime.features.torch_file import read_tensor, write_tensor

__all__ = [
    "read_slide_tokens",
    "read_tensor",
    "read_tile_features",
    "read_tile_file",
    "write_slide_tokens",
    "write_tensor",
    "write_tile_features",
    "write_tile_grid",
]

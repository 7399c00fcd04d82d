"""A checkpoint's tokenizer -> the bundle's `tokenizer/` folder, and a synthetic one for synthetic weights."""

from wsi_rt.export.tokenizer.convert import synthetic_tokenizer, write_tokenizer

__all__ = ["synthetic_tokenizer", "write_tokenizer"]

"""Where weights come from: one interface that yields named tensors, and a source per checkpoint layout."""

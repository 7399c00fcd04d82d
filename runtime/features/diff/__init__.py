"""Where and why two feature files differ (`wsi-rt diff-features`).

`side` reads one file, `tiles` pairs the tiles of two and explains grids, `values` explains numbers, `records` compares
what the files say of themselves, `run` puts them together and `report` says it.
"""

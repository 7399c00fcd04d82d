"""`wsi-rt bench tiles`: tiles from a slide to u8 [256, 256, 3], against other readers and the codec alone.

Each provider of each case runs in a fresh process per round, the rounds interleaved; its pixels are compared first.
"""

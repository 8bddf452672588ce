"""Defines, once, the figures of an H100 that decide how kernels are split up."""

STREAMING_MULTIPROCESSORS = 132
MULTIPROCESSOR_MEMORY = 226 * 1024  # bytes of shared memory for all blocks of a multiprocessor
BLOCK_MEMORY = 220 * 1024  # bytes of shared memory for one block, less what its barriers need
# Warpgroups of a multiprocessor that leave each thread all the registers that it can address: 65536 / (2 · 128) = 256.
WARPGROUPS = 2
WGMMA_ROWS = 64  # rows of a `wgmma`, which one warpgroup holds

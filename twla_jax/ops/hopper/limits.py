"""Defines, once, the figures of an H100 that decide how kernels are split up."""

STREAMING_MULTIPROCESSORS = 132
# By blocks of a cluster, the clusters that run at once, a block to each multiprocessor: not all of an H100's groups of
# multiprocessors are multiples of four.
CLUSTERS = {1: STREAMING_MULTIPROCESSORS, 2: 66, 4: 30, 8: 15}
MULTIPROCESSOR_MEMORY = 226 * 1024  # bytes of shared memory for all blocks of a multiprocessor
BLOCK_MEMORY = 220 * 1024  # bytes of shared memory for one block, less what its barriers need
# Warpgroups of a multiprocessor that leave each thread all the registers that it can address: 65536 / (2 · 128) = 256.
WARPGROUPS = 2
WGMMA_ROWS = 64  # rows of a `wgmma`, which one warpgroup holds

"""Rotates tokens on all threads of a block (Pallas Mosaic GPU), with as few waits as possible.

The rotation is two products on the tensor cores: `Yᵀ = Rᵀ Xᵀ`, of which a warpgroup has 64 rows, and from its registers
`Zᵀ = Yᵀ Lᵀ`, of which warpgroups with the same rows take different columns. All tokens share every wait.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.attention.splits import AttentionSplits
from twla_jax.ops.hopper import threads
from twla_jax.ops.hopper.limits import WARPGROUPS, WGMMA_ROWS
from twla_jax.ops.hopper.swizzle import swizzle_transforms
from twla_jax.ops.hopper.threads import Real, Word
from twla_jax.ops.rotate_quantize.rotation import KernelRotation

# Of a thread's products in flight. With 96 and more, two tokens at 4096×11008 took 11.2 µs instead of 10.95.
_SUMS_IN_FLIGHT = 95
# Numbers of `Zᵀ` that a thread has registers for. A step of LLaMA-2-7B with 192 (down at four tokens) took 2321 µs, and
# with two ops there 2181; with 144 (three tokens) 1856 instead of 1971.
_NUMBERS = 160


@dataclasses.dataclass(frozen=True)
class TokenShape:
    """Describes tokens as `size × r` matrices, each padded to `rows × columns`, on `warpgroups` warpgroups."""

    size: int
    r: int
    rows: int
    warpgroups: int
    tokens: int
    splits: int = 0  # of an attention, which tokens are merged from; 0 for tokens as they are
    heads: int = 0
    gated: bool = False  # a token is twice as wide; its gate comes first
    wide: bool = False  # codes have 16 bits, as two of 8

    @property
    def codes(self) -> int:
        """Return the rows of codes: one a token, or two where they are wide."""
        return self.tokens * (2 if self.wide else 1)

    @property
    def columns(self) -> int:
        """Return the columns of the padded matrix."""
        return -(-self.r // WGMMA_ROWS) * WGMMA_ROWS

    @property
    def threads(self) -> int:
        """Return the threads of all warpgroups."""
        return 128 * self.warpgroups

    @property
    def warps(self) -> int:
        """Return the warps of all warpgroups."""
        return self.threads // threads.WARP

    @property
    def lines(self) -> int:
        """Return the number of pieces of 64 rows that `Yᵀ` is cut into."""
        return self.columns // WGMMA_ROWS

    @property
    def shares(self) -> int:
        """Return the number of pieces that the columns of `Zᵀ` are cut into; spare warpgroups repeat one."""
        most = self.warpgroups // self.lines
        return next(n for n in range(most, 0, -1) if self.rows % (8 * n) == 0)

    @property
    def numbers(self) -> int:
        """Return how many numbers of all tokens' `Zᵀ` a thread has."""
        return self.tokens * self.rows // self.shares // 2


def token_shape(
    x: jax.Array | jax.ShapeDtypeStruct | AttentionSplits,
    rotation: KernelRotation,
    warpgroups: int,
    *,
    gated: bool = False,
    wide: bool = False,
) -> TokenShape:
    """Return how a rotation's tokens are shared between warpgroups."""
    splits = heads = 0
    if isinstance(x, AttentionSplits):
        x, (_, splits, heads, _) = x.mixed, x.softmax.shape
    return TokenShape(
        size=rotation.size,
        r=len(rotation.right_transposed),
        rows=len(rotation.left),
        warpgroups=warpgroups,
        tokens=x.shape[0],
        splits=splits,
        heads=heads,
        gated=gated,
        wide=wide,
    )


def obstacle(shape: TokenShape) -> str | None:
    """Return why tokens of such a shape cannot be rotated, or None."""
    if shape.r % 8:
        return f"the right factor has {shape.r} rows, not a multiple of 8"
    if shape.lines > shape.warpgroups:
        return f"the right factor has {shape.r} rows, more than {WGMMA_ROWS * shape.warpgroups}"
    # A thread's share of Yᵀ and Zᵀ, in registers.
    if shape.rows > 128:
        return f"the left factor has {shape.size} rows, more than 128"
    if shape.tokens > 1 and (shape.numbers > _NUMBERS or shape.warpgroups > WARPGROUPS):
        return f"{shape.tokens} tokens of {shape.size}×{shape.r} are more than there are registers for"
    return None


def token_scratch(shape: TokenShape, dtype):
    """Return the shared memory of the tokens, one below the other."""
    return plgpu.SMEM(
        (shape.tokens * shape.rows, shape.columns), dtype, transforms=swizzle_transforms(2, shape.columns)
    )


def left_scratch(shape: TokenShape, dtype):
    """Return the shared memory of L."""
    return plgpu.SMEM((shape.rows, shape.rows), dtype, transforms=swizzle_transforms(2, shape.rows))


def right_scratch(shape: TokenShape, dtype):
    """Return the shared memory of Rᵀ."""
    return plgpu.SMEM((shape.columns, shape.columns), dtype, transforms=swizzle_transforms(2, shape.columns))


def warps_scratch(shape: TokenShape):
    """Return the shared memory for what warps pass to each other: two numbers each of a token."""
    return plgpu.SMEM((2 * shape.warps * shape.tokens,), jnp.float32)


def load_reals(at: Word, count: int, offset: int = 0) -> list[Real]:
    """Load `count` floats, a multiple of four, from shared memory."""
    return [each.real() for i in range(0, count, 4) for each in threads.load(at, 4, offset=offset + 4 * i)]


def rotate(token_smem, right_smem, left_smem, *, shape: TokenShape) -> list[jax.Array]:
    """Return this warpgroup's share of each token's `Zᵀ`, in bf16.

    `token_smem` is free once all threads have come here.
    """
    line, share = warpgroup_share(shape)
    columns = shape.rows // shape.shares

    def products(pairs, n: int):
        """Return the products of all pairs, which are all in flight before one is waited for."""

        def run(*accs):
            for acc, (a, b) in zip(accs, pairs, strict=True):
                plgpu.wgmma(acc, a, b)
            return [acc[...].astype(jnp.bfloat16) for acc in accs]

        return pl.run_scoped(run, *[plgpu.WGMMAAccumulatorRef((WGMMA_ROWS, n), jnp.float32)] * len(pairs))

    lines = right_smem.at[pl.ds(line * WGMMA_ROWS, WGMMA_ROWS)]
    mine = left_smem.at[pl.ds(share * columns, columns)].T
    tokens = [token_smem.at[pl.ds(i * shape.rows, shape.rows)].T for i in range(shape.tokens)]
    z = []
    for i in range(0, shape.tokens, _at_once(shape)):
        y = products([(lines, token) for token in tokens[i : i + _at_once(shape)]], shape.rows)
        z += products([(of_token, mine) for of_token in y], columns)
    return z


def _at_once(shape: TokenShape) -> int:
    """Return the number of tokens whose products are in flight together."""
    return max(_SUMS_IN_FLIGHT // (shape.rows // 2), 1)


def warpgroup_share(shape: TokenShape):
    """Return which lines and which columns of `Zᵀ` this warpgroup has."""
    group = lax.axis_index("warpgroup")
    return lax.rem(group, shape.lines), lax.rem(lax.div(group, shape.lines), shape.shares)


def tree(values: list, combine):
    """Return all values combined, two by two, so that none waits long for another."""
    while len(values) > 1:
        values = [
            combine(*values[i : i + 2]) if i + 1 < len(values) else values[i]
            for i in range(0, len(values), 2)
        ]
    return values[0]

"""Tokens' rotation on all threads of a block (Pallas Mosaic GPU), as fast as one can wait for it.

The rotation is two products on the tensor cores: `Yᵀ = Rᵀ Xᵀ`, of which a warpgroup has 64 rows, and from its
registers on `Zᵀ = Yᵀ Lᵀ`, of which warpgroups with the same rows take different columns. Whatever is waited for, all
tokens wait for together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twla_jax.ops.attention.parts import AttentionParts
from twla_jax.ops.hopper import threads as threads
from twla_jax.ops.hopper.threads import Real, Word
from twla_jax.ops.rotate_quantize.rotation import KernelRotation

WGMMA_ROWS = 64
# Of a thread's products under way. With 96 and more two tokens at 4096×11008 took 11.2 µs instead of 10.95.
_SUMS = 95
# Of `Zᵀ`s, that a thread has registers for. A step of LLaMA-2-7B with 192 (down at four tokens) took 2321 µs, and with
# two ops there 2181; with 144 (three tokens) 1856 instead of 1971.
_NUMBERS = 160
_WARPGROUPS = 2  # that leave a thread so many registers


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens as `size × r` matrices, each filled up to `rows × columns`, on so many warpgroups."""

    size: int
    r: int
    rows: int
    warpgroups: int
    tokens: int
    parts: int = 0  # of an attention, that tokens are to be merged of; 0 for tokens as they are
    heads: int = 0
    gated: bool = False  # a token is twice as wide, first what is its gate
    wide: bool = False  # codes of 16 bits, in two parts of 8

    @property
    def codes(self) -> int:
        """Returns the rows of codes: one a token, or two where they are wide."""
        return self.tokens * (2 if self.wide else 1)

    @property
    def columns(self) -> int:
        """Of the filled up matrix."""
        return -(-self.r // WGMMA_ROWS) * WGMMA_ROWS

    @property
    def threads(self) -> int:
        """Of all warpgroups."""
        return 128 * self.warpgroups

    @property
    def warps(self) -> int:
        """Of all warpgroups."""
        return self.threads // threads.WARP

    @property
    def lines(self) -> int:
        """Into how many of 64 rows `Yᵀ` is cut."""
        return self.columns // WGMMA_ROWS

    @property
    def shares(self) -> int:
        """Into how many columns of `Zᵀ` are cut; warpgroups that are left do what another does, too."""
        most = self.warpgroups // self.lines
        return next(n for n in range(most, 0, -1) if self.rows % (8 * n) == 0)

    @property
    def numbers(self) -> int:
        """Of all tokens' `Zᵀ`, that a thread has."""
        return self.tokens * self.rows // self.shares // 2


def shape(
    x: jax.Array | jax.ShapeDtypeStruct | AttentionParts,
    rotation: KernelRotation,
    warpgroups: int,
    *,
    gated: bool = False,
    wide: bool = False,
) -> Shape:
    """How a rotation's tokens are shared between warpgroups."""
    parts = heads = 0
    if isinstance(x, AttentionParts):
        x, (_, parts, heads, _) = x.mixed, x.softmax.shape
    return Shape(
        size=rotation.size,
        r=len(rotation.right_transposed),
        rows=len(rotation.left),
        warpgroups=warpgroups,
        tokens=x.shape[0],
        parts=parts,
        heads=heads,
        gated=gated,
        wide=wide,
    )


def obstacle(shape: Shape) -> str | None:
    """Why tokens of such a shape cannot be turned, or None."""
    if shape.r % 8:
        return f"the right factor has {shape.r} rows, not a multiple of 8"
    if shape.lines > shape.warpgroups:
        return f"the right factor has {shape.r} rows, more than {WGMMA_ROWS * shape.warpgroups}"
    # A thread's share of Yᵀ and Zᵀ, in registers.
    if shape.rows > 128:
        return f"the left factor has {shape.size} rows, more than 128"
    if shape.tokens > 1 and (shape.numbers > _NUMBERS or shape.warpgroups > _WARPGROUPS):
        return f"{shape.tokens} tokens of {shape.size}×{shape.r} are more than there are registers for"
    return None


def token_memory(shape: Shape, dtype):
    """Shared memory of the tokens, one below the other."""
    return plgpu.SMEM((shape.tokens * shape.rows, shape.columns), dtype, transforms=swizzled(shape.columns))


def left_memory(shape: Shape, dtype):
    """Shared memory of L."""
    return plgpu.SMEM((shape.rows, shape.rows), dtype, transforms=swizzled(shape.rows))


def right_memory(shape: Shape, dtype):
    """Shared memory of Rᵀ."""
    return plgpu.SMEM((shape.columns, shape.columns), dtype, transforms=swizzled(shape.columns))


def warps_memory(shape: Shape):
    """Shared memory of what warps tell each other: two numbers each of a token."""
    return plgpu.SMEM((2 * shape.warps * shape.tokens,), jnp.float32)


def load_reals(at: Word, count: int, offset: int = 0) -> list[Real]:
    """A multiple of four."""
    return [each.real() for i in range(0, count, 4) for each in threads.load(at, 4, offset=offset + 4 * i)]


def turn(token_smem, right_smem, left_smem, *, shape: Shape) -> list[jax.Array]:
    """This warpgroup's part of each token's `Zᵀ`, bf16.

    token_smem is free when all have come here.
    """
    line, share = place(shape)
    columns = shape.rows // shape.shares

    def products(pairs, n: int):
        """All of them under way before one is waited for."""

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


def _at_once(shape: Shape) -> int:
    """Tokens whose products are under way together."""
    return max(_SUMS // (shape.rows // 2), 1)


def place(shape: Shape):
    """Which lines and which columns of `Zᵀ` this warpgroup has."""
    group = lax.axis_index("warpgroup")
    return lax.rem(group, shape.lines), lax.rem(lax.div(group, shape.lines), shape.shares)


def tree(values: list, combine):
    """All values combined, two by two, so that none waits long for another."""
    while len(values) > 1:
        values = [
            combine(*values[i : i + 2]) if i + 1 < len(values) else values[i]
            for i in range(0, len(values), 2)
        ]
    return values[0]


def swizzled(columns: int):
    """Transforms of 16-bit matrices with so many columns, a multiple of 16, as `wgmma` takes them."""
    swizzle = next(size for size in (128, 64, 32) if 2 * columns % size == 0)
    tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]

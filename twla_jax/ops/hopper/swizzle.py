"""Describes the layout in which the copy engine and tensor cores expect matrices in shared memory."""

from jax.experimental.pallas import mosaic_gpu as plgpu


def swizzle_bytes(itemsize: int, columns: int) -> int:
    """Return the widest swizzle, in bytes, that divides a row of `columns` elements of `itemsize` bytes."""
    return next(size for size in (128, 64, 32) if itemsize * columns % size == 0)


def swizzle_transforms(itemsize: int, columns: int | None = None):
    """Return the transforms of a reference to shared memory: tiles of 8 rows, swizzled in chunks of 16 bytes.

    Args:
      itemsize: bytes of an element.
      columns: of the matrix; None if a row is a multiple of 128 bytes.
    """
    swizzle = 128 if columns is None else swizzle_bytes(itemsize, columns)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    return (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]

"""Reads files of other packages: text packed by Zstandard, and tables in Parquet."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from twla_jax.errors import TwlaError

_ROWS = 1024  # of a table at a time


def unpack_zstandard(content: bytes, path: Path) -> bytes:
    """Return the content of a `.zst` file, unpacked.

    Raises:
      TwlaError: the package for it is missing, or it is no such file, or cut short.
    """
    if importlib.util.find_spec("zstandard") is None:
        raise TwlaError(f"{path}: needs zstandard: pip install 'twla-jax[zstd]'")
    import zstandard

    parts, rest = [], content
    try:
        while rest:
            frame = zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(rest))
            if not frame.eof:
                raise TwlaError(f"{path}: not a zstd file, or cut short")
            rest = frame.unused_data
    except zstandard.ZstdError:
        raise TwlaError(f"{path}: not a zstd file, or cut short") from None
    return b"".join(parts)


def parquet_records(
    path: Path, choose: Callable[[Sequence[str]], str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the content of every row of a Parquet file; one column alone is read.

    Args:
      path: of the file.
      choose: from the names of all columns to that of the one that is wanted.

    Raises:
      TwlaError: the package for it is missing, or the file cannot be read; and what `choose` raises.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise TwlaError(f"{path}: needs pyarrow: pip install 'twla-jax[datasets]'")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column, number = choose(file.schema_arrow.names), 0
            for batch in file.iter_batches(_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {column: value}
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TwlaError(f"{path}: not a readable Parquet file ({reason})") from None

"""Reads files of other packages: text packed by Zstandard, and tables in Parquet."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.json_files import require_file

_PIECE = 1 << 16  # bytes of a packed file at a time: each may stand for thousands
_ROWS = 1024  # of a table at a time


def unpack_zstandard(path: Path) -> Iterator[bytes]:
    """Yield the content of a `.zst` file, unpacked piece by piece.

    Raises:
      TwlaError: the package for it is missing, or it is no such file, or cut short.
    """
    if importlib.util.find_spec("zstandard") is None:
        raise TwlaError(f"{path}: needs zstandard: pip install 'twla-jax[zstd]'")
    import zstandard

    frame = None
    try:
        with path.open("rb") as file:
            while rest := file.read(_PIECE):
                while rest:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(rest)
                    rest = frame.unused_data
                    frame = None if frame.eof else frame
    except zstandard.ZstdError:
        raise TwlaError(f"{path}: not a zstd file, or cut short") from None
    if frame is not None:
        raise TwlaError(f"{path}: not a zstd file, or cut short")


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

    require_file(path)  # a pipe would be waited for without end
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

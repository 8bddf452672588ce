"""Swaps the names of two folders in one step, where the system can."""

import ctypes
import errno
import os
import sys
from pathlib import Path

_AT_CURRENT_FOLDER = -100
_LINUX_EXCHANGE, _DARWIN_SWAP = 2, 2
# What a system or file system answers that cannot do it.
_UNABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def exchange(first: Path, second: Path) -> bool:
    """Swap two existing names: at every moment each names one of the two folders.

    Returns:
      Whether it was done; False where the system or the file system cannot.

    Raises:
      OSError: it can, and failed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here = ctypes.c_int(_AT_CURRENT_FOLDER)
        failed = library.renameat2(here, names[0], here, names[1], ctypes.c_uint(_LINUX_EXCHANGE))
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, ctypes.c_uint(_DARWIN_SWAP))
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(second))

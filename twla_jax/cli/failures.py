"""Writes messages for failures of the machine, such as too little memory, and ends the process."""

import os
import resource
import sys
from typing import NoReturn

from twla_jax.errors import TwlaError

_CURE = "a device or a machine with more"
_CACHE = "--kv-cache int8 or --dtype bfloat16"
# The settings of each command that need less memory.
CURES = {
    "quantize": "a shorter --seq-len, fewer --windows, --dtype bfloat16, or for a refinement a smaller batch or"
    " streaming = true in the recipe's [refine.end_to_end]; --dry-run predicts the memory",
    "allocate": "a shorter --seq-len, fewer --windows or --dtype bfloat16",
    "eval": "a smaller --batch-size, a shorter --seq-len or --dtype bfloat16",
    "compare": "a smaller --batch-size, a shorter --seq-len or --dtype bfloat16",
    "generate": f"fewer --samples, fewer --max-new-tokens, {_CACHE}",
    "chat": f"fewer --max-new-tokens, {_CACHE}",
    "serve": f"fewer --slots, a shorter --max-length, {_CACHE}",
}
# By which messages of the system begin that have nothing to do with what was asked for.
_STATUSES = {"UNKNOWN", "UNAVAILABLE", "INTERNAL", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "DATA_LOSS"}
_LEAST = 1_900_000_000  # bytes that the runtime's threads and libraries reserve; with fewer it may abort


def require_address_space() -> None:
    """Refuse a limit of the address space under which JAX may end the process without a message.

    Raises:
      TwlaError: there is such a limit, as from `ulimit -v`.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < _LEAST:
        raise TwlaError(
            f"the address space is limited to {limit / 1e9:.1f} GB (ulimit -v), and JAX needs 2 GB; raise the limit"
        )


def of_the_current_folder() -> str:
    """Return what to add to a message if the current folder was removed, else an empty text."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "; note that the current folder was removed: change to another one"
    except OSError:
        pass
    return ""


def is_of_memory(error: Exception) -> bool:
    """Return whether an error says that the host or the device, for which JAX has no class, is out of memory."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    )


def end(status: int) -> NoReturn:
    """End the process; of several hosts at once, as the others, which wait for it, then end, too.

    Else it would wait for them first, as JAX does when it is told to exit.
    """
    if _with_others():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_of_hosts(error: Exception) -> bool:
    """Return whether an error came from work together with other hosts, which need not be this one's own.

    JAX raises some such errors as a ValueError, which begins with the status as well.
    """
    status = type(error).__name__ == "JaxRuntimeError" or str(error).partition(":")[0] in _STATUSES
    return status and _with_others()


def of_hosts(error: Exception) -> str:
    """Return a message that another host has stopped, with the first line of what the system says."""
    detail = " ".join(str(error).split())[:200]
    return (
        f"another host has stopped or cannot be reached, and its own message says why ({detail}); the same command on"
        " every host goes on from what is finished"
    )


def _with_others() -> bool:
    """Return whether JAX works together with other processes; it is not loaded to ask."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def of_memory(error: Exception, command: str) -> str:
    """Return a message that the memory does not suffice: what the system says, what helps, and what is kept.

    Args:
      error: whose first line is told, and whose notes say what is kept.
      command: that was running.
    """
    said = str(error).strip().removeprefix("RESOURCE_EXHAUSTED:").splitlines()
    detail = f" ({said[0].strip()[:160]})" if said and said[0].strip() else ""
    message = f"the memory does not suffice{detail}; take {CURES.get(command, _CURE)}"
    return "; ".join([message, *getattr(error, "__notes__", [])])

"""Writes messages for failures of the machine, such as too little memory."""

import os
import resource

from twla_jax.errors import TwlaError

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
    """Return whether an error says that the device is out of memory; JAX has no class of its own for this."""
    return type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)


def of_memory(error: Exception) -> str:
    """Return a message that the memory does not suffice, with the first line of what the system says."""
    said = str(error).strip().removeprefix("RESOURCE_EXHAUSTED:").splitlines()
    detail = f" ({said[0].strip()[:160]})" if said and said[0].strip() else ""
    return f"the memory does not suffice{detail}; take a smaller batch, shorter windows or --dtype bfloat16"

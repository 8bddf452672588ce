"""Names the arrays that a function takes from the device as well as from the host."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray

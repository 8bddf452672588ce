"""Provides two qwix providers: one collects what the column sweep needs, one multiplies by packed kernels."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes
from jaxtyping import Array, Float
from qwix import QuantizationProvider, QuantizationRule
from qwix._src.utils import flax_util  # where qwix's own contrib takes these from; the extra pins the version
from qwix.contrib.calibration import SinglePassCalibrationProvider

from twla_jax.core import gptq
from twla_jax.core.settings import ActivationSettings, CompensationSettings, RotationSettings, WeightSettings
from twla_jax.errors import TwlaError
from twla_jax.integrations.packed_kernel import PackedKernel

STATS_SUFFIX = "_twla"
SAMPLE_SUFFIX = "_twla_sample"

Path = tuple[Any, ...]  # of a module's parameter, from the root of the model


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwlaRule(QuantizationRule):
    """A qwix rule that makes the linears of matching modules ternary.

    Attributes:
      module_path: regular expression that a module's path (`layers/0/attention/q`) must match as a whole.
      weights: settings of the quantiser and the column sweep.
      rotation: settings of KOTMS; None leaves inputs unrotated.
      activations: bits of the linears' inputs, and how clips are fitted.
    """

    weights: WeightSettings = dataclasses.field(
        default_factory=lambda: WeightSettings(compensation=CompensationSettings(propagation=0.0))
    )
    rotation: RotationSettings | None = dataclasses.field(default_factory=RotationSettings)
    activations: ActivationSettings = dataclasses.field(default_factory=ActivationSettings)

    def __post_init__(self):
        for name in ("weight_qtype", "act_qtype", "tile_size"):
            if getattr(self, name) is not None:
                raise TwlaError(f"a TwlaRule does not read {name}: set weights, rotation and activations")
        if self.weights.streams > 1:
            raise TwlaError(
                "a TwlaRule quantises every linear for the inputs of the full-precision model: "
                "set weights.compensation.propagation to 0, and stream"
            )


class MomentProvider(SinglePassCalibrationProvider):
    """Collects, in one pass, the second moments of the inputs of every linear that a `TwlaRule` matches.

    The model computes what it always did. A linear is a kernel that a module owns and contracts with one other array
    through `lax.dot_general` or a two-operand `jnp.einsum`, without batch axes.

    Attributes:
      contracted: for each matched kernel the axes that are summed over, known once the model was traced.
      rules: for each matched kernel the first rule that matched.
      seen: paths of all modules with such kernels, matched or not.
    """

    def __init__(self, rules: Sequence[QuantizationRule]):
        super().__init__(rules)
        self.contracted: dict[Path, tuple[int, ...]] = {}
        self.rules: dict[Path, TwlaRule] = {}
        self.seen: dict[str, None] = {}

    def get_rule_type(self) -> type[QuantizationRule]:
        """Return the rule that this provider reads."""
        return TwlaRule

    def get_stats_suffix(self) -> str:
        """Return the end of the name of a kernel's statistics."""
        return STATS_SUFFIX

    def compute_stats(self, lhs: Float[Array, "m tokens"]) -> dict[str, Array]:
        """Return the sums `XᵀX [m, m]` and the number of tokens, of one batch."""
        moment = gptq.accumulate_moment(jnp.zeros((len(lhs), len(lhs)), jnp.float32), lhs.T)
        return {"moment": moment, "tokens": jnp.float32(lhs.shape[1])}

    def dot_general(self, lhs, rhs, dimension_numbers, *args, rule=None, op_id=None, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return `lax.dot_general`, and collect; several axes may be contracted."""
        del rule, op_id
        (lhs_axes, rhs_axes), (lhs_batch, _) = dimension_numbers
        if not lhs_batch:
            self._observe("dot_general", lhs, rhs, tuple(lhs_axes), tuple(rhs_axes))
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)

    def einsum(self, einsum_str, *operands, **kwargs):
        """Return `jnp.einsum`, and collect where the second of two operands is a kernel."""
        axes = contraction(einsum_str, operands)
        if axes is not None:
            lhs, rhs = operands
            self._observe("einsum", lhs, rhs, axes.lhs, axes.rhs)
        return jnp.einsum(einsum_str, *operands, **kwargs)

    def _observe(self, op_name, lhs, rhs, lhs_axes, rhs_axes) -> None:
        rule, op_id = self._get_current_rule_and_op_id(op_name)
        module = flax_util.get_current_module()
        name = flax_util.find_param(rhs)
        if name is None or isinstance(module, nn.Embed | nnx.Embed):
            return
        path = (*flax_util.get_current_module_path(), name)
        self.seen["/".join(map(str, path[:-1]))] = None
        if not isinstance(rule, TwlaRule):
            return
        pairs = sorted(zip(rhs_axes, lhs_axes, strict=True))
        if self.contracted.setdefault(path, tuple(axis for axis, _ in pairs)) != tuple(a for a, _ in pairs):
            raise TwlaError(f"{'/'.join(map(str, path))} is contracted over other axes in another call")
        self.rules[path] = rule
        inputs = jnp.moveaxis(lhs, [axis for _, axis in pairs], range(len(pairs)))
        inputs = inputs.reshape(math.prod(lhs.shape[axis] for axis in lhs_axes), -1)
        self._collect_stats(inputs, name, module_path=path[:-1], op_name=op_name, op_id=op_id, lhs_id=id(lhs))
        stride = max(-(-inputs.shape[1] // rule.activations.clip_tokens), 1)
        sample = inputs[:, stride // 2 :: stride].T.astype(jnp.float32)
        flax_util.get_or_create_variable("quant_stats", name + SAMPLE_SUFFIX, lambda: sample)


class TwlaProvider(QuantizationProvider):
    """Runs linears whose kernels are packed, wherever in a model they are; all else computes as it always did."""

    def __init__(self, rules: Sequence[QuantizationRule] = ()):
        super().__init__(rules)

    def dot_general(self, lhs, rhs, dimension_numbers, *args, preferred_element_type=None, **kwargs):
        """Return `lax.dot_general`, of a packed kernel too."""
        if not isinstance(rhs, PackedKernel):
            kwargs["preferred_element_type"] = preferred_element_type
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        (lhs_axes, rhs_axes), _ = dimension_numbers
        return _multiply(lhs, rhs, lhs_axes, rhs_axes, preferred_element_type)

    def einsum(self, einsum_str, *operands, preferred_element_type=None, **kwargs):
        """Return `jnp.einsum`, of a packed kernel too."""
        if not isinstance(operands[-1], PackedKernel):
            kwargs["preferred_element_type"] = preferred_element_type
            return jnp.einsum(einsum_str, *operands, **kwargs)
        axes = contraction(einsum_str, operands)
        assert axes is not None  # or the kernel would not have been packed
        lhs, kernel = operands
        product = _multiply(lhs, kernel, axes.lhs, axes.rhs, preferred_element_type)
        return jnp.transpose(product, axes.order)

    def param(self, module: nn.Module, name: str, *args, **kwargs):
        """Return a Linen parameter; packed ones without a comparison with the shapes of their initialiser."""
        if module.has_variable("params", name):
            held = module.get_variable("params", name)
            if isinstance(held, PackedKernel):
                return held
        return module.param(name, *args, **kwargs)

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """Return the functions that are replaced while a model is called."""
        return super().get_intercept_map() | {
            "jax.lax.dot_general": self.dot_general,
            "jax.numpy.einsum": self.einsum,
            "flax.linen.Module.param": self.param,
            "flax.linen.dtypes.promote_dtype": _promote_linen,
            "flax.nnx.nn.dtypes.promote_dtype": _promote_nnx,
        }


@dataclasses.dataclass(frozen=True)
class Contraction:
    """What a two-operand einsum sums over, and the order of the axes that remain: the first's, then the second's."""

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    order: tuple[int, ...]


def contraction(einsum_str: Any, operands: Sequence[Any]) -> Contraction | None:
    """Return the axes of an einsum that is a plain product of two arrays; None if it is anything else."""
    if not isinstance(einsum_str, str) or len(operands) != 2 or einsum_str.count("->") != 1:
        return None
    names, out = einsum_str.replace(" ", "").split("->")
    if names.count(",") != 1:
        return None
    lhs, rhs = names.split(",")
    if "..." in lhs:  # as many axes as are not named; digits are not used by einsum
        dots = "0123456789"[: operands[0].ndim - len(lhs) + 3]
        lhs, out = lhs.replace("...", dots), out.replace("...", dots)
    letters = [lhs, rhs, out]
    summed = [name for name in rhs if name in lhs and name not in out]
    remaining = [name for name in lhs + rhs if name not in summed]
    plain = all(len(set(part)) == len(part) for part in letters) and "." not in "".join(letters)
    if not plain or not summed or sorted(remaining) != sorted(out):
        return None
    return Contraction(
        lhs=tuple(lhs.index(name) for name in summed),
        rhs=tuple(rhs.index(name) for name in summed),
        order=tuple(remaining.index(name) for name in out),
    )


def _multiply(lhs, kernel: PackedKernel, lhs_axes, rhs_axes, preferred_element_type):
    pairs = sorted(zip(rhs_axes, lhs_axes, strict=True))
    if tuple(axis for axis, _ in pairs) != kernel.contracted:
        raise TwlaError(
            f"a kernel packed for products over its axes {kernel.contracted} is multiplied over axes {tuple(rhs_axes)}"
        )
    product = kernel.multiply(lhs, [axis for _, axis in pairs])
    return product if preferred_element_type is None else product.astype(preferred_element_type)


def _promote_linen(*arrays, **kwargs):
    return _promoted(lambda plain: linen_dtypes.promote_dtype(*plain, **kwargs), arrays)


def _promote_nnx(arrays, /, **kwargs):
    return _promoted(lambda plain: nnx_dtypes.promote_dtype(tuple(plain), **kwargs), arrays)


def _promoted(promote, arrays):
    """Return arrays in their common type; a packed kernel counts as what it stands for, and stays as it is."""
    packed = [isinstance(array, PackedKernel) for array in arrays]
    plain = [
        jnp.zeros((), array.dtype) if is_packed else array
        for array, is_packed in zip(arrays, packed, strict=True)
    ]
    together = zip(arrays, promote(plain), packed, strict=True)
    return tuple(array if is_packed else promoted for array, promoted, is_packed in together)

"""Defines a transformer block as a chain of sites: what is rotated and quantised, in order, and what lies between.

A family declares its sites as data and says in two methods what a site's linears read and what follows from their
outputs. Everything that goes through a block walks that chain with `run`: the forward pass, decoding with a cache,
calibration, sensitivities, refinement and the packed form.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from twla_jax.models.config import DecoderConfig
from twla_jax.models.layers import InputTransform, Linear
from twla_jax.models.routing import Routing
from twla_jax.ops.attention.kv_cache import LayerKV
from twla_jax.ops.attention.reference import Positions


class Site(NamedTuple):
    """An input of a block that is rotated and quantised, and the linears that read it.

    Its transform is the block's attribute `{name}_input`, its linears are attributes by their names.

    Attributes:
      name: as reports, tables and parameter paths call it.
      linears: in the order of their outputs.
      norm: the norm that the linears' input comes out of, if one stands right before it: kernels take it along.
      writes: whether the linears' outputs are added to the residual stream.
      recomputed: whether calibration computes its input anew from the site before rather than keep it: it is wide.
      experts: whether its linears are `ExpertLinear`s; the block then has `route(state)`.
    """

    name: str
    linears: tuple[str, ...]
    norm: str | None = None
    writes: bool = False
    recomputed: bool = False
    experts: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Holds what a block has computed between two sites.

    Attributes:
      x: the residual stream, `[b, t, d]`.
      inner: what the next site reads instead of the stream, `[b, t, m]`; None where it reads the stream.
      cache: keys and values of earlier tokens while decoding, else None.
    """

    x: Float[Array, "b t d"]
    inner: Any = None  # packed blocks have forms of their own
    cache: LayerKV | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Holds what blocks read beside their state.

    Attributes:
      positions: of queries and keys, with the rotary angles.
      reach: how many positions attention reaches back: of one layer, or `[layers]` of all.
      rotary: which of several rotary angles each layer has, `[layers]`; None where all have the same, and of one layer.
      experts: those that each token takes, `[b, t, k]`, instead of its router's choice; None lets the router choose.
      fused: whether attention of many tokens is cuDNN's; see `decoder.can_fuse`.
      window: how far back those layers reach that do not reach over all; None where there are none.
    """

    positions: Positions
    reach: Int32[Array, "*layers"]
    rotary: Int32[Array, " layers"] | None = None
    experts: Int32[Array, "b t k"] | None = None
    fused: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def span(self, first: int, count: int) -> "Context":
        """Return the context of `count` layers from `first` on, from that of all."""
        layers = slice(first, first + count)
        rotary = None if self.rotary is None else self.rotary[layers]
        return dataclasses.replace(self, reach=self.reach[layers], rotary=rotary)

    def layer(self, index: int | Int32[Array, ""]) -> "Context":
        """Return the context of one layer, from that of all."""
        positions = self.positions
        if self.rotary is not None:
            kind = self.rotary[index]
            positions = dataclasses.replace(positions, cos=positions.cos[kind], sin=positions.sin[kind])
        return dataclasses.replace(self, positions=positions, reach=self.reach[index], rotary=None)


class ChainBlock(nnx.Module):
    """Defines the contract of a family's block; its arrays may have leading axes of layers, over which a scan runs.

    Attributes:
      sites: in execution order.
      norms: the norms whose scales refinement trains: those of the residual stream.
    """

    sites: ClassVar[tuple[Site, ...]]
    norms: ClassVar[tuple[str, ...]]

    def __init__(self, config: DecoderConfig, *, leading: tuple[int, ...], rngs: nnx.Rngs, dtype: jnp.dtype):
        """Make random weights.

        Args:
          config: shapes and switches.
          leading: axes before those of one layer, as `(layers,)`.
          rngs: where the weights come from.
          dtype: of the parameters.
        """
        raise NotImplementedError

    def before(self, site: Site, state: State, context: Context) -> Any:
        """Return what the linears of `site` read, before its transform: `[b, t, m]`."""
        h = state.x if state.inner is None else state.inner
        return h if site.norm is None else getattr(self, site.norm)(h)

    def after(self, site: Site, state: State, h: Any, context: Context) -> State:
        """Return the state once the linears of `site` have run on h, which went through its transform."""
        raise NotImplementedError

    def route(self, state: State, context: Context) -> Routing:
        """Return the experts of each token, from the state before or between sites of experts."""
        raise NotImplementedError

    def transform(self, site: Site) -> InputTransform:
        """Return what the input of `site` goes through before its linears."""
        return getattr(self, f"{site.name}_input")

    def linears(self, site: Site) -> tuple[Linear, ...]:
        """Return the linears that read the input of `site`."""
        return tuple(getattr(self, name) for name in site.linears)

    def outputs(self, site: Site, h: Any) -> tuple[Float[Array, "b t _"], ...]:
        """Return what each linear of `site` makes of h, which went through its transform."""
        return tuple(linear(h) for linear in self.linears(site))

    def add_output(self, site: Site, h: Any, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return the residual stream x with the output of the one linear of `site` added."""
        (output,) = self.outputs(site, h)
        return x + self.to_stream(site, output)

    def adds(self, site: Site) -> bool:
        """Return whether the outputs of a site's linear are added to the residual stream as they are."""
        return site.writes and not site.experts and type(self).to_stream is ChainBlock.to_stream

    def to_stream(self, site: Site, output: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Return what is added to the residual stream, from the output of the one linear of `site`: that itself."""
        return output

    def __call__(self, x: Float[Array, "b t d"], context: Context) -> Float[Array, "b t d"]:
        """Return the block's output for whole sequences; the context is this layer's."""
        return run(self, State(x), context).x

    def decode(
        self, x: Float[Array, "b t d"], cache: LayerKV, context: Context
    ) -> tuple[Float[Array, "b t d"], LayerKV]:
        """Return the block's output for tokens that follow those in the cache, and the cache with them added."""
        state = run(self, State(x, cache=cache), context)
        assert state.cache is not None
        return state.x, state.cache


def run(block: ChainBlock, state: State, context: Context, first: int = 0, last: int | None = None) -> State:
    """Return the state after the sites `first` to `last` (exclusive) of a block; by default, after all of them."""
    for site in block.sites[first:last]:
        h = block.transform(site)(block.before(site, state, context))
        state = block.after(site, state, h, context)
    return state


def site_inputs(
    block: ChainBlock, state: State, context: Context
) -> tuple[dict[str, Float[Array, "b t m"]], State]:
    """Return the input of every site before its transform, by name, and the state after the block."""
    inputs = {}
    for index, site in enumerate(block.sites):
        inputs[site.name] = block.before(site, state, context)
        state = run(block, state, context, index, index + 1)
    return inputs, state

"""Defines the settings of rotary positions, and how they follow from a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from twla_jax.errors import TwlaError
from twla_jax.schema import Check, boolean, check_values, number, optional, sequence, shown

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_POSITIONS = 2**31 - 1
_factor = number(0, 1e6, above=True)
_factors = sequence(_factor, longest=2**15, shortest=1)
_THETA: dict[str, Check] = {"rope_theta": optional(number(0, 1e30, above=True))}
_CHECKS: dict[str, dict[str, Check]] = {  # required first: those that are not optional
    "default": {},
    "linear": {"factor": _factor},
    "llama3": {
        "factor": _factor,
        "low_freq_factor": _factor,
        "high_freq_factor": _factor,
        "original_max_position_embeddings": number(1, _POSITIONS),
    },
    "yarn": {
        "factor": _factor,
        "original_max_position_embeddings": number(1, _POSITIONS),
        "attention_factor": optional(_factor),
        "beta_fast": optional(_factor),
        "beta_slow": optional(_factor),
        "mscale": optional(number(0, 1e6)),
        "mscale_all_dim": optional(number(0, 1e6)),
        "truncate": optional(boolean()),
    },
    "longrope": {
        "short_factor": _factors,
        "long_factor": _factors,
        "original_max_position_embeddings": number(1, _POSITIONS),
        "factor": optional(_factor),
        "attention_factor": optional(_factor),
    },
}
_STATES_ORIGINAL = ("llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for longer contexts.

    `linear` divides all of them by `factor`; `llama3` divides the low ones, keeps the high ones and blends between;
    `yarn` (arXiv 2309.00071) does so by how often a pair turns within the original context, and scales cosines and
    sines by `attention_factor`; `longrope` (arXiv 2402.13753) divides the i-th by `factors[i]`, or by
    `long_factors[i]` once there are more positions than originally; `factors` divides the i-th by `factors[i]`, the
    form in which GGUF files state the llama3 rule.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "RopeScaling":
        """Return the scaling that `dataclasses.asdict` described, also after a round trip through JSON."""
        settings = dict(settings)
        for key in ("factors", "long_factors"):
            settings[key] = tuple(settings.get(key, ()))
        return cls(**settings)


def read_layered_rope(
    config: Mapping[str, Any],
    *,
    pairs: int,
    source: str,
    theta: float,
    sliding_theta: float,
    older_key: str = "",
) -> tuple[float, RopeScaling | None, float]:
    """Return `read_rope` of the full layers, and the theta of the sliding ones, which have no scaling.

    transformers 5 writes `rope_parameters` by kind of layer; before, `rope_scaling` was that of the full layers, and
    Gemma 3 called the sliding layers' theta `rope_local_base_freq`.

    Args:
      config: contents of a `config.json`.
      pairs: pairs of features that are rotated.
      source: the file's name, for messages.
      theta: of the full layers, where the file does not say.
      sliding_theta: of the sliding ones.
      older_key: the family's name for the sliding layers' theta in files of transformers 4, if it has one.

    Raises:
      TwlaError: as `read_rope`; a scaling of the sliding layers; or one under the name `type` alone, which transformers
        passes over where layers differ.
    """
    stated = config.get("rope_parameters") or {}
    by_layer = {kind: stated.get(kind) or {} for kind in ("full_attention", "sliding_attention")}
    for kind, parameters in by_layer.items():
        if not isinstance(parameters, Mapping):
            raise TwlaError(f"{source}: rope_parameters of {kind} are {shown(parameters)}, not an object")
    full, sliding = (dict(parameters) for parameters in by_layer.values())
    if stated.keys() - by_layer.keys():  # passed over by transformers, where layers differ
        raise TwlaError(
            f"{source}: rope_parameters have to be by kind of layer (full_attention, sliding_attention)"
        )
    if sliding.get("rope_type", sliding.get("type", "default")) != "default":
        raise TwlaError(f"{source}: a rope scaling of sliding layers is not supported")
    check_values(sliding, _THETA, source)
    full = {**full, **(config.get("rope_scaling") or {})}
    if "rope_type" not in full and full.get("type", "default") != "default":
        raise TwlaError(f"{source}: the rope scaling has a 'type' {shown(full['type'])}; call it 'rope_type'")
    flat = {**config, "rope_parameters": {"rope_theta": config.get("rope_theta") or theta, **full}}
    flat["rope_scaling"] = None
    older = config.get(older_key) if older_key else None  # a file may have a key without a name
    local = sliding.get("rope_theta") or older or sliding_theta
    return *read_rope(flat, pairs=pairs, source=source), float(local)


def read_rope(
    config: Mapping[str, Any], *, pairs: int, source: str, theta: float = 10000.0
) -> tuple[float, RopeScaling | None]:
    """Return `rope_theta` and the scaling that a config.json asks for, as transformers 5 reads them.

    transformers 5 writes both into `rope_parameters`, 4 side by side with the scaling in `rope_scaling`; where a file
    has both, `rope_scaling` decides.

    Args:
      config: contents of a `config.json`.
      pairs: pairs of features that are rotated in one head.
      source: the file's name, for messages.
      theta: where the file states none.

    Raises:
      TwlaError: a scaling that is not supported, a setting that is missing or out of range, or two places that
        disagree on `rope_theta`.
    """
    stated = {key: config.get(key) or {} for key in ("rope_parameters", "rope_scaling")}
    parameters = dict(stated["rope_scaling"] or stated["rope_parameters"])
    where = f"{source}: {'rope_scaling' if stated['rope_scaling'] else 'rope_parameters'}"
    if nested := [key for key, value in parameters.items() if isinstance(value, Mapping)]:
        raise TwlaError(
            f"{where}: settings by kind of layer ({nested[0]!r}) are not supported for this family"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _CHECKS:
        raise TwlaError(
            f"{source}: rope scaling {shown(kind)} is not supported; supported are {', '.join(KINDS)}"
        )
    theta = _theta(config, parameters, stated["rope_parameters"], theta, source)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise TwlaError(
            f"{source}: partial_rotary_factor {shown(parameters['partial_rotary_factor'])} is not supported, only 1.0"
        )
    if kind in _STATES_ORIGINAL:
        top = config.get("original_max_position_embeddings")
        if top is not None:
            parameters["original_max_position_embeddings"] = top
        parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 2048))
    for key, check in _CHECKS[kind].items():
        if key not in parameters and not check.accepts(None):
            raise TwlaError(f"{source}: rope scaling {kind!r} lacks {key!r}")
    check_values(parameters, _CHECKS[kind], where)
    return theta, _scaling(kind, parameters, config, pairs=pairs, theta=theta, where=where)


def _theta(
    config: Mapping[str, Any],
    parameters: Mapping[str, Any],
    unread: Mapping[str, Any],
    default: float,
    source: str,
) -> float:
    for values in (parameters, unread, config):
        check_values(values, _THETA, source)
    theta = parameters.get("rope_theta") or config.get("rope_theta") or default
    for other in (unread.get("rope_theta"), config.get("rope_theta")):
        if other is not None and other != theta:
            raise TwlaError(
                f"{source}: rope_theta is {theta:g} where the scaling is read, but {other:g} beside it; keep one"
            )
    return float(theta)


def _scaling(
    kind: str,
    parameters: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    pairs: int,
    theta: float,
    where: str,
) -> RopeScaling | None:
    if kind == "default":
        return None
    stated = {key: parameters[key] for key in _CHECKS[kind] if parameters.get(key) is not None}
    if kind == "llama3" and stated["low_freq_factor"] >= stated["high_freq_factor"]:
        raise TwlaError(f"{where}: low_freq_factor has to be below high_freq_factor")
    if kind == "yarn":
        if theta <= 1:
            raise TwlaError(f"{where}: yarn needs a rope_theta above 1")
        mscale, mscale_all = stated.pop("mscale", 0), stated.pop("mscale_all_dim", 0)
        default = _mscale(stated["factor"], 1.0)
        if mscale and mscale_all:
            default = _mscale(stated["factor"], mscale) / _mscale(stated["factor"], mscale_all)
        stated.setdefault("attention_factor", default)
    if kind == "longrope":
        stated["factors"], stated["long_factors"] = stated.pop("short_factor"), stated.pop("long_factor")
        for key in ("factors", "long_factors"):
            stated[key] = tuple(map(float, stated[key]))
            if len(stated[key]) != pairs:
                raise TwlaError(f"{where}: {len(stated[key])} factors for {pairs} rotated pairs")
        original = stated["original_max_position_embeddings"]
        factor = stated.setdefault("factor", config.get("max_position_embeddings", 2048) / original)
        if "attention_factor" not in stated:
            grown = factor > 1 and original > 1
            stated["attention_factor"] = (
                math.sqrt(1 + math.log(factor) / math.log(original)) if grown else 1.0
            )
    return RopeScaling(kind=kind, **stated)


def _mscale(factor: float, weight: float) -> float:
    """Return YaRN's scale of cosines and sines, `0.1 · weight · ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

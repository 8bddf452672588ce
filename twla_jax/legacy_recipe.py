"""Reads recipes as version 0.1.0 wrote them into quantised folders: one flat table a part."""

from typing import Any

_LATENT = ("batch", "code_rate", "scale_rate", "rotation_rate", "activation_bits", "dtype")


def translate(values: Any) -> Any:
    """Return a recipe's nested dicts in today's form; those that are in it already as they are.

    Only what that version wrote itself is known: whole recipes, whose weights name their quantiser.
    """
    weights = values.get("weights") if isinstance(values, dict) else None
    if not isinstance(weights, dict) or "quantizer" not in weights:
        return values
    new = {**values, "weights": _weights(weights)}
    if (rotation := values.get("rotation", {})).get("start") == "none":
        new["rotation"] = False
    elif rotation:
        new["rotation"] = rotation
    if values.get("embedding", {}).get("bits", 16) == 16:
        new["embedding"] = False
    new["refine"] = _refine(values.get("refine", {}))
    return new


def _weights(old: dict[str, Any]) -> dict[str, Any]:
    if old["quantizer"] == "integer":
        kind, fields = "integer", ("bits",)
    elif old.get("planes", 1) == 2:
        kind, fields = "two_planes", ("euclidean_steps", "rounds", "metric")
    else:
        kind, fields = "ternary", ("euclidean_steps", "threshold", "rounds", "metric")
    compensation = _taken(old, ("damping", "propagation")) if old.get("compensate", True) else False
    return {kind: _taken(old, fields), "compensation": compensation, **_taken(old, ("group_size",))}


def _refine(old: dict[str, Any]) -> dict[str, Any]:
    latent = _taken(old, _LATENT)
    new: dict[str, Any] = {}
    if old.get("block_steps"):
        new["blocks"] = {**latent, "steps": old["block_steps"]}
        new["blocks"] |= {key: old[f"block_{key}"] for key in ("window", "mix") if f"block_{key}" in old}
    if old.get("steps"):
        new["end_to_end"] = {**latent, "steps": old["steps"]}
    if old.get("clip_steps"):
        new["clips"] = {**_taken(old, ("batch", "dtype")), "steps": old["clip_steps"]}
        new["clips"] |= {key: old[f"clip_{key}"] for key in ("bits", "rate") if f"clip_{key}" in old}
    return new


def _taken(old: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: old[key] for key in keys if key in old}

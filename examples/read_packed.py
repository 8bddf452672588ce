"""Reads what `twla export OUT DEST --format safetensors` writes with numpy alone, and prints one matrix.

python examples/read_packed.py DEST/model.safetensors blocks.q.kernel 0      (docs/format.md describes the format)
"""

import json
import sys

import numpy as np

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U8": "u1"}


class PackedModel:
    def __init__(self, path):
        data = np.memmap(path, np.uint8, mode="r")
        size = int(data[:8].view("<u8")[0])
        self.header, self.data = json.loads(bytes(data[8 : 8 + size])), data[8 + size :]
        metadata = self.header.pop("__metadata__")
        self.config, self.tensors = (json.loads(metadata[key]) for key in ("config", "tensors"))

    def array(self, name, layer=...):
        entry = self.header[name]
        stored = self.data[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]])
        array = stored.reshape(entry["shape"])[layer]
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << 16).view("<f4")
        return array if entry["dtype"] == "U8" else array.astype(np.float64)

    def weight(self, name, layer=...):
        """A parameter in float64; packed ones as `[out, in]`, for inputs that are rotated."""
        kind, settings = self.tensors[name]["kind"], self.tensors[name]["static"]
        if kind == "array":
            return self.array(name, layer)
        n, keys = settings["in_features"], [key for key in self.header if key.startswith(f"{name}.")]
        part = {key.rsplit(".", 1)[1]: self.array(key, layer) for key in keys}
        if kind == "integer":
            width, groups = settings["bits"], -(-n // settings["group_size"])
            codes, zero = bits(part["codes"], width, n), bits(part["zero_point"], width, groups)
            return columns(part["scale"], settings) * (codes - columns(zero, settings))
        if kind != "ternary":
            raise SystemExit(f"{name}: weights of the kind '{kind}' are not read here")
        weight = columns(part["alpha"], settings) * trits(part["codes"], n)
        if "mu" in part:
            weight += columns(part["mu"], settings)
        if "residual_codes" in part:
            residual_alpha = part["alpha"] * part["residual_ratio"] / 200
            weight += columns(residual_alpha, settings) * trits(part["residual_codes"], n)
        return weight

    def rotation(self, site, layer):
        """The matrix Q by which inputs of a site (`qkv`, `o`, `mlp`, `down`) are multiplied."""
        name = f"blocks.{site}_input.rotation"
        return np.kron(self.array(f"{name}.left", layer), self.array(f"{name}.right", layer).T)


def columns(values, settings):
    return np.repeat(values, settings["group_size"], -1)[..., : settings["in_features"]]


def trits(stored, count):
    return (stored[..., None] // 3 ** np.arange(5) % 3 - 1.0).reshape(*stored.shape[:-1], -1)[..., :count]


def bits(stored, width, count):
    single = np.unpackbits(stored, axis=-1, bitorder="little")[..., : count * width]
    return single.reshape(*stored.shape[:-1], count, width) @ 2.0 ** np.arange(width)


if __name__ == "__main__":
    print(PackedModel(sys.argv[1]).weight(sys.argv[2], int(sys.argv[3])))

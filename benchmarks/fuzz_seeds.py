"""Makes the small valid files that `fuzz.py` begins with: `python benchmarks/fuzz_seeds.py` writes its corpus."""

import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "fuzz_corpus"


def seeds() -> dict[str, dict[str, bytes]]:
    """Return small valid inputs of the binary targets, as they are in the corpus."""
    names = {
        "model.embed_tokens.weight": (8, 4),
        "model.norm.weight": (4,),
        **{f"model.layers.0.{each}_layernorm.weight": (4,) for each in ("input", "post_attention")},
        **{f"model.layers.0.self_attn.{each}_proj.weight": (4, 4) for each in "qkvo"},
        **{f"model.layers.0.mlp.{each}_proj.weight": (4, 4) for each in ("gate", "up", "down")},
    }

    inside = {
        "model.layers.0.block_sparse_moe.gate.weight": (2, 4),
        **{
            f"model.layers.0.block_sparse_moe.experts.{index}.w{number}.weight": (4, 4)
            for index in range(2)
            for number in (1, 2, 3)
        },
    }
    experts = {name: shape for name, shape in names.items() if ".mlp." not in name} | inside

    def written(kind: str, width: int, scaled: bool, names: dict[str, tuple[int, ...]] = names) -> bytes:
        header, end = {}, 0
        for name, shape in names.items():
            eight = scaled and "proj" in name
            size = (1 if eight else width) * math.prod(shape)
            entry = {
                "dtype": "F8_E4M3" if eight else kind,
                "shape": list(shape),
                "data_offsets": [end, end + size],
            }
            header[name], end = entry, end + size
            if eight:
                header[f"{name}_scale_inv"] = {
                    "dtype": "F32",
                    "shape": [2, 2],
                    "data_offsets": [end, end + 16],
                }
                end += 16
        head = json.dumps(header).encode()
        return struct.pack("<Q", len(head)) + head + bytes(end)

    return {
        "safetensors": {
            "llama": written("F32", 4, False),
            "eight-bits": written("BF16", 2, True),
            "experts": written("F16", 2, False, experts),
        },
        "gguf": {"llama": _small_gguf()},
    }


def gguf_file(metadata: dict[str, Any]) -> bytes:
    """Return a GGUF file with this metadata; the types of values are those that writers choose."""

    def text(value: str) -> bytes:
        data = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(data)) + data

    def typed(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, bytes([value])
        if isinstance(value, int):
            return (4, struct.pack("<I", value)) if 0 <= value < 2**32 else (11, struct.pack("<q", value))
        if isinstance(value, float):
            return (6, struct.pack("<f", value)) if abs(value) < 3e38 else (12, struct.pack("<d", value))
        if isinstance(value, list):
            parts = [typed(each) for each in value]
            kind = parts[0][0] if parts else 4
            return 9, struct.pack("<IQ", kind, len(parts)) + b"".join(data for _, data in parts)
        return 8, text(value if isinstance(value, str) else json.dumps(value))

    metadata = dict(metadata)
    count = metadata.pop("factors", 0)
    rows = [1.0] * count if isinstance(count, int) and 0 < count <= 32 else []
    tensors = [("token_embd.weight", (4, 8), [0.0] * 32)]
    tensors += [(f"rope_factors_{each}.weight", (count,), rows) for each in ("long", "short") if rows]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = typed(value)
        head += text(key) + struct.pack("<I", kind) + data
    body = b""
    for name, shape, values in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(body))
        body += struct.pack("<32f", *values, *[0.0] * (32 - len(values)))
    return head + bytes(-len(head) % 32) + body


def _small_gguf() -> bytes:
    import gguf as writers
    import numpy as np

    with tempfile.TemporaryDirectory() as name:
        writer = writers.GGUFWriter(Path(name) / "a.gguf", "llama")
        for key, value in (
            ("context_length", 16),
            ("embedding_length", 4),
            ("block_count", 1),
            ("feed_forward_length", 4),
            ("head_count", 1),
        ):
            getattr(writer, f"add_{key}")(value)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"])
        writer.add_token_scores([0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0])
        writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
        writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
        for each in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.0.{each}.weight", np.ones(4, np.float32))
        for each in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.0.{each}.weight", np.zeros((4, 4), np.float16))
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        return (Path(name) / "a.gguf").read_bytes()


if __name__ == "__main__":
    for target, files in seeds().items():
        for name, data in files.items():
            (CORPUS / target / name).write_bytes(data)

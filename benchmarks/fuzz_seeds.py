"""Makes the small valid files that `fuzz.py` begins with: `python benchmarks/fuzz_seeds.py` writes its corpus."""

import json
import math
import struct
import tempfile
from pathlib import Path

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

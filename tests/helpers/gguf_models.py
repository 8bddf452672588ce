"""Models as GGUF files, as llama.cpp's converter writes them: names by the gguf package's own table."""

import gguf
import numpy as np

ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
ROTATES_NEIGHBOURS = ("llama", "smollm3", "granite")


def in_pairs(weight, heads):
    """Rows of queries or keys, the two halves of each head taken in turn."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(path, architecture, config, weights, metadata=(), extra=None):
    """Write a model.

    config and weights are those of its Hugging Face folder; `metadata` has the kind, key and value of what only this
    architecture has, `extra` tensors.
    """
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], layers)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    for kind, key, value in metadata:
        getattr(writer, f"add_{kind}")(f"{architecture}.{key}", value)
    for name, weight in weights.items():
        for part, count in heads.items():
            if f".{part}." in name and architecture in ROTATES_NEIGHBOURS:
                weight = in_pairs(weight, count)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            weight = 1 + weight.astype(np.float32)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored, f"llama.cpp has no name for {name}"
        writer.add_tensor(stored, weight.astype(np.float32 if weight.ndim == 1 else np.float16))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, np.asarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

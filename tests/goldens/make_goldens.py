"""Makes the golden files beside it from transformers' PyTorch models in float32.

Needs torch, transformers and gguf, none of which the tests do (Python 3.11, where newer ones have no wheel of torch):
`python tests/goldens/make_goldens.py [CASE …] [SMOLLM2.gguf]`; without a case, all of them are made.
Small random models keep their weights in the file; of SmolLM2 a sample of the logits is kept.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(__file__).parent
TOKENS = 24
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 1.5, 3.0, 6.0],
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA = {**SPECIAL, "head_dim": 16, "sliding_window": 7, "tie_word_embeddings": True}
EXPERTS = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
CASES = {
    "llama": ("llama", {}),
    "llama_tied_llama3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear_biases": ("llama", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    # 24 tokens: past the original context, so with the long factors; and within it, with the short ones.
    "llama_longrope": ("llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 16}}),
    "llama_longrope_short": (
        "llama",
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral_sliding": ("mistral", {"sliding_window": 7}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_tied": ("qwen3", {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {**SPECIAL, "no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {
            **SPECIAL,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
        },
    ),
    "gemma3": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3_linear": (
        "gemma3_text",
        {
            **GEMMA,
            "layer_types": ["full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma2": (
        "gemma2",
        {
            **GEMMA,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 24,
        },
    ),
    "olmo2": ("olmo2", {**SPECIAL, "num_key_value_heads": 4}),
    "olmo3": (
        "olmo3",
        {**SPECIAL, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo3_yarn": (
        "olmo3",
        {
            **SPECIAL,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {**YARN, "attention_factor": 1.2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "mixtral": (
        "mixtral",
        {**SPECIAL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **SPECIAL,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 0.75,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe_plain": (
        "qwen3_moe",
        {
            **EXPERTS,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "phi3": ("phi3", {**SPECIAL, "sliding_window": 7}),
    "phi4_mini": (
        "phi3",
        {
            **SPECIAL,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0],
                "long_factor": [1.0, 1.5, 3.0, 6.0, 8.0, 9.0],
                "original_max_position_embeddings": 16,
            },
        },
    ),
}


def small_model(name: str, seed: int) -> None:
    """Weights (rounded to float16, kept so), tokens and logits of one random configuration."""
    family, settings = CASES[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **{**SMALL, **settings})
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith(("bias", "sinks")):  # otherwise all ones, all zeros, or small
            parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
        parameter.data = parameter.data.half().float()
    tokens = torch.randint(0, config.vocab_size, (2, TOKENS))
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    stored = {
        key: value
        for key, value in published_tensors(model).items()
        if not (config.tie_word_embeddings and "lm_head" in key)
    }
    np.savez_compressed(
        HERE / f"{name}.npz",
        config=json.dumps(json.loads(config.to_json_string(use_diff=False))),
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy(),
        **{f"weight:{key}": value.numpy().astype(np.float16) for key, value in stored.items()},
    )


def generated_longrope() -> None:
    """What Phi-4-mini's small model generates across its original context: tokens, and the logits of each step."""
    stored = np.load(HERE / "phi4_mini.npz")
    config = transformers.AutoConfig.for_model(**json.loads(str(stored["config"])))
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    weights = {
        key.removeprefix("weight:"): torch.tensor(stored[key]).float() for key in stored.files if ":" in key
    }
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    prompt = torch.tensor(stored["tokens"][:, :8]).long()
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.eval().generate(prompt, **settings, return_dict_in_generate=True, output_logits=True)
    np.savez_compressed(
        HERE / "generated" / "phi4_mini.npz",
        tokens=made.sequences.numpy().astype(np.int32),
        logits=torch.stack(made.logits, 1).numpy(),
    )


def mxfp4() -> None:
    """What transformers makes of experts in MXFP4: all bytes, with the exponents of usual and extreme values."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 12, 3, 16), np.uint8)
    blocks.reshape(-1)[:256] = np.arange(256)
    scales = random.integers(110, 135, (2, 12, 3), np.uint8)
    scales.reshape(-1)[16:20] = 0, 1, 253, 254
    blocks.reshape(-1, 16)[19] &= 0x33  # 3 and more times 2^127 is infinite
    found = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    found = found.view(torch.int16).numpy().view(np.uint16)
    np.savez_compressed(HERE / "generated" / "mxfp4.npz", blocks=blocks, scales=scales, bits=found)


def published_tensors(model) -> dict[str, torch.Tensor]:
    """Tensors under the names of published files: in memory, transformers has all experts of a layer in one."""
    if not any(".experts." in key for key in model.state_dict()):
        return model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return safetensors.torch.load_file(Path(folder) / "model.safetensors")


def smollm2(path: Path) -> None:
    """Logits of SmolLM2-135M-Instruct, dequantised by transformers, at some positions and vocabulary entries."""
    folder = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**folder)
    tokens = tokenizer(
        "The Kronecker product of two orthogonal matrices is orthogonal, and so is its", return_tensors="pt"
    )
    positions, ids = [0, 4, 9, 14], np.linspace(0, model.config.vocab_size - 1, 256).astype(np.int32)
    with torch.no_grad():
        logits = model.eval()(tokens["input_ids"]).logits[0, positions].numpy()
    np.savez_compressed(
        HERE / "smollm2.npz",
        tokens=tokens["input_ids"].numpy().astype(np.int32),
        positions=np.array(positions),
        ids=ids,
        logits=logits[:, ids],
        scale=np.abs(logits).max(),
        likeliest=logits.argmax(-1),
    )


if __name__ == "__main__":
    named = [argument for argument in sys.argv[1:] if argument in CASES]
    files = [argument for argument in sys.argv[1:] if argument not in CASES]
    for case in named or CASES:
        # Seeded by the name, so that a new case leaves the others as they are.
        small_model(case, zlib.crc32(case.encode()))
    if not named or "phi4_mini" in named:
        generated_longrope()
    if not named or "gpt_oss" in named:
        mxfp4()
    if files:
        smollm2(Path(files[0]))

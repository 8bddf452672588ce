"""Checks exported models with the programs they were exported for; each part runs where its packages are.

    python benchmarks/check_exports.py reference OUT scores.npz         this library: tokens, log-probabilities
    python benchmarks/check_exports.py transformers DEST scores.npz     transformers with PyTorch
    python benchmarks/check_exports.py llama DEST.gguf scores.npz       llama-cpp-python
    python benchmarks/check_exports.py compressed DEST OUT.npz          the compressed-tensors package, bit for bit
    python benchmarks/check_exports.py hqq DEST OUT.npz                 the hqq package, to the rounding of float32
    python benchmarks/check_exports.py hqq_scores DEST scores.npz       the hqq package in transformers' model
    python benchmarks/check_exports.py packed DEST OUT.npz              numpy alone, through examples/read_packed.py
    python benchmarks/check_exports.py codes OUT OUT.npz                this library: the weights that it is to find

Each prints one line, and ends with status 1 where figures differ by more than `--tolerance`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def reference(out, scores, args):
    """Writes windows of text and each token's log-probability, activations at 16 bits."""
    import jax
    import jax.numpy as jnp

    import twla_jax
    from twla_jax.text import corpora

    model, tokenizer = twla_jax.load(out)
    model = twla_jax.set_activation_bits(model, 16)
    text = corpora.load_corpus(args.corpus, "evaluation")
    tokens = corpora.tokenize(text, tokenizer, model.config.vocab_size)
    windows = np.asarray(tokens[: args.windows * args.seq_len]).reshape(args.windows, args.seq_len)

    @jax.jit
    def score(model, window):
        log_probs = jax.nn.log_softmax(model(window[None])[0, :-1].astype(jnp.float32))
        return jnp.take_along_axis(log_probs, window[1:, None], axis=-1)[:, 0]

    values = np.stack([np.asarray(score(model, jnp.asarray(window))) for window in windows])
    np.savez(scores, tokens=windows, scores=values)
    print(f"reference: perplexity {np.exp(-values.mean()):.4f} on {values.size} tokens")


def compared(name, scores, args, score):
    """Prints the perplexity and the largest difference of a token's log-probability."""
    held = np.load(scores)
    values = np.stack([score(window) for window in held["tokens"]])
    ours, theirs = np.exp(-held["scores"].mean()), np.exp(-values.mean())
    largest = np.abs(values - held["scores"]).max()
    print(
        f"{name}: perplexity {theirs:.4f}, reference {ours:.4f}; largest difference of a token {largest:.2g} nats"
    )
    return abs(theirs / ours - 1) <= args.tolerance


def transformers(dest, scores, args):
    """Scores a Hugging Face folder with PyTorch, in the type it is stored in or in `--dtype`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dest, dtype=getattr(torch, args.dtype)).eval()

    @torch.no_grad()
    def score(window):
        ids = torch.as_tensor(window[None].astype(np.int64))
        log_probs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        return log_probs.gather(-1, ids[0, 1:, None])[:, 0].numpy()

    return compared("transformers", scores, args, score)


def llama(dest, scores, args):
    """Scores a GGUF file with llama.cpp, fed with the same tokens; compares how it splits a text, too."""
    import llama_cpp

    model = llama_cpp.Llama(dest, n_ctx=args.seq_len, logits_all=True, verbose=False, n_batch=args.seq_len)

    def score(window):
        model.reset()
        model.eval(window.tolist())
        logits = np.asarray(model.scores[: len(window) - 1], np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(log_probs, window[1:, None].astype(np.int64), 1)[:, 0]

    window = np.load(scores)["tokens"][0].tolist()
    text = model.detokenize(window, special=True)
    again = model.tokenize(text, add_bos=False, special=True)
    print(
        f"llama: {sum(a == b for a, b in zip(again, window, strict=False))} of {len(window)} tokens split alike"
    )
    return compared("llama", scores, args, score)


def codes(out, file, args):
    """Writes the weights of every packed linear as float32, by their published names."""
    from twla_jax.core.tensors import TernaryTensor, dequantize
    from twla_jax.storage import checkpoint
    from twla_jax.storage.export.folding import parameters
    from twla_jax.storage.export.huggingface import published_name

    model, _, _ = checkpoint.load(out)
    packed = [each for each in parameters(model) if isinstance(each.held, TernaryTensor)]
    np.savez(
        file, **{published_name(each, model.config): np.asarray(dequantize(each.value)) for each in packed}
    )
    print(f"codes: {len(packed)} matrices")


def compressed(dest, file, args):
    """Decompresses every linear with the compressed-tensors package, and compares bit for bit."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    held = {}
    for path in sorted(Path(dest).glob("*.safetensors")):
        held |= load_file(path)
    config = json.loads((Path(dest) / "config.json").read_text())["quantization_config"]
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    expected = np.load(file)
    wrong = 0
    for name in expected.files:
        stem = name.removesuffix(".weight")
        shape = held[f"{stem}.weight_shape"]
        integers = unpack_from_int32(held[f"{stem}.weight_packed"], bits, torch.Size(shape.tolist()))
        scale = held[f"{stem}.weight_scale"].float()
        dense = integers.float() * scale.repeat_interleave(-(-integers.shape[1] // scale.shape[1]), 1)
        wrong += int((dense.numpy() != expected[name]).sum())
    print(f"compressed: {len(expected.files)} matrices, {wrong} values differ")
    return wrong == 0


def packed(dest, file, args):
    """Reads every linear of a family named as Llama's with numpy alone; float32 rounds a sum of α·T and μ."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from read_packed import PackedModel

    model, expected = PackedModel(Path(dest) / "model.safetensors"), np.load(file)
    largest = 0.0
    for name in expected.files:  # model.layers.3.self_attn.q_proj.weight
        *_, layer, _, linear, _ = name.split(".")
        dense = model.weight(f"blocks.{linear.removesuffix('_proj')}.kernel", int(layer))
        largest = max(largest, float(np.abs(dense - expected[name]).max() / np.abs(expected[name]).max()))
    print(f"packed: {len(expected.files)} matrices, largest difference {largest:.2g} of the largest weight")
    return largest < 1e-6


def hqq_linears(dest):
    """Returns the modules that the hqq package makes of the packed linears, by name, and all other tensors."""
    import torch
    from hqq.core.quantize import HQQLinear
    from safetensors.torch import load_file

    held = {}
    for path in sorted(Path(dest).glob("*.safetensors")):
        held |= load_file(path)
    linears = {}
    for name in [name for name in held if name.endswith(".W_q")]:
        stem = name.removesuffix("W_q")
        state = {key.removeprefix(stem): held.pop(key) for key in list(held) if key.startswith(stem)}
        linears[stem.removesuffix(".")] = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
        linears[stem.removesuffix(".")].load_state_dict(state)
    return linears, held


def hqq(dest, file, args):
    """Dequantises every linear with the hqq package; float32 rounds a zero point and a product."""
    linears, _ = hqq_linears(dest)
    expected = np.load(file)
    largest = 0.0
    for name in expected.files:
        dense = linears[name.removesuffix(".weight")].dequantize().numpy()
        largest = max(largest, float(np.abs(dense - expected[name]).max() / np.abs(expected[name]).max()))
    print(f"hqq: {len(expected.files)} matrices, largest difference {largest:.2g} of the largest weight")
    return len(expected.files) == len(linears) and largest < 1e-6


def hqq_scores(dest, scores, args):
    """Scores transformers' model with its linears replaced by those of the hqq package."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(dest)
    del config.quantization_config  # transformers 5 reads no linears that are packed already
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    linears, rest = hqq_linears(dest)
    for name, module in linears.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)
    # Past `load_state_dict`, which hqq's modules answer in their own way.
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in rest.items():
        held[name].data = value.float()
    model.tie_weights()

    @torch.no_grad()
    def score(window):
        ids = torch.as_tensor(window[None].astype(np.int64))
        log_probs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        return log_probs.gather(-1, ids[0, 1:, None])[:, 0].numpy()

    return compared("hqq", scores, args, score)


def main():
    """Runs one check, as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {
        part.__name__: part
        for part in (reference, transformers, llama, codes, compressed, packed, hqq, hqq_scores)
    }
    parser.add_argument("part", choices=parts)
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--corpus", default="pydoc")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="what transformers computes in")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of the perplexity, relative")
    args = parser.parse_args()
    sys.exit(parts[args.part](args.model, args.file, args) is False)


if __name__ == "__main__":
    main()

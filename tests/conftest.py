"""What several test modules need: where the data lies, and small models."""

import gc
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from flax import nnx

from twla_jax.core import activation, kotms, tensors
from twla_jax.models.config import DecoderConfig
from twla_jax.models.decoder import Decoder
from twla_jax.quantization import pipeline

from helpers import tiny

# Devices to shard over. Before anything runs: the number is fixed from then on.
jax.config.update("jax_num_cpu_devices", 8)

# Tracing makes millions of small objects that are seldom in cycles: looking for those rarely saves a tenth of the time.
gc.set_threshold(200_000, 20, 100)

# The JAX whose compiled programs the tests marked `hlo` describe.
HLO_JAX = "0.11."

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if "TWLA_DATA" not in os.environ and _BESIDE.is_dir():
    os.environ["TWLA_DATA"] = str(_BESIDE)


# Commands that tests run leave nothing in the user's cache.
os.environ.setdefault("TWLA_COMPILATION_CACHE", "off")


# A shell that starts the tests in the background has its commands ignore interrupts, which tests send and wait for.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker("hlo") and not jax.__version__.startswith(HLO_JAX):
        pytest.skip(f"describes what JAX {HLO_JAX}* compiles, not {jax.__version__}")


# Of the 65530 maps of memory that Linux allows a process; each compiled program has some, and the whole suite too many.
_MOST_MAPS = 40_000


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Forget compiled programs between modules when there are many; until then later modules find them."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of corpora, `TWLA_DATA`."""
    folder = os.environ.get("TWLA_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TWLA_DATA names no folder of corpora")
    return Path(folder)


@pytest.fixture(scope="session")
def cases(data: Path) -> Path:
    """Small inputs with the right value, in the folder `cases` beside the corpora."""
    folder = data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no cases beside {data}")
    return folder


@pytest.fixture(scope="session")
def stories(data: Path) -> Path:
    """stories260K, a real and tiny trained model in Hugging Face layout, in the folder beside the corpora."""
    folder = data.parent / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no models/stories260K beside {data}")
    return folder


@pytest.fixture(scope="session")
def stories_model(stories: Path, tmp_path_factory) -> Path:
    """stories260K with its recovered vocabulary as a tokenizer, so that text goes in and comes out."""
    folder = tmp_path_factory.mktemp("models") / "stories"
    shutil.copytree(stories, folder, copy_function=shutil.copyfile)
    pieces = json.loads((stories / "tok512_recovered.json").read_text())
    pieces[1:3] = ["<s>", "</s>"]
    # Early pieces were merged first, hence likelier; bytes are a last resort.
    scores = [-50.0 if index < 259 else -6 - index / 100 for index in range(len(pieces))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(data: Path, tmp_path_factory) -> Path:
    """A folder with stories to calibrate on, `calibration.txt`, and others to evaluate on, `evaluation.txt`."""
    stories = (data / "web" / "tinystories_sample.txt").read_text().split("<|endoftext|>")
    folder = tmp_path_factory.mktemp("texts")
    for name, part in (("calibration", stories[::2]), ("evaluation", stories[1::2])):
        (folder / f"{name}.txt").write_text("".join(part))
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> DecoderConfig:
    """Three blocks whose widths neither 4, 5 nor a group of 16 divides."""
    return DecoderConfig(
        model_type="llama",
        vocab_size=97,
        hidden_size=42,
        intermediate_size=78,
        num_layers=3,
        num_heads=3,
        num_kv_heads=1,
        head_dim=14,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config) -> Decoder:
    """A decoder of random weights, held by numpy as the readers leave them; no test changes it."""
    return jax.tree.map(np.asarray, Decoder(tiny_config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="session")
def tiny_quantized(tiny_model):
    """`tiny_model` quantised on `tiny.WINDOWS` by `tiny.RECIPE`, and the figures of that; no test changes it."""
    return pipeline.quantize_blocks(tiny_model, tiny.WINDOWS, tiny.RECIPE.quantization, progress=False)


@pytest.fixture
def tiny_ternary(tiny_config) -> Decoder:
    """A decoder as the quantiser leaves it, with random codes, scales, rotations and clips."""
    rng = np.random.default_rng(0)
    model = Decoder(tiny_config, rngs=nnx.Rngs(0), param_dtype=jnp.float16)
    layers = tiny_config.num_layers
    for site in model.sites:
        for name in site.linears:
            linear = getattr(model.blocks, name)
            _, m, n = linear.kernel.get_value().shape
            linear.kernel = nnx.Param(
                tensors.from_codes(
                    jnp.asarray(rng.integers(-1, 2, (layers, n, m)), jnp.int8),
                    jnp.asarray(rng.normal(size=(layers, n, -(-m // 16))) * 0.1),
                    jnp.asarray(rng.normal(size=(layers, n, -(-m // 16))) * 0.01),
                    16,
                )
            )
        transform = model.blocks.transform(site)
        left, right = kotms.factor_sizes(m, n, "balanced")
        orthogonal = [
            np.stack([np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(layers)]).astype(
                np.float16
            )
            for size in (left, right)
        ]
        transform.rotation = nnx.data(nnx.Param(kotms.KroneckerRotation(*map(jnp.asarray, orthogonal))))
        transform.activation = nnx.data(
            nnx.Param(
                activation.ActivationQuantizer(
                    bits=jnp.asarray(rng.choice([4, 8], layers), jnp.int32),
                    clips=jnp.asarray(rng.choice([1.0, 0.9], (layers, 4)), jnp.float16),
                    enabled=True,
                )
            )
        )
    return model

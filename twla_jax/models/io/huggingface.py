"""Reads a model folder in Hugging Face layout: `config.json` and one or many safetensors files."""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path

from twla_jax.json_files import read_json
from twla_jax.models.config import DecoderConfig
from twla_jax.models.config_keys import READ, float8_settings, is_mxfp4
from twla_jax.models.decoder import Decoder
from twla_jax.models.families import config_from_hf, family_of
from twla_jax.models.io import float8, mxfp4
from twla_jax.models.io.loading import fill_decoder
from twla_jax.models.io.shards import Shards
from twla_jax.schema import check_values

_log = logging.getLogger(__name__)
GENERATION = "generation_config.json"


def read_config(folder: Path) -> DecoderConfig:
    """Return the settings in `folder/config.json`, with the end tokens of `generation_config.json` beside its own.

    Raises:
      TwlaError: one of the files is not JSON, or a setting is missing, out of range or not supported.
    """
    path = folder / "config.json"
    config = config_from_hf(read_json(path), source=str(path))
    if (folder / GENERATION).exists():
        path = folder / GENERATION
        stated = read_json(path)
        check_values(stated, {"eos_token_id": READ["eos_token_id"]}, str(path))
        more = stated.get("eos_token_id")
        more = more if isinstance(more, list) else [] if more is None else [more]
        ends = dict.fromkeys([*config.eos_token_ids, *more])
        config = dataclasses.replace(config, eos_token_ids=tuple(ends))
    return config


def load_model(folder: Path, *, dtype=None, in_files: bool = False) -> Decoder:
    """Return the decoder in `folder`, parameters as numpy arrays in their stored type (float32, float16 or bfloat16).

    Weights of eight bits with scales, and those of 64 bits, become float32, those in MXFP4 bfloat16.

    A head that the configuration ties to the embedding, but that the file holds with other values, is kept apart, as
    transformers 5 does; of a tied pair, either may be the one that is stored.

    Args:
      folder: with `config.json` and safetensors files.
      dtype: what it computes in; float32 if None.
      in_files: as `fill_decoder` takes it.

    Raises:
      TwlaError: as `read_config`; a shard is missing or cut short; a tensor cannot be used.
    """
    config = read_config(folder)
    stated = read_json(folder / "config.json")
    in_four, in_eight = is_mxfp4(stated), float8_settings(stated) is not None
    shards = Shards(folder, packed=[mxfp4.BLOCKS] * in_four + [float8.SCALES] * in_eight)
    table, ignored = dict(family_of(config).hf_tensors), _left_out(shards.names(), folder)
    embed, head = table["embed"], table["head.kernel"]
    if config.tie_word_embeddings and head in shards.names():
        if embed not in shards.names():
            table["embed"] = head
        elif shards.equal(embed, head):
            ignored.add(head)
        else:
            _log.warning("%s: tie_word_embeddings is true, but the head differs; it is kept apart", folder)
            config = dataclasses.replace(config, tie_word_embeddings=False)
    source = mxfp4.Mxfp4Source(shards) if in_four else float8.dequantized(shards, stated, folder)
    source = family_of(config).hf_source(source, config)
    return fill_decoder(config, source, table, ignored=ignored, dtype=dtype, in_files=in_files)


# Parts of published models that stand beside the text decoder, by how the names of their tensors begin.
_BESIDE = {
    "vision": ("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "image_newline"),
    "audio": ("audio_tower.", "audio_model."),
    "multi-token prediction": ("mtp.", "mtp_layers.", "medusa_head."),
}


def _left_out(names: Collection[str], folder: Path) -> set[str]:
    """Return the tensors that belong to no text decoder, and log which these are; rotary tables are made anew."""
    found = {name for name in names if name.endswith("rotary_emb.inv_freq")}
    for kind, begins in _BESIDE.items():
        if beside := {name for name in names if name.removeprefix("model.").startswith(begins)}:
            _log.warning("%s: %d tensors of %s are left out (%s, …)", folder, len(beside), kind, min(beside))
            found |= beside
    return found

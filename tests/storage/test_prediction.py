"""What a model will take is known from its configuration, and what it took is read to the last byte."""

import dataclasses
import json

import pytest

from twla_jax.cli import main
from twla_jax.core.settings import FoldedRotationSettings, SymmetricSettings, TernarySettings, WeightSettings
from twla_jax.errors import TwlaError
from twla_jax.recipe import Recipe, load_recipe
from twla_jax.storage import accounting, checkpoint, prediction


@pytest.fixture
def saved(tiny_ternary, tmp_path):
    checkpoint.save(tiny_ternary, None, tmp_path / "out", Recipe(), {})
    return tmp_path / "out"


@pytest.mark.parametrize("quantizer", [TernarySettings(), SymmetricSettings()], ids=["mu", "no mu"])
def test_the_prediction_is_what_is_then_stored(tiny_config, tiny_ternary, quantizer, tmp_path):
    weights = WeightSettings(group_size=16, quantizer=quantizer)
    predicted = prediction.predict(tiny_config, Recipe(weights=weights))
    if isinstance(quantizer, SymmetricSettings):
        for linear in (
            getattr(tiny_ternary.blocks, name) for site in tiny_ternary.sites for name in site.linears
        ):
            linear.kernel.set_value(dataclasses.replace(linear.kernel.get_value(), mu=None))
    checkpoint.save(tiny_ternary, None, tmp_path / "out", Recipe(), {})
    account = accounting.account(tmp_path / "out")
    stored = account["breakdown"]
    assert predicted["weights"] == account["weights"]
    assert predicted["bytes"]["linears"] == stored["codes"] + stored["scales_and_offsets"]
    assert predicted["bytes"]["rotations"] == stored["rotations"]
    assert predicted["bytes"]["clips"] == stored["clips"]
    assert predicted["bytes"]["total"] == sum(stored.values()) - stored["tokenizer_and_metadata"]
    assert predicted["bits_per_weight_linear"] == pytest.approx(account["bits_per_weight_linear"])
    assert predicted["bits_per_weight_model"] == pytest.approx(account["bits_per_weight_model"])


def test_a_model_is_inspected_before_it_is_quantised(stories_model, capsys):
    main.main(["inspect", str(stories_model), "--recipe", "rtn-int4", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert (figures["family"], figures["layers"], figures["recipe"]) == ("llama", 5, "rtn-int4")
    assert 4 < figures["bits_per_weight_linear"] < 6
    main.main(["inspect", str(stories_model)])
    assert "can be quantised" in capsys.readouterr().out


def test_folded_rotations_take_the_bytes_of_a_second_embedding(tiny_config):
    tied, untied = (
        prediction.predict(tiny_config, Recipe(folded_rotation=folded))["bytes"]
        for folded in (None, FoldedRotationSettings())
    )
    table = 2 * tiny_config.vocab_size * tiny_config.hidden_size
    assert tiny_config.tie_word_embeddings
    assert (tied["embeddings"], untied["embeddings"]) == (table, 2 * table)
    assert untied["total"] == tied["total"] + table


def test_the_published_layout_is_not_predicted(tiny_config):
    figures = prediction.predict(tiny_config, load_recipe("paper-groups"))
    assert figures["bytes"] is None
    assert "depends on the weights" in prediction.format_prediction(figures)


def test_inspect_reads_every_byte_when_asked(saved, capsys):
    main.main(["inspect", str(saved), "--verify", "--json"])
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert (
        json.loads(capsys.readouterr().out)["bytes_verified"] == size - (saved / "twla.json").stat().st_size
    )
    chunk = next(path for path in saved.rglob("0.0.0") if "codes" in str(path))
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(SystemExit):
        main.main(["inspect", str(saved), "--verify"])
    assert "differs from what was saved" in capsys.readouterr().err
    main.main(["inspect", str(saved)])  # by size alone all is there
    chunk.unlink()
    with pytest.raises(SystemExit):
        main.main(["inspect", str(saved)])
    assert "missing; the folder is damaged" in capsys.readouterr().err


def test_only_a_quantised_model_can_be_verified(stories_model):
    with pytest.raises(TwlaError, match="not a quantised model"):
        checkpoint.read_manifest(stories_model)

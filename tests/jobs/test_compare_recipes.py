"""One table of recipes: measured once, sized by what lies on the disk, taken up where it was left."""

import json
import math
import shutil
import types

import pytest

from twla_jax.cli import main
from twla_jax.core.tensors import IntegerTensor
from twla_jax.jobs import compare_recipes, quantize_model, scores
from twla_jax.reports.run import Phases
from twla_jax.storage import accounting, checkpoint
from twla_jax.text import corpora

QUICK = "rotation = false\n[activations]\nclip_tokens = 64\n[weights]\ngroup_size = 32\n"


@pytest.fixture(scope="module")
def compared(stories_model, texts, tmp_path_factory):
    """Arguments of a comparison of two recipes, and the folder it left."""
    folder = tmp_path_factory.mktemp("compare")
    recipes = {"ours": "two_planes.rounds = 1", "integers": "integer.bits = 3"}
    for name, settings in recipes.items():
        (folder / f"{name}.toml").write_text(QUICK + settings)
    arguments = ["compare", stories_model, "--corpus", texts / "evaluation.txt", "--out", folder / "out"]
    arguments += ["--calibration", texts / "calibration.txt", "--windows", 4, "--seq-len", 64]
    arguments = [*map(str, arguments), "--max-windows", "4", "--activation-bits", "16,8", "--json"]
    rows = ["--recipes", ",".join(str(folder / f"{name}.toml") for name in recipes)]
    main.main([*arguments, *rows])
    return arguments, rows, folder


def run(capsys, *arguments):
    main.main(list(map(str, arguments)))
    return json.loads(capsys.readouterr().out)


def test_rows_are_sized_by_what_is_stored_and_taken_from_what_was_measured(compared, capsys, monkeypatch):
    arguments, rows, folder = compared
    monkeypatch.setattr(quantize_model, "quantize_to_folder", None)
    monkeypatch.setattr(scores, "evaluate", None)
    result = run(capsys, *arguments, *rows, "--plot", folder / "compare.svg")
    full, ours, integers = result["rows"]
    assert (folder / "compare.svg").stat().st_size > 0
    assert [row["name"] for row in result["rows"]] == ["full precision", "ours", "integers"]
    assert full["perplexity"].keys() == {"A16"}
    for row in (ours, integers):
        assert row["perplexity"].keys() == {"A16", "A8"}
        assert full["perplexity"]["A16"] < row["perplexity"]["A16"] < 100
        account = accounting.account(folder / "out" / row["name"])
        assert row["bits_per_weight_linear"] == account["bits_per_weight_linear"]
        params = folder / "out" / row["name"] / "params"
        chunks = [path for path in params.glob("*/*") if path.name.replace(".", "").isdigit()]
        assert row["bytes"] == sum(path.stat().st_size for path in chunks) < full["bytes"]
    text = compare_recipes.format_comparison(result)
    assert all(f"{row['perplexity']['A16']:.2f}" in text for row in result["rows"])


def test_an_interrupted_comparison_measures_only_what_is_missing(compared, capsys, monkeypatch):
    arguments, rows, folder = compared
    before = run(capsys, *arguments, *rows)["rows"]
    kept = json.loads((folder / "out" / compare_recipes.RESULTS).read_text())
    kept["scores"].popitem()  # the last one: integers at 8 bits
    (folder / "out" / compare_recipes.RESULTS).write_text(json.dumps(kept))
    left = folder / "out" / "integers.partial"  # as a kill leaves it while it is being removed
    left.mkdir()
    (left / "block-2.npz").touch()
    scored, evaluate = [], scores.evaluate
    monkeypatch.setattr(scores, "evaluate", lambda *a, **k: scored.append(1) or evaluate(*a, **k))
    assert run(capsys, *arguments, *rows)["rows"] == before
    assert len(scored) == 1
    assert not left.exists()


def test_a_folder_is_a_row_as_it_is(compared, capsys, tmp_path):
    arguments, _, folder = compared
    shutil.copytree(folder / "out" / "integers", tmp_path / "mine")
    rows = run(capsys, *arguments, "--recipes", tmp_path / "mine")["rows"]
    reference = run(capsys, *arguments, *compared[1])["rows"]
    assert rows[1] == {**reference[2], "name": "mine"}
    assert checkpoint.is_checkpoint(tmp_path / "mine")


def test_a_recipe_that_breaks_the_model_is_a_row_like_any_other(compared, capsys, monkeypatch, tmp_path):
    arguments, _, folder = compared
    whole = quantize_model.evaluate

    def evaluate(model, **options):
        found = whole(model, **options)
        broken = isinstance(model.blocks.q.kernel.get_value(), IntegerTensor)
        return {**found, "perplexity": 1e9} if broken else found

    monkeypatch.setattr(quantize_model, "evaluate", evaluate)
    rows = ["--recipes", str(folder / "integers.toml")]
    assert run(capsys, *arguments, *rows, "--out", tmp_path / "out")["rows"][1]["name"] == "integers"
    text = arguments[arguments.index("--calibration") + 1]
    quantise = ["quantize", arguments[1], tmp_path / "alone", "--recipe", folder / "integers.toml"]
    with pytest.raises(SystemExit, match="1"):
        run(capsys, *quantise, "--calibration", text, "--windows", 4, "--seq-len", 64)
    assert "is broken" in capsys.readouterr().err
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--recipes", "w9"], "neither a file nor one of"),
        (["--windows", "5"], "was made from another model, text or recipe"),
        (["--activation-bits", "5"], "must be one of 16, 8, 6, 4, 2"),
        (["--plot", "picture.xyz"], "picture.xyz"),
        (["--recipes", "rtn-int4,rtn-int4"], "two rows are called rtn-int4"),
    ],
)
def test_mistakes_take_one_line(compared, capsys, change, message):
    arguments, rows, _ = compared
    with pytest.raises(SystemExit) as stop:
        main.main([*arguments, *rows, *change])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_of_a_mix_every_text_counts_and_the_worst_is_shown(monkeypatch, tmp_path):
    """Texts as different as they are long; two models whose losses a table gives."""
    parts = tuple(
        corpora.Corpus(name=name, split="evaluation", text=name, source="") for name in ("code", "prose")
    )
    mix = corpora.Corpus(name="mix", split="evaluation", text="code prose", source="", parts=parts)
    nll = {("full", "code"): 1.0, ("full", "prose"): 3.0, ("ours", "code"): 2.5, ("ours", "prose"): 3.5}
    lengths = {"code": 1, "prose": 3}

    def evaluate(model, tokens, **_):
        loss = nll[model, tokens]
        return {"perplexity": math.exp(loss), "nll": loss, "windows": lengths[tokens]}

    config = types.SimpleNamespace(vocab_size=1)
    monkeypatch.setattr(
        compare_recipes.loading,
        "load",
        lambda name, dtype: (types.SimpleNamespace(config=config, name=name), None),
    )
    monkeypatch.setattr(scores.sites, "set_activation_bits", lambda model, bits: model.name)
    monkeypatch.setattr(scores.corpora, "tokenize", lambda text, *_: text.text)
    monkeypatch.setattr(scores, "evaluate", evaluate)
    measured = scores.Measured(tmp_path / "compare.json")
    score = scores.Scorer(measured, mix, "float32", {}, Phases(verbose=False), False)
    rows = []
    for name in ("full", "ours"):
        found = score(name, name, name, [16])
        size = {"bits_per_weight_linear": 2.0, "bits_per_weight_model": 2.0, "bytes": 9}
        rows.append({"name": name, **size, **compare_recipes._by_bits(found)})
    compare_recipes._add_worst(rows)
    full, ours = rows
    # The mean is over windows: three of prose, one of code.
    assert full["perplexity"]["A16"] == pytest.approx(math.exp((1 + 3 * 3) / 4))
    assert ours["worst"]["A16"] == {"domain": "code", "ratio": pytest.approx(math.exp(1.5))}
    result = {"rows": rows, "model": {"name": "m"}, "corpus": {"name": "mix"}, "windows": 4, "seq_len": 8}
    table = compare_recipes.format_comparison(result).splitlines()
    assert table[2].endswith("worst A16")
    assert table[-1].endswith("code 4.48×")

"""The command line: figures on stdout, all else on stderr, mistakes in one line, exit status 0 only on success."""

import json
import shutil

import pytest

from twla_jax.cli import main

from helpers import html_pages
from helpers.commands import fails, run
from helpers.quick_recipe import QUICK

SMALL = ["--windows", "4", "--seq-len", "64", "--check-windows", "4"]


@pytest.fixture(scope="module")
def text(texts):
    return str(texts / "evaluation.txt")


@pytest.fixture(scope="module")
def out(stories_model, texts, tmp_path_factory):
    """stories260K quantised by the command, its activations at 6 bits on average."""
    folder = tmp_path_factory.mktemp("cli") / "out"
    recipe = folder.parent / "quick.toml"
    recipe.write_text(QUICK)
    calibration, evaluation = texts / "calibration.txt", texts / "evaluation.txt"
    options = ["--recipe", recipe, "--calibration", calibration, "--check-corpus", evaluation, *SMALL]
    options += ["--activation-budget", 6, "--site", "block"]
    main.main(list(map(str, ["quantize", stories_model, folder, *options])))
    return folder


def test_a_quantised_folder_alone_is_enough(out, capsys):
    assert {path.name for path in out.iterdir()} == {
        *("params", "tokenizer", "report.json", "ila_amp.json", "twla.json")
    }
    assert not out.with_name("out.partial").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["evaluation"]["perplexity"]["A16"] >= report["evaluation"]["perplexity"]["full"] > 1
    assert report["calibration"]["sha256"] != report["evaluation"]["sha256"]
    assert report["versions"]["jax"]
    assert report["same_bytes"].startswith("same versions, XLA flags and kind of device")
    by_phase = [peak["host_bytes"] for peak in report["peak_memory_by_phase"].values()]
    assert 0 < by_phase[0] <= by_phase[-1] <= report["peak_memory"]["host_bytes"]
    assert report["peak_memory_by_phase"].keys() == report["seconds"].keys()


def test_json_is_alone_on_stdout(out, text, capsys):
    arguments = ["--corpus", text, "--seq-len", 64, "--max-windows", 2, "--json"]
    scored = json.loads(run(capsys, "eval", out, *arguments).out)
    assert (scored["windows"], scored["tokens"]) == (2, 128)
    coarse = json.loads(run(capsys, "eval", out, *arguments, "--activation-bits", 2).out)
    assert coarse["perplexity"] > scored["perplexity"]
    sizes = json.loads(run(capsys, "inspect", out, "--json").out)
    assert sizes["bytes_accounted"] == pytest.approx(sizes["bytes_on_disk"], rel=0.02)
    generated = json.loads(
        run(capsys, "generate", out, "--prompt", "Once", "--max-new-tokens", 5, "--json").out
    )
    assert len(generated["tokens"]) == 5


def test_a_report_is_one_page_that_needs_nothing_else(out, stories_model, texts, tmp_path, capsys):
    figures = tmp_path / "eval.json"
    scored = ["--domains", texts, "--against", stories_model, "--seq-len", 64, "--max-windows", 2, "--json"]
    figures.write_text(run(capsys, "eval", out, *scored).out)
    page, compared = tmp_path / "page.html", tmp_path / "compare.json"
    rows = [{"name": f"r{size}", "bytes": size, "perplexity": {"A16": 1e6 / size}} for size in (10**4, 10**5)]
    compared.write_text(json.dumps({"rows": rows}))
    arguments = ["report", out, page, "--figures", f"{figures},{compared}", "--against", stories_model]
    arguments += ["--corpus", texts / "evaluation.txt", "--prompt", "<b>Once</b>"]
    said = json.loads(run(capsys, *arguments, "--json").out)
    assert said["left_out"] == {}
    assert said["bytes"] == page.stat().st_size
    html = html_pages.read(page)
    assert html.headings == said["sections"]
    assert html.links == []
    assert not {"script", "b"} & set(html.tags)
    assert html.tags.count("svg") == html.tags.count("figure") == 4 + 1 + 1 + 2 + 1 + 1 + 4
    assert "calibration" in html.text
    assert "r10000 A16" in html.text
    assert "“<b>Once</b> …”" in html.text
    message, _ = fails(capsys, *arguments)
    assert "--overwrite" in message
    alone = json.loads(run(capsys, "report", out, page, "--overwrite", "--json").out)
    assert alone["left_out"].keys() == {
        *("Weights before and after shaping", "Quality by text", "Activations before and after rotation")
    }
    html_pages.require_shown(page, tmp_path)


def test_a_table_of_texts_ends_with_the_worst(out, stories_model, texts, capsys):
    arguments = ["--domains", texts, "--against", stories_model, "--seq-len", 64, "--max-windows", 2]
    figures = json.loads(run(capsys, "eval", out, *arguments, "--json").out)
    best, worst = figures["domains"]
    assert {best["name"], worst["name"]} == {"calibration", "evaluation"} == figures["texts"].keys()
    assert figures["worst"] == worst["name"]
    assert 1 < best["ratio"] <= worst["ratio"]
    assert worst["kl"] > 0
    assert 0 < worst["agreement"] < 1
    printed = run(capsys, "eval", out, *arguments).out.splitlines()
    assert printed[0].split() == ["text", "tokens", "perplexity", "original", "KL", "same", "top-1", "ratio"]
    assert printed[-1].split()[0] == worst["name"]


def test_a_dry_run_knows_the_size_and_writes_nothing(out, stories_model, capsys, tmp_path):
    recipe = out.parent / "quick.toml"
    arguments = ["quantize", stories_model, tmp_path / "out", "--recipe", recipe, "--dry-run"]
    figures = json.loads(run(capsys, *arguments, "--json").out)
    stored = json.loads(run(capsys, "inspect", out, "--json").out)["breakdown"]
    size = figures["output"]["bytes"]
    assert size["linears"] == stored["codes"] + stored["scales_and_offsets"]
    assert (size["rotations"], size["clips"]) == (stored["rotations"], stored["clips"])
    assert figures["host_bytes"]["total"] > figures["host_bytes"]["blocks"] > 0
    assert "host" in run(capsys, *arguments).out
    assert not list(tmp_path.iterdir())


def test_a_mesh_scores_as_one_device_does(out, text, capsys):
    arguments = ["eval", out, "--corpus", text, "--seq-len", 64, "--max-windows", 4, "--batch-size", 2]
    arguments += ["--activation-bits", 16, "--json"]
    one, four = (
        json.loads(run(capsys, *arguments, *more).out)["perplexity"]
        for more in ([], ["--mesh", "data=2,model=2"])
    )
    assert four == pytest.approx(one, rel=1e-4)


def test_a_mesh_of_more_devices_than_there_are_is_refused(out, text, capsys):
    line, _ = fails(capsys, "eval", out, "--corpus", text, "--mesh", "model=16")
    assert "--mesh model=16: needs 16 devices, but there are 8" in line


def test_generation_streams_what_json_says(out, capsys):
    arguments = ["generate", out, "--prompt", "Once upon a time", "--max-new-tokens", 8]
    streamed = run(capsys, *arguments).out
    assert streamed.rstrip("\n") == json.loads(run(capsys, *arguments, "--json").out)["text"].rstrip("\n")


def test_a_model_is_quantised_and_its_bits_allocated_in_one_go(out, text, capsys):
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"]["allocation"]["budget"] == 6
    assert report["allocation"]["after"]["average_bits"] <= 6
    assert report["evaluation"]["perplexity"].keys() == {"full", "A16", "A6 by block"}
    arguments = ["--corpus", text, "--seq-len", 64, "--max-windows", 4, "--json"]
    scored = json.loads(run(capsys, "eval", out, *arguments).out)
    assert scored["perplexity"] == pytest.approx(report["evaluation"]["perplexity"]["A6 by block"], rel=1e-3)


def test_bits_are_allocated_anew_from_the_same_table(out, text, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    printed = run(
        capsys, "allocate", folder, "--budget", 5, "--site", "block", "--plot", tmp_path / "a.svg"
    ).out
    assert " → 5.000 on average" in printed or " → 4." in printed
    assert "(budget 5, by block, weighted by elements)" in printed
    assert "taken from the folder" in printed  # quantising measured it
    assert (tmp_path / "a.svg").stat().st_size > 0
    frontier = ["--frontier", "4,5,8", "--corpus", text, "--max-windows", 1, "--json"]
    figures = json.loads(run(capsys, "allocate", folder, "--site", "block", *frontier).out)
    assert [point["budget"] for point in figures["frontier"]] == [4, 5, 8]
    assert all(point["perplexity"] > 1 for point in figures["frontier"])
    sizes = json.loads(run(capsys, "inspect", folder, "--json").out)
    assert sizes["bytes_accounted"] == sizes["bytes_on_disk"]
    assert not folder.with_name("out.allocate").exists()


def test_an_unquantised_model_can_be_evaluated_but_has_no_activation_bits(stories_model, text, capsys):
    arguments = ["--corpus", text, "--seq-len", 64, "--max-windows", 1]
    assert run(capsys, "eval", stories_model, *arguments).out.startswith("perplexity ")
    line, _ = fails(capsys, "eval", stories_model, *arguments, "--activation-bits", 4)
    assert "need a quantised model" in line


def test_what_computed_a_figure_is_said_with_it(stories_model, text, capsys):
    arguments = ["eval", stories_model, "--corpus", text, "--seq-len", 64, "--max-windows", 1]
    scored = json.loads(run(capsys, *arguments, "--json").out)
    packed = json.loads(run(capsys, *arguments, "--kernels", "on", "--json").out)
    assert scored["path"] == "the quantiser's own arithmetic"
    assert packed["path"] == "XLA reference: there are no kernels for cpu"
    assert packed["perplexity"] == pytest.approx(scored["perplexity"], rel=1e-4)
    assert "there are no kernels for cpu, float32)" in run(capsys, *arguments, "--kernels", "on").out


def test_samples_are_made_side_by_side(stories_model, capsys):
    arguments = ["generate", stories_model, "--prompt", "Once", "--max-new-tokens", 4, "--kv-cache", "int8"]
    made = json.loads(run(capsys, *arguments, "--samples", 3, "--temperature", 1, "--json").out)
    assert len(made["texts"]) == len({tuple(row) for row in made["tokens"]}) == 3
    line, _ = fails(capsys, *arguments, "--samples", 3)
    assert "all would be the same; set --temperature" in line


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (
            ["quantise"],
            "quantize, allocate, eval, generate, chat, serve, inspect, export, report, compare, bench, demo",
            2,
        ),
        (["quantize", "{model}"], "OUT", 2),
        (
            ["quantize", "{model}", "{new}", "--activation-bits", "5"],
            "'5' for argument '--activation-bits'",
            2,
        ),
        (["quantize", "{model}", "{new}", "--recipe", "w2"], "neither a file nor one of: demo", 1),
        (["quantize", "{model}", "{new}", "--calibration", "wiki"], "nor one of: pydoc, wikitext2", 1),
        (
            ["quantize", "{model}", "{new}", "--windows", "0"],
            "--windows: '0' is not a whole number from 1",
            2,
        ),
        (["quantize", "{model}", "{new}", "--seq-len", "513"], "--seq-len 513 exceeds the model's 512", 1),
        (["quantize", "{model}", "{out}"], "is not empty", 1),
        (["quantize", "{out}", "{new}"], "is quantised already", 1),
        (
            ["quantize", "{nothing}", "{new}"],
            "neither a folder, a .gguf file, 'smollm2' nor an id on the hub",
            1,
        ),
        (["quantize", "{model}", "{new}", "--calibration", "{short}"], "fewer than one window", 1),
        (["quantize", "{model}", "{new}", "--calibration", "{test}"], "for evaluation only", 1),
        (["quantize", "{model}", "{new}", "--calibration", "self+pydoc"], "not with other texts", 1),
        (
            ["quantize", "{model}", "{new}", "--refine-tokens", "9"],
            "recipe 'w1.58-g128' has no end-to-end",
            1,
        ),
        (
            ["quantize", "{model}", "{new}", "--refine-minutes", "2"],
            "--refine-minutes 2: recipe 'w1.58-g128' has no end-to-end",
            1,
        ),
        (["eval", "{out}", "--corpus", "self"], "never for evaluation", 1),
        (["allocate", "{out}", "--budget", "4", "--calibration", "self"], "no text of the model itself", 1),
        (["eval", "{out}", "--seq-len", "4096"], "exceeds the model's 512", 1),
        (["eval", "{out}", "--corpus", "{short}", "--seq-len", "64"], "fewer than one window", 1),
        (["quantize", "{model}", "{new}", "--activation-budget", "9"], "between 2 and 8 bits on average", 1),
        (["allocate", "{out}"], "needs --budget or --frontier", 1),
        (["allocate", "{out}", "--frontier", "4", "--plot", "{new}"], "needs --budget", 1),
        (["allocate", "{out}", "--budget", "1.5"], "between 2 and 8 bits on average", 1),
        (["allocate", "{out}", "--frontier", "4,9"], "average between 2 and 8", 1),
        (["allocate", "{out}", "--budget", "4", "--choices", "4,5"], "allocation.choices = (4, 5)", 1),
        (["allocate", "{out}", "--budget", "4", "--choices", "4;8"], "--choices 4;8: must be numbers", 1),
        (["allocate", "{out}", "--budget", "4", "--seq-len", "513"], "513 exceeds the model's 512", 1),
        (["allocate", "{out}", "--budget", "4", "--calibration", "{test}"], "for evaluation only", 1),
        (["allocate", "{model}", "--budget", "4"], "not a quantised model", 1),
        (["inspect", "{model}", "--verify"], "not a quantised model", 1),
        (["generate", "{out}", "--prompt", ""], "prompt", 1),
        (["generate", "{out}", "--prompt", "a", "--samples", "0"], "--samples: '0' is not a whole number", 2),
        (["eval", "{out}", "--seq-len", "64", "--kernels", "on"], "group size 32: kernels take", 1),
        (["bench", "--shape", "gpt-2"], "--shape", 2),
        (["bench", "--shape", "tiny", "--layers", "3"], "layers 3: tiny has 1 to 2", 1),
        (["bench", "--shape", "tiny", "--batch", "1;8"], "--batch 1;8: must be numbers", 1),
    ],
)
def test_mistakes_get_one_line(arguments, message, status, stories_model, out, data, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Once upon a time.")
    places = {
        "model": stories_model,
        "out": out,
        "new": tmp_path / "new",
        "nothing": tmp_path / "nothing",
        "short": tmp_path / "short.txt",
        "test": data / "wikitext2" / "wiki.test.raw",
    }
    small = ["--seq-len", "64"] if arguments[0] == "quantize" and "--seq-len" not in arguments else []
    line, code = fails(capsys, *(argument.format(**places) for argument in arguments), *small)
    assert message in line
    assert code == status
    assert not (tmp_path / "new").exists()


def test_interruption_and_defects_end_without_a_traceback(monkeypatch, capsys):
    for error, status in (
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 1),
        (ZeroDivisionError(), 1),
    ):

        def stop(*_, error=error):
            raise error

        monkeypatch.setattr(main, "_run", stop)
        _, code = fails(capsys, "inspect", "anything")
        assert code == status

"""The scripts for a GPU, on what runs here: the reference passes against itself, and a wrong kernel does not; an
ablation changes one thing a row, and goes on where it was.
"""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from twla_jax.bench import SHAPES, shapes
from twla_jax.ops.ternary_matmul import reference
from twla_jax.recipe import Recipe
from twla_jax.refinement_settings import EndToEndSettings, RefineSettings

from helpers.quick_recipe import QUICK

COARSE = "rotation = false\n[weights]\ngroup_size = 32\nternary.rounds = 0\n"  # leaves much to refine


def script(name):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ablation():
    return script("ablation")


@pytest.mark.slow
def test_check_tells_right_from_wrong(monkeypatch):
    check_gpu, check_gpu_attention = map(script, ("check_gpu", "check_gpu_attention"))
    products = check_gpu.PRODUCTS[3:5]
    check_gpu.check("xla", products)
    check_gpu.check_rotations("xla", check_gpu.ROTATIONS[1:2])
    check_gpu.check_linears("xla", check_gpu.LINEARS[-2:])
    check_gpu.check_linear_pairs("xla", [((16, 64), (32, 64), 64)], repetitions=2)
    check_gpu.check_integers("xla", check_gpu.INTEGERS[:1])
    check_gpu.check_attention("xla", check_gpu_attention.ATTENTION[1:2])
    check_gpu.check_qkv_attention("xla", [((16, 64), 4, 2, 320, 3, 100)], d=64, repetitions=2)
    check_gpu.check_chunk_attention("xla", [(1, 4, 2, 64, 64, 8, 3)])
    from twla_jax.ops.ternary_matmul import tpu

    monkeypatch.setattr(
        tpu, "matmul", lambda *args, **settings: reference.matmul(*args, **settings).at[0, 0].add(1)
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_gpu.check("tpu", products[:1])


def test_tiles_that_are_tried_lie_around_the_rules():
    tune = script("tune")
    for rule in (
        tune.RingTileConfig(rows=96, warpgroups=2, stages=3),
        tune.RingTileConfig(rows=96, warpgroups=2, stages=2, together=2),
    ):
        tried = set(tune.around(rule, columns=8))
        assert rule in tried
        assert {config.warpgroups for config in tried} == {2, 3, 4}
        assert {config.together for config in tried} == {1, rule.together}
        for config in tried:
            assert config.rows in (48, 96)
            assert 1 <= config.stages <= -(-8 // (config.warpgroups * config.together))


@pytest.mark.slow
def test_perplexities_by_path_agree_where_there_are_no_kernels():
    check = script("check_perplexity")
    model = shapes.random_model(SHAPES["tiny"], activation_bits=8)
    tokens = np.random.default_rng(0).integers(0, 256, 64)
    found = check.compare(model, tokens, 8, seq_len=32)
    assert found[check.KERNELS] == found[check.REFERENCE]
    assert found[check.OWN] == pytest.approx(found[check.REFERENCE], rel=0.02)
    assert check.difference({check.KERNELS: 1.01, check.REFERENCE: 1.0}) == pytest.approx(0.01)


def test_every_row_of_the_ablation_is_one_change(ablation):
    base = Recipe(refine=RefineSettings(end_to_end=EndToEndSettings(steps=9)))
    for name, row in ablation.ROWS.items():
        changed = row.recipe(base)
        parts = [
            field.name
            for field in dataclasses.fields(base)
            if getattr(base, field.name) != getattr(changed, field.name)
        ]
        assert len(parts) + row.narrow == (name != "base")


@pytest.mark.slow
def test_the_ablation_runs_and_refinement_shows(ablation, stories_model, texts, tmp_path, capsys):
    (tmp_path / "quick.toml").write_text(
        "rotation = false\n[weights]\ngroup_size = 32\nternary.rounds = 0\n[refine.end_to_end]\nbatch = 2\n"
    )
    text, results = str(texts / "calibration.txt"), tmp_path / "results.jsonl"
    options = ["--recipe", tmp_path / "quick.toml", "--calibration", text, "--refine-text", text]
    options += ["--corpus", texts / "evaluation.txt", "--windows", 4, "--seq-len", 64, "--max-windows", 4]
    options += ["--steps", 40, "--seeds", 0, "--rows", "base", "no refinement", "--dtype", "float32"]
    ablation.main(list(map(str, [stories_model, "--results", results, *options])))
    base, plain = map(json.loads, results.read_text().splitlines())
    assert (base["row"], plain["row"]) == ("base", "no refinement")
    assert base["refine"]["steps"] == 40
    assert plain["refine"] is None
    assert base["A16"] < 0.9 * plain["A16"]
    assert f"| base | {base['A16']:.1f} | {base['A4']:.1f} | 0 |" in capsys.readouterr().out


def test_the_ablation_stops_in_time_and_goes_on(ablation, tmp_path, monkeypatch):
    ran, clock = [], iter(np.arange(0.0, 1000.0, 10.0))

    class Bench:
        def __init__(self, options):
            pass

        def run(self, row, settings):
            rotation = settings.rotation
            ran.append((row, settings.calibration.seed, None if rotation is None else rotation.seed))
            return {"A16": 10.0 + settings.calibration.seed, "A4": 20.0, "refine": None, "seconds": {}}

    monkeypatch.setattr(ablation, "Bench", Bench)
    monkeypatch.setattr(ablation.time, "perf_counter", lambda: next(clock))
    arguments = ["m", "--results", str(tmp_path / "r.jsonl"), "--rows", "base", "no rotation"]
    # A tick of 10 s between one row's beginning and the next one's.
    results = ablation.ablate(ablation.parse([*arguments, "--seconds", "30"]))
    assert [line["row"] for line in results] == ["base", "no rotation", "base"]
    results = ablation.ablate(ablation.parse(arguments))
    base, rotation = ablation.ROWS["base"], ablation.ROWS["no rotation"]
    assert ran == [each for seed in range(3) for each in ((base, seed, seed), (rotation, seed, None))]
    assert "| base | 11.0 ± 1.0 | 20.0 ± 0.0 | 0, 1, 2 |" in ablation.table(results)
    # Other settings are other results.
    assert len(ablation.ablate(ablation.parse([*arguments, "--steps", "7", "--seeds", "0"]))) == 2


@pytest.mark.slow
def test_the_worst_domain_of_every_calibration_is_shown(stories_model, texts, tmp_path, capsys):
    (tmp_path / "quick.toml").write_text(QUICK)
    text, results = texts / "calibration.txt", tmp_path / "results.jsonl"
    options = ["--recipes", tmp_path / "quick.toml", "--calibrations", text, "--tokens", 128, 256]
    options += ["--calibration-seq-len", 64, "--domains", texts, "--seq-len", 64, "--max-windows", 2]
    script("domains").main(list(map(str, [stories_model, "--results", results, *options])))
    less, more = map(json.loads, results.read_text().splitlines())
    assert (less["tokens"], more["tokens"]) == (128, 256)
    printed = capsys.readouterr().out.splitlines()
    assert "| worst | calibration | evaluation |" in printed[2]
    worst = max(row["ratio"] for row in more["domains"])
    assert f"| quick | {text} | 256 | {worst:.2f} |" in printed[-1]


@pytest.mark.slow
def test_every_refinement_starts_from_the_same_model(stories_model, texts, tmp_path, capsys):
    (tmp_path / "quick.toml").write_text(COARSE)
    results = tmp_path / "results.jsonl"
    options = ["--recipe", tmp_path / "quick.toml", "--text", texts / "calibration.txt", "--windows", 4]
    lengths = ("--seq-len", "--refine-seq-len", "--eval-seq-len", "--test-seq-len")
    options += [part for length in lengths for part in (length, 64)] + ["--max-windows", 2, "--batch", 2]
    options += ["--domains", texts, "--corpus", texts / "evaluation.txt", "--test-windows", 2]
    variants = ["nothing:steps=1,code_rate=0,scale_rate=0", "long:tokens=2560,code_rate=1e-2,scale_rate=1e-2"]
    options += ["--dtype", "float32", "--bits", 16, 4, "--results", results, "--variants", *variants]
    script("refine_trials").main(list(map(str, [stories_model, *options])))
    start, nothing, long = map(json.loads, results.read_text().splitlines())
    assert nothing["A16"] == pytest.approx(start["A16"], rel=1e-3)
    assert (nothing["refine"]["steps"], long["refine"]["steps"]) == (1, 20)
    assert long["A16"] < start["A16"]
    assert long["domains"][-1]["ratio"] < start["domains"][-1]["ratio"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith(f"| long | A16 | {long['A16']:.2f} | {long['domains'][-1]['ratio']:.2f} |")
    assert printed[-1].startswith(f"| long | A4 | {long['A4']:.2f} | {long['domains A4'][-1]['ratio']:.2f} |")
    assert long["A4"] != long["A16"]


def test_a_variant_is_a_name_and_what_it_changes():
    variant = script("refine_trials").Variant.parse("hot:code_rate=1e-2,batch=8,text=pydoc,own_text=0.25")
    assert variant.settings == {"code_rate": 0.01, "batch": 8, "own_text": 0.25}
    assert variant.own == {"text": "pydoc"}


@pytest.mark.slow
def test_memory_of_the_streaming_refinement_is_a_row(capsys):
    options = ["tiny", "--layers", "1", "--batch", "1", "--seq-len", "8", "--steps", "1", "--tokens", "480"]
    script("refine_memory").main(options)
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| tiny | bfloat16 | 1 × 8 | 0.0 GB |")  # a CPU counts none
    seconds, minutes = (float(row.split("|")[column].split()[0]) for column in (6, 7))
    assert minutes == pytest.approx(seconds, abs=0.1)  # 60 steps


def test_growth_is_predicted_from_the_figures_that_are_kept(tmp_path, capsys):
    scaling = script("scaling")
    kept = Path(__file__).parents[2] / "benchmarks" / "scaling_h200.json"
    scaling.main(["--json", str(kept), "--fit", "--plot", str(tmp_path / "growth.png")])
    printed = capsys.readouterr().out
    measured = printed.split("measured:")[1].splitlines()[1:]
    for row, line in zip(json.loads(kept.read_text()), measured, strict=False):
        assert row["weights"] == shapes.quantized_weights(SHAPES[row["shape"]])
        name, taken, fitted = re.match(
            r"(\S+) .* measured +([\d.]+) min +fitted +([\d.]+) min", line
        ).groups()
        assert name == row["shape"]
        assert float(taken) == pytest.approx(row["model_seconds"] / 60, abs=0.06)
        assert float(fitted) == pytest.approx(float(taken), rel=0.2)
    table = printed.split("predicted, minutes")[1].splitlines()
    minutes = {line.split()[0]: line.split()[1] for line in table[1:5]}
    assert float(minutes["llama-2-70b"]) > 5 * float(minutes["qwen3-8b"])
    assert "no room" in table[4]
    assert (tmp_path / "growth.png").stat().st_size > 0


@pytest.mark.slow
def test_growth_is_measured_and_added_to_the_figures(tmp_path, capsys):
    (tmp_path / "quick.toml").write_text(QUICK)
    figures = tmp_path / "figures.json"
    options = ["--windows", "2", "--seq-len", "64", "--recipe", tmp_path / "quick.toml", "--dtype", "float32"]
    script("scaling").main(list(map(str, ["tiny", "--json", figures, "--fit", *options])))
    (row,) = json.loads(figures.read_text())
    kept = json.loads((Path(__file__).parents[2] / "benchmarks" / "scaling_h200.json").read_text())
    assert row.keys() == kept[0].keys()
    assert row["model_seconds"] == pytest.approx(2 * (row["rotation_seconds"] + row["block_seconds"]))
    assert "tiny" in capsys.readouterr().out.split("measured:")[1].splitlines()[1]


def test_an_audit_tells_a_vulnerability_from_a_registry_that_does_not_answer():
    verdict = script("audit").verdict
    sound, hurt = ({"name": name, "version": "1.0", "vulns": []} for name in ("a", "b"))
    hurt["vulns"].append({"id": "PYSEC-1", "fix_versions": ["1.1"]})
    unknown = {"name": "c", "skip_reason": "not found there"}
    said, status = verdict(
        1, json.dumps({"dependencies": [sound, hurt, unknown]}), "Found 1 known vulnerability"
    )
    assert (said.splitlines()[0], status) == ("b 1.0: PYSEC-1", 1)
    assert said.endswith("2 packages asked about, 1 known vulnerabilities; not known there: c")
    assert verdict(0, json.dumps({"dependencies": [sound]}), "")[1] == 0
    assert verdict(2, "", "usage: pip-audit\nunknown option\n") == ("pip-audit failed: unknown option", 1)
    for output, errors in (("", "ERROR: cannot connect\n"), (json.dumps({"dependencies": [unknown]}), "")):
        said, status = verdict(1, output, errors)
        assert said.startswith("could not ask a registry")
        assert (len(said.splitlines()), status) == (1, 0)


@pytest.mark.slow
def test_several_devices_are_compared_with_one_and_a_killed_run_with_a_whole_one(monkeypatch, capsys):
    mesh = script("mesh")
    monkeypatch.setattr(mesh.xla_flags, "disable_triton_gemm", lambda: None)
    ended = iter([(4, "digest"), (3, "begins"), (2, "another digest")])  # whole, killed, and run again
    monkeypatch.setattr(mesh, "child", lambda *arguments: next(ended))
    with pytest.raises(SystemExit, match="other bytes"):
        mesh.main(["resume", "decode", "--shape", "tiny", "--decode-shape", "tiny", "--decode-layers", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "=2" in line]
    assert re.search(r"resume +data=2 .* then 2 more: OTHER BYTES", rows[0])
    assert re.search(r"decode +model=2 .* ×   \d+ and \d+ tokens/s, \d+% of the tokens are the same", rows[1])

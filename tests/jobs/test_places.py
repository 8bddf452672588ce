"""A job writes where it was told to, keeps the place from others, and says what an interrupt leaves."""

import errno
import types
from pathlib import Path

import pytest
from jax.errors import JaxRuntimeError

from twla_jax.errors import TwlaError
from twla_jax.jobs import compare_recipes, loading, places, scores
from twla_jax.recipe import Recipe
from twla_jax.reports import plotting
from twla_jax.storage import folders, locks


@places.writes(work=".partial")
def job(model, out, *, overwrite=False, act=lambda out: None):
    act(out)
    return out


def replace(out):
    with folders.beside(out) as temporary:
        (temporary / "twla.json").write_text("{}")


def stopped(error, *acts):
    def run(out):
        for act in acts:
            act(out)
        raise error

    return run


def work(out):
    out.with_name(out.name + ".partial").mkdir(parents=True)


def test_a_job_gets_the_place_that_a_link_leads_to(tmp_path):
    (tmp_path / "link").symlink_to("models/out")
    assert job("m", tmp_path / "link", act=replace) == tmp_path / "models" / "out"
    assert (tmp_path / "link" / "twla.json").exists()


@pytest.mark.parametrize("out", ["", ".", "file", "full", "/proc"])
def test_a_job_that_could_not_be_saved_does_not_begin(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(TwlaError):
            job("m", out, overwrite=overwrite, act=lambda _: pytest.fail("began"))


def test_a_second_job_on_the_same_place_does_not_begin(tmp_path):
    def second(out):
        # The same run may write its own place; another thread or process may not.
        with locks.hold(out):
            pass
        locks._HELD.set(frozenset())
        with pytest.raises(TwlaError, match="another run is writing it"):
            job("m", out)

    job("m", tmp_path / "out", act=second)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("acts", "notes"),
    [
        ([], ["{out} is not written"]),
        ([work], ["{out} is not written", "what is finished is kept in {out}.partial, from where"]),
        ([work, replace], ["{out} is written and whole"]),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, JaxRuntimeError])
def test_an_interrupt_and_a_lack_of_memory_say_what_is_kept(tmp_path, acts, notes, error):
    out = tmp_path / "out"
    with pytest.raises(error) as caught:
        job("m", out, act=stopped(error(), *acts))
    assert len(caught.value.__notes__) == len(notes)
    for note, said in zip(notes, caught.value.__notes__, strict=True):
        assert said.startswith(note.format(out=out))


@pytest.mark.parametrize(
    "name", ["../escape", "/abs", "a/b", "a\0b", "", ".", "..", "-x", "x" * 101, "a\nb", "c:"]
)
def test_a_recipes_name_leads_to_no_other_folder(name):
    with pytest.raises(TwlaError, match="choose a plain name"):
        places.check_name(name)


def test_compare_checks_the_names_of_its_recipes(stories_model, texts, tmp_path):
    recipe = Recipe.from_dict({"name": "../escape"})
    options = {"corpus": str(texts / "evaluation.txt"), "seq_len": 64, "progress": False}
    with pytest.raises(TwlaError, match=r"recipe name '../escape'"):
        compare_recipes.compare_recipes(stories_model, [recipe], tmp_path / "a" / "out", **options)
    assert not list(tmp_path.iterdir())


def test_figures_of_other_runs_are_checked_before_they_are_believed(tmp_path):
    path = tmp_path / "compare.json"
    for content in ("", "[]", '{"scores": []}', '{"scores": {"k": {"perplexity": "1"}}}', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(TwlaError, match="remove it"):
            scores.Measured(path)
    score = {"perplexity": float("inf"), "nll": 800.0, "windows": 1}
    path.unlink()
    scores.Measured(path).add("k", score)
    assert scores.Measured(path).scores["k"]["nll"] == 800.0


@pytest.mark.parametrize("file", ["compare.json", "plot.png", "plot"])
def test_figures_and_plots_of_before_stay_when_the_disk_is_full(tmp_path, monkeypatch, file):
    def write(data):
        def write_some(path, *_, **options):
            Path(path).write_bytes(data)
            if data == b"half":
                raise OSError(errno.ENOSPC, "No space left on device")
            assert options.get("format", "png") == "png"

        if file == "compare.json":
            monkeypatch.setattr(Path, "write_text", write_some)
            measured.add("k", {})
        else:
            plotting._save(types.SimpleNamespace(savefig=write_some), tmp_path / file)

    measured = scores.Measured(tmp_path / "compare.json")
    write(b"whole")
    with pytest.raises(TwlaError, match="No space left on device; nothing was written"):
        write(b"half")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


@pytest.mark.parametrize("name", ["", " ", "a\0b", "x" * 5000, "nothing"])
def test_a_model_that_is_none_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TwlaError, match=r"name|neither"):
        loading.resolve_model(name)

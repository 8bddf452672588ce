"""The notebook runs from top to bottom on a CPU, and the model it saves serves the script."""

import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
def test_notebook_then_script(stories_model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setenv("TWLA_QUICKSTART_MODEL", str(stories_model))
    monkeypatch.setenv("TWLA_QUICKSTART_OUT", str(out))
    monkeypatch.setenv("TWLA_QUICKSTART_SMALL", "1")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "the restored model gives the same logits" in printed
    assert "the model on a mesh gives the same logits" in printed

    main = runpy.run_path(str(EXAMPLES / "use_in_your_jit.py"))["main"]
    main(out)
    *_, tuned = capsys.readouterr().out.splitlines()
    before, after = tuned.removeprefix("soft prompt: loss ").split(" in ")[0].split(" → ")
    assert float(after) < float(before)


def test_your_own_flax_model(capsys):
    main = runpy.run_path(str(EXAMPLES / "your_own_flax_model.py"))["main"]
    main(steps=2)
    *_, floats, ternary, last = capsys.readouterr().out.splitlines()
    bytes_of = [
        int(line.split(", ")[-1].removesuffix(" bytes").replace(",", "")) for line in (floats, ternary)
    ]
    assert bytes_of[1] < bytes_of[0] / 8
    assert last == "restored model gives the same outputs: True"

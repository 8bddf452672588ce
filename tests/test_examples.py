"""The notebooks run from top to bottom on a CPU, the second on the model that the first saves."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_notebook(name: str, folder: Path) -> list[str]:
    """Return the lines that a notebook prints when it is run in a folder."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    printed = (output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(printed).splitlines()


@pytest.mark.slow
def test_quickstart_then_your_jit(stories_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TWLA_QUICKSTART_MODEL", str(stories_model))
    monkeypatch.setenv("TWLA_QUICKSTART_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("TWLA_QUICKSTART_SMALL", "1")
    printed = "\n".join(run_notebook("quickstart.ipynb", tmp_path))
    assert "the restored model gives the same logits" in printed
    assert "the model on a mesh gives the same logits" in printed

    *_, tuned = run_notebook("use_in_your_jit.ipynb", tmp_path)
    before, after = tuned.removeprefix("soft prompt: loss ").split(" in ")[0].split(" → ")
    assert float(after) < float(before)


@pytest.mark.slow
def test_your_own_flax_model(tmp_path, monkeypatch):
    monkeypatch.setenv("TWLA_EXAMPLE_STEPS", "2")
    *_, floats, ternary, last = run_notebook("your_own_flax_model.ipynb", tmp_path)
    bytes_of = [
        int(line.split(", ")[-1].removesuffix(" bytes").replace(",", "")) for line in (floats, ternary)
    ]
    assert bytes_of[1] < bytes_of[0] / 8
    assert last == "restored model gives the same outputs: True"

"""Every notebook runs from top to bottom. They are committed without outputs, which would age unseen."""

import os
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
EXPECTED = {
    "quickstart": ("Paris", "True", "self-check: passed", "llm.paged_attention", "stablehlo.reverse"),
    "tpu_pod": ("--mesh tensor=16", "layout: tensor 16", "not even one fits", "cache of int8"),
}
"""What the last cell prints, and what any of them does."""
TIMEOUT = 300  # seconds a cell


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # those of Jupyter are not ours
def test_notebook(path: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMIR_CACHE", str(smollm2_path.parent))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3").execute(cwd=str(tmp_path))
    text = {i: printed(cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    assert not [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and stderr(cell)]
    last, *expected = EXPECTED[path.stem]
    assert last in text[max(text)]
    said = "\n".join(text.values())
    for words in expected:
        assert words in said, said


def printed(cell: Any, stream: str = "stdout") -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == stream)


def stderr(cell: Any) -> str:
    return printed(cell, "stderr")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and not cell.get("execution_count")

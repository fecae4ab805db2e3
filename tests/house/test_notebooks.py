"""The notebooks are clean, and run one after the other from fresh kernels as their readers run them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import venv
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
# Each uses what the one before left, but for the last.
NAMES = ["train.ipynb", "convert-checkpoint-to-diffusers.ipynb", "infer.ipynb", "lora.ipynb"]
SMALL = {"LIMIT": "12", "STEPS": "2", "SOLVER_STEPS": "2", "BATCH": "4", "PROMPTS": '["red apple"]', "SEEDS": "[0]"}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_clean(path: Path) -> None:
    notebook = read(path.name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        ast.parse(cell.source)
        assert not cell.outputs, f"{path.name} holds outputs; clear them before committing"
        assert cell.execution_count is None
    assert "if root is None" in code[0].source
    assert code[0].source == read(NAMES[0]).cells[2].source, "all notebooks install in the same way"
    programs = re.findall(r'run\(\s*"([^"-][^"]*)"', "\n".join(cell.source for cell in code))
    assert all((ROOT / program).is_file() for program in programs), programs
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", "\n".join(c.source for c in notebook.cells))
    assert all((path.parent / target).exists() for target in targets), targets


@pytest.mark.slow
def test_the_first_cell_installs(tmp_path: Path) -> None:
    """As on a hosted notebook: an empty folder, a Python without packages. pip is replaced by one that says so."""
    venv.create(tmp_path / "python", with_pip=False)
    (tmp_path / "site/pip").mkdir(parents=True)
    (tmp_path / "site/pip/__main__.py").write_text("import sys\nprint('pip', *sys.argv[1:])\n")
    cell = read(NAMES[0]).cells[2].source
    given = cell.replace("REPOSITORY = None", f"REPOSITORY = {ROOT.as_uri()!r}")
    assert given != cell
    (tmp_path / "empty").mkdir()

    def run(code: str) -> subprocess.CompletedProcess[str]:
        python, environment = tmp_path / "python/bin/python", {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = [str(python), "-c", code]
        return subprocess.run(
            done, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=200
        )

    assert "into REPOSITORY" in run(cell).stderr
    done = run(f"{given}\nprint(root, os.getcwd())")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "empty/pixart"
    assert done.stdout.splitlines() == ["pip install --quiet -r requirements.txt", f"{place} {place}"]
    assert (place / "requirements.txt").is_file()


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Fewer steps and pictures, by changing the cell that readers change."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for name, value in SMALL.items():
                cell.source = re.sub(rf"^{name} = [^#\n]+", f"{name} = {value}  ", cell.source, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a busy machine takes many times as long
def test_notebooks_run_in_order(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to others
    monkeypatch.setenv("TQDM_DISABLE", "1")
    (checkout / "notebooks").unlink()
    (checkout / "notebooks").mkdir()  # a symbolic link would lead the kernel out of the checkout
    shown = {}
    for name in NAMES:
        notebook = read(name)
        shrink(notebook)
        NotebookClient(
            notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(checkout / "notebooks")}}
        ).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        shown[name] = [data for output in outputs if (data := output.get("data")) is not None]
    pictures = {name: sum("image/png" in data for data in datas) for name, datas in shown.items()}
    assert pictures == {"train.ipynb": 4, "convert-checkpoint-to-diffusers.ipynb": 1, "infer.ipynb": 1, "lora.ipynb": 1}
    tables = [data["text/markdown"] for data in shown["train.ipynb"] if "text/markdown" in data]
    assert len(tables) == 1 and tables[0].count("\n") == 3  # heads and two steps
    assert (checkout / "output/notebook/diffusers/transformer/config.json").is_file()
    assert (checkout / "output/notebook/lora/comfyui_lora.safetensors").is_file()
    assert (checkout / "output/notebook/comparison.png").stat().st_size > 10_000

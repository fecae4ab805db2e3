"""The house keeps its order: imports between rooms point one way, and nothing dangerous is called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "diffusion"
MAY_IMPORT = {
    "config": set(),
    "models": set(),
    "process": set(),
    "objectives": {"models", "process"},
    "text": set(),
    "images": {"models"},
    "features": {"text", "images", "checkpoints"},
    "data": {"process", "features", "images"},
    "checkpoints": {"models"},
    "adapters": {"models", "text", "checkpoints"},
    "inference": {"models", "process", "text", "images", "checkpoints", "adapters"},
    "evaluation": {"models", "process", "text", "images", "features", "checkpoints", "inference"},
    "training": {
        "config", "models", "process", "objectives", "text", "images", "features", "data", "checkpoints", "adapters",
        "inference", "evaluation",
    },
    "web": {"config", "images", "inference"},
}  # fmt: skip
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = [
    path
    for folder in ("app", "tools", "scripts", "train_scripts", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
]


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_all_rooms_are_known() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    room = parts[0] if len(parts) > 1 else None
    if room is None:
        return
    for name in imported_modules(path):
        pieces = name.split(".")
        if pieces[0] in ("tools", "scripts", "train_scripts", "app", "tests"):
            pytest.fail(f"{path} imports {name}")
        if pieces[0] == "diffusion" and len(pieces) > 1 and pieces[1] in MAY_IMPORT and pieces[1] != room:
            assert pieces[1] in MAY_IMPORT[room], f"{path} imports {name}"


@pytest.mark.parametrize("path", [*SOURCES, *PROGRAMS], ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_dangerous_is_called(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system", "yaml.load"), f"{path}: {name}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("shell") != "True", f"{path}: shell=True"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"{path}: torch.load without weights_only"
    assert "sys.path.insert" not in path.read_text(encoding="utf-8")


def test_no_grab_bags() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "misc", "common", "helpers")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_timm_is_imported_where_it_is_used(path: Path) -> None:
    """It brings over 200 modules, and all but the frozen picture encoders do without."""
    top = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = [alias.name for node in top for alias in node.names] + [getattr(node, "module", "") or "" for node in top]
    assert not [name for name in names if name.split(".")[0] == "timm"]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("diffusion, diffusion.errors", {"torch"}),
        # Every process of a run imports this; what only drawing needs would double its time.
        ("diffusion.training.program", {"diffusers", "transformers", "timm", "torchvision", "peft", "scipy", "gradio"}),
    ],
)
def test_imports_are_light(modules: str, heavy: set[str]) -> None:
    code = f"import sys, {modules}; print(*sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

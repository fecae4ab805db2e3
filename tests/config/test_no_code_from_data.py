"""Nothing in the package or the scripts runs code that comes out of data, configs' strings or checkpoints."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("diffusion", "tools", "train_scripts", "scripts")
FORBIDDEN_NAMES = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {
    ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("yaml", "load"), ("os", "system"),
    ("os", "popen"), ("builtins", "eval"), ("builtins", "exec"),
}  # fmt: skip
FORBIDDEN_KEYWORDS = {("shell", True), ("weights_only", False), ("allow_pickle", True), ("trust_remote_code", True)}


def offences(source: str) -> list[str]:
    """'line: what' for every forbidden call, import or keyword in Python source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(f"{node.lineno}: {node.id}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            found += [f"{node.lineno}: {'.'.join(pair)}"] if pair in FORBIDDEN_ATTRIBUTES else []
        if isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
            found += [f"{node.lineno}: {'.'.join(pair)}" for pair in names if pair in FORBIDDEN_ATTRIBUTES]
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            pair = (node.arg, node.value.value)
            found += [f"{node.value.lineno}: {node.arg}={node.value.value}"] if pair in FORBIDDEN_KEYWORDS else []
    return found


def test_no_code_is_run_from_data() -> None:
    paths = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert len(paths) > 10
    found = [f"{path}:{line}" for path in paths for line in offences(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')", "exec(text)", "import pickle\npickle.load(f)", "from pickle import loads", "yaml.load(f)",
        "os.system('ls')", "subprocess.run('ls', shell=True)", "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)", "f = eval",
    ],
)  # fmt: skip
def test_the_scan_sees(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "yaml.safe_load(f)", "torch.load(p, weights_only=True)", "json.load(f)"]
)
def test_the_scan_lets_pass(source: str) -> None:
    assert offences(source) == []

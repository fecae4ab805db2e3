"""The documentation is true: links, commands, flags, keys and error texts are those of the code."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

import diffusion.errors
from diffusion.config import TrainConfig
from diffusion.config.arguments import ArgumentParser
from diffusion.config.legacy import NEVER_READ
from diffusion.config.problems import all_keys
from diffusion.inference.memory import MEMORY_CHOICES
from diffusion.inference.solvers import DEFAULT_STEPS
from tests.doors import Door

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *PAGES]}
PROGRAM = re.compile(r"\b(?:app|benchmarks|scripts|tools|train_scripts)/\w+\.py")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Lines of shell blocks, and indented lines, that call a program; continued lines are joined."""
    fenced = "\n".join(blocks(text, "bash") + blocks(text, ""))
    indented = "\n".join(re.findall(r"^    (?:python|torchrun) (?:.*\\\n)*.*$", text, flags=re.MULTILINE))
    lines = f"{fenced}\n{indented}".replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(?:python|torchrun|make) ", line)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", TEXTS[path], flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)", text)
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_parse(path: Path) -> None:
    for code in blocks(TEXTS[path], "python"):
        ast.parse(code)


@pytest.fixture
def flags_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """All flags of a program, from the parser that it builds."""
    door = Door(monkeypatch, capsys)

    @cache
    def flags(program: str) -> frozenset[str]:
        made: list[ArgumentParser] = []
        with monkeypatch.context() as patch:
            patch.setattr(ArgumentParser, "print_help", lambda self: made.append(self))
            assert door(program, "--help").returncode == 0
        return frozenset(made[0]._all_flags()) if made else frozenset()

    return flags


def test_commands_name_programs_and_flags_that_exist(flags_of) -> None:  # type: ignore[no-untyped-def]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wrong, seen = [], 0
    for path, text in TEXTS.items():
        for command in commands(text):
            words = shlex.split(command, comments=True)
            if words[0] == "make":
                wrong += [f"{path.name}: {command}"] * (not set(words[1:]) <= targets)
                continue
            program = next((word for word in words if PROGRAM.fullmatch(word)), None)
            if program is None:
                continue
            seen += 1
            if not (ROOT / program).is_file():
                wrong.append(f"{path.name}: {program}")
            elif not program.startswith("benchmarks/"):
                given = [word.split("=")[0] for word in words[words.index(program) :] if word.startswith("--")]
                wrong += [f"{path.name}: {program} {flag}" for flag in given if flag not in flags_of(program)]
    assert seen > 30
    assert wrong == []


def test_programs_named_in_the_text_exist() -> None:
    named = {(path.name, name) for path, text in TEXTS.items() for name in PROGRAM.findall(text)}
    # docs/migration.md names what the original had in its left column
    wrong = [pair for pair in named if not (ROOT / pair[1]).is_file() and pair[0] != "migration.md"]
    assert wrong == []


def test_made_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "tools/write_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = set(re.findall(r"([\w/-]+\.md)$", yaml.safe_dump(yaml.safe_load(text)["nav"]), re.M))
    there = {str(path.relative_to(DOCS)) for path in PAGES}
    assert there - nav == set(), "add these pages to nav in mkdocs.yml"
    assert nav - there == set()


@cache
def messages() -> tuple[str, ...]:
    """Every text of the package, with … for what is filled in."""
    found = []
    for path in (ROOT / "diffusion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
    return tuple(found)


def test_error_texts_are_those_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(.+?)` \|", text, flags=re.M)
    assert len(shown) > 35
    wrong = []
    for message in shown:
        pieces = [piece for piece in re.split("…+", message) if piece.strip()]
        pattern = re.compile(".*?".join(map(re.escape, pieces)), re.DOTALL)
        if not any(pattern.search(template) for template in messages()):
            wrong.append(message)
    assert wrong == []


def test_exit_codes_are_those_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.M)}
    codes = {value for name, value in vars(diffusion.errors).items() if name.startswith("EXIT_")}
    assert listed == codes - {0}


def rows(section: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in re.findall(r"^\| (.+?) \| (.+?) \|$", section, flags=re.M)][1:]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def cases_of(path: Path) -> dict[str, str]:
    """Names of a file's tests, and their decorators as text."""
    functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
    return {node.name: " ".join(map(ast.unparse, node.decorator_list)) for node in functions}


def test_every_row_of_the_inference_table_is_backed() -> None:
    """File kind x program x solver x plan: by tests that run without a card, or by results that are committed."""
    section = TEXTS[DOCS / "inference.md"].split("## What backs this")[1].split("\n## ")[0]
    table = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", section, flags=re.M)[1:]
    assert len(table) > 15
    for *what, backing in table:
        results = [name for name in names(backing) if name.endswith(".json")]
        tests = [name.split("::") for name in names(backing) if "::" in name]
        assert results or tests, what
        assert all((ROOT / name).is_file() for name in results), (what, results)
        for file, name in tests:
            path = ROOT / (file if "/" in file else f"tests/inference/{file}")
            decorators = cases_of(path)[name]
            assert results or "is_available" not in decorators, f"{name} needs a card"
    programs, solvers, plans = (set(names(" ".join(column))) for column in list(zip(*table))[1:4])
    assert {path.name for path in (ROOT / "scripts").glob("infer*.py")} <= programs
    assert set(DEFAULT_STEPS) <= solvers
    assert set(MEMORY_CHOICES) <= plans


def test_migration_names_files_flags_and_keys_that_exist(flags_of) -> None:  # type: ignore[no-untyped-def]
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    files, flags, keys = (
        re.search(rf"^## {title}\n(.*?)(?=^## )", text, re.M | re.S)[1]  # type: ignore[index]
        for title in ("Files", "Flags", "Config keys")
    )
    for left, right in rows(files):
        same = "the same" in right and "path" not in right
        paths = [name for name in names(left if same else right) if "/" in name]
        assert all(list(ROOT.glob(path)) for path in paths), (left, right)
    for title, part in re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", flags, re.M | re.S):
        programs = names(title)
        known = set().union(*(flags_of(program) for program in programs))
        for left, right in rows(part):
            given = [name for name in names(left) + names(right) if name.startswith("--")]
            assert [flag for flag in given if flag not in known] == [], (title, left)
    sigma = re.search(r"^## Programs of PixArt-Sigma\n(.*?)(?=^## )", text, re.M | re.S)[1]  # type: ignore[index]
    for left, right in rows(sigma):
        programs = PROGRAM.findall(right)
        assert all((ROOT / program).is_file() for program in programs), (left, right)
        known = set().union(*(flags_of(program) for program in programs))
        given = {name.split()[0] for name in names(right) if name.startswith("--")}
        assert given <= known, (left, right)
    known_keys = {key[0] for key in all_keys(TrainConfig)}
    for left, _ in rows(keys):
        assert [name for name in names(left) if name not in known_keys] == []
    for name in NEVER_READ:
        assert f"`{name}`" in keys


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reference = (tmp_path / "reference/process.html").read_text(encoding="utf-8")
    assert "spaced_timesteps" in reference and "doc-function" in reference

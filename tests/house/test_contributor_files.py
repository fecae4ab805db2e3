"""Files for those who work on the project: readable, and true to the project they speak of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
YAML = ["CITATION.cff", ".pre-commit-config.yaml", *(str(p.relative_to(ROOT)) for p in ROOT.glob(".github/**/*.yml"))]


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_readable(name: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")), dict)


def test_one_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert f'\nversion = "{version}"\n' in project
    assert f"## {version} (unreleased)" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_contributors_page_names_targets_and_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert named and named <= targets
    paths = re.findall(r"\]\(([^)]+)\)|`([\w./-]+/[\w./-]+)`", text)
    missing = [path for pair in paths if not (ROOT / (path := pair[0] or pair[1])).exists()]
    assert not missing, missing

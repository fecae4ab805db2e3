"""Runs a program of this repository as `python NAME ...` would, in this process: no second import of torch."""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


class Door:
    """Call it with a program's path below the root and its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, program: str, *arguments: object) -> Done:
        self._monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        self._capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        said = self._capsys.readouterr()
        return Done(code, said.out, said.err)

"""Every program: a help that groups, shows defaults and an example; a misspelt flag is answered with the right one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion.config.arguments import ArgumentParser
from tests.doors import Door

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("app", "scripts", "tools", "train_scripts")
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
MANY_OPTIONS = 12  # from here on, a list without titles is hard to read


def with_commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from with_commands(command)


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    monkeypatch.setenv("COLUMNS", "1000")  # no line of the help is broken
    return Door(monkeypatch, capsys)


def help_of(program: str, door: Door, monkeypatch: pytest.MonkeyPatch) -> tuple[ArgumentParser, str]:
    """The parser that a program builds, and what it prints on --help."""
    made: list[ArgumentParser] = []
    with monkeypatch.context() as patch:
        patch.setattr(ArgumentParser, "print_help", lambda self: made.append(self) or print(self.format_help()))
        done = door(program, "--help")
    assert done.returncode == 0, done.stderr
    assert made, f"{program} does not use diffusion.config.arguments.ArgumentParser"
    return made[0], done.stdout


def test_help(program: str, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    made, text = help_of(program, door, monkeypatch)
    examples = [line for line in text.splitlines() if program in line and not line.startswith("usage")]
    assert examples, f"{program} --help shows no command that calls it"
    for parser in with_commands(made):
        text = " ".join(parser.format_help().split())
        options = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        titled = [group for group in parser._action_groups[2:] if group._group_actions]
        assert len(options) < MANY_OPTIONS or len(titled) >= 2, f"{parser.prog}: {len(options)} options, not grouped"
        for action in options:
            if isinstance(action, argparse._SubParsersAction) or action.help is argparse.SUPPRESS:
                continue
            assert action.help, f"{parser.prog}: {action.dest} has no help"
            default = action.default
            said = default is None or default is False or default is argparse.SUPPRESS or default == []
            if not said and action.nargs != 0:
                shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
                numbers = {shown, f"{default:g}" if isinstance(default, float) else shown}
                assert any(number in text for number in numbers), f"{parser.prog}: {action.dest} hides its default"


def test_a_misspelt_flag_is_answered_with_the_right_one(
    program: str, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [flag for flag in help_of(program, door, monkeypatch)[0]._all_flags() if flag.startswith("--")]
    flag = max(flags, key=len)
    done = door(program, flag[:-3] + flag[-2:], "x")  # one letter is missing
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: unknown flag {flag[:-3] + flag[-2:]}; did you mean {flag}?")


def test_values_are_not_taken_for_flags(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(prog="draw")
    parser.add_argument("--prompt", action="append", help="a prompt")
    parser.add_argument("--shift", type=float, help="a number")
    parser.add_argument("rest", nargs="*", help="words")
    arguments = parser.parse_args(
        ["--prompt=--promt", "--prompt", "--ar 9:16 apple", "--shift", "-.5", "--", "--promt"]
    )
    assert arguments.prompt == ["--promt", "--ar 9:16 apple"]
    assert (arguments.shift, arguments.rest) == (-0.5, ["--promt"])
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--Prompt", "x"])
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--prom", "x"])  # flags are not completed
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"error: unknown flag {word}; did you mean --prompt? (see draw --help)" for word in ("--Prompt", "--prom")
    ]


def test_the_flag_of_another_command_is_not_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser(prog="store")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("split").add_argument("--parts", type=int)
    commands.add_parser("merge").add_argument("--prefix")
    assert parser.parse_args(["split", "--parts", "3"]).parts == 3
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["merge", "--parts", "3"])
    assert capsys.readouterr().err.startswith("error: unknown flag --parts")

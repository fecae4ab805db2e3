"""The argument parser of every program: defaults in the help, a hint for a misspelt flag. Needs no torch."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from diffusion.errors import EXIT_USER_ERROR

_NEGATIVE_NUMBER = re.compile(r"-\d|-\.\d")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and example, and ends the help of an option with its default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if nothing or action.default == [] or action.nargs == 0 or "default" in text.lower():
            return text
        if isinstance(action.default, list):
            return f"{text} (default: {' '.join(map(str, action.default))})".lstrip()
        return f"{text} (default: %(default)s)".lstrip()


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are one line, with the nearest flag for a misspelt one.

    Flags are not completed: a shortened flag that works today would change its meaning with the next flag.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **options})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse; a misspelt flag comes before its consequences, such as a required one that is missing."""
        given = list(sys.argv[1:] if args is None else args)
        known = self._all_flags()
        for text in given:
            if text == "--":
                break
            name = text.partition("=")[0]
            is_flag = name[:1] == "-" and len(name) > 1 and " " not in name and not _NEGATIVE_NUMBER.match(name)
            if is_flag and name not in known:
                self.error(_unknown_flag(name, known))
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Print `message` as one line on stderr and exit with the code of a user's error."""
        print(f"error: {' '.join(message.split())} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)

    def _all_flags(self) -> list[str]:
        """Flags of this parser and of its commands, which parse their own."""
        flags = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    flags += command._all_flags()
        return flags


def _unknown_flag(name: str, known: Sequence[str]) -> str:
    """The error line of a flag that there is not. Dashes and case are passed over when the nearest one is sought."""
    plain = {_plain(flag): flag for flag in reversed(known)}
    close = difflib.get_close_matches(_plain(name), list(plain), n=1, cutoff=0.6)
    return f"unknown flag {name}" + (f"; did you mean {plain[close[0]]}?" if close else "")


def _plain(flag: str) -> str:
    return flag.strip("-").replace("_", "-").lower()

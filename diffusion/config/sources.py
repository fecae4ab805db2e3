"""The chain of files behind a config: read `_base_` without running anything, and find who set a key."""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.config.problems import KeyPath, one_line
from diffusion.errors import ConfigError

OVERRIDE_SOURCE = "--cfg-options"
_BASE_KEY = "_base_"


def display(path: Path) -> str:
    """`path` relative to the current folder when it lies below it, else absolute."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@dataclass(frozen=True)
class SourceFile:
    """One config file, parsed; a JSON file has an empty tree."""

    path: Path
    tree: ast.Module
    sha256: str

    def assignments(self, name: str) -> Iterator[ast.expr]:
        """Values assigned to the top-level `name`, the last one first."""
        for statement in reversed(self.tree.body):
            targets: list[ast.expr] = []
            if isinstance(statement, ast.Assign):
                targets = statement.targets
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                targets = [statement.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                assert isinstance(statement, (ast.Assign, ast.AnnAssign))
                assert statement.value is not None
                yield statement.value


def read_chain(path: Path) -> list[SourceFile]:
    """Parse a config and everything it inherits: the file itself first, then its bases, depth first.

    Raises:
        ConfigError: a file is missing or unreadable, has a syntax error, or inherits from itself.
    """
    return _read_chain(path.absolute(), ())


def read_json(path: Path) -> tuple[SourceFile, dict[str, Any]]:
    """Read a resolved config (`TrainConfig.to_json`); nothing in it is executed.

    Raises:
        ConfigError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        content = path.read_bytes()
        values = json.loads(content)
    except FileNotFoundError:
        raise ConfigError(f"{display(path)}: no such config file{_nearby(path)}") from None
    except OSError as error:
        raise ConfigError(f"{display(path)} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{display(path)} is not JSON: {one_line(str(error))}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{display(path)} is not JSON of a config: it must hold one object with the config's keys")
    source = SourceFile(path.absolute(), ast.Module(body=[], type_ignores=[]), hashlib.sha256(content).hexdigest())
    return source, values


def _read_chain(path: Path, children: tuple[Path, ...]) -> list[SourceFile]:
    resolved = path.resolve()
    if resolved in [child.resolve() for child in children]:
        loop = " -> ".join(display(item) for item in (*children, path))
        raise ConfigError(f"{display(children[-1])}: circular {_BASE_KEY}: {loop}; remove one of these links")
    source = _parse(path, children[-1] if children else None)
    chain = [source]
    for base in _bases(source):
        chain += _read_chain(_absolute(path.parent / base), (*children, path))
    return chain


def _absolute(path: Path) -> Path:
    """`path` without '..' parts when it exists, so that messages stay short."""
    return path.resolve() if path.exists() else path


def _parse(path: Path, child: Path | None) -> SourceFile:
    wanted_by = f" (the {_BASE_KEY} of {display(child)})" if child is not None else ""
    if path.suffix != ".py":
        raise ConfigError(f"{display(path)}{wanted_by}: a config is a Python file ending in .py")
    try:
        content = path.read_bytes()
        tree = ast.parse(content, filename=str(path))
    except FileNotFoundError:
        raise ConfigError(f"{display(path)}: no such config file{wanted_by}{_nearby(path)}") from None
    except OSError as error:
        raise ConfigError(f"{display(path)}{wanted_by} cannot be read: {error.strerror}") from None
    except SyntaxError as error:
        line = f" line {error.lineno}" if error.lineno is not None else ""
        text = f" in `{one_line(error.text)}`" if error.text else ""
        raise ConfigError(f"{display(path)}{line}: syntax error: {one_line(error.msg)}{text}") from None
    except ValueError as error:  # NUL bytes
        raise ConfigError(f"{display(path)}{wanted_by} is not Python text: {one_line(str(error))}") from None
    return SourceFile(path, tree, hashlib.sha256(content).hexdigest())


def _nearby(path: Path) -> str:
    """A hint at the file of the same folder, or of a folder above, that the missing `path` may mean."""
    if not path.parent.is_dir():
        return f"; nor does the folder {display(path.parent)}"
    names = sorted(item.name for item in path.parent.glob(f"*{path.suffix}"))
    found = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {display(path.parent / found[0])}?" if found else ""


def _bases(source: SourceFile) -> list[str]:
    value = next(source.assignments(_BASE_KEY), None)
    if value is None:
        return []
    try:
        bases = ast.literal_eval(value)
    except ValueError:
        bases = None
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        where = f"{display(source.path)}:{value.lineno}"
        raise ConfigError(f"{where}: {_BASE_KEY} must be a string or a list of strings, written out in the file")
    return bases


def locate(path: KeyPath, chain: list[SourceFile], overridden: set[KeyPath]) -> str:
    """The place that set a key path: '--cfg-options' or 'file:line'; the config file when no line is found."""
    for other in overridden if path else ():
        shorter = min(len(path), len(other))
        if path[:shorter] == other[:shorter]:
            return OVERRIDE_SOURCE
    best_depth, place = 0, display(chain[0].path)
    for source in chain:
        for value in source.assignments(path[0]) if path else ():
            depth, line = _descend(value, path)
            if depth > best_depth:
                best_depth, place = depth, f"{display(source.path)}:{line}"
    return place


def _descend(value: ast.expr, path: KeyPath) -> tuple[int, int]:
    """How many parts of `path` are found inside an assigned `dict(...)` or `{...}`, and the line of the last."""
    depth, line = 1, value.lineno
    for part in path[1:]:
        child = _child(value, part)
        if child is None:
            break
        value, depth, line = child, depth + 1, child.lineno
    return depth, line


def _child(value: ast.expr, name: str) -> ast.expr | None:
    if isinstance(value, ast.Call):
        return next((keyword.value for keyword in value.keywords if keyword.arg == name), None)
    if isinstance(value, ast.Dict):
        pairs = zip(value.keys, value.values, strict=True)
        return next((item for key, item in pairs if isinstance(key, ast.Constant) and key.value == name), None)
    if isinstance(value, (ast.List, ast.Tuple)) and name.isdigit() and int(name) < len(value.elts):
        return value.elts[int(name)]
    return None

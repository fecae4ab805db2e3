"""Load a Python config file: inheritance, overrides, validation, errors on one line.

A .py config runs with your rights, as any Python file does; what a checkpoint carries is JSON and is never executed.
"""

from __future__ import annotations

import builtins
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffusion.config.legacy import overridden_after_move, resume_as_section, take_legacy_keys
from diffusion.config.overrides import apply_override
from diffusion.config.problems import check_choice, explain, one_line
from diffusion.config.schema import TrainConfig
from diffusion.config.sources import SourceFile, display, locate, read_chain, read_json
from diffusion.errors import ConfigError


def print_notice(line: str) -> None:
    """Print one line on stderr, on the first process of a run only."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    choices: Mapping[str, Callable[[], Sequence[str]]] | None = None,
    flags: Mapping[str, str] | None = None,
    notify: Callable[[str], None] = print_notice,
) -> TrainConfig:
    """Read, override and validate a training config.

    Args:
        path: a .py file in mmcv's config syntax (`_base_` paths are relative to the file, `_delete_=True` replaces
            an inherited dict), which is executed; or the config.json of a run folder, which is only read.
        overrides: 'a.b=value' strings; a later one wins.
        choices: allowed values of top-level string keys that only the caller knows, e.g. {"model": model_names}; called
            when all else is right, since finding them out may import torch.
        flags: dotted key -> the program's flag, such as "--rank", by which the user gave it; errors name it.
        notify: receives one line with the files and their sha256, and one per group of ignored keys.
    Raises:
        ConfigError: one line naming key, value, the file (or --cfg-options) that set it and the nearest valid name.
    """
    path = Path(path).expanduser()
    if path.suffix == ".json":
        source, raw = read_json(path)
        chain = [source]
    else:
        chain = read_chain(path)
        raw = _execute(chain)
    notify(f"config {', base '.join(f'{display(source.path)} sha256 {source.sha256}' for source in chain)}")
    resume_as_section(raw)
    overridden = set()
    for override in overrides:
        overridden.add(apply_override(raw, override))
        resume_as_section(raw)
    overridden = overridden_after_move(overridden)
    for notice in take_legacy_keys(raw):
        notify(f"config {display(chain[0].path)}: {notice}")
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:
        named = flags or {}
        raise explain(
            error, TrainConfig, lambda key: named.get(".".join(map(str, key))) or locate(key, chain, overridden)
        ) from None
    for key, allowed in (choices or {}).items():
        check_choice(key, getattr(config, key), allowed(), locate((key,), chain, overridden))
    return config


def config_from_json(text: str | bytes, source: str) -> TrainConfig:
    """Read what `TrainConfig.to_json` wrote; nothing in the text is executed.

    Raises:
        ConfigError: the text is no valid config; `source` names it.
    """
    try:
        return TrainConfig.from_json(text)
    except ValidationError as error:
        raise explain(error, TrainConfig, lambda key: source) from None


def _execute(chain: list[SourceFile]) -> dict[str, Any]:
    """Run the file and its bases through mmengine and return their merged names as plain dicts and lists."""
    from mmengine.config import Config  # 0.5 s to import: only when a config is read

    filename = str(chain[0].path)
    try:
        loaded = Config.fromfile(filename, import_custom_modules=False, lazy_import=False).to_dict()
    except Exception as error:  # a config may raise anything
        raise ConfigError(_blame(error, chain)) from error
    return {key: value for key, value in _plain(loaded).items() if not _is_helper(key, value)}


def _blame(error: Exception, chain: list[SourceFile]) -> str:
    """'file:line: the config raised ...', from the innermost frame that lies in one of the files."""
    files = {os.path.abspath(source.path): source for source in chain}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if os.path.abspath(frame.filename) in files]
    text = one_line(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))
    if not frames:
        return f"{display(chain[0].path)}: cannot be merged with its _base_: {text}"
    place = f"{display(files[os.path.abspath(frames[-1].filename)].path)}:{frames[-1].lineno}"
    return f"{place}: the config raised {type(error).__name__}: {text}"


def _plain(value: Any) -> Any:
    """Copy of nested mmengine dicts as plain dicts, without mmengine's own `_scope_` marks."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key != "_scope_"}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _is_helper(name: str, value: Any) -> bool:
    """Names that a config may bind for its own use: `_private` ones, and imported or defined callables."""
    callable_helper = callable(value) and name not in TrainConfig.model_fields
    return name.startswith("_") or callable_helper or isinstance(value, type(builtins))

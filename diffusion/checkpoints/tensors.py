"""Tensors in files, by name: safetensors (whole or in shards) and torch files. No pickled code ever runs."""

from __future__ import annotations

import contextlib
import inspect
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusion.errors import CheckpointError, first_line


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file whose tensors are read when they are asked for, each into memory of its own.

    Joining parts into one weight then holds one copy of the weights, not two, and a file that is replaced later cannot
    change a model. Raises CheckpointError when the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # safetensors before 0.8 always maps the file, whose pages count twice until the load is done.
        in_place = {"backend": "pread"} if "backend" in inspect.signature(load_file).parameters else {}
        with self._explained():
            self._file = safe_open(path, framework="pt", **in_place)
            self._keys = list(self._file.keys())
            self._known = frozenset(self._keys)
            self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, key: str) -> Tensor:
        with self._explained():
            tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._known  # the default of Mapping would read the tensor

    def __len__(self) -> int:
        return len(self._keys)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path} cannot be read ({error}); copy or download it again") from error


class ShardedTensors(Mapping[str, Tensor]):
    """The files that an index `*.index.json` names, as one mapping; tensors are read when they are asked for.

    Raises:
        CheckpointError: the index or a shard is missing or damaged, or a shard lacks a tensor that the index promises.
    """

    def __init__(self, index: Path) -> None:
        places = _weight_map(index)
        shards = {name: read_tensors(index.parent / name) for name in sorted(set(places.values()))}
        lacking = [f"{key} ({name})" for key, name in places.items() if key not in shards[name]]
        if lacking:
            raise CheckpointError(f"{index}: shards lack {', '.join(lacking)}; copy or download them again")
        self._places = {key: shards[name] for key, name in places.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._places[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)


class Renamed(Mapping[str, Tensor]):
    """Another mapping under other names, without reading it: `names` maps new names to old ones."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __len__(self) -> int:
        return len(self._names)


def read_tensors(path: Path, *, ema: bool = False) -> Mapping[str, Tensor]:
    """The tensors of one file, whatever its kind: safetensors, torch (`.pth`, `.pt`, `.bin`), or an index of shards.

    Raises:
        CheckpointError: missing, damaged, of another kind, or without averaged weights when `ema` asks for them.
    """
    if path.name.endswith(".json"):
        return ShardedTensors(path)
    if path.suffix == ".safetensors":
        if ema:
            raise CheckpointError(f"{path} holds one set of weights; leave ema out")
        return TensorFile(path)
    return read_native(path, ema=ema)


def read_native(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Weights of an original `.pth` file: a bare state dict, or `state_dict` / `state_dict_ema` inside a dict.

    Raises:
        CheckpointError: the file is missing, damaged, holds pickled code, or has no weights.
    """
    content = read_torch(Path(path))
    key = "state_dict_ema" if ema else "state_dict"
    if isinstance(content, Mapping) and ("state_dict" in content or key in content):
        if key not in content:
            raise CheckpointError(f"{path} has no {key}; it holds {', '.join(map(str, content))}")
        content = content[key]
    elif ema:
        raise CheckpointError(f"{path} has no {key}: it is a bare state dict; leave ema out")
    elif isinstance(content, Mapping) and "state_dict_ema" in content:
        raise CheckpointError(f"{path} holds averaged weights alone (state_dict_ema); open it with ema (--ema)")
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors")
    # The file is mapped: copies keep a model apart from a file that is replaced later, and free what else it holds.
    return {key: tensor.detach().clone() for key, tensor in content.items()}


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain values only.

    Raises:
        CheckpointError: the file is missing or damaged, or would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error below says enough
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(_why_not_loaded(path, error)) from error


def _why_not_loaded(path: Path, error: Exception) -> str:
    """The class or function that a pickle would have called, or that the file is damaged; and the remedy."""
    text = str(error)
    if called := re.search(r"GLOBAL (\S+)", text):
        reason = f"its pickle calls {called[1]}, and no code of a file is run"
    elif "weights_only" in text:  # torch goes on to advise loading it all the same
        reason = "no tensor file, or its pickle holds more than tensors and plain values"
    else:
        return f"{path} is cut or damaged ({first_line(error)[:80]}); copy or download it again"
    return f"{path} is refused: {reason}; take the file from its publisher, as .safetensors where there is one"


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(places.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}); copy or download it again") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(map(str, outside))}")
    return places

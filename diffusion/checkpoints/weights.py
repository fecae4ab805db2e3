"""Read and write networks: diffusers folders and native `.pth` files. No pickled code ever runs."""

from __future__ import annotations

import contextlib
import inspect
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.checkpoints.keys import (
    NATIVE_ONLY,
    config_from_diffusers,
    config_to_diffusers,
    diffusers_to_native,
    native_to_diffusers,
)
from diffusion.errors import CheckpointError, StorageError
from diffusion.models import PixArt, PixArtConfig

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
NULL_CAPTION_NAME = "null_caption.safetensors"


def find_transformer_folder(path: str | Path, *, ema: bool = False) -> Path:
    """The folder with a transformer's config.json inside a pipeline folder, a `checkpoint-N`, or the folder itself.

    Args:
        ema: prefer the averaged weights, where the folder has them.
    Raises:
        CheckpointError: nothing there.
    """
    path = Path(path)
    for candidate in ([path / "transformer_ema"] if ema else []) + [path / "transformer", path]:
        if (candidate / "config.json").is_file() and (candidate / WEIGHTS_NAME).is_file():
            return candidate
    raise CheckpointError(
        f"{path} holds no transformer: expected transformer/config.json and transformer/{WEIGHTS_NAME} "
        "(a diffusers pipeline folder, or a checkpoint-N of a run)"
    )


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

    def __getitem__(self, key: str) -> Tensor:
        with self._explained():
            tensor: Tensor = self._file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path} cannot be read ({error}); copy or download it again") from error


def read_native(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """Weights of an original `.pth` file: a bare state dict, or `state_dict` / `state_dict_ema` inside a dict.

    Raises:
        CheckpointError: the file is missing, damaged, holds pickled code, or has no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is refused: not a plain weight file ({reason})") from error
    key = "state_dict_ema" if ema else "state_dict"
    if isinstance(content, Mapping) and "state_dict" in content:
        if key not in content:
            raise CheckpointError(f"{path} has no {key}; it holds {', '.join(map(str, content))}")
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors")
    return dict(content)


def load_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path, *, assign: bool = False
) -> None:
    """Strict load into a PixArt; `pos_embed` is computed from the config, and the null caption may be absent.

    Raises:
        CheckpointError: the weights do not fit, see `require_fit`.
    """
    given = {key: tensor for key, tensor in state_dict.items() if key != "pos_embed"}
    require_fit(model, given, source)
    model.load_state_dict(given, strict=False, assign=assign)


def require_fit(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Compare names and shapes with those of a PixArt, which may lie on the meta device.

    Raises:
        CheckpointError: every missing, unexpected and differently shaped weight, in one line.
    """
    expected = {key: tensor for key, tensor in model.state_dict().items() if key != "pos_embed"}
    given = {key: tensor for key, tensor in state_dict.items() if key != "pos_embed"}
    missing = [key for key in expected if key not in given and key not in NATIVE_ONLY]
    unexpected = [key for key in given if key not in expected]
    shapes = [
        f"{key} (file {tuple(given[key].shape)}, model {tuple(expected[key].shape)})"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    problems = [
        f"{title}: {', '.join(keys)}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model; {'; '.join(problems)}")


def read_transformer(path: str | Path, *, ema: bool = False) -> tuple[PixArtConfig, dict[str, Tensor]]:
    """Config and native weights of a diffusers transformer folder (see `find_transformer_folder`)."""
    folder = find_transformer_folder(path, ema=ema)
    try:
        config = config_from_diffusers(json.loads((folder / "config.json").read_text()))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not JSON: {error}") from error
    state_dict = diffusers_to_native(TensorFile(folder / WEIGHTS_NAME))
    null_caption = folder / NULL_CAPTION_NAME
    if null_caption.is_file():
        state_dict |= TensorFile(null_caption)
        config = replace(config, model_max_length=state_dict["y_embedder.y_embedding"].shape[0])
    return config, state_dict


def load_transformer(
    path: str | Path,
    *,
    ema: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> PixArt:
    """A network in eval mode from a diffusers folder; the weights exist once in memory.

    Args:
        path: transformer folder, pipeline folder or `checkpoint-N`.
        dtype: None = as stored.
    Raises:
        CheckpointError: missing or damaged files, or weights that do not fit their config.
    """
    config, state_dict = read_transformer(path, ema=ema)
    with torch.device("meta"):
        model = PixArt(**vars(config))
    load_weights(model, state_dict, path, assign=True)
    materialize_buffers(model)
    return model.to(device=device, dtype=dtype).eval()


def materialize_buffers(model: PixArt) -> None:
    """Give the buffers that a weight file may lack their values, after a load on the meta device."""
    if model.pos_embed.is_meta:
        model.pos_embed = model.position_embedding()
    if model.y_embedder.y_embedding.is_meta:
        model.y_embedder.y_embedding = torch.zeros(model.y_embedder.y_embedding.shape)


def save_transformer(
    model: PixArt, folder: str | Path, *, dtype: torch.dtype | None = None, stored_null_caption: bool = False
) -> None:
    """Write the layout that stock diffusers opens: config.json and one safetensors file.

    Args:
        dtype: of the file; None = as in memory.
        stored_null_caption: also keep the model's null embedding, in a file of its own (diffusers has no key for it).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state_dict = {key: tensor.detach().to("cpu", dtype) for key, tensor in model.state_dict().items()}
    config = config_to_diffusers(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {key: tensor.contiguous() for key, tensor in native_to_diffusers(state_dict).items()}
    save_tensors(tensors, folder / WEIGHTS_NAME)
    if stored_null_caption:
        key = "y_embedder.y_embedding"
        save_tensors({key: state_dict[key].contiguous()}, folder / NULL_CAPTION_NAME)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file, as diffusers marks them.

    Raises:
        StorageError: it could not be written.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"{path} could not be written ({error}); free some disk space") from error

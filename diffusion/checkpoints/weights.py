"""Weights into networks, strictly, and networks into diffusers folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.checkpoints.dit import dit_fields
from diffusion.checkpoints.files import ALIGNMENT_HEAD_NAME, NULL_CAPTION_NAME, WEIGHTS_NAME
from diffusion.checkpoints.keys import NATIVE_ONLY, TRAINING_ONLY, config_to_diffusers, native_to_diffusers
from diffusion.errors import CheckpointError, StorageError
from diffusion.models import DiTConfig, LatentTransformer, PixArt, PixArtConfig

CONFIG_IN_METADATA = "pixart.config"  # key of a safetensors header: fields of PixArtConfig as JSON
PREDICTION_IN_METADATA = "modelspec.prediction_type"  # likewise (Stability-AI/ModelSpec 1.0.1), with these names
SPEC_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "flow": "flow"}


def load_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path, *, assign: bool = False
) -> None:
    """Strict load into a PixArt or a DiT; `pos_embed` is computed from the config, and the null caption may be absent.

    Raises:
        CheckpointError: the weights do not fit, see `require_fit`.
    """
    given = _read_by(model, state_dict)
    require_fit(model, given, source)
    model.load_state_dict(given, strict=False, assign=assign)


def require_fit(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Compare names and shapes with those of a network, which may lie on the meta device.

    Raises:
        CheckpointError: every missing, unexpected and differently shaped weight, in one line.
    """
    expected = {key: tensor for key, tensor in model.state_dict().items() if key != "pos_embed"}
    given = _read_by(model, state_dict)
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


def _read_by(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file that are meant for a network: none of training's own that it has no place for."""
    trains = any(key.startswith(TRAINING_ONLY) for key in model.state_dict())
    return {
        key: tensor
        for key, tensor in state_dict.items()
        if key != "pos_embed" and (trains or not key.startswith(TRAINING_ONLY))
    }


def require_marked(path: Path, config: PixArtConfig) -> None:
    """Refuse a file that cannot say what its network predicts: readers of a `.pth` take it for noise.

    Raises:
        CheckpointError: such a file, of a network that predicts something else.
    """
    if path.suffix == ".pth" and config.prediction_type != "epsilon":
        raise CheckpointError(
            f"{path}: a .pth cannot say that its network predicts {config.prediction_type}; write .safetensors"
        )


def materialize_buffers(model: LatentTransformer) -> None:
    """Give the buffers that a weight file may lack their values, after a load on the meta device."""
    if model.pos_embed.is_meta:
        model.pos_embed = model.position_embedding()
    if isinstance(model, PixArt) and model.y_embedder.y_embedding.is_meta:
        model.y_embedder.y_embedding = torch.zeros(model.y_embedder.y_embedding.shape)


def save_transformer(
    model: LatentTransformer, folder: str | Path, *, dtype: torch.dtype | None = None, stored_null_caption: bool = False
) -> None:
    """Write the layout that stock diffusers opens: config.json and one safetensors file; see `write_transformer`.

    Args:
        dtype: of the file; None = as in memory.
        stored_null_caption: also keep the model's null embedding, in a file of its own (diffusers has no key for it).
    """
    state_dict = {key: tensor.detach().to("cpu", dtype) for key, tensor in model.state_dict().items()}
    kept = ("y_embedder.y_embedding",) if stored_null_caption else ()
    write_transformer(state_dict, model.config, folder, native_only=kept)


def write_transformer(
    state_dict: Mapping[str, Tensor],
    config: PixArtConfig | DiTConfig,
    folder: str | Path,
    *,
    native_only: Iterable[str] = (),
) -> None:
    """Write native weights as the folder that stock diffusers opens; training's own weights get a file beside it.

    A DiT keeps the names of its public files: diffusers' layout would repeat its embedders in every block.

    Args:
        native_only: of `NATIVE_ONLY`, the tensors to keep in a file of their own.
    Raises:
        CheckpointError: diffusers has no place for a weight or option. StorageError: the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(config, DiTConfig):
        (folder / "config.json").write_text(json.dumps(dit_fields(config), indent=2) + "\n")
        save_tensors({key: tensor.contiguous() for key, tensor in state_dict.items()}, folder / WEIGHTS_NAME)
        return
    fields = config_to_diffusers(config)
    tensors = {key: tensor.contiguous() for key, tensor in native_to_diffusers(state_dict).items()}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_tensors(tensors, folder / WEIGHTS_NAME, {CONFIG_IN_METADATA: json.dumps(asdict(config))})
    if kept := {key: state_dict[key].contiguous() for key in native_only}:
        save_tensors(kept, folder / NULL_CAPTION_NAME)
    if head := {key: tensor.contiguous() for key, tensor in state_dict.items() if key.startswith(TRAINING_ONLY)}:
        save_tensors(head, folder / ALIGNMENT_HEAD_NAME)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, as diffusers marks them.

    Args:
        metadata: further entries of the file's header.
    Raises:
        StorageError: it could not be written.
    """
    try:
        # safetensors makes files that their owner alone may read; others keep the mode of any new file.
        path.touch()
        mode = path.stat().st_mode
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
        path.chmod(mode)
    except SafetensorError as error:
        raise StorageError(f"{path} could not be written ({error}); free some disk space") from error

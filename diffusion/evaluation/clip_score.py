"""CLIP score: whether a picture shows what its prompt says, in the eyes of a CLIP model. Legend: N pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from diffusion.checkpoints.download import file_sha256
from diffusion.errors import CheckpointError, DataError, first_line
from diffusion.evaluation.fidelity import picture_batches, shared_entries
from diffusion.inference.recipe import library_versions, read_recipe

# In the order in which transformers takes them; an index names the parts of a divided file.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def clip_scores(
    pictures: Sequence[str | Path | Image.Image],
    prompts: Sequence[str],
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
) -> Tensor:
    """100 * max(cos(picture, prompt), 0) of each pair: (N,) float32 on the CPU, in 0..100; usual values are 20 to 35.

    CLIPScore (arXiv:2104.08718) with weight 1 in place of 2.5, in percent, on the prompt as it is, without "A photo
    depicts" before it: what papers on text-to-image models report. Prompts beyond the model's 77 tokens are cut.

    Args:
        pictures: files, or RGB pictures.
        folder: of a CLIP model in the layout of transformers, or its id on the Hugging Face hub if that is cached.
    Raises:
        CheckpointError: no such model, or weights are missing. DataError: names the picture that cannot be read.
    """
    return _scores(*load_clip(folder, device), pictures, prompts, batch_size)


def clip_report(
    pictures: Sequence[Path], folder: str | Path, *, device: str | torch.device = "cpu", batch_size: int = 32
) -> dict[str, Any]:
    """Mean CLIP score of PNG files and the prompts they carry, and all it depends on, ready for JSON.

    `standard_error` is that of the mean, null for one picture.

    Raises:
        CheckpointError: no such model. DataError: a picture that cannot be read, or carries no prompt; or none at all.
    """
    if not pictures:
        raise DataError("no pictures to score; give at least one")
    recipes = [read_recipe(picture) for picture in pictures]
    prompts = [_prompt_in(recipe, picture) for recipe, picture in zip(recipes, pictures)]
    model, processor = load_clip(folder, device)
    scores = _scores(model, processor, pictures, prompts, batch_size).double()
    found = clip_folder(folder)
    return {
        "clip_score": float(scores.mean()),
        "standard_error": float(scores.std()) / math.sqrt(len(scores)) if len(scores) > 1 else None,
        "convention": "100 * max(cos, 0), mean over pictures",
        "num_pictures": len(scores),
        "num_prompts_cut": _num_cut(model, processor, prompts),
        "model": str(folder),
        "weights_sha256": {path.name: file_sha256(path) for path in _weight_files(found)},
        "sampling": shared_entries(recipes),
        "device": str(device),
        "versions": library_versions(),
    }


def clip_folder(folder: str | Path) -> Path:
    """The local folder of a CLIP model: `folder` itself, or where the hub's cache keeps the model of that id.

    Raises:
        CheckpointError: neither; says which folder to fill, and how.
    """
    from transformers.utils import cached_file

    try:
        config = cached_file(str(folder), "config.json", local_files_only=True)
    except (OSError, ValueError) as error:
        name = "openai/clip-vit-large-patch14"
        raise CheckpointError(
            f"{folder}: neither a folder with a CLIP model's config.json nor a cached id; "
            f"fill a folder with `hf download {name} --local-dir output/pretrained_models/{name.split('/')[1]}`"
        ) from error
    return Path(str(config)).parent


def load_clip(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """transformers' CLIPModel (float32, eval mode, frozen) and CLIPProcessor, from local files alone.

    Raises:
        CheckpointError: a part is missing or unreadable.
    """
    from transformers import CLIPModel, CLIPProcessor

    found = clip_folder(folder)
    try:
        # Pillow's resize is the one that CLIP was made with.
        processor = CLIPProcessor.from_pretrained(str(found), local_files_only=True, backend="pil")
        loaded: Any = CLIPModel.from_pretrained(
            str(found), local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        model, loading = loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{found}: the CLIP model cannot be loaded ({first_line(error)})") from error
    if loading["missing_keys"]:
        # transformers would go on with random weights in their place.
        missing = sorted(loading["missing_keys"])
        raise CheckpointError(f"{found}: {len(missing)} weights are missing, the first {missing[0]!r}")
    return model.to(device).eval().requires_grad_(False), processor


def _scores(
    model: Any, processor: Any, pictures: Sequence[str | Path | Image.Image], prompts: Sequence[str], batch_size: int
) -> Tensor:
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts: equal numbers are needed")
    scores: list[Tensor] = [torch.empty(0)]
    start = 0
    # TF32 keeps 10 bits after the point: figures of a CPU and a GPU would differ.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for images in picture_batches(pictures, batch_size, lambda image: image):
            texts = list(prompts[start : start + len(images)])
            start += len(images)
            inputs = processor(
                text=texts,
                images=images,
                padding=True,
                truncation=True,
                max_length=_max_tokens(model),
                return_tensors="pt",
            )
            output = model(**inputs.to(model.device))
            cosines = (output.image_embeds * output.text_embeds).sum(-1)  # both are of length 1
            scores.append(100 * cosines.clamp(min=0).cpu())
    return torch.cat(scores)


def _prompt_in(recipe: Mapping[str, Any], picture: Path) -> str:
    prompt = recipe.get("prompt")
    if not isinstance(prompt, str):
        raise DataError(f"{picture}: its recipe holds no prompt, so it cannot be scored; move it elsewhere")
    return prompt


def _max_tokens(model: Any) -> int:
    return model.config.text_config.max_position_embeddings


def _num_cut(model: Any, processor: Any, prompts: Sequence[str]) -> int:
    """How many prompts have more tokens than the model reads."""
    token_ids = processor.tokenizer(list(prompts), verbose=False)["input_ids"]
    return sum(len(row) > _max_tokens(model) for row in token_ids)


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from."""
    name = next((name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        return []
    if not name.endswith(".json"):
        return [folder / name]
    parts = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / part for part in sorted(set(parts))]

"""Sentence embeddings of a real language model, computed once and carried as a small file.

The teacher reads every text of the corpus on the machine where its weights are; the student trains elsewhere from the
file alone. Embeddings are rotated onto their leading principal axes and stored in 8 bits: dot products, which are all
that distillation uses, survive (the retained share is reported and kept in the file).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion.errors import CheckpointError, DataError, first_line
from diffusion.text.tokenizer import tokenize

_TENSORS = ("text_bytes", "embeddings", "embedding_scale", "pairs", "held_out")


@dataclass(frozen=True)
class TeacherTexts:
    """A corpus with the teacher's opinion of it.

    Attributes:
        texts: N distinct texts.
        embeddings: (N, K) float32 of unit length.
        pairs: (P, 2) int64, two texts of one meaning (label, keywords).
        held_out: (H,) int64 texts for evaluation only.
    """

    texts: list[str]
    embeddings: Tensor
    pairs: Tensor
    held_out: Tensor

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.embeddings):
            raise ValueError(f"{len(self.texts)} texts but {len(self.embeddings)} embeddings; they must be parallel")


def embed_texts(
    folder: str | Path,
    texts: Sequence[str],
    *,
    device: str = "cpu",
    batch_size: int | None = None,
    max_length: int = 64,
) -> Tensor:
    """Mean-pooled, normalised sentence embeddings of a BERT-like encoder (all-MiniLM-L6-v2): (N, C) float32.

    Texts are sorted by length, so that little padding is computed; a GPU takes more at a time. Raises CheckpointError
    when `folder` is no model.
    """
    from tqdm import tqdm
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no sentence encoder ({first_line(error)}); pass the folder of MiniLM"
        ) from error
    model = model.to(device).eval()
    batch_size = batch_size or (128 if device == "cpu" else 1024)
    ids, lengths = tokenize(tokenizer, texts, max_length)
    embeddings = torch.empty(len(texts), model.config.hidden_size)
    with torch.inference_mode(), tqdm(total=len(texts), unit="text", desc="teacher", mininterval=2) as progress:
        for chosen in lengths.argsort(stable=True).split(batch_size):
            longest = int(lengths[chosen].max())
            mask = torch.arange(longest) < lengths[chosen, None]  # (B, L)
            batch = {"input_ids": ids[chosen, :longest].long(), "attention_mask": mask.long()}
            states = model(**{name: tensor.to(device) for name, tensor in batch.items()}).last_hidden_state  # (B, L, C)
            pooled = masked_mean(states, mask.to(device))
            embeddings[chosen] = torch.nn.functional.normalize(pooled, dim=1).cpu()
            progress.update(len(chosen))
    return embeddings


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, C) states and (B, L) bool True = keep -> (B, C) float32 mean over the kept tokens."""
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def principal_components(embeddings: Tensor, components: int) -> tuple[Tensor, float]:
    """Rotate (N, C) onto the `components` leading axes of its second moment.

    Not centred, so that dot products are kept. Returns (N, K) of unit length and the share of the squared length kept.
    """
    keep = min(components, embeddings.shape[1])
    moment = embeddings.double().T @ embeddings.double()
    values, vectors = torch.linalg.eigh(moment)
    axes = vectors[:, -keep:].flip(1)
    kept = values[-keep:].sum() / values.sum()
    return torch.nn.functional.normalize(embeddings @ axes.float(), dim=1), float(kept)


def save_teacher_texts(data: TeacherTexts, path: Path, *, metadata: dict[str, str]) -> None:
    """Write one safetensors file: texts as UTF-8 lines, embeddings in 8 bits with one scale a dimension."""
    from safetensors.torch import save_file

    scale = data.embeddings.abs().amax(0).clamp(min=1e-8) / 127  # (K,)
    encoded = "\n".join(data.texts).encode("utf-8")
    tensors = {
        "text_bytes": torch.frombuffer(bytearray(encoded), dtype=torch.uint8),
        "embeddings": (data.embeddings / scale).round().to(torch.int8).contiguous(),
        "embedding_scale": scale.float().contiguous(),
        "pairs": data.pairs.to(torch.int64).contiguous(),
        "held_out": data.held_out.to(torch.int64).contiguous(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    save_file(tensors, str(aside), metadata=metadata)
    aside.replace(path)


def load_teacher_texts(path: Path) -> TeacherTexts:
    """Read what `save_teacher_texts` wrote; embeddings come back as float32 of unit length. Raises DataError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no teacher file ({error}); write it with tools/build_text_corpus.py") from error
    missing = [name for name in _TENSORS if name not in tensors]
    if missing:
        raise DataError(f"{path} is no teacher file: {missing} missing; write it with tools/build_text_corpus.py")
    embeddings = tensors["embeddings"].float() * tensors["embedding_scale"]
    texts = bytes(tensors["text_bytes"].numpy()).decode("utf-8").split("\n")
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    return TeacherTexts(texts, unit, tensors["pairs"], tensors["held_out"])


def read_texts(path: Path) -> list[str]:
    """Texts of a teacher file, or the lines of a `.txt` file. Raises DataError when the file cannot be read."""
    if path.suffix != ".txt":
        return load_teacher_texts(path).texts
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); pass a UTF-8 file with one text a line") from error


def write_teacher_file(
    corpus_texts: list[str],
    pairs: Sequence[tuple[int, int]],
    held_out: Sequence[int],
    teacher: Path,
    output: Path,
    *,
    components: int,
    device: str,
) -> float:
    """Embed a corpus and write the file that the student trains from. Returns the share of squared length kept."""
    embeddings, kept = principal_components(embed_texts(teacher, corpus_texts, device=device), components)
    data = TeacherTexts(corpus_texts, embeddings, torch.tensor(pairs).reshape(-1, 2), torch.tensor(held_out))
    about = {"texts": len(corpus_texts), "components": embeddings.shape[1], "kept": round(kept, 5)}
    save_teacher_texts(
        data, output, metadata={"teacher": f"{teacher.parent.name}/{teacher.name}", "about": json.dumps(about)}
    )
    return kept

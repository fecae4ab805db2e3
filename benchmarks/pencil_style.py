"""What the proofs of style share: which bundled pictures are redrawn and learned, and what drawings show of the style.

Distances are those of the retrieval among real pictures, here among the drawings of all real pictures; two of them are
2 apart on average, by the scale of the features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pencil_drawing import pencil_drawing

BASE = "output/pretrained_models/emoji-256"
APART = 2.0  # the mean distance of two drawings


class Style(NamedTuple):
    """The bundled pictures and their drawings; rows that are learned, and others that are judged."""

    real: Any
    drawings: Any
    taught: list[int]
    judged: list[int]

    def captions(self) -> list[str]:
        return [self.real.samples[row].captions[0] for row in self.judged]


def load_style(data: str, taught: int, judged: int) -> Style:
    """One picture a concept of the training split."""
    from diffusion.evaluation.drawing import spread
    from diffusion.evaluation.retrieval import load_gallery

    real, drawings = load_gallery(data), load_gallery(data, pencil_drawing)
    found: dict[str, int] = {}
    for row in real.split("train"):
        found.setdefault(real.concepts[row], row)
    rows = list(found.values())
    learned = spread(rows, taught)
    return Style(real, drawings, learned, spread([row for row in rows if row not in learned], judged))


def write_drawings(style: Style, folder: Path) -> Path:
    """An ImageFolder of the drawings that are learned, under the captions of the real pictures."""
    folder.mkdir()
    lines = []
    for row in style.taught:
        sample = style.real.samples[row]
        pencil_drawing(sample.decode()).save(folder / f"{row}.png")
        lines.append(json.dumps({"file_name": f"{row}.png", "captions": list(sample.captions)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def compare(style: Style, before: list[Any], after: list[Any], name: str) -> dict[str, Any]:
    """Distances to the drawings that were meant, with edges alone too, and R@1; `name` is what `after` is called."""
    from diffusion.evaluation.retrieval import nearest_pictures, recall, to_pixels

    def paired(pictures: list[Any]) -> tuple[float, float]:
        distances = style.drawings.distances(to_pixels(pictures))
        both, colour = (found[range(len(style.judged)), style.judged].mean() for found in distances)
        return float(both), float(both - colour)

    def first(gallery: Any, pictures: list[Any]) -> float:
        near = nearest_pictures(gallery.distances(to_pixels(pictures))[0], gallery.groups, 1)
        return recall(near, gallery.concepts, [gallery.concepts[row] for row in style.judged], 1)

    (start, edges_start), (end, edges_end) = paired(before), paired(after)
    return {
        "concepts": len(style.judged),
        "paired_distance_base": round(start, 4),
        f"paired_distance_{name}": round(end, 4),
        "paired_distance_base_edges": round(edges_start, 4),
        f"paired_distance_{name}_edges": round(edges_end, 4),
        "distance_among_drawings": APART,
        "progress": round((start - end) / (start - APART), 4),
        "r1_base_among_real": round(first(style.real, before), 4),
        f"r1_{name}_among_drawings": round(first(style.drawings, after), 4),
    }


def save_grid(path: Path, style: Style, before: list[Any], after: list[Any], name: str) -> None:
    """Base, what was trained and the drawing of the real picture, side by side, for up to 12 concepts."""
    from PIL import Image

    from diffusion.images import labelled_grid

    chosen = range(0, len(before), max(len(before) // 12, 1))[:12]
    captions, sheets = style.captions(), []
    for index in chosen:
        redrawn = pencil_drawing(style.real.samples[style.judged[index]].decode())
        sheet = Image.new("RGB", (3 * 128, 128), "white")
        for place, image in enumerate((before[index], after[index], redrawn)):
            sheet.paste(image.resize((128, 128), Image.Resampling.LANCZOS), (128 * place, 0))
        sheets.append(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{captions[index]}: base, {name}, real picture redrawn" for index in chosen]
    labelled_grid(sheets, texts, columns=2).save(path, quality=88)

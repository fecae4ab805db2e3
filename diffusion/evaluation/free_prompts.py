"""Prompts in a user's own words, and which concepts a person would accept as their picture."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from diffusion.errors import DataError
from diffusion.evaluation.retrieval import Gallery

_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class FreePrompt:
    """A prompt, the concepts that answer it, and the skin tones that do; no tones = any."""

    prompt: str
    concepts: tuple[str, ...]
    skin_tones: tuple[str, ...] = ()

    def accepts(self, gallery: Gallery, row: int) -> bool:
        """Whether a picture, or one that is nearly the same, answers the prompt."""
        group = gallery.groups[row]
        return any(
            sample.attributes["concept"] in self.concepts
            and (not self.skin_tones or sample.attributes.get("skin_tone") in self.skin_tones)
            for sample, other in zip(gallery.samples, gallery.groups)
            if other == group
        )


def read_free_prompts(path: str | Path) -> list[FreePrompt]:
    """Lines of {"prompt": ..., "concepts": [...], "skin_tones": [...] (optional)}.

    Raises:
        DataError: the file or a line cannot be read; names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a JSON-lines file of prompts") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            prompt = FreePrompt(str(row["prompt"]), tuple(row["concepts"]), tuple(row.get("skin_tones", ())))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} is no prompt with concepts ({error!r})") from error
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def normalised(text: str) -> str:
    """Lower-case words without punctuation and articles: two prompts that say the same are equal."""
    return " ".join(word for word in re.findall(r"[^\W_]+", text.lower()) if word not in _ARTICLES)

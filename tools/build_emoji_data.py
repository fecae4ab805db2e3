"""Build the bundled data: `data/emoji` (Fluent Emoji 3D with captions) and `data/data_toy` (20 of them, SA1B layout).

Pictures come from npm `@lobehub/fluent-emoji-3d`, captions from npm `emojibase-data`; both archives are fetched with
`npm pack` unless given, and their sha256 is checked. The result is deterministic: same bytes for the same Pillow.

    python tools/build_emoji_data.py --out data --cache build/emoji
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import DataError, run_cli

SIZE_PX = 256
WEBP_QUALITY = 90
JPEG_QUALITY = 95
# Mean absolute difference (0..255) of two pictures averaged down to 64x64. README.md of the data set says how chosen.
DUPLICATE_BELOW = 2.5
HELDOUT_MARGIN = 5.0
HELDOUT_PICTURES = 220
HELDOUT_TONES_PER_CONCEPT = 2
SEED = 20231001

TONE_NAMES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
GENDER_NAMES = {0: "female", 1: "male", None: ""}
# fmt: off
METADATA_FIELDS = ("concept", "skin_tone", "gender", "group", "subgroup", "hexcode", "split", "duplicate_group")
RESERVED_CONCEPTS = (
    "accordion", "cupcake", "flamingo", "hedgehog", "octopus", "pinched fingers", "pineapple", "poodle", "robot",
    "sailboat", "teapot", "teddy bear",
)
TOY_CONCEPTS = (
    "red apple", "grinning face", "smiling face with sunglasses", "rocket", "fox", "sunflower", "pizza", "guitar",
    "soccer ball", "umbrella", "penguin", "snowman", "hot beverage", "automobile", "red heart", "rainbow", "crown",
    "mushroom", "butterfly", "light bulb",
)
# fmt: on
# Errors of fluent-emoji-3d 1.1.0. The file of this emoji shows the medium-dark one a second time:
WRONG_PICTURES = ("1fac4-1f3ff",)
# and the files of this concept, in the order light .. dark, show these tones:
SHUFFLED_TONES: dict[str, tuple[str, ...]] = {
    "person mountain biking": ("dark", "medium", "medium-dark", "medium-light", "light")
}


@dataclass(frozen=True)
class Archive:
    """One npm package, pinned to the bytes it had when the data set was made."""

    package: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The name `npm pack` gives the archive."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


FLUENT = Archive(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
EMOJIBASE = Archive("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")


@dataclass
class Emoji:
    """One picture and what is known about it; `split` and `duplicate_group` are decided after all are read."""

    hexcode: str
    source: bytes
    text: str
    keywords: tuple[str, ...]
    concept: str
    skin_tone: str
    gender: str
    group: str
    subgroup: str
    split: str = "train"
    duplicate_group: str = ""


def fetch(archive: Archive, cache: Path, given: Path | None) -> Path:
    """Return the checked archive: `given`, or the cached one, or a fresh download by npm.

    Raises:
        DataError: npm is missing or fails, or the bytes are not the pinned ones.
    """
    path = given if given is not None else cache / archive.file_name
    if given is None and not path.exists():
        npm_pack(archive, cache)
    if not path.is_file():
        raise DataError(f"{path}: no such archive; give the tgz of {archive.package}@{archive.version}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise DataError(
            f"{path}: sha256 is {digest}, not the pinned {archive.sha256} of {archive.package}@{archive.version}; "
            "remove the file and run again"
        )
    return path


def npm_pack(archive: Archive, cache: Path) -> None:
    """Download one package into `cache`."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"npm is not installed, so {archive.package}@{archive.version} cannot be fetched; install Node.js, or "
            "pass --fluent-tgz and --emojibase-tgz"
        )
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{archive.package}@{archive.version}"
    done = subprocess.run([npm, "pack", name, "--pack-destination", cache], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())[:300]
        raise DataError(f"`npm pack {name}` failed: {reason}; check the network, or pass --fluent-tgz/--emojibase-tgz")


def read_members(path: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """Map member name -> content for the members of a tgz with this prefix and suffix, sorted by name."""
    contents = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(prefix) and member.name.endswith(suffix):
                handle = tar.extractfile(member)
                assert handle is not None
                contents[member.name] = handle.read()
    return dict(sorted(contents.items()))


def match_key(hexcode: str) -> str:
    """Hexcode in lower case without the variation selector fe0f, which the two packages place differently."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def plain_quotes(text: str) -> str:
    """Typographic quotes become the ones people type, so that a prompt can match a label."""
    return text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})


def read_emoji(fluent: Path, emojibase: Path) -> list[Emoji]:
    """Every picture with a label, sorted by hexcode; pictures unknown to emojibase or wrong are left out."""
    members = read_members(emojibase, "package/", ".json")
    names = json.loads(members["package/meta/groups.json"])
    messages = json.loads(members["package/en/messages.json"])
    spoken = {entry["key"]: entry["message"] for kind in ("groups", "subgroups") for entry in messages[kind]}
    known: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for base in json.loads(members["package/en/data.json"]):
        for entry in [base, *base.get("skins", [])]:
            known[match_key(entry["hexcode"])] = (entry, base)
    emoji = []
    for member, source in read_members(fluent, "package/assets/", ".webp").items():
        stem = Path(member).stem.lower()
        if match_key(stem) not in known or stem in WRONG_PICTURES:
            continue
        entry, base = known[match_key(stem)]
        tones = entry.get("tone", [])
        tones = tones if isinstance(tones, list) else [tones]
        emoji.append(
            Emoji(
                hexcode=stem,
                source=source,
                text=plain_quotes(entry["label"]),
                keywords=tuple(plain_quotes(tag) for tag in base["tags"]),
                concept=plain_quotes(base["label"]),
                skin_tone=", ".join(TONE_NAMES[tone] for tone in tones),
                gender=GENDER_NAMES[base.get("gender")],
                group=spoken[names["groups"][str(base["group"])]],
                subgroup=spoken[names["subgroups"][str(base["subgroup"])]],
            )
        )
    return sorted(emoji, key=lambda item: item.hexcode)


def mend_tones(emoji: Sequence[Emoji]) -> None:
    """Exchange pictures between the tones of a concept until each shows the tone that it is labelled with.

    In 288 of 304 concepts the package has "medium-light" and "medium" the wrong way round: the former came out darker.
    """
    tones_of: dict[str, dict[str, Emoji]] = defaultdict(dict)
    for item in emoji:
        if item.skin_tone:
            tones_of[item.concept][item.skin_tone] = item
    names = tuple(TONE_NAMES.values())
    for concept, items in tones_of.items():
        shown = SHUFFLED_TONES.get(concept, names)
        light, dark = (compose_on_white(items[tone].source).convert("L") for tone in ("medium-light", "medium"))
        if shown == names and np.asarray(light).mean() < np.asarray(dark).mean():
            shown = ("light", "medium", "medium-light", "medium-dark", "dark")
        sources = {tone: items[name].source for name, tone in zip(names, shown) if name in items}
        for name, item in items.items():
            item.source = sources[name]


def captions_of(item: Emoji, keywords_name_it: bool) -> list[str]:
    """Two to four captions that are true of the picture; each of them names the skin tone if there is one.

    `keywords_name_it` says that no other concept has the same keywords, so that they alone are a caption.
    """
    tone = f"{item.skin_tone} skin tone" if item.skin_tone else ""
    separator = ", " if ": " in item.text else ": "
    captions = [item.text, item.text + separator + ", ".join(item.keywords)]
    plain = item.concept.replace(": ", ", ")
    captions.append(f"a 3D emoji of {plain}" + (f", {tone}" if tone else ""))
    if keywords_name_it:
        captions.append(", ".join([*item.keywords, tone] if tone else item.keywords))
    return captions


def compose_on_white(source: bytes) -> Image.Image:
    """Decode RGBA, lay it on white and centre it on a 256x256 canvas (higher pictures lose rows evenly)."""
    picture = Image.open(io.BytesIO(source)).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE_PX, SIZE_PX), "white")
    left, top = (SIZE_PX - picture.width) // 2, (SIZE_PX - picture.height) // 2
    layer = Image.new("RGBA", canvas.size, (255, 255, 255, 0))
    layer.paste(picture, (left, top))
    canvas.alpha_composite(layer)
    return canvas.convert("RGB")


def write_images(emoji: Sequence[Emoji], folder: Path) -> np.ndarray:
    """Write every picture as WebP; return the pictures as they decode, averaged to 64x64: (N, 64, 64, 3) float32."""
    folder.mkdir(parents=True)
    small = np.empty((len(emoji), 64, 64, 3), dtype=np.float32)
    for row, item in enumerate(emoji):
        path = folder / f"{item.hexcode}.webp"
        compose_on_white(item.source).save(path, quality=WEBP_QUALITY, method=6)
        with Image.open(path) as stored:
            small[row] = block_means(np.asarray(stored.convert("RGB"), dtype=np.float32), 4)
    return small


def block_means(pixels: np.ndarray, block: int) -> np.ndarray:
    """(..., H, W, 3) -> (..., H/block, W/block, 3): the mean of each block x block square."""
    *batch, height, width, channels = pixels.shape
    return pixels.reshape(*batch, height // block, block, width // block, block, channels).mean(axis=(-4, -2))


def near_pairs(small: np.ndarray, below: float) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, mean absolute difference) with i < j for all pairs that differ by less than `below`.

    Averaging cannot increase a mean absolute difference, so the 8x8 pictures reject most pairs without error.
    """
    coarse = block_means(small, 8).reshape(len(small), -1)
    fine = small.reshape(len(small), -1)
    for i in range(len(small) - 1):
        bound = np.abs(coarse[i + 1 :] - coarse[i]).mean(axis=1)
        for j in i + 1 + np.flatnonzero(bound < below):
            distance = float(np.abs(fine[i] - fine[j]).mean())
            if distance < below:
                yield i, int(j), distance


def mark_duplicates(emoji: Sequence[Emoji], pairs: Sequence[tuple[int, int, float]]) -> None:
    """Give pictures that are linked by near-duplicate pairs one group id: the first hexcode among them."""
    parent = list(range(len(emoji)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j, distance in pairs:
        if distance < DUPLICATE_BELOW:
            first, second = sorted((root(i), root(j)))
            parent[second] = first
    for i, item in enumerate(emoji):
        item.duplicate_group = emoji[root(i)].hexcode


def assign_splits(emoji: Sequence[Emoji], pairs: Sequence[tuple[int, int, float]]) -> None:
    """Set `split`: "reserved" concepts, "heldout" combinations of concept and tone, "train" the rest.

    Held out are only pictures that have no other picture within HELDOUT_MARGIN, at most two tones of a concept, as
    even over the tones as the candidates allow.

    Raises:
        DataError: a reserved concept does not exist or resembles another picture; too few held-out candidates.
    """
    has_neighbour = {row for i, j, _ in pairs for row in (i, j)}
    missing = set(RESERVED_CONCEPTS) - {item.concept for item in emoji}
    if missing:
        raise DataError(f"reserved concepts not in the data: {sorted(missing)}; correct RESERVED_CONCEPTS")
    candidates: dict[str, list[Emoji]] = defaultdict(list)
    for row, item in enumerate(emoji):
        if item.concept in RESERVED_CONCEPTS:
            item.split = "reserved"
            if row in has_neighbour:
                raise DataError(f"reserved concept {item.concept!r} resembles another picture; choose another one")
        elif item.skin_tone in TONE_NAMES.values() and row not in has_neighbour:
            candidates[item.concept].append(item)
    concepts = sorted(candidates)
    random.Random(SEED).shuffle(concepts)
    taken: Counter[str] = Counter()
    for concept in concepts * HELDOUT_TONES_PER_CONCEPT:
        free = [item for item in candidates[concept] if item.split == "train"]
        if taken.total() < HELDOUT_PICTURES and free:
            chosen = min(free, key=lambda item: (taken[item.skin_tone], item.hexcode))
            chosen.split = "heldout"
            taken[chosen.skin_tone] += 1
    if taken.total() < HELDOUT_PICTURES:
        raise DataError(f"only {taken.total()} of {HELDOUT_PICTURES} held-out pictures found; lower HELDOUT_MARGIN")


def metadata_rows(emoji: Sequence[Emoji]) -> Iterator[dict[str, Any]]:
    """One ImageFolder row per picture, in the order of the pictures."""
    owners: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for item in emoji:
        owners[item.keywords].add(item.concept)
    for item in emoji:
        keywords_name_it = len(item.keywords) > 1 and len(owners[item.keywords]) == 1
        captions = captions_of(item, keywords_name_it)
        facts = {name: getattr(item, name) for name in METADATA_FIELDS}
        yield {"file_name": f"images/{item.hexcode}.webp", "text": item.text, "captions": captions, **facts}


def build_emoji(emoji: Sequence[Emoji], root: Path) -> None:
    """Write `root/images` and `root/metadata.jsonl`, aside first; an older build is replaced at the end."""
    aside = root / "images.partial"
    shutil.rmtree(aside, ignore_errors=True)
    pairs = list(near_pairs(write_images(emoji, aside), HELDOUT_MARGIN))
    mark_duplicates(emoji, pairs)
    assign_splits(emoji, pairs)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in metadata_rows(emoji)]
    table = root / "metadata.jsonl.partial"
    table.write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(root / "images", ignore_errors=True)
    aside.rename(root / "images")
    table.replace(root / "metadata.jsonl")


def build_toy(emoji: Sequence[Emoji], root: Path) -> None:
    """Write 20 training pictures in the original's SA1B layout, and the list of them that InternalData reads."""
    by_concept = {item.concept: item for item in emoji if not item.skin_tone and item.split == "train"}
    missing = set(TOY_CONCEPTS) - set(by_concept)
    if missing:
        raise DataError(f"toy concepts are not training pictures: {sorted(missing)}; correct TOY_CONCEPTS")
    shutil.rmtree(root, ignore_errors=True)
    images, captions, partition = folders = [root / "SA1B" / name for name in ("images", "captions", "partition")]
    for folder in folders:
        folder.mkdir(parents=True)
    names, infos = [], []
    for concept in TOY_CONCEPTS:
        name, caption = concept.replace(" ", "_"), captions_of(by_concept[concept], False)[1]
        picture = compose_on_white(by_concept[concept].source)
        picture.save(images / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
        (captions / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
        names.append(name)
        size = {"height": picture.height, "width": picture.width, "ratio": picture.height / picture.width}
        infos.append({**size, "path": f"SA1B/images/{name}.jpg", "prompt": caption})
    (partition / "part0.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (root / "data_info.json").write_text(json.dumps(infos, indent=2) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Command line of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder that gets emoji/ and data_toy/")
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"), help="folder for the npm archives")
    parser.add_argument("--fluent-tgz", type=Path, help=f"use this archive of {FLUENT.package}@{FLUENT.version}")
    parser.add_argument("--emojibase-tgz", type=Path, help=f"use this one of {EMOJIBASE.package}@{EMOJIBASE.version}")
    return parser.parse_args()


def main() -> None:
    """Fetch, match, write, and print the counts."""
    args = parse_args()
    fluent = fetch(FLUENT, args.cache, args.fluent_tgz)
    emojibase = fetch(EMOJIBASE, args.cache, args.emojibase_tgz)
    emoji = read_emoji(fluent, emojibase)
    mend_tones(emoji)
    build_emoji(emoji, args.out / "emoji")
    build_toy(emoji, args.out / "data_toy")
    shared = [count for count in Counter(item.duplicate_group for item in emoji).values() if count > 1]
    print(f"{len(emoji)} pictures of {len({item.concept for item in emoji})} concepts -> {args.out / 'emoji'}")
    print(", ".join(f"{name} {count}" for name, count in Counter(item.split for item in emoji).items()))
    print(f"{sum(shared)} pictures in {len(shared)} groups of near duplicates; largest {max(shared)}")
    print(f"{len(TOY_CONCEPTS)} pictures in SA1B layout -> {args.out / 'data_toy'}")


if __name__ == "__main__":
    run_cli(main)

"""Tables of README and docs/performance.md from what `benchmarks/compare.py` and `benchmarks/cold_start.py` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MISSING = "not measured yet"
# Rows of the comparison, in order: name of the row, what it does.
ROWS = {
    "train-256": "training, 256 px",
    "train-512": "training, 512 px",
    "train-1024": "training, 1024 px",
    "sample-256": "20 steps, 256 px",
    "sample-512": "20 steps, 512 px",
    "sample-1024": "20 steps, 1024 px",
    "lcm-1024": "4 steps (LCM), 1024 px",
    "throughput-512": "20 steps, 512 px, many at once",
    "cold-512": "first picture of a process, 512 px",
    "cpu-train": "CPU: training, bundled model",
    "cpu-train-float32": "CPU: the same in float32",
    "cpu-sample": "CPU: 20 steps, bundled model",
    "cpu-lcm": "CPU: 4 steps (LCM), bundled model",
    "cpu-cold": "CPU: first picture of a process",
}
OURS, FP8, EAGER, COMPILED = "ours", "ours-fp8", "diffusers", "diffusers-compile"


@dataclass(frozen=True)
class Lever:
    """One thing that makes a row faster: what it is, how it is switched on, and the arms that show its gain."""

    what: str
    switch: str
    row: str
    with_it: str
    without: str
    exact: bool = True


LEVERS = (
    Lever("blocks compiled", "`compile=True` in a config", "train-256", "ours-compile", "ours-eager"),
    Lever("attention, text, fused kernels", "`kernels=...` in a config", "train-256", "ours", "ours-compile"),
    Lever("the same at 1024 px", "`kernels=...` in a config", "train-1024", "ours", "ours-compile"),
    Lever("FP8 products in training", "`kernels.fp8`", "train-1024", "ours-fp8", "ours", False),
    Lever("all of `--fast`", "`--fast`", "sample-256", "ours", "ours-eager"),
    Lever("solver loop as one CUDA graph", "`--fast`", "sample-256", "ours", "ours-without-graph"),
    Lever("compiled blocks and decoder", "`--fast`", "sample-1024", "ours", "ours-without-compile"),
    Lever("more kernels tried", "`--fast --autotune`", "sample-1024", "ours-autotune", "ours"),
    Lever("FP8 products in sampling", "`--fast --fp8`", "sample-1024", "ours-fp8", "ours", False),
    Lever("blocks in every second step", "`--reuse_every 2`", "sample-1024", "ours-reuse-2", "ours", False),
    Lever("guidance in half the steps", "`--guidance_until 0.5`", "sample-1024", "ours-guide-half", "ours", False),
    Lever("CPU: products by oneDNN", "the default", "cpu-sample", "ours", "ours-eager"),
    Lever("CPU: compiled blocks", "`enable_fast_sampling(compile=True)`", "cpu-sample", "ours-compile", "ours"),
    Lever("CPU: decoder in NHWC, upsampling folded", "the default", "cpu-lcm", "ours", "ours-plain-decoder"),
    Lever("CPU: bfloat16", "`--fast --dtype bfloat16`", "cpu-sample", "ours-bfloat16", "ours", False),
)  # fmt: skip


def readme_table(results: Path) -> str:
    """Ours against diffusers, one line a row that was measured; the others are named below."""
    lines = [
        "| work | ours | diffusers eager | diffusers + compile | ours is faster by |",
        "|---|---|---|---|---|",
    ]
    found = {title: read(results / f"compare_{name}.json") for name, title in ROWS.items()}
    measured = {title: result for title, result in found.items() if result is not None}
    missing = [title for title in found if title not in measured]
    for title, result in measured.items():
        arms = {row["arm"]: row for row in result["rows"]}
        for ours, shown_as in ((OURS, title), (FP8, f"{title}, FP8 (lossy)")):
            if ours is OURS or ours in arms:
                lead = [f"{gain:.2f}x" for gain in (gain_of(arms, ours, other) for other in (EAGER, COMPILED)) if gain]
                shown = [figure(arms.get(arm)) for arm in (ours, EAGER, COMPILED)]
                lines.append(f"| {shown_as} | {' | '.join(shown)} | {', '.join(lead)} |")
    table = [*lines, "", machines(measured), ""] if measured else []
    return "\n".join([*table, *([f"Not measured yet: {'; '.join(missing)}."] if missing else [])]).strip()


def machines(measured: dict[str, dict[str, Any]]) -> str:
    """On what rows of these titles were measured; those of another machine than the first row's are named."""
    places: dict[str, list[str]] = {}
    for title, result in measured.items():
        device, versions = result["device"] if result["device"] != "cpu" else result["cpu"], result["versions"]
        place = f"{device}, torch {versions['torch']}, diffusers {versions['diffusers']}"
        places.setdefault(place, []).append(f'"{title}"')
    first, *others = places
    return "; ".join([f"Measured on {first}", *(f"{', '.join(places[place])}: {place}" for place in others)]) + "."


def figure(row: dict[str, Any] | None) -> str:
    """Pictures a second and share of the matrix-product rate, milliseconds, or seconds of a cold start."""
    if row is None:
        return ""
    if "import_s" in row:
        return f"{row['seconds']:.1f} s"
    if row["setting"] == "batch 1" or row["setting"].startswith("batch 1,"):
        return f"{row['ms_a_call'] / 1000:.3g} s"
    return f"{row['images_per_s']:.4g} images/s ({100 * row['share']:.0f} %)"


def gain_of(arms: dict[str, dict[str, Any]], one: str, other: str) -> float | None:
    """How much faster an arm is than another; None where one of them was not measured."""
    if one not in arms or other not in arms:
        return None
    if "import_s" in arms[one]:
        return float(arms[other]["seconds"] / arms[one]["seconds"])
    return float(arms[one]["images_per_s"] / arms[other]["images_per_s"])


def levers_section(results: Path) -> list[str]:
    """Each lever with its gain, from arms that took turns in one run; then the commands for those without."""
    missing: dict[str, dict[str, None]] = {}
    lines = [
        "| lever | switched on by | row | gain | result |",
        "|---|---|---|---|---|",
    ]
    for lever in LEVERS:
        gain = MISSING
        for path in [*sorted(results.glob(f"levers_{lever.row}*.json")), results / f"compare_{lever.row}.json"]:
            result = read(path)
            arms = {} if result is None else {row["arm"]: row for row in result["rows"]}
            measured = gain_of(arms, lever.with_it, lever.without)
            if measured is not None:
                gain = f"{measured:.2f}x"
                break
        if gain == MISSING:
            missing.setdefault(lever.row, {}).update(dict.fromkeys([lever.with_it, lever.without]))
        lines.append(f"| {lever.what} | {lever.switch} | {lever.row} | {gain} | {'same' if lever.exact else 'lossy'} |")
    if missing:
        lines += ["\nThose not measured yet are measured by\n", "```bash"]
        lines += [f"python benchmarks/compare.py {row} --arms {' '.join(arms)}" for row, arms in missing.items()]
        lines += ["```"]
    return lines


def read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # type: ignore[no-any-return]

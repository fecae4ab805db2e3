"""Tables of figures within pages that are written by hand: a page marks where each stands, by its name here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import finetuning_tables
from performance_tables import MISSING, read, readme_table

_MARKED = re.compile(r"(<!-- table (\w+) by tools/write_docs\.py -->\n)(?:.*?\n)??(<!-- end of table -->)", re.DOTALL)


def memory_plans(result: dict[str, Any]) -> str:
    """Peak and seconds of each plan on a card, for docs/inference.md."""
    lines = [
        "| plan | GB the process may take | GB it took, context counted | seconds a call | latents of `full` |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        if not row["completes"]:
            lines.append(f"| {PLANS[name]} | {row.get('cap_gb')} | {row['failure']} | | |")
            continue
        error = row.get("latents_error")
        latents = "" if error is None else "the same bits" if row["latents_equal"] else f"{100 * error:.1f} % off"
        cap, peak = row["cap_gb"] or "all", row.get("peak_gb", "")
        lines.append(f"| {PLANS[name]} | {cap} | {peak} | {row['seconds']:.2f} | {latents} |")
    return "\n".join([*lines, "", f"{where(result)}; {result['benchmark']}."])


PLANS = {
    "full": "`full`",
    "full x4": "`full`, 4 pictures a call",
    "8gb": "`8gb`",
    "4gb": "`4gb`",
    "resident": "none: all parts stay on the card",
    "offload": "`enable_model_cpu_offload`",
    "full-fp16": "`full` in float16",
}


def extraction(result: dict[str, Any], loader: dict[str, Any]) -> str:
    """Rows a second of extraction and loading, for docs/data.md."""
    captions = result["captions"]
    lines = [
        "| what | rows a second, to the disk | share of the matmul rate | the original's way | faster by |",
        "|---|---|---|---|---|",
        f"| captions, T5-XXL, {captions['mean_tokens']:.0f} tokens on average | {captions['ours_per_s']:.0f} "
        f"| {100 * captions['share_of_matmul_rate']:.0f} % | {captions['original_one_by_one_per_s']:.3g} "
        f"({captions['original_20_threads_per_s']:.3g} with its 20 threads) "
        f"| {captions['ratio']:.0f}x ({captions['ratio_to_20_threads']:.0f}x) |",
    ]
    for px, row in result["pictures"].items():
        lines.append(
            f"| pictures, {px} px, from JPEG | {row['ours_per_s']:.0f} | {100 * row['share_of_matmul_rate']:.0f} % "
            f"| {row['original_per_s']:.3g} | {row['ratio']:.1f}x |"
        )
    lines += [
        "",
        f"{where(result)}; random weights of full size, the VAE's encoder compiled.",
        f"In training the loader gives {loader['samples_per_s']:,.0f} samples a second with {loader['workers']} "
        "workers on that machine (256 px, captions of T5-XXL).",
    ]
    return "\n".join(lines)


def presets(result: dict[str, Any]) -> str:
    """Memory and seconds a step of the presets, for docs/recipe.md."""
    lines = [
        "| preset | peak memory | seconds a step | images a step | loss at the first step -> after | steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["presets"].items():
        if "error" in row:
            lines.append(f"| `{name}` | {row['error']} | | | | |")
            continue
        lines.append(
            f"| `{name}` | {row['peak_reserved_gib']} GiB of {row['cap_gib']} | {row['seconds_a_step']:.3f} "
            f"| {row['global_batch']} | {row['first_loss']:.3f} -> {row['last_loss']:.3f} | {row['steps']} |"
        )
    device = next(row["device"] for row in result["presets"].values() if "device" in row)
    return "\n".join([*lines, "", f"{where({**result, 'device': device})}; from initial weights."])


_RETRIEVAL = "validation loss | held-out labels R@1, R@5 | trained labels R@1, R@5 | free prompts"


def stages(result: dict[str, Any]) -> str:
    """Arms of the recipe in miniature, for docs/recipe.md."""
    lines = [f"| arm | steps | {_RETRIEVAL} |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {' + '.join(map(str, row['steps']))} | {_found(row)} |" for name, row in result["arms"].items()
    ]
    share = 100 * result["share_of_first_stage"]
    return "\n".join(
        [
            *lines,
            "",
            f"{where(result)}; FLOPs of {result['steps']} steps of the first arm each, {share:.0f} % of them "
            "for a first stage. Validation loss at 256 px, of the averaged weights.",
        ]
    )


def levers(result: dict[str, Any]) -> str:
    """Arms with and without the levers, for docs/recipe.md."""
    lines = [f"| arm | steps | {_RETRIEVAL} |", "|---|---|---|---|---|---|"]
    for name, row in result["arms"].items():
        lines.append(f"| {name} | {row['steps']} | {_found(row)} |")
    return "\n".join([*lines, "", f"{where(result)}; {result['benchmark']}. Losses of flow are of another kind."])


def _found(row: dict[str, Any]) -> str:
    """Cells of `_RETRIEVAL`; shares in percent."""
    pairs = [f"{100 * row[f'{split}_r1']:.1f}, {100 * row[f'{split}_r5']:.1f}" for split in ("heldout", "train")]
    return " | ".join([f"{row['validation_loss']:.4f}", *pairs, f"{100 * row['free_prompts']:.0f}"])


def parallel(result: dict[str, Any]) -> str:
    """One GPU against several, for docs/training-parallel.md."""
    lines = [
        "| size | strategy | images/s of all | scaling | peak memory a GPU | communication: at all, alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        processes, _, strategy, size = name.split(" ", 3)
        label = "`ddp`, `sums_by='nccl'`" if strategy == "ddp_by_nccl" else f"`{strategy}`"
        if processes == "1":
            before, after = result["one_process_before_and_after"][size]
            rates, scaling, talk, label = f"{before:.1f} and {after:.1f}", "", "", "one GPU, before and after"
        else:
            rates, scaling = f"{row['images_per_s']:.1f}", f"{100 * result['scaling'][name]:.1f} %"
            talk = f"{100 * row['communication_share']:.1f} %, {100 * row['exposed_communication_share']:.1f} %"
        lines.append(f"| {size} | {label} | {rates} | {scaling} | {row['peak_gib']:.1f} GiB | {talk} |")
    gap = result["resume"]["largest relative gap"]
    return "\n".join(
        [
            *lines,
            "",
            f"{where(result)}; {result['benchmark']}. A run that went from DDP on all GPUs to FSDP2 to one GPU had the "
            f"losses of one on a single GPU, within {gap:.0e} of each.",
        ]
    )


def where(result: dict[str, Any]) -> str:
    return f"Measured on {result['device']}, torch {result['versions']['torch']}"


def made_of(
    write: Callable[..., str], program: str, *stems: str, enough: Callable[[list[bool]], bool] = all
) -> Callable[[Path], str]:
    """A table of results by the names of their files; where not `enough` of them are there, how to get them."""

    def table(results: Path) -> str:
        found = [read(results / f"{stem}.json") for stem in stems]
        if not enough([result is not None for result in found]):
            return f"`python benchmarks/{program}.py`: {MISSING}."
        return write(*(result for result in found if result is not None))

    return table


TABLES: dict[str, Callable[[Path], str]] = {
    "speed": readme_table,
    "memory_plans": made_of(memory_plans, "bench_memory_plans", "memory_plans"),
    "extraction": made_of(extraction, "bench_extraction", "extraction_h100", "loader"),
    "parallel": made_of(parallel, "bench_parallel", "parallel"),
    "stages": made_of(stages, "recipe_stages", "recipe_stages"),
    "levers": made_of(levers, "ablation_emoji", "ablation_levers"),
    "presets": made_of(presets, "measure_presets", "presets"),
    "finetuning": made_of(
        finetuning_tables.families,
        "bench_finetuning",
        "finetuning",
        "finetuning_kept",
        "finetuning_fast",
        enough=any,
    ),
    **{
        name: made_of(getattr(finetuning_tables, name), f"finetune_{name}", f"finetune_{name}")
        for name in ("lora", "dreambooth", "diffusers", "lcm", "controlnet", "dmd")
    },
}


def filled(text: str, results: Path) -> str:
    """A page with the tables that it marks.

    Raises:
        ValueError: a mark with a name that no table has.
    """

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        return f"{begin}{TABLES[name](results)}\n{end}"

    return _MARKED.sub(fill, text)


def marked_pages(root: Path) -> Iterator[Path]:
    """README.md and pages of docs/ that mark a table."""
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        if _MARKED.search(path.read_text(encoding="utf-8")):
            yield path

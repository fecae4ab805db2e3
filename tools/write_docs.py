"""Write the pages of docs/ that are made from code and results (models, performance, scaling, config keys, reference),
and the tables of results in README.md and in pages written by hand.

    python tools/write_docs.py
    python tools/write_docs.py --check

With --check nothing is written; exit code 2 says that a page is not what this program would write.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion.config.arguments import ArgumentParser
from diffusion.errors import DataError, run_cli

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
NOTE = "<!-- written by tools/write_docs.py; change what it reads, not this page -->\n"
FACTS = ("command", "cpu", "gpu", "device", "threads", "python", "versions", "benchmark")
COMPARISON = (
    "## Against diffusers\n",
    "`python benchmarks/compare.py ROW` runs all arms of a row in one process and in turns, on the same random data,",
    "after each has found its best batch and compile mode; `benchmarks/cold_start.py` starts a process a picture.",
    "diffusers gets SDPA, bfloat16, fused AdamW, and compiled also fused qkv, a compiled T5 and a compiled NHWC",
    "decoder. FLOPs are those of `benchmarks/flops.py` (1 multiply-add = 2, training = 3 forward passes, nothing",
    "subtracted for what is cached); the share is of the rate of an 8192 x 8192 bfloat16 matrix product in the same",
    "run (1024, float32 on a CPU). The table of all rows is in the README.\n",
    "### Levers\n",
    'Gains are ratios of arms that took turns in one run. "Same" differs by rounding alone.\n',
)
# What is used under which terms, beside the files of the table of models.
LICENCES = (
    ("code", "this repository", "Apache-2.0", "LICENSE"),
    ("pictures of `data/`", "Fluent Emoji by Microsoft, packaged by LobeHub", "MIT", "data/emoji/LICENSES"),
    ("captions of `data/`", "emojibase", "MIT", "data/emoji/LICENSES"),
    ("bundled model emoji-256", "trained by this repository", "MIT", "output/pretrained_models/emoji-256/README.md"),
)  # fmt: skip


def models_page() -> str:
    """Published files with sizes and licences, and under which terms everything else is."""
    from diffusion.checkpoints.published import PUBLISHED, RECORDED

    lines = [
        f"# Models\n\n{NOTE}",
        "Every published PixArt file that the programs know.",
        "`python tools/download.py --model_names NAME --only_models` fetches one;",
        "[checkpoints.md](checkpoints.md) says how to convert and to check it.\n",
        "| model | name | licence of the weights | parameters | from |",
        "|---|---|---|---|---|",
    ]
    for row in PUBLISHED:
        recorded = RECORDED.get(row.name.removesuffix(".pth"))
        size = f"{recorded.num_parameters / 1e6:,.0f} M" if recorded is not None else ""
        hub = f"[{row.repo}](https://huggingface.co/{row.repo})"
        lines.append(f"| {row.title} | `{row.name}` | {row.licence} | {size} | {hub} |")
    lines += [
        "\nLicences of the alpha 512 and 1024 px models are those of their cards, and are taken for the others of",
        "the family; a download shows the hub's own statement where it differs. Parameters were counted from the",
        "original's classes.\n",
        "## Code, data and bundled model\n",
        "| what | by | licence | where it says so |",
        "|---|---|---|---|",
        *(f"| {what} | {who} | {licence} | `{place}` |" for what, who, licence, place in LICENCES),
        "\nA model that you fine-tune from a published file stays under the licence of that file.",
    ]
    return "\n".join(lines) + "\n"


def flatten(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Scalar figures with their path; lists, which hold single measurements, are left out."""
    for name, value in figures.items():
        if name in FACTS and not prefix:
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}, ")
        elif not isinstance(value, list):
            yield f"{prefix}{name}".replace("_", " "), value


def performance_page() -> str:
    """Every result in benchmarks/results: figures, command and machine."""
    from performance_tables import levers_section  # lies beside this program

    lines = [
        f"# Performance\n\n{NOTE}",
        "What `benchmarks/` and `tools/evaluate.py` measured, with command, machine and versions; `make bench`",
        "measures yours (with a GPU: `python benchmarks/on_gpu.py --list`). Times are medians where a name says so.\n",
        *COMPARISON,
        *levers_section(RESULTS),
    ]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        lines.append(f"\n## {path.stem.replace('_', ' ')}\n\n{result.get('benchmark', '')}".rstrip() + "\n")
        tables = [
            value for value in result.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        scalars = list(flatten(result))
        if scalars:
            lines += [
                "| figure | value |",
                "|---|---|",
                *(f"| {name} | {shown(value)} |" for name, value in scalars),
                "",
            ]
        for table in tables:
            names = list(
                dict.fromkeys(
                    name for row in table for name, value in row.items() if not isinstance(value, (list, dict))
                )
            )
            lines += [
                f"| {' | '.join(name.replace('_', ' ') for name in names)} |",
                "|" + "---|" * len(names),
                *(f"| {' | '.join(shown(row.get(name, '')) for name in names)} |" for row in table),
                "",
            ]
        versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        machine = [str(result[name]) for name in ("device", "gpu", "cpu") if name in result]
        if "threads" in result:
            machine.append("1 thread" if result["threads"] == 1 else f"{result['threads']} threads")
        lines.append(
            f"`{result.get('command', 'command not recorded')}`; {'; '.join([*machine, versions])}".rstrip("; ")
        )
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A figure as it stands in a table."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "\\|")


def config_page() -> str:
    """All config keys with defaults and meanings."""
    from diffusion.config import describe_keys

    rows = []
    for line in describe_keys().splitlines():
        name, _, rest = line.partition(" (")
        default, _, meaning = rest.partition("): ")
        default, meaning = (text.replace("|", "\\|") for text in (default, meaning))
        rows.append(f"| `{name}` | `{default}` | {meaning} |")
    intro = "The keys of a config file, also printed by `python -m diffusion.config`."
    head = f"# Config keys\n\n{NOTE}\n{intro} `--cfg-options KEY=VALUE` changes one.\n"
    return "\n".join([head, "| key | default | meaning |", "|---|---|---|", *rows]) + "\n"


def reference_pages() -> dict[str, str]:
    """One page a room: its docstring and its public names."""
    pages = {}
    rooms = []
    for init in sorted((ROOT / "diffusion").glob("*/__init__.py")):
        room, tree = init.parent.name, ast.parse(init.read_text(encoding="utf-8"))
        purpose = (ast.get_docstring(tree) or "").splitlines()[0]
        names = public_names(tree)
        rooms.append(
            f"| [`diffusion.{room}`]({room}.md) | {purpose} |" if names else f"| `diffusion.{room}` | {purpose} |"
        )
        if names:
            blocks = [f"::: diffusion.{room}.{name}" for name in names]
            pages[f"reference/{room}.md"] = "\n\n".join([f"# diffusion.{room}", NOTE.strip(), purpose, *blocks]) + "\n"
    intro = "The public names of each room; which room may import which is in [architecture.md](../architecture.md)."
    pages["reference/index.md"] = (
        f"# Reference\n\n{NOTE}\n{intro}\n\n| room | what lives there |\n|---|---|\n" + "\n".join(rooms) + "\n"
    )
    return pages


def public_names(tree: ast.Module) -> list[str]:
    """The names in `__all__`, classes and functions first."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value), key=lambda name: (name.isupper(), name.lower()))
    return []


def pages() -> dict[str, str]:
    """All pages that are made, or have a table that is, by their path below docs/."""
    from measured_tables import filled, marked_pages  # these lie beside this program
    from scaling_model import Assumptions, measured, page

    return {
        **{
            os.path.relpath(path, ROOT / "docs"): filled(path.read_text(encoding="utf-8"), RESULTS)
            for path in marked_pages(ROOT)
        },
        "models.md": models_page(),
        "scaling.md": page(measured(), Assumptions()),
        "performance.md": performance_page(),
        "config.md": config_page(),
        **reference_pages(),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not current")
    args = parser.parse_args()

    stale = []
    for name, text in pages().items():
        path = ROOT / "docs" / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not args.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if args.check and stale:
        raise DataError(f"docs/{', docs/'.join(stale)}: not current; run `python tools/write_docs.py`")
    print(f"docs: {len(stale)} pages written" if stale else "docs: all pages are current")


if __name__ == "__main__":
    run_cli(main)

"""Tables and sheets of what `benchmarks/bench_finetuning.py` and `benchmarks/finetune_*.py` found."""

from __future__ import annotations

from typing import Any


def families(*found: dict[str, Any]) -> str:
    """Speed and memory of every family on XL/2."""
    lines = [
        "| activations | px | family | pictures a step | steps/s | step against full | peak memory | trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in found:
        kind = result["activations"].split(",")[0]
        kind += "".join(f", {how}" for how in ("compiled", "recorded", "kernels") if result.get(how))
        full = {row["size_px"]: row["steps_per_s"] for row in result["rows"] if row["row"] == "full"}
        for row in result["rows"]:
            peak = row.get("peak_memory_gib")
            against = f"{full[row['size_px']] / row['steps_per_s']:.2f}x" if row["size_px"] in full else ""
            lines.append(
                f"| {kind} | {row['size_px']} | {row['row']} | {row['batch']} | {row['steps_per_s']:.2f} | {against} "
                f"| {'' if peak is None else f'{peak:.1f} GiB'} | {row['trained_parameters_m']:.1f} M |"
            )
    device = {row.get("device", "cpu") for result in found for row in result["rows"]}
    return "\n".join([*lines, "", f"Measured on {', '.join(sorted(device))}, bf16, AdamW, without T5 and VAE."])


def lora(result: dict[str, Any]) -> str:
    """What the adapter of a style has learned."""
    lines = _style(result, "lora", f"with the LoRA, at strength {result['lora_scale']}")
    lines.insert(-1, f"| file | | {result['adapter_file_mb']:.1f} MB |")
    return "\n".join([*lines, *_sheet("finetune_lora", "base, LoRA, redrawn real picture")])


def diffusers(result: dict[str, Any]) -> str:
    """What all weights have learned of a style."""
    lines = _style(result, "tuned", "tuned")
    return "\n".join([*lines, *_sheet("finetune_diffusers", "base, tuned, redrawn real picture")])


def _style(result: dict[str, Any], name: str, title: str) -> list[str]:
    """The figures of `pencil_style.compare`, and what the training took."""
    start, end = result["paired_distance_base"], result[f"paired_distance_{name}"]
    return [
        f"| judged on concepts it did not see | base | {title} |",
        "|---|---|---|",
        f"| distance to the redrawn real picture (2 = that among redrawn pictures) | {start:.2f} "
        f"| {end:.2f}: {100 * result['progress']:.0f} % of the way |",
        f"| the part of it by edges | {result['paired_distance_base_edges']:.2f} "
        f"| {result[f'paired_distance_{name}_edges']:.2f} |",
        f"| R@1, among real pictures / among redrawn ones | {100 * result['r1_base_among_real']:.0f} % "
        f"| {100 * result[f'r1_{name}_among_drawings']:.0f} % |",
        f"| training | | {result['training_s']:.0f} s on {result['device']} |",
    ]


def dreambooth(result: dict[str, Any]) -> str:
    """How often the subject is drawn, and what its class lost."""
    lines = [
        "| subject, taught as | prior preservation | drawn before | drawn after | R@1 of its class's group | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['subject']}, a {row['class']} | {'yes' if row['prior_preservation'] else 'no'} "
            f"| {row['subject_drawn_before']} of {row['seeds']} | {row['subject_drawn']} of {row['seeds']} "
            f"| {100 * row['class_r1_before']:.0f} % -> {100 * row['class_r1_after']:.0f} % | {row['training_s']:.0f} |"
        )
    return "\n".join([*lines, *_sheet("finetune_dreambooth", "subject, before, after, class after")])


def lcm(result: dict[str, Any]) -> str:
    """R@1 and sharpness of the distilled models at few steps, and of the model they come from."""
    counts = list(result["LCM"])
    lines = [
        f"| R@1 in % of {result['drawings']} labels, sharpness | {' | '.join(counts)} | training |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for name in ("undistilled", "LCM", "LCM-LoRA"):
        rates = " | ".join(_found(result[name][count]) for count in counts)
        spent = result["training_seconds"].get(name)
        training = "" if spent is None else f"{result['steps'][name]} steps of {result['batch_size']}, {spent:.0f} s"
        lines.append(f"| {name} | {rates} | {training} |")
    lines += ["", f"The teacher, 20 steps with guidance: {_found(result['teacher'])}. Trained on {result['device']}."]
    lines.append("Sharpness is that of a drawing over that of its real picture.")
    return "\n".join([*lines, *_sheet("finetune_lcm", "teacher; undistilled, LCM, LCM-LoRA at 8, 4, 2, 1 steps")])


def dmd(result: dict[str, Any]) -> str:
    """R@1 and sharpness of one step with and without distillation, and of the teacher."""
    lines = [
        f"| R@1 in % of {result['drawings']} labels, sharpness | |",
        "|---|---|",
        f"| teacher, 20 steps with guidance | {_found(result['teacher'])} |",
        f"| undistilled, 1 step | {_found(result['undistilled'])} |",
        f"| DMD, 1 step | {_found(result['DMD'])} |",
        "",
        f"{result['steps']} steps of {result['batch_size']}, {result['seconds']['training']:.0f} s on "
        f"{result['device']}, and {result['seconds']['pairs']:.0f} s for the pairs.",
    ]
    return "\n".join([*lines, *_sheet("finetune_dmd", "teacher; undistilled and DMD in one step")])


def _found(row: dict[str, float]) -> str:
    return f"{row['r1']:.1f}, {row['sharpness']:.2f}"


def controlnet(result: dict[str, Any]) -> str:
    """Whether drawings follow the edges, and still show what the label says."""
    lines = [
        "| condition | F1 of edges | base without condition | R@1 | R@1 of the base |",
        "|---|---|---|---|---|",
    ]
    base = f"{result['base']['r1']:.1f} %"
    for name, title in (("own edges", ""), ("moved edges", f", pictures at {result['moved_pictures_take']}")):
        row = result[name]
        lines.append(f"| {name}{title} | {row['f1']:.2f} | {row['f1_of_base']:.2f} | {row['r1']:.1f} % | {base} |")
    lines += ["", f"Trained for {result['training_seconds']:.0f} s on {result['device']}."]
    return "\n".join([*lines, *_sheet("finetune_controlnet", "edges, ControlNet, base")])


def _sheet(name: str, what: str) -> list[str]:
    return ["", f"![{what}](images/{name}.webp)", "", f"*{what[0].upper()}{what[1:]}.*"]

"""Writes the README's table, those of `docs/speed.md`, `docs/training_speed.md`, `docs/data.md` and
`docs/serving.md`, and `docs/speed.png`, from `benchmarks/results`.

python benchmarks/report.py
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers_dim.files import write_between


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "speed.png"
README = ROOT / "README.md"
SUMMARY_BEGIN, SUMMARY_END = "<!-- summary-bench:begin -->", "<!-- summary-bench:end -->"
SPEED_PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TRAINING_PAGE = ROOT / "docs" / "training_speed.md"
TRAINING_BEGIN, TRAINING_END = "<!-- train-bench:begin -->", "<!-- train-bench:end -->"
DESIGN_BEGIN, DESIGN_END = "<!-- design-bench:begin -->", "<!-- design-bench:end -->"
DATA_PAGE = ROOT / "docs" / "data.md"
DATA_BEGIN, DATA_END = "<!-- data-bench:begin -->", "<!-- data-bench:end -->"
SERVING_PAGE = ROOT / "docs" / "serving.md"
SERVING_BEGIN, SERVING_END = "<!-- serving-bench:begin -->", "<!-- serving-bench:end -->"
UNMEASURED = "unmeasured"
# Which JSON holds what: the published width on a CPU, the published model on a GPU, the embedded model.
CPU, GPU, EMBEDDED = "cpu", "full", "embedded"

KERNELS = {
    "layer_norm_modulate": "LayerNorm and adaLN modulate",
    "gate_residual": "gate and residual",
    "gate_residual_layer_norm_modulate": "both in one",
    "relu_linear_attention": "ReLU linear attention",
    "relu_linear_attention_state": "its state",
    "relu_linear_attention_apply": "its state applied",
    "gated_depthwise_conv": "gated depthwise convolution",
}
MEMORY = {
    "plain": "all on the GPU",
    "float8_weights": "weights in 8 bits (layerwise casting)",
    "model_offload": "`enable_model_cpu_offload`",
    "group_offload": "`enable_group_offload`, leaf level, streams",
    "sequential_offload": "`enable_sequential_cpu_offload`",
    "plain_4096": "4096 px, all on the GPU",
    "vae_tiling_4096": "4096 px, `vae.enable_tiling`",
}
APPROXIMATIONS = {
    "exact": "none",
    "first_block_cache_0.05": "`FirstBlockCacheConfig(threshold=0.05)`",
    "first_block_cache_0.1": "`FirstBlockCacheConfig(threshold=0.1)`",
    "first_block_cache_0.2": "`FirstBlockCacheConfig(threshold=0.2)`",
    "taylor_seer_2": "`TaylorSeerCacheConfig(cache_interval=2)`",
    "taylor_seer_4": "`TaylorSeerCacheConfig(cache_interval=4)`",
    "mag_cache": "`MagCacheConfig`, calibrated",
    "pyramid_attention_broadcast": "`PyramidAttentionBroadcastConfig`, every second step",
    "faster_cache": "`FasterCacheConfig`",
    "guidance_interval_0_0.5": "`guidance_interval=(0.0, 0.5)`",
    "guidance_interval_0.1_0.8": "`guidance_interval=(0.1, 0.8)`",
    "two_thirds_of_the_steps": "two thirds of the steps",
    "half_of_the_steps": "half of the steps",
    "a_third_of_the_steps": "a third of the steps",
}
DESIGN = {
    "separate": "`generate`, then encoding apart",
    "shared": "the picture seen once",
    "shared, static cache": "the same, static cache",
    "shared, compiled": "the same, compiled",
}
TRAINING = {
    "stock": "stock",
    "stock_checkpointing": "stock, gradient checkpointing",
    "ours": "ours",
    "ours_checkpointing": "ours, gradient checkpointing",
    "ours_compiled": "ours, compiled",
    "ours_compiled_checkpointing": "ours, compiled, gradient checkpointing",
}
OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "8-bit AdamW", "came": "CAME"}
GROWTH = {"size": "{} px", "batch": "batch {}", "tokens": "{} condition tokens"}
GROWTH_VALUES = {
    "size": [512, 1024, 2048, 4096],
    "batch": [1, 2, 4, 8, 16],
    "tokens": [256, 1024, 1791, 4096, 8192],
}


class Results:
    """The JSONs of a folder; what is not there is empty."""

    def __init__(self, folder: Path):
        self.files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}

    def section(self, file: str, section: str) -> dict[str, Any]:
        """A section's results, empty if it was not measured."""
        results = self.files.get(file, {}).get(section, {}).get("results", {})
        return {} if "unmeasured" in results else results

    def setting(self, file: str, section: str) -> str:
        """What a section was measured on, in words."""
        entry = self.files.get(file, {}).get(section)
        if entry is None or "unmeasured" in entry["results"]:
            return UNMEASURED
        return f"{entry['device']}, CPU threads {entry['threads']}, {entry['dtype']}"


def get(results: Any, *keys: str) -> Any:
    """The value at the end of `keys`, or `None` if it was not measured."""
    for key in keys:
        results = results.get(key) if isinstance(results, dict) else None
    return results


def seconds(value: float | None) -> str:
    if value is None:
        return UNMEASURED
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def number(value: float | None, form: str = "{:.2f}") -> str:
    return UNMEASURED if value is None else form.format(value)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right; one row if nothing is measured."""
    rows = list(rows)
    if all(cell == UNMEASURED for row in rows for cell in row[1:]):
        rows = [["all"] + [UNMEASURED] * (len(head) - 1)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def fastest(cell: dict[str, Any], prefix: str) -> float | None:
    """The median of the fastest variant whose name begins so."""
    times = [
        get(timing, "median_seconds") for name, timing in cell.get("variants", {}).items() if name.startswith(prefix)
    ]
    return min((time for time in times if time is not None), default=None)


def speed_table(results: Results) -> str:
    works = [
        (CPU, "call", ("text_to_image",), "text-to-image"),
        (CPU, "call", ("edit",), "edit"),
        (CPU, "step", ("first",), "first step"),
        (CPU, "step", ("later",), "later step"),
        (EMBEDDED, "edit", (), "embedded model: whole edit"),
        (GPU, "call", ("text_to_image",), "text-to-image"),
        (GPU, "call", ("edit",), "edit"),
        (GPU, "step", ("first",), "first step"),
        (GPU, "step", ("later",), "later step"),
        (GPU, "edit", (), "whole edit, from image and blueprint to picture"),
        (GPU, "vlm", ("all",), "vision-language model and connector"),
        (GPU, "vae", ("vae_encode",), "VAE, encoding"),
        (GPU, "vae", ("vae_decode",), "VAE, decoding"),
    ]
    places = {CPU: "CPU", GPU: "GPU", EMBEDDED: "CPU"}
    rows = []
    for file, section, keys, what in works:
        cell = get(results.section(file, section), *keys) or {}
        variants = cell.get("variants", {})
        # The VAE is the same on both sides; its variants are layouts.
        ours = fastest(cell, "") if section == "vae" else get(variants, "ours", "median_seconds")
        stock, floor = get(variants, "stock", "median_seconds"), get(cell, "floor", "seconds")
        compiled = None if section in ("vae", "vlm") else fastest(cell, "ours_")
        best = min(time for time in (ours, compiled) if time is not None) if ours else None
        rows.append(
            [
                f"{places[file]}: {what}",
                "the same part" if section in ("vae", "vlm") else seconds(stock),
                seconds(ours),
                "" if section in ("vae", "vlm") else number(stock / ours if stock and ours else None),
                "" if section in ("vae", "vlm") else seconds(compiled),
                seconds(floor),
                number(best / floor if best and floor else None),
            ]
        )
    head = ["", "stock", "ours", "times faster", "ours, compiled or fused", "floor", "times the floor"]
    return table(head, rows)


def kernel_table(results: Results) -> str:
    cells = results.section(GPU, "kernels")
    rows = []
    for name, words in KERNELS.items():
        row = [words]
        for direction in ("forward", "forward_and_backward"):
            variants = get(cells, name, direction, "variants") or {}
            for variant in ("definition", "definition_compiled", "ours"):
                row.append(seconds(get(variants, variant, "median_seconds")))
        rows.append([*row, number(get(cells, name, "forward", "variants", "ours", "times_the_floor"))])
    ways = ["plain", "plain, compiled", "kernel"]
    head = ["operation", *ways, *(f"{way}, with backward" for way in ways), "kernel, times the floor"]
    return table(head, rows)


def memory_table(results: Results) -> str:
    cells = results.section(GPU, "memory")
    rows = []
    for name, words in MEMORY.items():
        peak, time = get(cells, name, "peak_bytes"), get(cells, name, "median_seconds")
        rows.append([words, number(peak and peak / 1e9, "{:.2f} GB"), seconds(time)])
    return table(["one edit", "peak memory", "time"], rows)


def growth_table(results: Results) -> str:
    sections = {file: results.section(file, "growth") for file in (CPU, GPU)}
    rows = []
    for axis, form in GROWTH.items():
        for value in GROWTH_VALUES[axis]:
            row = [form.format(value)]
            for growth in sections.values():
                variants = get(growth, axis, "cells", str(value), "variants") or {}
                row += [seconds(get(variants, name, "median_seconds")) for name in ("ours", "stock")]
            rows.append(row)
        unit = {"size": "pixels", "batch": "pictures", "tokens": "tokens"}[axis]
        exponents = [
            get(growth, axis, "exponents", name) for growth in sections.values() for name in ("ours", "stock")
        ]
        rows.append([f"**exponent, of {unit}**", *(f"**{number(value)}**" for value in exponents)])
    return table(["one step", "CPU, ours", "CPU, stock", "GPU, ours", "GPU, stock"], rows)


def approximation_table(results: Results) -> str:
    cells, full = (get(results.section(file, "approximate"), "variants") or {} for file in (EMBEDDED, GPU))
    rows = []
    for name, words in APPROXIMATIONS.items():
        cell = cells.get(name, {})
        equal = name == "exact" and bool(cell)
        rows.append(
            [
                words,
                number(get(cell, "share_of_exact_flops"), "{:.0%}"),
                number(get(cell, "times_faster_than_exact")),
                number(get(full, name, "times_faster_than_exact")),
                "equal" if equal else number(get(cell, "mean_psnr"), "{:.1f} dB"),
                number(get(cell, "largest_difference"), "{:.0f}"),
                number(get(cell, "success"), "{:.0%}"),
            ]
        )
    head = ["approximation", "arithmetic left", "times faster, CPU", "times faster, GPU"]
    return table([*head, "PSNR to exact", "largest difference of 255", "edits that succeed"], rows)


def sizes(results: Results, file: str, section: str, form: str) -> str:
    """A phrase on the settings of a section, empty if it was not measured."""
    entry = results.files.get(file, {}).get(section)
    return "" if entry is None or "unmeasured" in entry["results"] else form.format(**entry)


def make_report(folder: Path = RESULTS) -> str:
    """The tables of `docs/speed.md`, in Markdown, of the JSONs in a folder."""
    results = Results(folder)
    call = "; {layers} layers, {size} px, {tokens} condition tokens, {steps} steps, guidance {guidance_scale}"
    grown = {place: get(results.section(file, "growth"), "layers") for file, place in ((CPU, "CPU"), (GPU, "GPU"))}
    layers = (
        ", ".join(f"{place}: {count} layer{'s' * (count > 1)}" for place, count in grown.items() if count)
        or UNMEASURED
    )
    work = get(results.section(EMBEDDED, "approximate"), "work")
    steps = get(results.section(EMBEDDED, "approximate"), "num_inference_steps")
    parts = [
        f"CPU: {results.setting(CPU, 'call')}{sizes(results, CPU, 'call', call)}. "
        f"GPU: {results.setting(GPU, 'call')}{sizes(results, GPU, 'call', call)}.",
        speed_table(results),
        f"A step of one picture without guidance, over sizes, batches and condition lengths ({layers}). Time grows as "
        "the amount to the power of the exponent.",
        growth_table(results),
        f"Approximations, on {work or 'held-out edits of the embedded model: ' + UNMEASURED}"
        f"{f' at {steps} steps' if steps else ''}.",
        approximation_table(results),
        f"Kernels against their definitions ({results.setting(GPU, 'kernels')}).",
        kernel_table(results),
        f"Peak GPU memory ({results.setting(GPU, 'memory')}).",
        memory_table(results),
    ]
    if results.files:
        parts.insert(2, "![Time of stock parts, of this package and of the floor; growth; approximations](speed.png)")
    return "\n\n".join(parts)


def summary_report(folder: Path = RESULTS) -> str:
    """The README's table, in Markdown, of the JSONs in a folder: the whole works, as far as they were measured."""
    results = Results(folder)
    places = {CPU: ("CPU", "{layers} layers at full width, {size} px"), GPU: ("GPU", "{layers} layers, {size} px")}
    rows = []
    for file, (place, form) in places.items():
        for kind, words in (("text_to_image", "text-to-image"), ("edit", "edit")):
            where = f"{words}, {place}, {sizes(results, file, 'call', form)}"
            rows.append((where, get(results.section(file, "call"), kind)))
    rows.append(("edit, CPU, embedded model, 64 px", results.section(EMBEDDED, "edit")))
    rows.append(("edit, GPU, from image and blueprint to picture", results.section(GPU, "edit")))
    measured = []
    for words, cell in rows:
        stock, ours = (get(cell, "variants", name, "median_seconds") for name in ("stock", "ours"))
        if stock and ours:
            measured.append([words, seconds(stock), seconds(ours), number(stock / ours)])
    text = table(["", "stock parts", "ours", "times faster"], measured or [[UNMEASURED] * 4])
    return text if results.section(GPU, "call") else f"{text}\n\nNothing has been measured on a GPU yet."


def design_report(folder: Path = RESULTS) -> str:
    """The table of designing, in Markdown, of the JSONs in a folder."""
    results = Results(folder)
    places = {f"design_{CPU}": "CPU", f"design_{GPU}": "GPU"}
    form = "; layers {layers}, {size} px, {results[picture_tokens]} picture tokens, {results[new_tokens]} written"
    heads = [
        f"{place}: {results.setting(file, 'design')}{sizes(results, file, 'design', form)}."
        for file, place in places.items()
    ]
    rows = []
    for name, words in DESIGN.items():
        cells = [get(results.section(file, "design"), "variants", name) for file in places]
        rows.append(
            [words]
            + [
                text
                for cell in cells
                for text in (
                    seconds(get(cell, "median_seconds")),
                    number(get(cell, "times_faster_than_separate")),
                )
            ]
        )
    head = ["design and encoding of one picture"]
    for place in places.values():
        head += [place, "times faster"]
    return " ".join(heads) + "\n\n" + table(head, rows)


def gigabytes(value: float | None) -> str:
    return number(value and value / 1e9, "{:.2f} GB")


def training_rates(timing: dict[str, Any]) -> list[str]:
    """What a timing of training steps says of a sample, of the work and of the device."""
    share = get(timing, "share_of_matmul_rate")
    mfu = get(timing, "mfu")
    return [
        seconds(get(timing, "seconds_a_sample")),
        number(get(timing, "times_faster_than_stock")),
        number(get(timing, "times_faster_by_processor")),
        number(share, "{:.0%}"),
        number(mfu, "{:.0%}"),
    ]


def equality_table(results: Results) -> str:
    rows = []
    for file, place in TRAINING_PLACES.items():
        cells = results.section(file, "equality")
        for name, words in TRAINING.items():
            row = [
                number(get(cells, dtype, name, what), "{:.1e}")
                for dtype in ("float32", "bfloat16")
                for what in ("loss", "gradient")
            ]
            if set(row) != {UNMEASURED}:
                rows.append([f"{place}: {words}", *row])
    head = ["difference to stock in float32", "loss, float32", "gradient, float32", "loss, bf16", "gradient, bf16"]
    return table(head, rows or [["", *[UNMEASURED] * 4]])


def step_table(results: Results, section: str) -> str:
    """Variants at batch 1, or each at the largest batch that fits."""
    rows = []
    for file, place in TRAINING_PLACES.items():
        cell = results.section(file, section)
        for name, words in TRAINING.items():
            timing = get(cell, "variants", name)
            if timing is None and file != f"training_{GPU}":
                continue
            row = training_rates(timing or {})
            if section == "largest_batch":
                batch = get(timing, "batch")
                more = " or more" if get(timing, "capped") else ""
                memory = get(cell, "memory")
                row = [gigabytes(memory), number(batch, "{}") + more, gigabytes(get(timing, "peak_bytes")), *row]
            rows.append([f"{place}: {words}", *row])
    head = ["a sample", "times faster than stock", "by processor time", "of the matmul rate", "MFU"]
    if section == "largest_batch":
        head = ["memory", "largest batch", "its peak", *head]
    return table(["", *head], rows)


def sizes_table(results: Results) -> str:
    rows = []
    for file, place in TRAINING_PLACES.items():
        cells = results.section(file, "table")
        for size, batches in cells.items():
            for batch, cell in batches.items():
                for name in ("ours_checkpointing", "ours_compiled_checkpointing"):
                    timing = get(cell, "variants", name)
                    if timing is not None:
                        row = [number(get(cell, "tokens"), "{}"), *training_rates(timing)[:1]]
                        row += [*training_rates(timing)[3:], gigabytes(get(cell, "peak_bytes"))]
                        rows.append([f"{place}: {size} px, batch {batch}, {TRAINING[name]}", *row])
        if not cells and file == f"training_{GPU}":
            rows.append([place, *[UNMEASURED] * 5])
    return table(["", "condition tokens", "a sample", "of the matmul rate", "MFU", "peak memory"], rows)


def optimizer_table(results: Results) -> str:
    measured = results.section(f"training_{GPU}", "optimizers")
    counted = measured or results.section(f"training_{CPU}", "optimizers")
    rows = []
    for name, words in OPTIMIZERS.items():
        timing = get(measured, name)
        rows.append(
            [
                words,
                gigabytes(get(counted, name, "published_state_bytes")),
                gigabytes(get(timing, "peak_bytes")),
                seconds(get(timing, "ours_checkpointing", "median_seconds")),
            ]
        )
    head = ["published model", "state, counted", "peak memory on the GPU", "step on the GPU"]
    return table(head, rows)


# Files of `benchmarks/training.py`, and what they are called.
TRAINING_PLACES = {f"training_{CPU}": "CPU", f"training_{EMBEDDED}": "embedded, CPU", f"training_{GPU}": "GPU"}


def training_report(folder: Path = RESULTS) -> str:
    """The tables of `docs/training_speed.md`, in Markdown, of the JSONs in a folder."""
    results = Results(folder)
    form = "; {layers} layers, {size} px, {tokens} condition tokens"
    settings = {
        section: ". ".join(
            f"{place}: {results.setting(file, section)}{sizes(results, file, section, form)}"
            f"{sizes(results, file, section, ', load average {load_average[0]:.1f} to {load_average[1]:.1f}')}"
            for file, place in TRAINING_PLACES.items()
        )
        for section in ("equality", "step", "largest_batch", "table", "optimizers")
    }
    parts = [
        "Losses and gradients are equal to rounding: relative differences on a padded batch with a dropped condition. "
        f"{settings['equality']}.",
        equality_table(results),
        f"A step at batch 1. {settings['step']}.",
        step_table(results, "step"),
        f"Each at the largest batch that fits the memory. {settings['largest_batch']}.",
        step_table(results, "largest_batch"),
        f"Sizes and batches. {settings['table']}.",
        sizes_table(results),
        f"Optimizers. {settings['optimizers']}.",
        optimizer_table(results),
    ]
    return "\n\n".join(parts)


DATA = "data_engine"  # the file of `benchmarks/data_engine.py`


def faults_table(results: Results) -> str:
    """What a killed command made of edits with planted faults."""
    head = ["planted faults, a judge that errs, kills", ""]
    found = results.section(DATA, "faults")
    if not found:
        return table(head, [["all", UNMEASURED]])

    def agreement(name: str) -> str:
        cell = found[name]
        both = " / ".join(number(cell[what], "{:.3f}") for what in ("recall", "precision"))
        return f"{both} ({cell['expected']:,} were to be dropped, {cell['dropped']:,} were)"

    def share(kind: str) -> str:
        counts = found["blueprints"][kind]
        return f"{counts['dropped']:,} of {sum(counts.values()):,}"

    planted = ", ".join(f"{count:,} {name}" for name, count in found["faults"].items() if name != "none")
    rows = [
        ["edits", f"{found['edits']:,} ({planted})"],
        ["kills", f"{len(found['kills'])}"],
        ["rows kept", f"{found['kept']:,}"],
    ]
    for stage, reasons in found["dropped"].items():
        rows += [[f"dropped by {stage}: {reason}", f"{count:,}"] for reason, count in reasons.items()]
    rows += [
        ["edits lost", f"{found['lost']:,}"],
        ["edits doubled", f"{found['doubled']:,}"],
        ["questions to the judge", f"{found['questions']:,}"],
        ["asked again though the answer was there", f"{found['repeated']:,}"],
        ["asked again since a kill came before the answer", f"{found['cut']:,}"],
        ["recall / precision of drops by filters and assessment", agreement("filters_and_assessment")],
        ["recall / precision of all drops", agreement("all_stages")],
        ["dropped of right blueprints", share("right")],
        ["dropped of mistaken ones that name another place", share("mistaken, another place")],
        ["dropped of mistaken ones that name the same place", share("mistaken, same place")],
    ]
    return table(head, rows)


def overhead_table(results: Results) -> str:
    cells = {size: cell for size, cell in results.section(DATA, "overhead").items() if size != "samples"}
    parts = {
        "engine": "the engine",
        "filters": "of that filters, with decoding",
        "decoding": "of that decoding",
        "engine_and_client": "the engine with the client of a server",
    }
    rows = []
    for variant, words in parts.items():
        timings = [get(cell, "variants", variant) for cell in cells.values()] or [None]
        names = ("milliseconds_a_sample", "processor_milliseconds_a_sample")
        rows.append([words, *(number(get(timing, name), "{:.2f} ms") for timing in timings for name in names)])
    head = ["time a sample"]
    for size, cell in cells.items():
        head += [f"{size} px, files of {cell['bytes_a_picture'] / 1000:.0f} kB", "by processor time"]
    return table(head if cells else [*head, "", "by processor time"], rows)


def stream_table(results: Results) -> str:
    found = results.section(DATA, "memory")
    names = ("resident_bytes", "peak_bytes", "index_bytes")
    head = ["rows so far", "resident", "peak", "of that the index of near-duplicates"]
    if not found:
        return table(head, [["all", *[UNMEASURED] * len(names)]])
    rows = [[f"{point['rows']:,}", *(f"{point[name] / 1e6:,.1f} MB" for name in names)] for point in found["points"]]
    growth = found["growth_by_10000_rows"]
    rows.append(["**growth by 10,000 rows**", *(f"**{growth[name] / 1e6:.2f} MB**" for name in names)])
    return table(head, rows)


def ray_table(results: Results) -> str:
    found = results.section(DATA, "ray")
    rows = []
    for workers in ("1", "2"):
        faster = get(found, "times_faster") if workers == "2" else (1.0 if found else None)
        rows.append([workers, seconds(get(found, "workers", workers, "median_seconds")), number(faster)])
    return table(["Ray workers", "a run", "times faster"], rows)


def data_report(folder: Path = RESULTS) -> str:
    """The tables of `docs/data.md`, in Markdown, of the JSONs in a folder."""
    results = Results(folder)
    form = "{device}, {cores} cores, load average {load_average[0]:.1f} to {load_average[1]:.1f}"
    more = {
        "faults": "; wrong are {error_rate:.0%} of its verdicts and of its blueprints",
        "overhead": "; median of {runs} runs of {samples} samples",
        "memory": "",
        "ray": "; median of {runs} runs of {ray_samples} samples, {answer_seconds:g} s an answer",
    }
    where = {section: sizes(results, DATA, section, form + words) or UNMEASURED for section, words in more.items()}
    alone = get(results.section(DATA, "ray"), "seconds_of_one_judge")
    least = "" if alone is None else f" One judge alone needs {seconds(alone)} for its answers."
    parts = [
        "The command `diffusers-dim data build`, killed at random moments and started again, on edits of the picture "
        f"world with a judge that errs ({where['faults']}).",
        faults_table(results),
        f"The engine's own time beside a judge that answers at once ({where['overhead']}). Samples are in memory.",
        overhead_table(results),
        f"Memory of a process that streams pairs of 64 px through the engine, all filters on ({where['memory']}).",
        stream_table(results),
        f"A run that waits for its judges ({where['ray']}). Ray and the workers are started before.{least}",
        ray_table(results),
    ]
    return "\n\n".join(parts)


SERVING = "serving"  # the file of `benchmarks/serving.py`


def hostile_table(results: Results) -> str:
    found = results.section(SERVING, "hostile")
    rows = []
    for index, cell in enumerate(found.get("rounds", []), start=1):
        good, hostile = cell["right"] + cell["wrong"], cell["hostile_as_expected"] + cell["hostile_otherwise"]
        memory = f"{cell['resident_bytes'] / 1e6:,.0f} MB"
        rows.append([f"{index}", f"{cell['right']} of {good}", f"{cell['hostile_as_expected']} of {hostile}", memory])
    head = ["round", "good ones answered right", "hostile ones answered as they should be", "server's memory after it"]
    return table(head, rows or [[UNMEASURED] * 4])


def batching_table(results: Results) -> str:
    found = results.section(SERVING, "batching")
    rows = []
    for size, timing in get(found, "max_batch_size").items() if found else ():
        faster = get(found, "times_faster") if rows else 1.0
        rate, filled = (number(get(timing, name)) for name in ("pictures_per_second", "pictures_per_call"))
        rows.append([size, seconds(get(timing, "median_seconds")), rate, filled, number(faster)])
    head = ["pictures a call, at most", "a run", "pictures a second", "pictures a call", "times the throughput"]
    return table(head, rows or [[UNMEASURED] * 5])


def serving_report(folder: Path = RESULTS) -> str:
    """The tables of `docs/serving.md`, in Markdown, of the JSONs in a folder."""
    results = Results(folder)
    form = (
        "{device}, {cores} cores, load average {load_average[0]:.1f} to {load_average[1]:.1f},"
        " one process with {threads} thread for the server; {clients} clients at once; "
    )
    more = {
        "hostile": "{requests} requests a round, {hostile_steps} steps",
        "batching": "median of {runs} runs of {batched} requests, {steps} steps, 64 px",
    }
    where = {section: sizes(results, SERVING, section, form + words) or UNMEASURED for section, words in more.items()}
    kinds = get(results.section(SERVING, "hostile"), "rounds")
    parts = [
        f"Good and hostile requests, nine to one ({where['hostile']}).",
        hostile_table(results),
        "The same requests painted one by one and together, before two servers that take turns"
        f" ({where['batching']}).",
        batching_table(results),
    ]
    if kinds:
        told = [
            f"{kind} ({'no answer to give' if 'gone' in found else next(iter(found))})"
            for kind, found in kinds[0]["hostile"].items()
        ]
        parts.insert(2, f"The hostile ones in turn, with the status that each gets: {', '.join(told)}.")
    return "\n\n".join(parts)


def update_readme(path: Path, report: str, begin: str = BEGIN, end: str = END) -> None:
    """
    Puts a report between a page's markers.

    Raises:
        ValueError: If the markers are not there.
    """
    write_between(path, begin, end, report)


def draw(folder: Path, path: Path) -> None:
    """Bars of calls, lines of growth and a cloud of approximations, as far as they were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = Results(folder)
    colours = {"stock": "#9aa0a6", "ours": "#1a73e8", "floor": "#34a853"}
    figure, (bars, lines, cloud) = plt.subplots(1, 3, figsize=(15, 4.6))

    # 1. Calls
    works = [
        (f"{place}\n{words}", cell)
        for file, place in ((CPU, "CPU"), (GPU, "GPU"))
        for kind, words in (("text_to_image", "text-to-image"), ("edit", "edit"))
        if (cell := get(results.section(file, "call"), kind))
    ]
    for place, (_, cell) in enumerate(works):
        values = {name: get(cell, "variants", name, "median_seconds") for name in ("stock", "ours")}
        values["floor"] = get(cell, "floor", "seconds")
        for offset, (name, value) in enumerate(values.items()):
            if value is not None and values["stock"]:
                share = value / values["stock"]
                label = None if place else name
                bar = bars.bar(place + 0.27 * (offset - 1), share, 0.25, color=colours[name], label=label)
                bars.bar_label(bar, [seconds(value)], fontsize=7)
    bars.set_xticks(range(len(works)), [words for words, _ in works])
    bars.set(ylabel="time, stock = 1", ylim=(0, 1.3), title="One call, from condition to latents")
    if works:
        bars.legend(frameon=False, ncols=3, loc="upper center")

    # 2. Growth
    growth = results.section(GPU, "growth") or results.section(CPU, "growth")
    for axis, marker in (("size", "o"), ("batch", "s"), ("tokens", "^")):
        base = get(growth, "base", axis)
        for name, style in (("stock", "--"), ("ours", "-")):
            points = sorted(
                ((float(value) / base) ** (2 if axis == "size" else 1), time)
                for value, cell in (get(growth, axis, "cells") or {}).items()
                if (time := get(cell, "variants", name, "median_seconds"))
            )
            power = get(growth, axis, "exponents", name)
            if points:
                label = f"{'pixels' if axis == 'size' else axis}, {name}" + (f" (power {power:.2f})" if power else "")
                lines.plot(*zip(*points), style, marker=marker, color=colours[name], alpha=0.85, label=label)
    lines.set(
        yscale="log",
        xlabel="times the preset's amount",
        ylabel="seconds a step",
        title="How a step grows",
    )
    lines.set_xscale("log", base=2)
    lines.xaxis.set_major_formatter("{x:g}")
    if growth:
        lines.legend(frameon=False, fontsize=8)

    # 3. Approximations
    variants = get(results.section(EMBEDDED, "approximate"), "variants") or {}
    short = {
        "first": "first block",
        "taylor": "TaylorSeer",
        "mag": "MagCache",
        "pyramid": "PAB",
        "faster": "FasterCache",
    }
    groups = {
        **short,
        "guidance": "guidance interval",
        "two": "fewer steps",
        "half": "fewer steps",
        "a": "fewer steps",
    }
    palette = dict(zip(dict.fromkeys(groups.values()), plt.get_cmap("tab10").colors))
    seen = set()
    for name, cell in variants.items():
        group = groups.get(name.split("_")[0])
        if group and get(cell, "mean_psnr") and get(cell, "times_faster_than_exact"):
            label = None if group in seen else group
            seen.add(group)
            cloud.scatter(cell["times_faster_than_exact"], cell["mean_psnr"], color=palette[group], s=60, label=label)
    cloud.set(
        xlabel="times faster than exact", ylabel="mean PSNR to exact, dB", title="Approximations, embedded model"
    )
    if seen:
        cloud.legend(frameon=False, fontsize=8)

    for axes in (bars, lines, cloud):
        axes.spines[["top", "right"]].set_visible(False)
        if not axes.has_data():
            axes.text(0.5, 0.5, UNMEASURED, ha="center", transform=axes.transAxes)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the JSONs.")
    parser.add_argument("--readme", type=Path, default=README, help="Whose table is written anew.")
    parser.add_argument("--speed_page", type=Path, default=SPEED_PAGE, help="Its tables, too.")
    parser.add_argument("--training_page", type=Path, default=TRAINING_PAGE, help="Its tables, too.")
    parser.add_argument("--data_page", type=Path, default=DATA_PAGE, help="Its tables, too.")
    parser.add_argument("--serving_page", type=Path, default=SERVING_PAGE, help="Its tables, too.")
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    update_readme(args.readme, summary_report(args.results), SUMMARY_BEGIN, SUMMARY_END)
    update_readme(args.speed_page, make_report(args.results))
    update_readme(args.speed_page, design_report(args.results), DESIGN_BEGIN, DESIGN_END)
    update_readme(args.training_page, training_report(args.results), TRAINING_BEGIN, TRAINING_END)
    update_readme(args.data_page, data_report(args.results), DATA_BEGIN, DATA_END)
    update_readme(args.serving_page, serving_report(args.results), SERVING_BEGIN, SERVING_END)
    if any(args.results.glob("*.json")):
        draw(args.results, args.plot)


if __name__ == "__main__":
    main()

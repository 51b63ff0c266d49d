"""DIM's claim at small scale, on two CPU cores: does a blueprint help a small painter where an edit needs design?

    python examples/reproduce_claim.py --work_dir .tiny_work/claim

The edits are those of the picture world whose instructions have to be thought through (`DESIGN_EDIT_KINDS`:
relations, superlatives, all but, counting, chains of two). For each seed two painters are trained from the same start,
on the same pictures in the same order; one reads the instructions, the other one the blueprints. Both then edit
pictures that neither has seen. The one with blueprints is also given those of other designers: none, and designers
that take a share of the words for places, sizes and colors for the opposite.

`--start` is the embedded model, which has read instructions and blueprints of plain edits. Each painter and each
measurement is kept in `--work_dir`: a run that was stopped goes on, and several may share the work, each with seeds or
arms of its own. `claim.json` and, by `--docs`, docs/claim.md and docs/claim.png tell what there is.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean

import torch

from diffusers_dim import TINY_SHAPES, DIMEditPipeline
from diffusers_dim.evaluation.shapes import evaluate_shapes
from diffusers_dim.evaluation.statistics import mean_interval
from diffusers_dim.files import write_between, write_lines
from diffusers_dim.tiny.dataset import write_edits
from diffusers_dim.tiny.judge import mistake_words
from diffusers_dim.tiny.world import DESIGN_EDIT_KINDS, EditSample, sample_edits
from make_tiny_shapes import fast_precision, finished_folder, launch


ARMS = ("instruction", "blueprint")  # what the painter reads
HELD_OUT_SEED = 1_000_000_007
# Who words the edit for the painter that reads blueprints: the share of words mistaken, `None` for no designer.
DESIGNERS: dict[str, float | None] = {
    "truth": 0.0,
    "5% of words mistaken": 0.05,
    "20% of words mistaken": 0.2,
    "50% of words mistaken": 0.5,
    "none": None,
}
# What is set side by side: each arm with the designer that it was trained with.
COMPARED = {"instruction": "none", "blueprint": "truth"}
BEGIN, END = "<!-- claim:begin -->", "<!-- claim:end -->"


def train(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """The painter of that arm and seed, trained if it is not there."""
    output = args.work_dir / f"{arm}-{seed}"
    if (output / "model_index.json").exists():
        return output
    data, conditions = (args.work_dir / f"{name}-{arm}" for name in ("edits", "conditions"))
    if not data.exists():
        with finished_folder(data) as aside:
            write_edits(aside, args.edits, args.data_seed, DESIGN_EDIT_KINDS, prompts=arm)
    model = {"pretrained_model_name_or_path": args.start, "resolution": 64}
    launch(
        "precompute_conditions.py",
        {**model, "kind": "edit", "jsonl": data / "edits.jsonl", "output_dir": conditions, "batch_size": 64},
    )
    start = time.monotonic()
    launch(
        "train_dim_edit.py",
        {
            **model,
            "precomputed_conditions": conditions,
            "group_by_length": None,
            "output_dir": output,
            "seed": seed,
            "train_batch_size": 64,
            "max_train_steps": args.steps,
            "learning_rate": args.learning_rate,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 50,
            "max_grad_norm": 1.0,
            "use_ema": None,
            "ema_decay": 0.998,
            "checkpointing_steps": 200,
            "checkpoints_total_limit": 1,
            "resume_from_checkpoint": "latest",
        },
        args.mixed_precision,
    )
    # Of the last start alone, where a training was stopped and went on.
    (output / "seconds.json").write_text(json.dumps(time.monotonic() - start))
    return output


def design(samples: list[EditSample], designer: str) -> list[EditSample]:
    """The samples with what that designer writes as their blueprints."""
    rate, rng = DESIGNERS[designer], random.Random(designer)
    if rate is None:
        return [replace(sample, blueprint=sample.instruction) for sample in samples]
    return [replace(sample, blueprint=mistake_words(sample.blueprint, rate, rng)) for sample in samples]


def measure(args: argparse.Namespace, arm: str, seed: int, designer: str) -> None:
    """Success of a painter on the held-out edits, to a file of its own."""
    path = args.work_dir / "measured" / f"{arm}-{seed}-{designer.replace(' ', '_')}.json"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    pipe = DIMEditPipeline.from_pretrained(args.work_dir / f"{arm}-{seed}", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    samples = design(sample_edits(args.held_out, HELD_OUT_SEED, kinds=DESIGN_EDIT_KINDS), designer)
    start = time.monotonic()
    report = evaluate_shapes(pipe, samples, blueprints=arm == "blueprint")
    facts = {"arm": arm, "seed": seed, "designer": designer, "edits": args.held_out, "steps": args.steps}
    succeeded = {kind: [score.success for score in scores] for kind, scores in report.scores.items()}
    write_lines(path, [json.dumps({**facts, "seconds": time.monotonic() - start, "succeeded": succeeded})])
    print(f"{arm}, seed {seed}, designer {designer}: {report.overall:.1%}", flush=True)


def read_measured(work_dir: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((work_dir / "measured").glob("*.json"))]


def of(measured: list[dict], arm: str, designer: str) -> list[dict]:
    """What was measured of the painters of that arm with that designer."""
    return [m for m in measured if (m["arm"], m["designer"]) == (arm, designer)]


def successes(measured: list[dict], kind: str | None) -> dict[int, list[float]]:
    """By seed, for each held-out edit of that kind, or of all, whether it succeeded."""
    kinds = DESIGN_EDIT_KINDS if kind is None else [kind]
    return {m["seed"]: [float(success) for kind in kinds for success in m["succeeded"][kind]] for m in measured}


def over_seeds(per_seed: dict[int, list[float]]) -> list[float]:
    """A value for each held-out edit: the seeds edit the same ones, which the intervals are over."""
    return [mean(edit) for edit in zip(*per_seed.values(), strict=True)]


def percent(measured: list[dict], kind: str | None = None) -> str:
    """Success over all seeds; of all kinds with its 95% interval and each seed's own."""
    per_seed = successes(measured, kind)
    every = over_seeds(per_seed)
    if not every:
        return "unmeasured"
    if kind is not None:
        return f"{mean(every):.1%}"
    low, high = mean_interval(every)
    seeds = ", ".join(f"{mean(seed):.0%}" for seed in per_seed.values())
    return f"{mean(every):.1%} ({low:.1%} to {high:.1%}; {seeds})"


def lift(without: list[dict], with_blueprints: list[dict], kind: str | None = None) -> str:
    """By how many points success is higher with blueprints, edit by edit, with its 95% interval."""
    less, more = successes(without, kind), successes(with_blueprints, kind)
    differences = over_seeds(
        {seed: [b - a for a, b in zip(less[seed], more[seed], strict=True)] for seed in less if seed in more}
    )
    if not differences:
        return "unmeasured"
    low, high = mean_interval(differences)
    return f"{100 * mean(differences):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def tables(args: argparse.Namespace, measured: list[dict]) -> Iterator[str]:
    """The lines of docs/claim.md between its marks."""
    main = {arm: of(measured, arm, designer) for arm, designer in COMPARED.items()}
    painters = sorted({f"{m['arm']}-{m['seed']}" for m in measured})
    times = [args.work_dir / painter / "seconds.json" for painter in painters]
    seconds = [json.loads(path.read_text()) for path in times if path.exists()]
    counts = {arm: len(found) for arm, found in main.items()}
    yield (
        f"Measured on {date.today()}, on a CPU: {args.steps} steps of 64 over {args.edits:,} edits for each painter,"
        f" seeds without blueprints: {counts['instruction']}, with: {counts['blueprint']}, {args.held_out} held-out"
        f" edits each. By the clock, on a core each and beside other work, training took {sum(seconds) / 60:.0f}"
        f" minutes for {len(seconds)} painters, and measuring {sum(m['seconds'] for m in measured) / 60:.0f}."
    )
    yield ""
    yield "| edit | without blueprints | with blueprints | points between |"
    yield "| --- | --- | --- | --- |"
    for kind in (*DESIGN_EDIT_KINDS, None):
        cells = ["**all**" if kind is None else kind.replace("_", " ")]
        cells += [*(percent(found, kind) for found in main.values()), lift(*main.values(), kind)]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "| designer for the painter with blueprints | success |"
    yield "| --- | --- |"
    for designer in DESIGNERS:
        yield f"| {designer} | {percent(of(measured, 'blueprint', designer))} |"
    yield "| self | the tiny model's reader is random and cannot write |"


def draw(measured: list[dict], path: Path) -> None:
    """Success by kind of edit and arm, and by designer, each seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained")
    colors = {"instruction": "#9aa5b1", "blueprint": "#2563eb"}
    for place, kind in enumerate((*DESIGN_EDIT_KINDS, None)):
        for shift, (arm, designer) in zip((-0.2, 0.2), COMPARED.items()):
            values = [100 * mean(seed) for seed in successes(of(measured, arm, designer), kind).values()]
            if values:
                left.bar(place + shift, mean(values), 0.38, color=colors[arm])
                left.plot([place + shift] * len(values), values, ".", color="#1d232a", markersize=5)
    left.set_xticks(range(6), [kind.replace("_", " ") for kind in DESIGN_EDIT_KINDS] + ["all"])
    left.set(ylim=(0, 100), ylabel="edits that succeeded, %", title="Painters trained with and without blueprints")
    figure.legend(
        handles=[pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()],
        labels=["reads the instruction", "reads the blueprint"],
        loc="outside lower left",
        frameon=False,
        ncols=2,
    )
    for place, designer in enumerate(DESIGNERS):
        values = [100 * mean(seed) for seed in successes(of(measured, "blueprint", designer), None).values()]
        if values:
            right.bar(place, mean(values), 0.6, color=colors["blueprint"])
            right.plot([place] * len(values), values, ".", color="#1d232a", markersize=5)
    right.set_xticks(range(len(DESIGNERS)), [name.replace(" of words ", "\n") for name in DESIGNERS])
    right.set(ylim=(0, 100), title="The same painter with other designers")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(args: argparse.Namespace) -> None:
    """Writes what was measured so far."""
    measured = read_measured(args.work_dir)
    if not measured:
        return
    write_lines(args.work_dir / "claim.json", [json.dumps(measured, indent=1)])
    print("\n".join(tables(args, measured)), flush=True)
    if args.docs is not None:
        write_between(args.docs / "claim.md", BEGIN, END, "\n".join(tables(args, measured)))
        draw(measured, args.docs / "claim.png")
        write_lines(args.docs / "claim.json", [json.dumps(measured)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=TINY_SHAPES, help="Pipeline to train from; the embedded model.")
    parser.add_argument("--work_dir", type=Path, default=Path(".tiny_work/claim"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="Which painters.")
    parser.add_argument("--edits", type=int, default=8000, help="Edits to train on.")
    parser.add_argument("--data_seed", type=int, default=77)
    parser.add_argument("--steps", type=int, default=400, help="Training steps of 64 edits.")
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--held_out", type=int, default=300, help="Edits to measure success on.")
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "bf16"],
        default=fast_precision(),
        help="bf16 by default on a GPU or with AVX-512, otherwise no.",
    )
    parser.add_argument("--only", choices=["train", "measure", "report"], help="One of the three; all by default.")
    parser.add_argument("--docs", type=Path, help="Folder of claim.md, whose tables and plot are written anew.")
    args = parser.parse_args()
    if not (args.start / "model_index.json").exists():
        parser.error(f"--start {args.start}: is no pipeline's folder: it holds no model_index.json.")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for arm in args.arms:
            if args.only in (None, "train"):
                train(args, arm, seed)
            if args.only in (None, "measure") and (args.work_dir / f"{arm}-{seed}" / "model_index.json").exists():
                for designer in DESIGNERS if arm == "blueprint" else ("none",):
                    measure(args, arm, seed, designer)
    if args.only in (None, "report"):
        report(args)


if __name__ == "__main__":
    main()

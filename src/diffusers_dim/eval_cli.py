# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Benchmarks on the command line: `diffusers-dim eval imgedit`, `gedit`, `geneval`, `mjhq`, `shapes`, `preservation` and
`compare`.

What works is imported inside the functions that need it, so that `--help` answers at once.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_common import check_writable, errors_in_one_line
from .devices import resolve_device
from .eval_stages import JUDGED, file_name, find_scores, read_run, read_scores, run_benchmark


eval_app = typer.Typer(
    help="Run benchmarks: paint what they ask for, score it, and report.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

BENCHMARKS = {
    "imgedit": "ImgEdit's Basic benchmark: 737 edits of nine types, scored by a judge.",
    "gedit": "GEdit-Bench: edits of eleven groups, scored by a judge with VIEScore.",
    "geneval": "GenEval: four pictures a prompt, scored from what its own evaluator found.",
    "mjhq": "MJHQ-30K: FID to 30,000 pictures, overall and by category.",
    "shapes": "The package's own picture world: held-out edits, scored exactly.",
}


def _add_benchmark(name: str, description: str) -> None:
    """Adds the command of a benchmark; they share their options."""
    not_judged, own = name not in JUDGED, name == "shapes"

    def command(
        context: typer.Context,
        output: Annotated[
            Path, typer.Option(help="The run's folder. A run that was stopped, and a later stage, go on from there.")
        ],
        data: Annotated[
            Path | None,
            typer.Option(
                help="The benchmark's data, as released.", show_default="made in --output" if own else "none"
            ),
        ] = None,
        only: Annotated[
            Literal["generate", "score", "report"] | None,
            typer.Option(help="Run one stage alone.", show_default="all three"),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(
                help="Diffusers folder or Hub repository id, to generate with.",
                show_default="the embedded model of shapes" if own else "none",
            ),
        ] = None,
        limit: Annotated[
            int | None, typer.Option(min=1, help="Take so many cases, evenly drawn.", show_default="all")
        ] = None,
        size: Annotated[
            int | None,
            typer.Option(
                min=1,
                help="Side of the pictures in pixels; of sources the centre is taken.",
                show_default="that of the data" if own else "1024",
            ),
        ] = None,
        steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps.", show_default="30")] = None,
        guidance_scale: Annotated[
            float | None,
            typer.Option(help="Guidance scale; off at 1.", show_default="the model's own" if own else "7.5"),
        ] = None,
        seed: Annotated[
            int | None, typer.Option(min=0, max=2**63 - 1, help="Of each case's noise.", show_default="233")
        ] = None,
        batch_size: Annotated[
            int | None, typer.Option(min=1, help="Cases a device and call.", show_default="1")
        ] = None,
        device: Annotated[
            str | None,
            typer.Option(help="Such as cpu, cuda or cuda:1, of a single process.", show_default="an accelerator"),
        ] = None,
        dtype: Annotated[
            Literal["auto", "float32", "bfloat16", "float16"] | None,
            typer.Option(help="Of the model.", show_default="bfloat16 on an accelerator that has it, else float32"),
        ] = None,
        designer: Annotated[
            Literal["none", "self", "vlm", "openai", "replay"] | None,
            typer.Option(
                help="Who words what is painted: nobody, the model's own vision-language model, another one, one"
                " behind a chat completions server (its key from OPENAI_API_KEY), or a file of blueprints.",
                show_default="none",
            ),
        ] = None,
        designer_model: Annotated[
            str | None, typer.Option(help="Of vlm a folder or Hub repository id, of openai a server's model.")
        ] = None,
        designer_base_url: Annotated[
            str | None, typer.Option(help="The server of openai.", show_default="OpenAI's")
        ] = None,
        designer_max_new_tokens: Annotated[
            int | None, typer.Option(min=1, help="Longest answer, thoughts too.", show_default="1024")
        ] = None,
        designer_batch_size: Annotated[
            int | None, typer.Option(min=1, help="Cases at a time, of vlm.", show_default="8")
        ] = None,
        designer_concurrency: Annotated[
            int | None, typer.Option(min=1, help="Requests at a time, of openai.", show_default="8")
        ] = None,
        on_failure: Annotated[
            Literal["error", "instruction"] | None,
            typer.Option(
                help="What a designer that fails twice leaves: an error, or the instruction as it is.",
                show_default="error",
            ),
        ] = None,
        blueprints: Annotated[
            Path | None, typer.Option(help="The jsonl of --designer replay, which it implies.", show_default="none")
        ] = None,
        judge: Annotated[
            Literal["openai", "vlm"] | None,
            typer.Option(
                hidden=not_judged,
                help="Who scores: a model behind a chat completions server (its key from OPENAI_API_KEY), or one that"
                " is loaded here.",
                show_default="openai",
            ),
        ] = None,
        judge_model: Annotated[
            str | None,
            typer.Option(
                hidden=not_judged,
                help="A server's model, or for vlm a folder or Hub repository id.",
                show_default="none",
            ),
        ] = None,
        judge_base_url: Annotated[
            str | None, typer.Option(hidden=not_judged, help="The server of openai.", show_default="OpenAI's")
        ] = None,
        judge_name: Annotated[
            str | None,
            typer.Option(
                hidden=not_judged,
                help="What the judge is called. One of another name is a second judge of the same run.",
                show_default="its model",
            ),
        ] = None,
        judge_max_new_tokens: Annotated[
            int | None,
            typer.Option(min=1, hidden=not_judged, help="Longest answer, thoughts too.", show_default="1024"),
        ] = None,
        judge_batch_size: Annotated[
            int | None, typer.Option(min=1, hidden=not_judged, help="Cases at a time, of vlm.", show_default="8")
        ] = None,
        judge_concurrency: Annotated[
            int | None,
            typer.Option(min=1, hidden=not_judged, help="Requests at a time, of openai.", show_default="8"),
        ] = None,
        budget_money: Annotated[
            float | None,
            typer.Option(
                min=0,
                hidden=not_judged,
                help="Stop the judge before it costs more; needs prices.",
                show_default="none",
            ),
        ] = None,
        budget_calls: Annotated[
            int | None, typer.Option(min=0, hidden=not_judged, help="Stop at so many calls.", show_default="none")
        ] = None,
        budget_tokens: Annotated[
            int | None,
            typer.Option(
                min=0, hidden=not_judged, help="Stop at so many tokens, asked and answered.", show_default="none"
            ),
        ] = None,
        budget_seconds: Annotated[
            float | None,
            typer.Option(min=0, hidden=not_judged, help="Stop after so many seconds.", show_default="none"),
        ] = None,
        price_prompt: Annotated[
            float | None,
            typer.Option(min=0, hidden=not_judged, help="Of a million tokens asked.", show_default="unknown"),
        ] = None,
        price_answer: Annotated[
            float | None,
            typer.Option(min=0, hidden=not_judged, help="Of a million tokens answered.", show_default="unknown"),
        ] = None,
        language: Annotated[
            Literal["en", "cn"] | None,
            typer.Option(hidden=name != "gedit", help="Of the instructions.", show_default="en"),
        ] = None,
        rewritten: Annotated[
            Path | None,
            typer.Option(
                hidden=name != "geneval",
                help="A jsonl of what to paint for each prompt: `prompt` and `rewritten`.",
                show_default="the prompts",
            ),
        ] = None,
        resize: Annotated[
            Literal["clean", "legacy_pytorch"] | None,
            typer.Option(
                hidden=name != "mjhq",
                help="How pictures are brought to Inception's size, by clean-fid's names.",
                show_default="clean",
            ),
        ] = None,
        features: Annotated[
            str | None,
            typer.Option(
                hidden=name != "mjhq",
                help="Folder or Hub repository id of a CLIP or DINOv2 model in Inception's place. The figures are then"
                " no FID, but Fréchet distances in its features.",
                show_default="Inception v3",
            ),
        ] = None,
        count: Annotated[
            int | None,
            typer.Option(min=1, hidden=not own, help="How many edits are made without --data.", show_default="600"),
        ] = None,
        data_seed: Annotated[
            int | None,
            typer.Option(min=0, hidden=not own, help="Of these edits.", show_default="one not trained on"),
        ] = None,
        kinds: Annotated[
            str | None,
            typer.Option(metavar="KIND,...", hidden=not own, help="Of these edits.", show_default="those trained on"),
        ] = None,
    ) -> None:
        with errors_in_one_line():
            run_benchmark(name, context.params)

    eval_app.command(name, help=description)(command)


for _name, _description in BENCHMARKS.items():
    _add_benchmark(_name, _description)


@eval_app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="A run's folder, with scores.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(help="Another's, of the same benchmark.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Markdown file to write; beside it a JSON file and a plot.")] = Path(
        "comparison.md"
    ),
    judge_name: Annotated[
        str | None, typer.Option(help="By whose scores, where both have several judges.", show_default="none")
    ] = None,
) -> None:
    """Compare two runs case by case: differences by group, intervals and significance."""
    with errors_in_one_line():
        from .evaluation.report import write_comparison
        from .evaluation.statistics import compare as compare_scores

        check_writable(output, "a file, such as comparison.md")
        first, second = read_scores(run_a), read_scores(run_b)
        names = [name for name in first if name in second]
        if judge_name is not None:
            names = [name for name in names if name == f"scores-{file_name(judge_name)}.json"]
        if len(names) != 1:
            has = f"{run_a} has {', '.join(first)}, {run_b} has {', '.join(second)}"
            raise ValueError(f"Name one judge of both runs by --judge-name: {has}.")
        a, b = first[names[0]], second[names[0]]
        found = compare_scores(a, b)
        try:
            write_comparison(a, b, output, found)
        except ImportError as error:
            raise ValueError(str(error)) from error
        for name, one in {**found.groups, "overall": found.overall}.items():
            if one.value is not None:
                p = "" if one.p is None else f", p {one.p:.4f}"
                typer.echo(f"{name}: {one.a:.3f} and {one.b:.3f}, {one.value:+.3f}{p}, of {one.pairs} pairs")
        typer.echo(f"Comparison: {output}")


@eval_app.command()
def preservation(
    run: Annotated[Path, typer.Option(help="The folder of a run of edits.")],
    targets: Annotated[
        Path | None,
        typer.Option(
            help="A jsonl with the true edits: `id` and `image_path_target`, relative to it.",
            show_default="those of shapes, else none",
        ),
    ] = None,
    metrics: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of psnr, ssim, lpips, dino and clip.")
    ] = "psnr,ssim,lpips,dino,clip",
    dino: Annotated[
        str | None, typer.Option(help="Folder or Hub repository id of a DINOv2 model.", show_default="none")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="The same of a CLIP model.", show_default="none")] = None,
    device: Annotated[str, typer.Option(help="Of the networks, such as cpu or cuda:1.")] = "auto",
) -> None:
    """Measure what edits kept and what they changed, without a judge."""
    with errors_in_one_line():
        from .cli_common import show_progress_on_terminals_only
        from .evaluation.preservation import Pair, load_metrics, measure_preservation
        from .files import read_jsonl, write_lines

        read_run(run, "")
        rows = list(read_jsonl(run / "cases.jsonl", ("id", "group", "files")).values())
        if not all("image_path" in row for row in rows):
            raise ValueError(f"{run} is no run of edits: its cases have no sources.")
        made = run / "data" / "edits.jsonl"
        targets = made if targets is None and made.exists() else targets
        true: dict[str, Path] = {}
        if targets is not None:
            for row in read_jsonl(targets, ("id", "image_path_target")).values():
                true[str(row["id"])] = targets.parent / row["image_path_target"]
        pairs = [
            Pair(
                row["id"],
                row["group"],
                Path(row["image_path"]),
                run / "pictures" / row["files"][0],
                true.get(row["id"]),
            )
            for row in rows
        ]
        show_progress_on_terminals_only()
        found, unmeasured = load_metrics(metrics.split(","), dino, clip, resolve_device(device))
        # Scores list those cases, too, that --limit left out.
        every = max((len(scores.cases) for scores in find_scores(run).values()), default=len(pairs))
        measured = measure_preservation(pairs, found, unmeasured, max(every, len(pairs)), sys.stderr.isatty())
        path = run / "preservation.json"
        write_lines(path, [json.dumps(measured.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)])
        typer.echo(f"{measured}\n\nPreservation: {path}")

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
A benchmark's stages as the commands of `diffusers-dim eval` run them: generate, score and report.

What works is imported inside the functions that need it, so that `--help` answers at once.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from .cli_common import (
    DESIGNER_OPTIONS,
    check_prices,
    choose_options,
    describe_calls,
    describe_unfinished,
    load_designer,
    load_pipeline,
    make_limits,
    run_designs,
)
from .devices import resolve_device, resolve_dtype


if TYPE_CHECKING:
    from accelerate import PartialState

    from .evaluation.benchmark import Benchmark, Case, Figure, Scores


STAGES = ("generate", "score", "report")
JUDGED = ("imgedit", "gedit")

# By stage, the options that are for it alone.
STAGE_OPTIONS = {
    "generate": (
        *("model", "limit", "size", "steps", "guidance_scale", "seed", "batch_size", "device", "dtype"),
        *("designer", "designer_model", "designer_base_url", "designer_max_new_tokens", "designer_batch_size"),
        *("designer_concurrency", "on_failure", "blueprints"),
    ),
    "score": (
        "features",
        *("judge", "judge_model", "judge_base_url", "judge_name", "judge_max_new_tokens", "judge_batch_size"),
        *("judge_concurrency", "budget_money", "budget_calls", "budget_tokens", "budget_seconds"),
        *("price_prompt", "price_answer", "resize"),
    ),
}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_options(name: str, given: dict[str, Any], stages: Sequence[str]) -> None:
    """
    Makes sure that options fit the benchmark and the stages, before anything is loaded.

    Raises:
        ValueError: If they do not; one that does not is named.
    """
    theirs = {"language": "gedit", "rewritten": "geneval", "resize": "mjhq", "features": "mjhq"}
    theirs |= dict.fromkeys(("count", "data_seed", "kinds"), "shapes")
    for option, benchmark in theirs.items():
        if given[option] is not None and benchmark != name:
            raise ValueError(f"{_option(option)}: is for `eval {benchmark}`.")
    if name not in JUDGED:
        for option in STAGE_OPTIONS["score"]:
            if given[option] is not None and option not in ("features", "resize"):
                raise ValueError(f"{_option(option)}: {name} is scored without a judge.")
    for stage, options in STAGE_OPTIONS.items():
        for option in options if stage not in stages else ():
            if given[option] is not None:
                raise ValueError(f"{_option(option)}: is nothing for --only {stages[0]}.")
    if name == "shapes":
        for option in ("count", "data_seed", "kinds"):
            if given[option] is not None and given["data"] is not None:
                raise ValueError(f"{_option(option)}: the edits of --data are there already.")
    elif given["data"] is None:
        raise ValueError("Give --data, the folder of the benchmark's data.")
    elif "generate" in stages and given["model"] is None:
        raise ValueError("Give --model, to generate with, or another stage by --only.")
    if given["blueprints"] is not None and given["designer"] not in (None, "replay"):
        raise ValueError(f"--blueprints: is nothing for --designer {given['designer']}.")
    if name in JUDGED and "score" in stages and given["judge_model"] is None:
        raise ValueError(f"{name} is scored by a judge: give --judge-model, or another stage by --only.")
    check_prices(given)


def options_of(who: Literal["designer", "judge"], kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """
    What was given of a designer's or judge's options, by the names that [`load_designer`] knows.

    Raises:
        ValueError: If one is nothing for it, or one is missing.
    """
    names = ("model", "base_url", "max_new_tokens", "batch_size", "concurrency")
    found = {_option(name): given[f"{who}_{name}"] for name in names}
    if who == "designer":
        found["--blueprints"] = given["blueprints"]
    try:
        options = choose_options(f"--{who}", kind, found, left_out=("--cache", "--device", "--dtype"))
    except ValueError as error:
        prefixed = "|".join(_option(name)[2:] for name in names)
        raise ValueError(re.sub(rf"--(?={prefixed})", f"--{who}-", str(error))) from error
    first = DESIGNER_OPTIONS[kind][0]
    if first not in options:
        raise ValueError(f"--{who} {kind}: needs {first if kind == 'replay' else f'--{who}-model'}.")
    return options


def load_benchmark(name: str, given: dict[str, Any]) -> "Benchmark":
    """The benchmark of that name over its data."""
    if name == "imgedit":
        from .evaluation.imgedit import ImgEdit

        return ImgEdit(given["data"])
    if name == "gedit":
        from .evaluation.gedit import GEdit

        return GEdit(given["data"], given["language"] or "en")
    if name == "geneval":
        from .evaluation.geneval import GenEval

        return GenEval(given["data"], given["rewritten"])
    if name == "mjhq":
        from .evaluation.mjhq import MJHQ

        return MJHQ(given["data"], given["resize"] or "clean", given["features"])
    from .evaluation.shapes import HELD_OUT_SEED, Shapes, write_held_out

    data = given["data"]
    if data is None:
        kinds = None if given["kinds"] is None else given["kinds"].split(",")
        data = given["output"] / "data"
        made_of = (given["count"], given["data_seed"], kinds)
        # A later stage takes what is there.
        if not (data / "edits.jsonl").exists() or made_of != (None, None, None):
            seed = HELD_OUT_SEED if given["data_seed"] is None else given["data_seed"]
            write_held_out(data, given["count"] or 600, seed, kinds)
    return Shapes(data)


def draw_evenly(cases: Sequence["Case"], count: int | None) -> list["Case"]:
    """So many of the cases, in their order, from all over them; all for `None`."""
    count = len(cases) if count is None else min(count, len(cases))
    return [cases[place * len(cases) // count] for place in range(count)]


def run_benchmark(name: str, given: dict[str, Any]) -> None:
    """
    Runs the stages of a benchmark that were asked for, this process its share, and prints what came of it.

    Args:
        name (`str`): One of `BENCHMARKS`.
        given (`dict`): The command's options by their parameters' names; `None` where nothing was given.

    Raises:
        ValueError: If an option makes no sense, or data, folder or pictures are not as they have to be.
        typer.Exit: With code 1 if a designer or judge failed for some, or a budget stopped the judge.
    """
    stages = STAGES if given["only"] is None else (given["only"],)
    check_options(name, given, stages)
    if given["device"] is not None:
        device = resolve_device(given["device"])
        if device.type == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"  # what `accelerate launch --cpu` sets

    from .evaluation.generation import start_processes

    output, count = given["output"], given["limit"]
    if "generate" not in stages:
        count = read_run(output, name)["cases"]
    elif (output / "run.json").exists():
        read_run(output, name, "choose another --output")
    state = start_processes()
    with state.main_process_first():  # it writes what the others then find
        benchmark = load_benchmark(name, given)
        every = benchmark.cases
        if benchmark.kind == "t2i":
            # Of text to image, scorers go by the files that are there, and not case by case.
            benchmark.cases = draw_evenly(every, count)
        benchmark.prepare(output / "pictures")
        if benchmark.kind == "edit":
            every = benchmark.cases
    painted = draw_evenly(every, count)
    if "generate" in stages:
        generate(benchmark, painted, given, state)
    state.destroy_process_group()
    if not state.is_main_process:
        return
    if "generate" in stages:
        files = sum(len(case.files) for case in painted)
        typer.echo(f"{files:,} pictures of {_of(painted, every)} cases: {output / 'pictures'}")
    else:
        check_run(output, painted)
    failed = ""
    if "score" in stages:
        failed = score(benchmark, painted, every, given)
    if "report" in stages:
        report(every, output)
    if failed:
        typer.echo(f"diffusers-dim: error: {failed}", err=True)
        raise typer.Exit(1)


def read_run(output: Path, name: str, advice: str = "generate first, or choose another --output") -> dict[str, Any]:
    """
    What `run.json` in a run's folder holds.

    Raises:
        ValueError: If there is none, or it is not of that benchmark.
    """
    path = output / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        found, _ = run["benchmark"], int(run["cases"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{output} holds no run ({' '.join(str(error).split())}): {advice}.") from error
    if name and found != name:
        raise ValueError(f"{output} holds a run of {found}, not of {name}: {advice}.")
    return run


def check_run(output: Path, painted: Sequence["Case"]) -> None:
    """Raises a `ValueError` if a folder's run is not of these cases as their data are now."""
    from .evaluation.generation import RunSettings, begin_run

    run = read_run(output, "")
    try:
        settings = RunSettings(**{field.name: run[field.name] for field in fields(RunSettings)})
    except KeyError as error:
        raise ValueError(f"{output / 'run.json'} is no run's: it lacks {error}.") from error
    begin_run(output, settings, painted)


def check_model(kind: Literal["edit", "t2i"], model: str) -> None:
    """Raises a `ValueError` if a model is no pipeline of that kind, without loading it."""
    from diffusers import DiffusionPipeline

    try:
        found = DiffusionPipeline.load_config(model).get("_class_name")
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: cannot be loaded ({' '.join(str(error).split())}).") from error
    found = found[-1] if isinstance(found, list | tuple) else found
    wanted = {"edit": "DIMEditPipeline", "t2i": "DIMPipeline"}[kind]
    if found != wanted:
        raise ValueError(f"--model {model}: has to be a {wanted}, but is a {found}.")


# Generate


def generate(benchmark: "Benchmark", painted: Sequence["Case"], given: dict[str, Any], state: "PartialState") -> None:
    """Has designers write blueprints where one was asked for, and paints what is not there."""
    from PIL import Image

    from .evaluation.benchmark import GUIDANCE_SCALE, SEED, SIZE, STEPS
    from .evaluation.generation import RunSettings, begin_run, name_model, paint_cases
    from .tiny import TINY_SHAPES

    output, model = given["output"], given["model"]
    model = TINY_SHAPES if model is None else model
    check_model(benchmark.kind, model)
    size, guidance_scale = given["size"], given["guidance_scale"]
    if benchmark.name == "shapes":
        if size is None:
            with Image.open(painted[0].image) as image:
                size = image.width
    elif guidance_scale is None:
        guidance_scale = GUIDANCE_SCALE
    who = given["designer"] or ("none" if given["blueprints"] is None else "replay")
    options = options_of("designer", who, given) if who in ("vlm", "openai", "replay") else {}
    settings = RunSettings(
        benchmark.name,
        name_model(model),
        str(resolve_dtype(given["dtype"] or "auto", state.device)).removeprefix("torch."),
        size or SIZE,
        size or SIZE,
        given["steps"] or STEPS,
        guidance_scale,
        SEED if given["seed"] is None else given["seed"],
        _name_designer(who, options),
    )
    blueprints = None
    if options:
        with state.main_process_first():
            if state.is_main_process:
                begin_run(output, settings, painted)
                write_blueprints(benchmark.kind, who, given["on_failure"] or "error", options, painted, output)
            blueprints = read_blueprints(output)

    def load(device: Any, dtype: Any) -> Any:
        if given["device"] is not None and state.num_processes == 1:
            device = resolve_device(given["device"])
        return load_pipeline(benchmark.kind, model, device, dtype)

    paint_cases(load, painted, output, settings, blueprints, given["batch_size"] or 1)


def _name_designer(who: str, options: dict[str, Any]) -> str:
    """As `run.json` has it."""
    if who in ("none", "self"):
        return "" if who == "none" else who
    from .evaluation.generation import name_model

    if who != "replay":
        return name_model(options["--model"])
    path = options["--blueprints"]
    if not path.is_file():
        raise ValueError(f"--blueprints {path}: there is no such file.")
    # What it holds tells one file of the name from another.
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def write_blueprints(
    kind: Literal["edit", "t2i"],
    who: str,
    on_failure: str,
    options: dict[str, Any],
    painted: Sequence["Case"],
    output: Path,
) -> None:
    """
    Writes what a designer makes of the cases of a run as `blueprints.jsonl`, each with its case's key as `id`. What is
    there is not asked for again.

    Raises:
        typer.Exit: With code 1 if it failed for some.
    """
    path = output / "blueprints.jsonl"
    if kind == "t2i":
        from .files import write_lines

        if path.exists():
            return
        designer = load_designer(who, on_failure, {**options, "--cache": output / "rewritten"})
        texts = designer.rewrite([case.prompt for case in painted])
        rows = [{"id": c.key, "prompt": text, "instruction": c.prompt} for c, text in zip(painted, texts, strict=True)]
        write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))
        typer.echo(f"{len(rows):,} prompts rewritten: {path}")
        return
    from .designers.jobs import DesignJob

    job = DesignJob(output / "cases.jsonl", path)
    if job.left:
        run_designs(job, who, on_failure, options)


def read_blueprints(output: Path) -> dict[str, str]:
    """What a run's `blueprints.jsonl` holds, by the cases' keys; empty where there is none."""
    from .files import iterate_jsonl

    path = output / "blueprints.jsonl"
    if not path.exists():
        return {}
    return {line.row["id"]: line.row["prompt"] for line in iterate_jsonl(path, ("id", "prompt"))}


def _of(painted: Sequence["Case"], every: Sequence["Case"]) -> str:
    return f"{len(every):,}" if len(painted) == len(every) else f"{len(painted):,} of {len(every):,}"


# Score


def score(benchmark: "Benchmark", painted: Sequence["Case"], every: Sequence["Case"], given: dict[str, Any]) -> str:
    """Scores a run's pictures, prints and keeps the figures, and says what is to be done again; "" for nothing."""
    from .evaluation.generation import check_pictures, name_model

    output, failed = given["output"], ""
    pictures = output / "pictures"
    check_pictures(painted, pictures)
    run = read_run(output, benchmark.name)
    if len(painted) < len(every):
        run["subset"] = f"{_of(painted, every)} cases, evenly drawn"
    judge = folder = answers = None
    path = output / "scores.json"
    if benchmark.name in JUDGED:
        judge = given["judge_name"] or name_model(given["judge_model"])
        name = file_name(judge)
        folder, path = output / "judged" / name, output / f"scores-{name}.json"
        answers, failed = ask_judge(benchmark, given, pictures, folder)
    try:
        scores = add_left_out(benchmark.score(run, pictures, answers, judge or ""), painted, every)
    except ImportError as error:
        raise ValueError(str(error)) from error
    scores.save(path)
    if folder is not None:
        benchmark.export(folder, scores, answers)
    for line in figures_table(scores.figures):
        typer.echo(line)
    typer.echo(f"Scores: {path}")
    return failed


def file_name(judge: str) -> str:
    """A judge's name, as those of its files have it."""
    return re.sub(r"[^\w.-]+", "-", judge).strip(".-") or "judge"


def ask_judge(
    benchmark: "Benchmark", given: dict[str, Any], pictures: Path, folder: Path
) -> tuple[dict[str, Any], str]:
    """The judge's answers by the cases' keys, and what is to be done again; "" for nothing."""
    from .data.engine.engine import EngineSummary
    from .evaluation.judging import judge_cases

    kind = given["judge"] or "openai"
    budget, prices = make_limits(given)
    judge = load_designer(kind, "error", options_of("judge", kind, given))
    answers = judge_cases(
        benchmark,
        pictures,
        judge,
        folder,
        only_present=True,  # that all pictures of the run are there was checked
        budget=budget,
        prices=prices,
        progress=sys.stderr.isatty(),
    )
    summary = EngineSummary.load(folder / "summary.json")
    typer.echo(f"{summary.samples:,} cases judged: {describe_calls(summary, prices)}: {folder}")
    return answers, next(iter(describe_unfinished(summary, folder)), "")


def add_left_out(scores: "Scores", painted: Sequence["Case"], every: Sequence["Case"]) -> "Scores":
    """Scores with those cases that were left out of the run, unscored, so that figures say of how many they are."""
    from .evaluation.benchmark import LEFT_OUT, CaseScore

    found = {case.key: case for case in scores.cases}
    missing = [case for case in every if case.key not in found]
    left = {case.key for case in every} - {case.key for case in painted}
    # A figure of a group is of its cases, any other one of all.
    groups = {case.group for case in every}
    figures = {
        name: replace(figure, cases=figure.cases + sum(name not in groups or case.group == name for case in missing))
        for name, figure in scores.figures.items()
    }
    cases = [
        CaseScore(case.key, case.group, None, reason=LEFT_OUT) if case.key in left else found[case.key]
        for case in every
    ]
    return replace(scores, figures=figures, cases=cases)


def figures_table(figures: dict[str, "Figure"]) -> list[str]:
    """Lines of a table, for people: the groups and what is overall; all else is in the report."""
    figures = {name: figure for name, figure in figures.items() if "/" not in name or name.endswith("/overall")}
    width = max(map(len, figures))
    lines = [f"{'':<{width}}  {'score':>8}  {'95% interval':>18}  n of N"]
    for name, figure in figures.items():
        value = "-" if figure.value is None else f"{figure.value:.3f}"
        interval = "-" if figure.low is None else f"{figure.low:.3f} to {figure.high:.3f}"
        lines.append(f"{name:<{width}}  {value:>8}  {interval:>18}  {figure.scored} of {figure.cases}")
    return lines


def find_scores(output: Path) -> dict[str, "Scores"]:
    """
    A run's scores by the names of their files; none if it was not scored.

    Raises:
        ValueError: If they are of pictures that are no longer this run's.
    """
    from .evaluation.benchmark import Scores

    run = read_run(output, "")
    found = {path.name: Scores.load(path) for path in sorted(output.glob("scores*.json"))}
    for name, scores in found.items():
        if changed := [setting for setting in run if scores.run.get(setting) != run[setting]]:
            raise ValueError(f"{output / name} is of another run ({', '.join(changed)}): score again, or remove it.")
    return found


def read_scores(output: Path) -> dict[str, "Scores"]:
    """
    The same of a run that was scored.

    Raises:
        ValueError: If it was not, or they are of pictures that are no longer this run's.
    """
    found = find_scores(output)
    if not found:
        raise ValueError(f"{output} holds no scores: score first.")
    return found


# Report


def report(every: Sequence["Case"], output: Path) -> None:
    """Writes a run's report of all judges' scores, and says where."""
    from .evaluation.report import write_report

    scores = list(read_scores(output).values())
    try:
        path = write_report(output, scores, every, output / "pictures", read_blueprints(output))
    except ImportError as error:
        raise ValueError(str(error)) from error
    typer.echo(f"Report: {path}")

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
What the commands share: errors, files, devices, pipelines and designers.

torch and the models are imported inside the functions that need them, so that `--help` answers at once.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from .devices import resolve_device, resolve_dtype


if TYPE_CHECKING:
    import torch

    from .data.engine.engine import Budget, EngineSummary, Prices
    from .designers import Designer
    from .designers.jobs import DesignJob
    from .pipelines import DIMPipeline


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turns the errors that bad input raises into a line on stderr and exit code 2, with no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        # A ValueError of ours may list what is wrong; libraries' OSErrors are broken into lines for no reason.
        message = str(error) if isinstance(error, ValueError) else " ".join(str(error).split())
        typer.echo(f"diffusers-dim: error: {message}", err=True)
        raise typer.Exit(2) from error


def check_writable(path: Path, hint: str) -> None:
    """Raises a `ValueError` if no file could be written there."""
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder; name {hint}.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--output {path}: there is no folder {folder}.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"--output {path}: cannot be written.")


def show_progress_on_terminals_only() -> None:
    """Keeps the libraries' progress bars out of log files."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


class GrowingText:
    """Prints a text as it grows, on stdout or, with `err`, on stderr. `printed` is what is there of it."""

    def __init__(self, err: bool = False):
        self.err = err
        self.printed = ""

    def show(self, text: str) -> None:
        """Prints what `text` has more than what was printed of it, or all of it where it is another one."""
        if not text.startswith(self.printed):
            typer.echo("\n\n", nl=False, err=self.err)
            self.printed = ""
        typer.echo(text[len(self.printed) :], nl=False, err=self.err)
        self.printed = text


def load_pipeline(
    kind: Literal["edit", "t2i"],
    model: str,
    device: "torch.device",
    dtype: "torch.dtype",
    offload: str = "none",
    vae_tiling: bool = False,
) -> "DIMPipeline":
    """
    Loads a pipeline for use: on its device or with offloading.

    Raises:
        ValueError: If `model` is no pipeline of that kind, or cannot be loaded.
    """
    from safetensors import SafetensorError

    from . import DIMEditPipeline, DIMPipeline
    from .loaders.released import REPO_ID

    if offload != "none" and device.type == "cpu":
        raise ValueError(f"--offload {offload}: needs an accelerator to load to, but the device is the CPU.")
    pipeline_class = DIMEditPipeline if kind == "edit" else DIMPipeline
    folder = Path(model).expanduser()
    if folder.exists():
        index = folder / "model_index.json"
        if not index.is_file():
            raise ValueError(f"--model {model}: holds no model_index.json. See `diffusers-dim convert --help`.")
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"--model {model}: its model_index.json names no pipeline class.") from error
        found = found[-1] if isinstance(found, list) else found
        if found != pipeline_class.__name__:
            hint = {
                "DIMEditPipeline": " `diffusers-dim edit` takes it.",
                "DIMPipeline": " `diffusers-dim generate` takes it.",
            }
            raise ValueError(
                f"--model {model}: has to be a {pipeline_class.__name__}, but is a {found}.{hint.get(found, '')}"
            )
    elif not REPO_ID.fullmatch(model):
        raise ValueError(f"--model {model}: is neither a folder here nor a Hub repository id (owner/name).")
    show_progress_on_terminals_only()
    try:
        pipe = pipeline_class.from_pretrained(folder if folder.exists() else model, dtype=dtype)
    except (OSError, SafetensorError) as error:
        where = "" if folder.exists() else "is no folder here, and as a Hub repository "
        raise ValueError(f"--model {model}: {where}cannot be loaded ({' '.join(str(error).split())})") from error
    if vae_tiling:
        pipe.vae.enable_tiling()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(desc="Denoising", disable=not sys.stderr.isatty())
    return pipe


# The options that each designer takes.
DESIGNER_OPTIONS = {
    "self": ("--model", "--batch-size", "--max-new-tokens", "--cache", "--device", "--dtype"),
    "vlm": ("--model", "--batch-size", "--max-new-tokens", "--cache", "--device", "--dtype"),
    "openai": ("--model", "--base-url", "--concurrency", "--max-new-tokens", "--cache"),
    "replay": ("--blueprints",),
}


def choose_options(option: str, kind: str, given: dict[str, Any], left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """
    What was given of a designer's options on the command line.

    Args:
        option (`str`): The option that chose the designer, such as "--designer".
        kind (`str`): The choice, one of `DESIGNER_OPTIONS`.
        given (`dict`):
            Values by the options' names; `None`, and "auto" for a device or dtype, where nothing was given.
        left_out (`tuple[str, ...]`): Options of the designer that the command has none of.

    Raises:
        ValueError: If one of them is nothing for this designer.
    """
    nothing = {"--device": "auto", "--dtype": "auto"}
    options = {name: value for name, value in given.items() if value not in (None, nothing.get(name))}
    taken = [name for name in DESIGNER_OPTIONS[kind] if name not in left_out]
    for name in options:
        if name not in taken:
            # Without the value: an address may hold a password.
            raise ValueError(f"{name}: is nothing for {option} {kind}, which takes {', '.join(taken)}.")
    return options


def check_prices(given: dict[str, Any]) -> None:
    """
    Makes sure that the options of prices and budget fit together.

    Raises:
        ValueError: If one price is missing, or both where a budget of money needs them.
    """
    if (given["price_prompt"] is None) != (given["price_answer"] is None):
        raise ValueError("Give both of --price-prompt and --price-answer; one may be 0.")
    if given["budget_money"] is not None and given["price_prompt"] is None:
        raise ValueError("--budget-money: needs --price-prompt and --price-answer.")


def make_limits(given: dict[str, Any]) -> "tuple[Budget, Prices | None]":
    """The budget and prices that were given for a judge."""
    from .data.engine.engine import Budget, Prices

    check_prices(given)
    budget = Budget(*(given[f"budget_{unit}"] for unit in ("money", "calls", "tokens", "seconds")))
    return budget, None if given["price_prompt"] is None else Prices(given["price_prompt"], given["price_answer"])


def describe_price(money: float, prices: "Prices | None") -> str:
    """What a judge's calls cost, in words."""
    return "at no known price" if prices is None else f"at a price of {money:,.4f}"


def describe_calls(summary: "EngineSummary", prices: "Prices | None") -> str:
    """What a judge was asked over all runs, in words."""
    return (
        f"{summary.calls:,} calls ({summary.asked:,} of them now), {summary.prompt_tokens:,} tokens asked and"
        f" {summary.tokens:,} answered, {describe_price(summary.money, prices)}, {summary.seconds:,.1f} s"
    )


def describe_unfinished(summary: "EngineSummary", folder: Path) -> list[str]:
    """Why a run with a judge is to be started again, in words; nothing if it is not."""
    reasons = []
    if summary.stopped is not None:
        reasons.append(f"stopped by the budget of {summary.stopped}; raise it to go on.")
    if summary.failed:
        reasons.append(
            f"the judge failed for {summary.failed:,}; run again to ask it again, and see {folder / 'dropped.jsonl'}."
        )
    return reasons


def run_designs(job: "DesignJob", kind: str, on_failure: str, options: dict[str, Any]) -> None:
    """
    Designs what is left of a job, tells what became of it and where it is. The designer, see [`load_designer`], is not
    even loaded if nothing is left.

    Raises:
        typer.Exit: With code 1 if there is no blueprint for some.
    """
    at_a_time = 4 * options.get("--concurrency", options.get("--batch-size", 8))
    designer = load_designer(kind, on_failure, options) if job.left else None
    summary = job.run(designer, at_a_time, sys.stderr.isatty())
    typer.echo(
        f"{summary.rows} of {len(job.rows)} designs: {summary.done} new ({summary.repaired} repaired,"
        f" {summary.cached} from the cache, {summary.fallbacks} the plain instruction), {summary.kept} before,"
        f" {summary.failed} failed, {summary.tokens:,} tokens, {summary.seconds:.1f} s: {job.output}"
    )
    if summary.failed:
        typer.echo(f"diffusers-dim: error: {summary.failed} failed: {job.failures}", err=True)
        raise typer.Exit(1)


def load_designer(kind: str, on_failure: str, options: dict[str, Any]) -> "Designer":
    """
    The designer of that kind.

    Args:
        kind (`str`): One of `DESIGNER_OPTIONS`.
        on_failure (`str`): See [`Designer`].
        options (`dict`): What was given on the command line by the options' names.

    Raises:
        ValueError: If it cannot be had, or an option is missing.
    """
    from .designers import BlueprintCache

    common: dict[str, Any] = {"on_failure": on_failure}
    if "--cache" in options:
        common["cache"] = BlueprintCache(options["--cache"])
    if "--max-new-tokens" in options:
        common["max_new_tokens"] = options["--max-new-tokens"]
    if kind == "replay":
        from .designers.replay import ReplayDesigner

        return ReplayDesigner(options["--blueprints"], **common)
    model = options["--model"]
    if kind == "openai":
        from .designers.openai import OpenAIDesigner

        try:
            return OpenAIDesigner(
                model, base_url=options.get("--base-url"), concurrency=options.get("--concurrency", 8), **common
            )
        except ImportError as error:
            raise ValueError(f"--designer openai: {error}.") from error
    common["batch_size"] = options.get("--batch-size", 8)
    device = resolve_device(options.get("--device", "auto"))
    dtype = resolve_dtype(options.get("--dtype", "auto"), device)
    if kind == "vlm":
        from .designers.vlm import VLMDesigner

        show_progress_on_terminals_only()
        return VLMDesigner(model, dtype=dtype, device=device, **common)
    from .designers.self_designer import SelfDesigner

    return SelfDesigner(load_pipeline("edit", model, device, dtype), **common)

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
The Hub on the command line: `diffusers-dim push`, `card` and `code`.

torch and the models are imported inside the functions that need them, so that `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .cli_common import check_writable, errors_in_one_line, show_progress_on_terminals_only


def push(
    model: Annotated[str, typer.Argument(help="A pipeline's folder, or its Hub repository.")],
    repo_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[REPO_ID]", help="Where to: OWNER/NAME, made if it is not there.", show_default="none"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the folder here, new or empty, and send nothing.", show_default="none")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    variant: Annotated[
        Literal["bf16", "fp16"] | None,
        typer.Option(help="Weights of that dtype, in files that bear its name.", show_default="as stored"),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Most bytes in a file of weights, such as 5GB.", show_default="the libraries' own"),
    ] = None,
    model_card: Annotated[
        Path | None,
        typer.Option(
            "--card", help="Its model card.", show_default="README.md of MODEL, or a released model's own card"
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Publish a pipeline on the Hub: weights, the code that loads them, and a model card that is whole."""
    with errors_in_one_line():
        if repo_id is None and output is None and not dry_run:
            raise ValueError("Give a REPO_ID to send it to, --output to write the folder, or --dry-run to see it.")
        if output is not None and (private or create_pr):
            raise ValueError("--private, --create-pr: are for sending, but --output sends nothing.")

        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        from .hub.upload import prepare_folder, prepared, upload

        show_progress_on_terminals_only()
        sends = output is None and not dry_run
        if sends and get_token() is None:
            raise ValueError("Sending needs a login: run `hf auth login`, or set HF_TOKEN in the environment.")
        options: dict[str, Any] = {
            "repo_id": repo_id,
            "variant": variant,
            "max_shard_size": max_shard_size,
            "model_card": model_card,
        }
        if output is not None:
            _show(output, prepare_folder(model, output, **options))
            return
        with prepared(model, **options) as (folder, files):
            _show(folder, files)
            if sends:
                try:
                    typer.echo(upload(folder, repo_id, private=private or None, create_pr=create_pr))
                except HfHubHTTPError as error:
                    raise ValueError(f"{repo_id}: the Hub refused it ({' '.join(str(error).split())}).") from error


def _show(folder: Path, files: list[Path]) -> None:
    sizes = [(folder / path).stat().st_size for path in files]
    for path, size in zip(files, sizes):
        typer.echo(f"{size:>16,} bytes  {path.as_posix()}")
    typer.echo(f"{sum(sizes):>16,} bytes  in {len(files)} files")


def card(
    name: Annotated[str, typer.Argument(help="A released model's name, or with --check a card's file.")],
    output: Annotated[Path | None, typer.Option(help="File to write.", show_default="print it")] = None,
    repo_id: Annotated[
        str | None, typer.Option(help="Where the model will be, for its examples.", show_default="its name")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say what is missing in a card's file.")] = False,
) -> None:
    """Write the model card of a released model, converted by this package, or check a card."""
    with errors_in_one_line():
        from .hub.card import render_released_card, validate_model_card

        if check:
            if output is not None or repo_id is not None:
                raise ValueError("--check: writes nothing, so it takes neither --output nor --repo-id.")
            validate_model_card(name)
            typer.echo(f"{name} is whole.")
            return
        if output is not None:
            check_writable(output, "a file, such as README.md")
        text = str(render_released_card(name, repo_id))
        if output is None:
            typer.echo(text, nl=False)
        else:
            output.write_text(text, encoding="utf-8")
            typer.echo(output)


def code(folder: Annotated[Path, typer.Argument(help="A pipeline's folder.")]) -> None:
    """Put into a folder the code that loads it where this package is not installed."""
    with errors_in_one_line():
        from .hub.code import save_code

        for path in save_code(folder):
            typer.echo(folder / path)

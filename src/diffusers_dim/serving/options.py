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
"""What the scripts of the app and of the server ask for alike: a pipeline, and a designer."""

import argparse
from pathlib import Path
from typing import Any

from ..cli_common import DESIGNER_OPTIONS, choose_options


def add_model_arguments(parser: argparse.ArgumentParser, kind: str, embedded: str) -> argparse._ArgumentGroup:
    """
    Adds what [`~diffusers_dim.cli_common.load_pipeline`] is told.

    Args:
        parser (`argparse.ArgumentParser`): Gets the options.
        kind (`str`): What the model is, with its article.
        embedded (`str`): What the embedded model is called, the default.

    Returns:
        `argparse._ArgumentGroup`: their group.
    """
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default=embedded, help=f"{kind}'s folder or repository; {embedded}, the embedded one, by default."
    )
    model.add_argument("--device", default="auto", help="Such as cpu or cuda:1; an accelerator where there is one.")
    model.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    model.add_argument("--offload", choices=["none", "model", "sequential", "group"], default="none")
    model.add_argument("--vae_tiling", action="store_true", help="Decode large pictures in tiles.")
    return model


def add_designer_arguments(parser: argparse.ArgumentParser, choices: list[str], words: str) -> argparse._ArgumentGroup:
    """
    Adds the choice of a designer, with what those of vlm and openai are told.

    Args:
        parser (`argparse.ArgumentParser`): Gets the options.
        choices (`list[str]`): The designers, "default" among them.
        words (`str`): What is said of the choice.

    Returns:
        `argparse._ArgumentGroup`: their group.
    """
    designer = parser.add_argument_group("designer")
    designer.add_argument("--designer", choices=choices, default="default", help=words)
    designer.add_argument("--designer_model", help="Of vlm and openai.")
    designer.add_argument("--designer_base_url", help="Of openai.")
    designer.add_argument("--designer_cache", type=Path, help="A folder that keeps blueprints, of vlm and openai.")
    designer.add_argument("--designer_max_new_tokens", type=int, help="Of vlm and openai.")
    return designer


def get_designer_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of a designer's options, as `diffusers-dim design` names them; `None` where nothing was."""
    return {
        "--model": args.designer_model,
        "--base-url": args.designer_base_url,
        "--cache": args.designer_cache,
        "--max-new-tokens": args.designer_max_new_tokens,
        "--blueprints": getattr(args, "blueprints", None),
    }


def choose_designer_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """
    What [`~diffusers_dim.cli_common.load_designer`] is told of the designer chosen.

    Raises:
        ValueError: If something was given that this designer takes nothing of, or what it needs was not.
    """
    options = choose_options("--designer", args.designer, get_designer_arguments(args))
    first = DESIGNER_OPTIONS[args.designer][0]
    if first not in options:
        needed = "--blueprints" if first == "--blueprints" else "--designer_model"
        raise ValueError(f"--designer {args.designer}: needs {needed}.")
    return options

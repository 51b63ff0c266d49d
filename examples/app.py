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
Edits pictures in the browser, by default with the embedded model on this machine's CPU.

    python examples/app.py
    python examples/app.py --model EDIT_MODEL --designer openai --designer_model gpt-4o

The key of a designer behind a chat completions server is taken from the environment variable OPENAI_API_KEY. See
docs/app.md.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusers_dim import TINY_SHAPES
from diffusers_dim.cli_common import load_designer, load_pipeline
from diffusers_dim.devices import resolve_device, resolve_dtype
from diffusers_dim.serving.options import (
    add_designer_arguments,
    add_model_arguments,
    choose_designer_arguments,
    get_designer_arguments,
)


EMBEDDED = "TINY_SHAPES"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, "An edit pipeline", EMBEDDED)
    add_designer_arguments(
        parser,
        ["default", "none", "shapes", "self", "vlm", "openai"],
        "Who is chosen to begin with: the model itself, by rule for the embedded one (shapes), or nobody; vlm and"
        " openai add one as `diffusers-dim design` has them.",
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", help="This machine alone by default, or what the environment variable GRADIO_SERVER_NAME says."
    )
    server.add_argument("--port", type=int, default=7860)
    server.add_argument("--share", action="store_true", help="Open a public address by Gradio's tunnel.")
    server.add_argument("--max_megabytes", type=int, default=16, help="The longest file, in MiB.")
    server.add_argument("--max_megapixels", type=int, default=16, help="The largest picture, in Mi pixels.")
    server.add_argument("--max_steps", type=int, default=100)
    server.add_argument("--max_candidates", type=int, default=4, help="Pictures at a time.")
    server.add_argument("--per_minute", type=int, default=20, help="Designs and paintings of a session.")
    args = parser.parse_args(arguments)
    for name in ("max_megabytes", "max_megapixels", "max_steps", "max_candidates", "per_minute"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}.")
    return args


def load_designers(args: argparse.Namespace, pipe: Any, embedded: bool) -> tuple[dict[str, Any], list, str]:
    """The designers by name, what they are called with their names, and who is chosen to begin with."""
    from diffusers_dim.designers import SelfDesigner
    from diffusers_dim.tiny.designer import ShapesDesigner

    designers: dict[str, Any] = {}
    called = []
    if embedded or args.designer == "shapes":
        designers["shapes"] = ShapesDesigner()
        called.append(("By rule, for flat shapes", "shapes"))
    # The embedded model is too small to write.
    if not embedded or args.designer == "self":
        designers["self"] = SelfDesigner(pipe)
        called.append(("The model itself", "self"))
    if args.designer in ("vlm", "openai"):
        options = choose_designer_arguments(args)
        if args.designer == "vlm":
            options |= {"--device": args.device, "--dtype": args.dtype}
        designers[args.designer] = load_designer(args.designer, "error", options)
        called.append((args.designer_model, args.designer))
    elif any(get_designer_arguments(args).values()):
        raise ValueError(f"--designer {args.designer}: takes no --designer_... options; vlm and openai do.")
    designers["none"] = None
    called.append(("Nobody", "none"))
    chosen = ("shapes" if embedded else "self") if args.designer == "default" else args.designer
    return designers, called, chosen


def load_examples(embedded: bool) -> list:
    """Pictures of the picture world with instructions, drawn here; at twice its size and more for other models."""
    from diffusers_dim.tiny import sample_edits

    wanted = ("recolor", "replace", "remove", "add", "move", "background")
    samples = sample_edits(len(wanted), seed=4, size=64 if embedded else 512, kinds=wanted)
    samples.sort(key=lambda sample: wanted.index(sample.kind))
    return [(sample.source, sample.instruction) for sample in samples]


def main(args: argparse.Namespace) -> None:
    try:
        from starlette.middleware import Middleware

        from diffusers_dim.app.guard import Gate, close_downloads
        from diffusers_dim.app.page import CSS, THEME, Page
        from diffusers_dim.app.studio import Limits, Studio
    except ImportError as error:
        raise ValueError(f"The app needs Gradio: pip install 'diffusers-dim[serve]' ({error}).") from error

    embedded = args.model in (EMBEDDED, TINY_SHAPES)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    model = TINY_SHAPES if embedded else args.model
    pipe = load_pipeline("edit", model, device, dtype, args.offload, args.vae_tiling)
    pipe.set_progress_bar_config(disable=True)
    designers, called, chosen = load_designers(args, pipe, embedded)
    limits = Limits(
        bytes=args.max_megabytes * 1024**2,
        pixels=args.max_megapixels * 1024**2,
        steps=args.max_steps,
        candidates=args.max_candidates,
        per_minute=args.per_minute,
    )
    page = Page(
        Studio(pipe, designers, limits),
        called,
        chosen,
        load_examples(embedded),
        Path(os.environ["GRADIO_TEMP_DIR"]),
        "the embedded model of shapes" if embedded else Path(model).name,
    ).build()
    close_downloads()
    page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        show_error=False,
        max_file_size=limits.bytes,
        allowed_paths=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        footer_links=["api"],
        theme=THEME,
        css=CSS,
        app_kwargs={"middleware": [Middleware(Gate, max_bytes=limits.bytes)], "docs_url": None, "redoc_url": None},
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder below goes away
    with tempfile.TemporaryDirectory(prefix="diffusers-dim-app-") as folder:
        # A folder of its own: whatever is in Gradio's common one may be read by name.
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": str(Path(folder).resolve()),
            "GRADIO_EXAMPLES_CACHE": str(Path(folder).resolve() / "examples"),
        }
        try:
            main(parse_args())
        except (ValueError, OSError) as error:
            sys.exit(f"app.py: error: {error}")

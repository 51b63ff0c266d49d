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
Serves a pipeline to OpenAI's clients, by default the embedded model on this machine alone.

    python examples/serve.py --model EDIT_MODEL --port 8000

With `--num_replicas` Ray Serve runs as many pipelines, on one machine or on a cluster that RAY_ADDRESS names, and
spreads the requests over them. The API key is taken from the environment variable DIM_API_KEY; that of a designer
behind a chat completions server from OPENAI_API_KEY. See docs/serving.md.
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from diffusers_dim import TINY_SHAPES
from diffusers_dim.cli_common import DESIGNER_OPTIONS, load_designer, load_pipeline
from diffusers_dim.devices import resolve_device, resolve_dtype
from diffusers_dim.serving.app import ServingSettings, create_app
from diffusers_dim.serving.options import (
    add_designer_arguments,
    add_model_arguments,
    choose_designer_arguments,
    get_designer_arguments,
)


EMBEDDED = "TINY_SHAPES"
# Settings that are options of their own kind here.
OTHERWISE_SET = ("model_name", "api_key", "fetch_urls")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = add_model_arguments(parser, "A pipeline", EMBEDDED)
    model.add_argument("--kind", choices=["edit", "t2i"], default="edit", help="What the pipeline does.")
    model.add_argument("--model_name", help="What clients call it; the folder's or repository's own name by default.")
    designer = add_designer_arguments(
        parser,
        ["default", "none", *DESIGNER_OPTIONS],
        "Who writes blueprints: the model's default, nobody, or as with `diffusers-dim design`.",
    )
    designer.add_argument("--blueprints", type=Path, help="Of replay.")
    designer.add_argument(
        "--on_failure",
        choices=["error", "instruction"],
        default="instruction",
        help="What a designer that fails leaves: an error, or the instruction as it is.",
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="127.0.0.1, this machine alone, by default.")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--fetch_urls", action="store_true", help="Allow `image_url`, of public hosts.")
    limits = parser.add_argument_group("limits", "See docs/serving.md.")
    for setting in fields(ServingSettings):
        if setting.name not in OTHERWISE_SET:
            kind = float if setting.name.endswith("_seconds") else int
            assert setting.default is not MISSING
            limits.add_argument(f"--{setting.name}", type=kind, default=setting.default, help=f"{setting.default}")
    ray = parser.add_argument_group("Ray Serve")
    ray.add_argument("--num_replicas", type=int, help="Pipelines; without it one runs in this process, without Ray.")
    ray.add_argument("--num_gpus_per_replica", type=float, default=0)
    ray.add_argument("--num_cpus_per_replica", type=float, default=1)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port has to lie in [0, {2**16}), but is {args.port}.")
    if args.num_replicas is not None and args.num_replicas < 1:
        parser.error(f"--num_replicas has to be at least 1, but is {args.num_replicas}.")
    if args.model_name is None:
        args.model_name = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    if args.model == EMBEDDED:
        args.model = TINY_SHAPES
    try:
        args.settings = ServingSettings(
            **{
                setting.name: getattr(args, setting.name)
                for setting in fields(ServingSettings)
                if hasattr(args, setting.name)
            },
            api_key=os.environ.get("DIM_API_KEY") or None,
        )
        args.designer_options = find_designer_options(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def find_designer_options(args: argparse.Namespace) -> dict:
    """What was given of a designer's options, as `diffusers-dim design` names them."""
    if args.designer not in ("default", "none", "self"):
        return choose_designer_arguments(args)
    if named := [name for name, value in get_designer_arguments(args).items() if value is not None]:
        raise ValueError(f"--designer {args.designer}: takes none of {', '.join(named)}.")
    return {}


def build_app(args: argparse.Namespace):
    """Loads the pipeline and its designer, and makes the app."""
    device = resolve_device(args.device)
    pipe = load_pipeline(
        args.kind, args.model, device, resolve_dtype(args.dtype, device), args.offload, args.vae_tiling
    )
    pipe.set_progress_bar_config(disable=True)
    if args.designer == "none":
        pipe.designer = None
    elif args.designer == "self":
        pipe.designer = "self"
        pipe.designer.on_failure = args.on_failure
    elif args.designer != "default":
        pipe.designer = load_designer(args.designer, args.on_failure, args.designer_options)
    return create_app(pipe, args.settings)


def serve_on_ray(args: argparse.Namespace) -> None:
    """Runs replicas until SIGTERM or SIGINT; they finish what they have begun."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    settings = args.settings
    deployment = serve.deployment(
        serve.ingress(lambda: build_app(args))(),
        name="dim",
        num_replicas=args.num_replicas,
        # A replica's own queue refuses what is too much for it.
        max_ongoing_requests=settings.max_queue + settings.max_uploads,
        graceful_shutdown_timeout_s=settings.grace_seconds,
        ray_actor_options={"num_cpus": args.num_cpus_per_replica, "num_gpus": args.num_gpus_per_replica},
    )
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(deployment.bind(), name="dim")
    print(f"{args.num_replicas} replicas of {settings.model_name}: http://{args.host}:{args.port}/v1", flush=True)
    ended = False

    def end(number: int, frame: Any) -> None:
        nonlocal ended
        ended = True

    for number in (signal.SIGTERM, signal.SIGINT):  # in the place of Ray's own
        signal.signal(number, end)
    while not ended:
        time.sleep(0.1)
    serve.shutdown()
    ray.shutdown()


def main(args: argparse.Namespace) -> None:
    if args.num_replicas is not None:
        serve_on_ray(args)
        return
    from diffusers_dim.serving.server import run_server

    app = build_app(args)
    run_server(app, args.host, args.port, args.settings.grace_seconds)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (ImportError, ValueError) as error:
        sys.exit(f"serve.py: error: {error}")

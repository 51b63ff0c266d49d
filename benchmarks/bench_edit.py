"""Times edits, loading aside: `python benchmarks/bench_edit.py` for one edit of the embedded model.

Prints a JSON report, and keeps it in `benchmarks/results/`.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_dim import TINY_SHAPES, DIMEditPipeline, __version__
from diffusers_dim.tiny import sample_edits


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")


def device_name(device: str) -> str:
    """The accelerator's own name, or the processor's model where the system tells it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY_SHAPES, help="Diffusers folder of an edit model.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=1, help="Edits before the timed ones.")
    parser.add_argument("--runs", type=int, default=7, help="Timed edits.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "edit_tiny.json")
    args = parser.parse_args()
    if args.runs < 1 or args.warmup < 0:
        parser.error(f"--runs has to be at least 1 and --warmup at least 0, but they are {args.runs}, {args.warmup}.")

    pipe = DIMEditPipeline.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    sample = sample_edits(1, seed=0)[0]
    seconds = []
    for _ in tqdm(range(args.warmup + args.runs), desc="edits", disable=None):
        start = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(0)
        result = pipe(
            sample.source, sample.instruction, num_inference_steps=args.num_inference_steps, generator=generator
        )
        # The result is a PIL picture, so the device is done.
        seconds.append(round(time.perf_counter() - start, 4))
    seconds = seconds[args.warmup :]

    report = {
        "benchmark": "one edit, loading aside",
        "command": shlex.join(["python", "benchmarks/bench_edit.py", *sys.argv[1:]]),
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "model": "embedded (TINY_SHAPES)" if args.model == TINY_SHAPES else args.model,
        "size": list(result.images[0].size),
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": pipe.guidance_scale,
        "dtype": args.dtype,
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"diffusers-dim": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
    }
    text = json.dumps(report, indent=2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Times this package against stock diffusers parts and against the machine's floor.

    python benchmarks/bench.py call step growth --preset cpu
    python benchmarks/bench.py --preset full --device cuda

Results go to `benchmarks/results/NAME.json`, one entry a section with the command, versions and machine that it was
measured with; `benchmarks/report.py` makes the tables of `docs/speed.md` of them. What cannot be measured says so,
and why.
"""

import argparse
import dataclasses
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import torch

import sections
from approximate import bench_approximate
from measure import device_name, measure_machine, package_versions, unmeasured
from presets import PRESETS
from sections import VARIANTS, Bench


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "call": sections.bench_call,
    "step": sections.bench_step,
    "edit": sections.bench_edit,
    "vlm": sections.bench_vlm,
    "vae": sections.bench_vae,
    "kernels": sections.bench_kernels,
    "memory": sections.bench_memory,
    "growth": sections.bench_growth,
    "approximate": bench_approximate,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"Among {', '.join(SECTIONS)}; all by default.")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 by default, float32 on a CPU.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="All by default, on a CPU ours and stock.")
    parser.add_argument("--name", help="Of the JSON; the preset's by default.")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="The JSON's folder.")
    parser.add_argument("--layers", type=int, help="Of the transformer.")
    parser.add_argument("--edits", type=int, default=24, help="Held-out edits of the section approximate.")
    for name in ("size", "tokens", "steps", "batch", "runs"):
        parser.add_argument(f"--{name}", type=int, help="In place of the preset's.")
    parser.add_argument("--guidance_scale", type=float, help="In place of the preset's.")
    args = parser.parse_args()
    check_sections(parser, args.sections, SECTIONS)
    return args


def check_sections(parser: argparse.ArgumentParser, names: list[str], sections: dict[str, Callable]) -> None:
    """Ends the script where a section is asked for that there is not."""
    unknown = [name for name in names if name not in sections]
    if unknown:
        parser.error(f"sections have to be among {list(sections)}, but hold {unknown}.")


def run_sections(
    sections: dict[str, Callable[[Any], dict[str, Any]]],
    names: list[str],
    bench: Any,
    environment: dict[str, Any],
    path: Path,
) -> None:
    """Runs the sections named, or all, on `bench`, and writes each one's results with `environment` to a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in names or sections:
        print(f"{name} ...", file=sys.stderr, flush=True)
        load = os.getloadavg()[0]
        try:
            result = sections[name](bench)
        except RuntimeError as error:
            result = unmeasured(error)
            print(f"{name} is unmeasured: {result['unmeasured']}", file=sys.stderr)
        # What else ran meanwhile; of these, one is this process.
        loads = {"load_average": [load, os.getloadavg()[0]]}
        # Written after each, so that a section that fails takes no other's figures with it.
        results[name] = rounded({**environment, **loads, "results": result})
        path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def run_presets(
    script: str,
    description: str | None,
    sections: dict[str, Callable[[Any], dict[str, Any]]],
    presets: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """
    The command line of a benchmark whose presets are of one dataclass, with an option for each of its fields: runs
    sections and prints the JSON's path. The preset "full" is the default one; `more` goes with the environment.
    """
    fields = dataclasses.fields(presets["full"])
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"Among {', '.join(sections)}; all by default.")
    parser.add_argument("--preset", choices=presets, default="full")
    parser.add_argument("--name", help="Of the JSON.")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="The JSON's folder.")
    for field in fields:
        several = get_origin(field.type) is tuple
        parser.add_argument(
            f"--{field.name}",
            type=get_args(field.type)[0] if several else field.type,
            nargs="+" if several else None,
            help="In place of the preset's.",
        )
    args = parser.parse_args()
    check_sections(parser, args.sections, sections)
    given = {field.name: getattr(args, field.name) for field in fields if getattr(args, field.name) is not None}
    bench = dataclasses.replace(presets[args.preset], **given)
    environment = {
        "command": shlex.join(["python", f"benchmarks/{script}.py", *sys.argv[1:]]),
        "device": device_name(bench.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "preset": args.preset,
        **dataclasses.asdict(bench),
        "versions": package_versions(),
        **(more or {}),
    }
    path = args.results / f"{args.name or (script if args.preset == 'full' else f'{script}_{args.preset}')}.json"
    run_sections(sections, args.sections, bench, environment, path)
    print(path)


def rounded(result: Any) -> Any:
    """`result` with its numbers to six digits."""
    if isinstance(result, dict):
        return {key: rounded(value) for key, value in result.items()}
    if isinstance(result, list):
        return [rounded(value) for value in result]
    return float(f"{result:.6g}") if isinstance(result, float) else result


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    overrides = ("size", "tokens", "steps", "batch", "runs", "guidance_scale")
    preset = PRESETS[args.preset]
    preset = dataclasses.replace(
        preset, **{name: getattr(args, name) for name in overrides if getattr(args, name) is not None}
    )
    if args.layers is not None:
        preset = dataclasses.replace(preset, transformer={**preset.transformer, "num_layers": args.layers})
    bench = Bench(
        preset=preset,
        device=device,
        dtype=dtype,
        machine=measure_machine(device, dtype, preset.matmul_size, preset.copy_bytes),
        variants=args.variants or (["ours", "stock"] if device.type == "cpu" else list(VARIANTS)),
        edits=args.edits,
    )
    environment = {
        "command": shlex.join(["python", "benchmarks/bench.py", *sys.argv[1:]]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "preset": args.preset,
        "layers": preset.transformer["num_layers"],
        **{name: getattr(preset, name) for name in overrides},
        "machine": dataclasses.asdict(bench.machine),
        "versions": package_versions(),
    }
    path = args.results / f"{args.name or args.preset}.json"
    run_sections(SECTIONS, args.sections, bench, environment, path)
    print(path)


if __name__ == "__main__":
    main()

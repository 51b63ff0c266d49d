"""Times the pipeline's own designer, which sees a picture once for design and encoding, against doing both apart.

    python benchmarks/design.py --preset cpu
    python benchmarks/design.py --preset full --device cuda

"separate" is transformers' `generate` for the whole conversation and then `encode_prompt`'s own forward of the
finished blueprint; "shared" is what a pipeline with `designer="self"` does. Weights are random and no answer ends
early, so both write as many tokens as `--new_tokens`, and the blueprint that is encoded is a text of as many. Results
go to `benchmarks/results/design_NAME.json`, and `benchmarks/report.py` makes tables of them.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import check_sections, run_sections
from diffusers_dim.designers.designer import Conversation
from diffusers_dim.designers.prompts import DESIGN_PROMPT
from diffusers_dim.designers.self_designer import SelfDesigner
from measure import device_name, measure, package_versions
from presets import PRESETS, TEXT_ENCODER, Preset, blueprint_of, build_pipeline, random_picture


INSTRUCTION = "Make the red circle blue."
# The published widths, with one layer for its 36 and 32, and the embedded model's vocabulary: the product of the
# published one with each token's state would hide a single layer.
FEW_LAYERS = {
    "text_config": {**TEXT_ENCODER["text_config"], "num_hidden_layers": 1, "layer_types": ["full_attention"]},
    "vision_config": {**TEXT_ENCODER["vision_config"], "depth": 1, "fullatt_block_indexes": [0]},
}
del FEW_LAYERS["text_config"]["vocab_size"]
DESIGN_PRESETS = {
    "full": (PRESETS["full"], 350),
    "cpu": (dataclasses.replace(PRESETS["tiny"], text_encoder=FEW_LAYERS, size=1024, runs=3), 350),
    "tiny": (PRESETS["tiny"], 4),
}


@dataclass(frozen=True)
class DesignBench:
    """What is timed, where, and how many tokens a blueprint has."""

    preset: Preset
    new_tokens: int
    device: torch.device
    dtype: torch.dtype


def bench_design(bench: DesignBench) -> dict[str, Any]:
    """A design and its encoding, apart and with the picture seen once."""
    preset, size = bench.preset, bench.preset.size
    pipe: Any = build_pipeline(preset, bench.device, bench.dtype, with_text_encoder=True)
    model, processor = pipe.text_encoder, pipe.processor
    model.generation_config.min_new_tokens = bench.new_tokens
    image = random_picture(size)
    prompt = DESIGN_PROMPT.replace("{instruction}", INSTRUCTION)
    view = processor.resize(image, size, size)
    picture_tokens = int(processor.encode(" circle", [image], size, size)["condition_mask"].sum()) - 1
    blueprint = blueprint_of(processor, picture_tokens + bench.new_tokens, image, size)
    conversation = Conversation((prompt,), view)

    def design_apart() -> torch.Tensor:
        text = processor.apply_chat_template(conversation.messages(), add_generation_prompt=True, tokenize=False)
        inputs = processor(images=[view], text=[text], return_tensors="pt").to(bench.device)
        return model.generate(**inputs, max_new_tokens=bench.new_tokens, do_sample=False, disable_compile=True)

    def separate() -> None:
        design_apart()
        pipe.encode_hidden_states([blueprint], [image], size, size, bench.device)

    def shared(designer: SelfDesigner) -> Callable[[], None]:
        def run() -> None:
            prefix = pipe.encode_prefix([image], size, size, bench.device)
            designer._prefix, designer._rows = prefix, {id(view): 0}
            list(designer.write([conversation], lambda row, text: None))
            pipe.encode_hidden_states([blueprint], [image], size, size, bench.device, prefix=prefix)

        return run

    with torch.no_grad():
        settings = {"max_new_tokens": bench.new_tokens}
        variants = {"separate": separate, "shared": shared(SelfDesigner(pipe, **settings))}
        variants["shared, static cache"] = shared(SelfDesigner(pipe, static_cache=True, **settings))
        if bench.device.type != "cpu":
            variants["shared, compiled"] = shared(SelfDesigner(pipe, compile=True, **settings))
        parts = {
            "design apart": design_apart,
            "picture": lambda: pipe.encode_prefix([image], size, size, bench.device),
            "encoding apart": lambda: pipe.encode_hidden_states([blueprint], [image], size, size, bench.device),
        }
        timings = measure(variants, preset.runs, bench.device)
        baseline = timings["separate"]["median_seconds"]
        for timing in timings.values():
            if "median_seconds" in timing:
                timing["times_faster_than_separate"] = baseline / timing["median_seconds"]
        return {
            "picture_tokens": picture_tokens,
            "new_tokens": bench.new_tokens,
            "variants": timings,
            "parts": measure(parts, 1, bench.device),  # to look at, not to compare
        }


SECTIONS: dict[str, Callable[[DesignBench], dict[str, Any]]] = {"design": bench_design}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"Among {', '.join(SECTIONS)}; all by default.")
    parser.add_argument("--preset", choices=DESIGN_PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 by default, float32 on a CPU.")
    parser.add_argument("--name", help="Of the JSON, after `design_`; the preset's by default.")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="The JSON's folder.")
    for name in ("size", "runs", "new_tokens"):
        parser.add_argument(f"--{name}", type=int, help="In place of the preset's.")
    args = parser.parse_args()
    check_sections(parser, args.sections, SECTIONS)
    preset, new_tokens = DESIGN_PRESETS[args.preset]
    given = {name: getattr(args, name) for name in ("size", "runs") if getattr(args, name) is not None}
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    bench = DesignBench(dataclasses.replace(preset, **given), args.new_tokens or new_tokens, device, dtype)
    environment = {
        "command": shlex.join(["python", "benchmarks/design.py", *sys.argv[1:]]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "preset": args.preset,
        "size": bench.preset.size,
        "runs": bench.preset.runs,
        "layers": (bench.preset.text_encoder or {}).get("text_config", {}).get("num_hidden_layers"),
        "versions": package_versions(),
    }
    path = args.results / f"design_{args.name or args.preset}.json"
    run_sections(SECTIONS, args.sections, bench, environment, path)
    print(path)


if __name__ == "__main__":
    main()

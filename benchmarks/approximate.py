"""What approximations save, and what they change: diffusers' step caches, a guidance interval and fewer steps."""

import contextlib
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from PIL import Image

from diffusers_dim import DIMPipeline, DIMTransformer2DModel
from diffusers_dim.evaluation import evaluate_shapes
from diffusers_dim.tiny import sample_edits
from measure import Unmeasured, count_flops, measure, unmeasured
from presets import random_picture
from sections import Bench
from stock import with_transformer


HELD_OUT_SEED = 2_000_000_011  # of the embedded model's published success rate
CALIBRATION_SEED = 1_999_999_973


@dataclass(frozen=True)
class Approximation:
    """
    A way to give up exactness for speed.

    Args:
        cache (`Callable`, *optional*): Makes the config of a step cache for a pipeline.
        call (`Callable`, *optional*): Makes arguments of the call from its number of steps.
        adaptive (`bool`): Whether what is left out depends on values, so that random weights tell nothing of it.
    """

    cache: Callable[[DIMPipeline, int], Any] | None = None
    call: Callable[[int], dict[str, Any]] | None = None
    adaptive: bool = False


def taylor_seer(pipe: DIMPipeline, interval: int) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(cache_interval=interval, taylor_factors_dtype=pipe.transformer.dtype)


def pyramid_attention_broadcast(pipe: DIMPipeline, steps: int) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster_cache(pipe: DIMPipeline, steps: int) -> FasterCacheConfig:
    return FasterCacheConfig(
        tensor_format="BCHW",
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


APPROXIMATIONS = {
    "first_block_cache_0.05": Approximation(lambda pipe, steps: FirstBlockCacheConfig(0.05), adaptive=True),
    "first_block_cache_0.1": Approximation(lambda pipe, steps: FirstBlockCacheConfig(0.1), adaptive=True),
    "first_block_cache_0.2": Approximation(lambda pipe, steps: FirstBlockCacheConfig(0.2), adaptive=True),
    "taylor_seer_2": Approximation(lambda pipe, steps: taylor_seer(pipe, 2)),
    "taylor_seer_4": Approximation(lambda pipe, steps: taylor_seer(pipe, 4)),
    "mag_cache": Approximation(
        lambda pipe, steps: MagCacheConfig(mag_ratios=calibrate(pipe, steps), num_inference_steps=steps),
        adaptive=True,
    ),
    "pyramid_attention_broadcast": Approximation(pyramid_attention_broadcast),
    "faster_cache": Approximation(faster_cache),
    "guidance_interval_0_0.5": Approximation(call=lambda steps: {"guidance_interval": (0.0, 0.5)}),
    "guidance_interval_0.1_0.8": Approximation(call=lambda steps: {"guidance_interval": (0.1, 0.8)}),
    "two_thirds_of_the_steps": Approximation(call=lambda steps: {"num_inference_steps": max(1, steps * 2 // 3)}),
    "half_of_the_steps": Approximation(call=lambda steps: {"num_inference_steps": max(1, steps // 2)}),
    "a_third_of_the_steps": Approximation(call=lambda steps: {"num_inference_steps": max(1, steps // 3)}),
}


def calibrate(pipe: DIMPipeline, steps: int) -> list[float]:
    """MagCache's ratios, from edits that no result is reported of; diffusers prints them at the end of a call."""
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate_shapes(pipe, sample_edits(6, seed=CALIBRATION_SEED), num_inference_steps=steps)
    pipe.transformer.disable_cache()
    return json.loads(re.findall(r"^\[[^a-zA-Z]+\]$", printed.getvalue(), flags=re.MULTILINE)[-1])


def bench_approximate(bench: Bench) -> dict[str, Any]:
    """
    What diffusers' step caches, a guidance interval and fewer steps save. With the embedded model also what they
    change: the distance of held-out edits to the exact ones, and how many still succeed. With random weights only the
    time, and only where what is left out does not depend on values.
    """
    preset = bench.preset
    base = bench.pipeline(with_text_encoder=preset.trained)
    samples = sample_edits(bench.edits, seed=HELD_OUT_SEED)
    if not preset.trained:
        inputs = {
            "prompt_embeds": bench.randn(preset.batch, preset.tokens, base.transformer.config.caption_channels),
            "image": random_picture(preset.size),
            "height": preset.size,
            "width": preset.size,
            "guidance_scale": preset.guidance_scale,
            "output_type": "latent",
        }

    def paint(pipe: DIMPipeline, call: dict[str, Any], pictures: list[Image.Image] | None = None) -> Any:
        call = {"num_inference_steps": preset.steps, **call}
        if not preset.trained:
            return pipe(**inputs, **call)
        return evaluate_shapes(pipe, samples, keep=pictures, **call)

    pipes: dict[str, tuple[DIMPipeline, dict[str, Any]]] = {}
    results: dict[str, Any] = {"exact": {}}
    for name, approximation in {"exact": Approximation(), **APPROXIMATIONS}.items():
        results[name] = {}
        if approximation.adaptive and not preset.trained:
            results[name] = unmeasured(Unmeasured("what it leaves out depends on trained weights"))
            continue
        pipe = with_transformer(base, DIMTransformer2DModel)
        if approximation.cache is not None:
            pipe.transformer.enable_cache(approximation.cache(pipe, preset.steps))
        pipes[name] = (pipe, approximation.call(preset.steps) if approximation.call else {})

    pictures: dict[str, list[Image.Image]] = {name: [] for name in pipes}
    for name, (pipe, call) in pipes.items():
        counts = count_calls(pipe.transformer)
        reports: list[Any] = []
        flops = count_flops(lambda: reports.append(paint(pipe, call, pictures[name])))  # noqa: B023, called at once
        counts.stop()
        results[name] = {"flops": flops, "picture_forwards": counts.pictures}
        if preset.trained:
            results[name] |= {"success": reports[0].overall, **distance(pictures[name], pictures["exact"])}
    timings = measure(
        {name: partial(paint, pipe, call) for name, (pipe, call) in pipes.items()},
        min(preset.runs, 3),
        bench.device,
        warmups=dict.fromkeys(pipes, lambda: None),  # each has just run
    )
    for name, timing in timings.items():
        results[name] |= timing
        if "seconds" in timing:
            results[name]["times_faster_than_exact"] = timings["exact"]["median_seconds"] / timing["median_seconds"]
        results[name]["share_of_exact_flops"] = results[name]["flops"] / results["exact"]["flops"]
    work = f"{len(samples)} held-out edits of the embedded model" if preset.trained else "a call from prompt_embeds"
    return {"work": work, "num_inference_steps": preset.steps, "variants": results}


class count_calls:
    """Counts for how many pictures each kind of part of `transformer` is computed, until `stop` is called."""

    def __init__(self, transformer: DIMTransformer2DModel):
        # A cache stands in for a whole block or attention; a layer within runs only where the part does.
        parts = {"transformer": [transformer.proj_out]}
        for kind, layer in (
            ("self_attention", "attn1.to_q"),
            ("cross_attention", "attn2.to_q"),
            ("conv", "ff.conv_point"),
        ):
            parts[kind] = [block.get_submodule(layer) for block in transformer.transformer_blocks]
        self.pictures = dict.fromkeys(parts, 0)
        self.handles = [
            module.register_forward_hook(lambda module, args, output, kind=kind: self._count(kind, output.shape[0]))
            for kind, modules in parts.items()
            for module in modules
        ]

    def _count(self, kind: str, pictures: int) -> None:
        self.pictures[kind] += pictures

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def distance(pictures: list[Image.Image], exact: list[Image.Image]) -> dict[str, float | None]:
    """Mean PSNR in dB to the exact pictures, `None` where all are equal, and the largest difference of 255."""
    differences = [np.asarray(a, dtype=np.float64) - np.asarray(b) for a, b in zip(pictures, exact, strict=True)]
    errors = [np.square(difference).mean() for difference in differences]
    # An equal picture has no PSNR; half a step of one value in a picture has this one.
    limits = [0.25 / difference.size for difference in differences]
    psnr = [10 * math.log10(255.0**2 / max(error, limit)) for error, limit in zip(errors, limits)]
    return {
        "mean_psnr": statistics.mean(psnr) if any(errors) else None,
        "largest_difference": max(float(np.abs(difference).max()) for difference in differences),
    }

"""The sections of a benchmark: what is timed, and how it stands to stock parts and to the floor."""

import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import SanaTransformer2DModel
from diffusers.hooks import apply_layerwise_casting
from PIL import Image

from diffusers_dim import DIMPipeline, DIMTransformer2DModel, ops
from diffusers_dim.models.transformer_dim import DIMDenoisingCache, is_compiled
from diffusers_dim.tiny import sample_edits
from measure import (
    Cost,
    Machine,
    Unmeasured,
    denoising_cost,
    measure,
    run_cost,
    transformer_cost,
    unmeasured,
)
from presets import PRESETS, Preset, blueprint_of, build_pipeline, build_transformer, random_picture
from stock import share_weights, stock_pipeline, with_transformer


@dataclass(frozen=True)
class Bench:
    """What to measure, on what."""

    preset: Preset
    device: torch.device
    dtype: torch.dtype
    machine: Machine
    variants: list[str]
    edits: int

    @property
    def guided(self) -> bool:
        return self.preset.guidance_scale > 1.0

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of `transformer_cost`: under guidance each picture and each condition stands twice."""
        preset = self.preset
        branches = 2 if self.guided else 1
        rows = preset.batch * branches
        return {
            "pictures": rows,
            "guidance_branches": branches,
            "height": preset.latent_size,
            "width": preset.latent_size,
            "conditions": rows,
            "tokens": preset.tokens,
            "bytes_per_number": self.dtype.itemsize,
        }

    def pipeline(self, edits: bool = True, with_text_encoder: bool = False) -> DIMPipeline:
        """A pipeline of the preset on the device."""
        if with_text_encoder and self.preset.text_encoder is None:
            raise Unmeasured("this preset has no vision-language model")
        return build_pipeline(self.preset, self.device, self.dtype, edits, with_text_encoder)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def summary(self, timings: dict[str, dict[str, Any]], stock: str = "stock", **floor: Cost) -> dict[str, Any]:
        """
        Timings with each one's ratio to stock and to the floor, as far as those are there. The floor is the sum of its
        parts', which follow each other: the machine's arithmetic or its memory holds each up on its own.
        """
        summary: dict[str, Any] = {"variants": timings}
        if floor:
            seconds = sum(part.seconds(self.machine) for part in floor.values())
            parts = {
                name: {"seconds": part.seconds(self.machine), **dataclasses.asdict(part)}
                for name, part in floor.items()
            }
            summary["floor"] = {"seconds": seconds, "parts": parts}
        for timing in timings.values():
            if "seconds" not in timing:
                continue
            if "seconds" in timings.get(stock, {}):
                timing["times_faster_than_stock"] = timings[stock]["median_seconds"] / timing["median_seconds"]
            if floor:
                timing["times_the_floor"] = timing["median_seconds"] / seconds
        return summary


# The same weights in several forms
VARIANTS: dict[str, Callable[[torch.nn.Module], Any] | None] = {
    "ours": None,
    "ours_fused": lambda transformer: transformer.fuse_qkv_projections(),
    "ours_blocks_compiled": lambda transformer: transformer.compile_repeated_blocks(fullgraph=True),
    "ours_compiled": lambda transformer: transformer.compile(fullgraph=True),
    "ours_cuda_graphs": lambda transformer: transformer.compile(fullgraph=True, mode="reduce-overhead"),
    "stock": None,
    "stock_compiled": lambda transformer: transformer.compile(),
}


def pipelines_of_variants(bench: Bench, pipe: DIMPipeline) -> dict[str, DIMPipeline]:
    """Pipelines that share all parts of `pipe` but the transformer, and the transformer's weights."""
    pipes = {}
    for name in bench.variants:
        pipes[name] = (
            stock_pipeline(pipe) if name.startswith("stock") else with_transformer(pipe, DIMTransformer2DModel)
        )
        if VARIANTS[name] is not None:
            VARIANTS[name](pipes[name].transformer)
    return pipes


def bench_call(bench: Bench) -> dict[str, Any]:
    """
    Whole pipeline calls, from `prompt_embeds` to latents. An edit's source is encoded in the call; where the preset is
    not of the VAE's size, by a small stand-in that takes next to no time.
    """
    results = {} if bench.preset.trained else {"text_to_image": time_call(bench, edits=False)}
    return {**results, "edit": time_call(bench, edits=True)}


def time_call(bench: Bench, edits: bool) -> dict[str, Any]:
    """Calls of one kind."""
    preset = bench.preset
    torch._dynamo.reset()
    pipe = bench.pipeline(edits)
    images = [random_picture(preset.size)] * preset.batch
    inputs = {
        "prompt_embeds": bench.randn(preset.batch, preset.tokens, pipe.transformer.config.caption_channels),
        "latents": torch.randn(preset.batch, pipe.latent_channels, preset.latent_size, preset.latent_size),
        "height": preset.size,
        "width": preset.size,
        "guidance_scale": preset.guidance_scale,
        "output_type": "latent",
    }
    floor = {"denoising": denoising_cost(pipe.transformer.config, preset.steps, **bench.sizes)}
    if edits:
        inputs["image"] = images
        floor["vae_encode"] = run_cost(*vae_parts(pipe, images, preset.size)["vae_encode"])
    # Compiled code is compiled for a number of steps; on a CPU the rest is warm after two.
    cheap = bench.device.type == "cpu" and not any("compiled" in name for name in bench.variants)
    warm_up_steps = min(2, preset.steps) if cheap else preset.steps
    pipes = pipelines_of_variants(bench, pipe)
    latents: dict[str, torch.Tensor] = {}

    def warm_up(name: str) -> None:
        latents[name] = pipes[name](num_inference_steps=warm_up_steps, **inputs).images
        if not latents[name].isfinite().all():
            raise Unmeasured("the latents are not finite")

    result = bench.summary(
        measure(
            {name: partial(pipe, num_inference_steps=preset.steps, **inputs) for name, pipe in pipes.items()},
            preset.runs,
            bench.device,
            warmups={name: partial(warm_up, name) for name in pipes},
        ),
        **floor,
    )
    if "stock" in latents:
        result["latents_standard_deviation"] = latents["stock"].std().item()
        result["largest_difference_to_stock"] = {
            name: (latents[name] - latents["stock"]).abs().max().item() for name in latents if name != "stock"
        }
    return result


@torch.no_grad()
def bench_step(bench: Bench) -> dict[str, Any]:
    """One forward of the edit transformer as a step of a call: the first one, which fills the cache, and a later."""
    preset = bench.preset
    torch._dynamo.reset()
    pipe = bench.pipeline()
    config = pipe.transformer.config
    branches, rows = bench.sizes["guidance_branches"], bench.sizes["pictures"]
    latents = bench.randn(preset.batch, config.in_channels, preset.latent_size, preset.latent_size)
    condition = bench.randn(rows, preset.tokens, config.caption_channels)
    schedule = torch.linspace(999, 100, preset.steps, device=bench.device).long()

    def stock_step(transformer: torch.nn.Module) -> None:
        transformer(latents.repeat(branches, 1, 1, 1), condition, schedule[:1].expand(rows), return_dict=False)

    # What DIMPipeline.denoise does.
    on_cpu = bench.device.type == "cpu"

    def new_cache() -> DIMDenoisingCache:
        return DIMDenoisingCache(None if on_cpu else schedule)

    def step(transformer: torch.nn.Module, cache: DIMDenoisingCache) -> None:
        compiled = is_compiled(transformer)
        transformer(
            latents.repeat(branches, 1, 1, 1) if compiled else latents,
            condition,
            schedule[:1].expand(rows) if on_cpu else schedule[:1],
            return_dict=False,
            denoising_cache=cache,
            guidance_branches=1 if compiled else branches,
        )

    def first_step(transformer: torch.nn.Module) -> None:
        step(transformer, new_cache())

    works: dict[str, Callable[[], None]] = {}
    for name, variant in pipelines_of_variants(bench, pipe).items():
        transformer = variant.transformer
        if name.startswith("stock"):
            works[name] = partial(stock_step, transformer)
            continue
        filled = new_cache()
        step(transformer, filled)
        filled.clone_tensors()  # of a CUDA graph's memory
        works[f"{name}, first"] = partial(first_step, transformer)
        works[f"{name}, later"] = partial(step, transformer, filled)
    timings = measure(works, preset.runs, bench.device)
    floors = {
        "first": transformer_cost(config, timesteps=1 if on_cpu else preset.steps, **bench.sizes),
        "later": transformer_cost(config, timesteps=0, condition_is_cached=True, **bench.sizes),
    }
    results = {}
    for which, floor in floors.items():
        chosen = {
            name.removesuffix(f", {which}"): dict(timing)
            for name, timing in timings.items()
            if name.startswith("stock") or name.endswith(which)
        }
        results[which] = bench.summary(chosen, step=floor)
    return results


def bench_edit(bench: Bench) -> dict[str, Any]:
    """Whole edits, from image and blueprint to picture."""
    preset = bench.preset
    torch._dynamo.reset()
    pipe = bench.pipeline(with_text_encoder=True)
    if preset.trained:
        sample = sample_edits(1, seed=0)[0]
        image, text = sample.source, sample.instruction
    else:
        image = random_picture(preset.size)
        text = blueprint_of(pipe.processor, preset.tokens, image, preset.size)
    texts, images = [text] * preset.batch, [image] * preset.batch
    pipes = pipelines_of_variants(bench, pipe)

    def edit(pipe: DIMPipeline, output_type: str = "pil") -> Any:
        return pipe(
            images,
            texts,
            height=preset.size,
            width=preset.size,
            num_inference_steps=preset.steps,
            guidance_scale=preset.guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).images

    def warm_up(pipe: DIMPipeline) -> None:
        if not edit(pipe, "pt").isfinite().all():
            raise Unmeasured("the picture is not finite")

    timings = measure(
        {name: partial(edit, pipe) for name, pipe in pipes.items()},
        preset.runs,
        bench.device,
        warmups={name: partial(warm_up, pipe) for name, pipe in pipes.items()},
    )
    tokens = int(pipe.processor.encode(text, [image], preset.size, preset.size)["condition_mask"].sum())
    floor = {"denoising": denoising_cost(pipe.transformer.config, preset.steps, **{**bench.sizes, "tokens": tokens})}
    floor["text_encoder"] = run_cost(*text_encoder_part(pipe, images, texts, preset.size))
    floor |= {name: run_cost(*part) for name, part in vae_parts(pipe, images, preset.size).items()}
    result = bench.summary(timings, **floor)
    result["condition_tokens"] = tokens
    return result


def text_encoder_part(pipe: DIMPipeline, images: list[Image.Image], texts: list[str], size: int) -> tuple:
    """What an edit does to come to its condition, and the models that it runs."""

    @torch.no_grad()
    def encode_prompt() -> None:
        hidden_states, _ = pipe.encode_hidden_states(texts, images, size, size)
        pipe.connector(hidden_states.to(pipe.connector.dtype))

    return encode_prompt, [pipe.text_encoder.model, pipe.connector.linear_1, pipe.connector.linear_2]


def vae_parts(pipe: DIMPipeline, images: list[Image.Image], size: int) -> dict[str, tuple]:
    """What the VAE does in an edit, and the models that it runs."""
    pixels = pipe.image_processor.preprocess(images, size, size).to(pipe.vae.device, pipe.vae.dtype)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent
    return {
        "vae_encode": (torch.no_grad()(lambda: pipe.vae.encode(pixels)), [pipe.vae.encoder]),
        "vae_decode": (torch.no_grad()(lambda: pipe.vae.decode(latents)), [pipe.vae.decoder]),
    }


def bench_vlm(bench: Bench) -> dict[str, Any]:
    """Picture and blueprint to condition: the processor on the CPU, and all of it with model and connector."""
    preset = bench.preset
    pipe = bench.pipeline(with_text_encoder=True)
    image = random_picture(preset.size)
    texts, images = [blueprint_of(pipe.processor, preset.tokens, image, preset.size)] * preset.batch, [image]
    images *= preset.batch
    function, modules = text_encoder_part(pipe, images, texts, preset.size)
    timings = measure(
        {"processor": lambda: pipe.processor.encode(texts, images, preset.size, preset.size), "all": function},
        preset.runs,
        bench.device,
    )
    return {
        "processor": bench.summary({"ours": timings["processor"]}),
        "all": bench.summary({"ours": timings["all"]}, text_encoder=run_cost(function, modules)),
    }


def bench_vae(bench: Bench) -> dict[str, Any]:
    """The VAE, in torch's usual layout and with channels last; both sides of a comparison use the same one."""
    preset = bench.preset
    pipe = bench.pipeline()
    images = [random_picture(preset.size)] * preset.batch
    results: dict[str, Any] = {}
    for layout, memory_format in (("usual", torch.contiguous_format), ("channels_last", torch.channels_last)):
        pipe.vae.to(memory_format=memory_format)
        parts = vae_parts(pipe, images, preset.size)
        for name in ("vae_encode", "vae_decode"):
            function, modules = parts[name]
            timings = measure({layout: function}, preset.runs, bench.device)
            summary = bench.summary(timings, **{name: run_cost(function, modules)})
            results.setdefault(name, summary)["variants"] |= summary["variants"]
    return results


def bench_kernels(bench: Bench) -> dict[str, Any]:
    """Each operation of `diffusers_dim.ops` as a kernel, by its plain-torch definition, and that compiled."""
    if bench.device.type == "cpu":
        raise Unmeasured("on a CPU the operations are their definitions")
    torch._dynamo.reset()
    return time_kernels(bench, compiled=True)


def time_kernels(bench: Bench, compiled: bool) -> dict[str, Any]:
    """Forward, and forward with backward, at the preset's sizes."""
    config, side = bench.preset.transformer, bench.preset.latent_size
    rows, tokens = bench.sizes["pictures"], side * side
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    dim, hidden = heads * head_dim, 2 * int(config["mlp_ratio"] * heads * head_dim)
    eps = 1e-6

    def states(*shape: int) -> torch.Tensor:
        return bench.randn(*shape).requires_grad_()

    query, key, value = (states(rows, tokens, heads, head_dim) for _ in range(3))
    state = torch.randn(rows, heads, head_dim + 1, head_dim, device=bench.device, requires_grad=True)
    residual, update = states(rows, tokens, dim), states(rows, tokens, dim)
    shift, scale, gate = (states(rows, 1, dim) for _ in range(3))
    convolution = (states(rows, tokens, hidden), states(hidden, 1, 3, 3), states(hidden))
    cases: dict[str, tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]] = {
        "layer_norm_modulate": ((residual, shift, scale), (eps,)),
        "gate_residual": ((residual, gate, update), ()),
        "gate_residual_layer_norm_modulate": ((residual, gate, update, shift, scale), (eps,)),
        "relu_linear_attention": ((query, key, value), ()),
        "relu_linear_attention_state": ((key, value), ()),
        "relu_linear_attention_apply": ((query, state), ()),
        "gated_depthwise_conv": (convolution, (side, side)),
    }
    return {name: time_kernel(bench, name, *case, compiled) for name, case in cases.items()}


def time_kernel(
    bench: Bench, name: str, inputs: tuple[torch.Tensor, ...], settings: tuple[Any, ...], compiled: bool
) -> dict[str, Any]:
    """One operation."""
    kernel, definition = getattr(ops, name), getattr(ops, f"{name}_reference")
    functions = {"ours": kernel, "definition": definition}
    if compiled:
        functions["definition_compiled"] = torch.compile(definition, fullgraph=True)

    def forward(function: Callable) -> tuple[torch.Tensor, ...]:
        outputs = function(*inputs, *settings)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    outputs = forward(definition)
    gradients = [torch.randn_like(output) for output in outputs]
    moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))

    def backward(function: Callable) -> None:
        torch.autograd.grad(forward(function), inputs, gradients)

    def timed(work: Callable) -> dict[str, Any]:
        works = {key: partial(work, function) for key, function in functions.items()}
        return measure(works, bench.preset.runs, bench.device, repeat=20 if bench.device.type == "cuda" else 1)

    return {
        "forward": bench.summary(timed(torch.no_grad()(forward)), stock="definition", traffic=Cost(0, moved)),
        "forward_and_backward": bench.summary(timed(backward), stock="definition"),
    }


def to_float8(pipe: DIMPipeline, device: torch.device) -> None:
    """Weights of the two large models in 8 bits, computed with in the dtype that they had."""
    dtype = pipe.transformer.dtype
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    apply_layerwise_casting(
        pipe.text_encoder, torch.float8_e4m3fn, dtype, skip_modules_pattern=["norm", "embed", "patch_embed", "lm_head"]
    )
    pipe.to(device)


def tile_vae(pipe: DIMPipeline, device: torch.device) -> None:
    pipe.to(device)
    pipe.vae.enable_tiling()


# How a pipeline that lies on the CPU is put to work, and at which size if not at the preset's.
MEMORY_OPTIONS: dict[str, tuple[Callable[[DIMPipeline, torch.device], Any], int | None]] = {
    "plain": (lambda pipe, device: pipe.to(device), None),
    "float8_weights": (to_float8, None),
    "model_offload": (lambda pipe, device: pipe.enable_model_cpu_offload(device=device), None),
    "group_offload": (
        lambda pipe, device: pipe.enable_group_offload(
            device, offload_type="leaf_level", use_stream=device.type == "cuda"
        ),
        None,
    ),
    "sequential_offload": (lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device), None),
    "plain_4096": (lambda pipe, device: pipe.to(device), 4096),
    "vae_tiling_4096": (tile_vae, 4096),
}


def bench_memory(bench: Bench) -> dict[str, Any]:
    """Peak memory and time of one whole edit, by option."""
    if bench.device.type != "cuda":
        raise Unmeasured("a CPU's peak memory is not torch's to tell")
    results: dict[str, Any] = {}
    for name, (prepare, size) in MEMORY_OPTIONS.items():
        try:
            results[name] = peak_memory(bench, prepare, size)
        except RuntimeError as error:
            results[name] = unmeasured(error)
        gc.collect()
        torch.cuda.empty_cache()
    return results


def peak_memory(bench: Bench, prepare: Callable[[DIMPipeline, torch.device], Any], size: int | None) -> dict[str, Any]:
    """Of an edit with a pipeline of its own, put to work by `prepare`; large pictures take two steps only."""
    preset = bench.preset
    pipe = bench.pipeline(with_text_encoder=True).to("cpu")
    gc.collect()
    prepare(pipe, bench.device)
    steps = preset.steps if size is None else min(2, preset.steps)
    size = size or preset.size
    image = random_picture(size)
    tokens = max(preset.tokens, min((size // 28 + 2) ** 2, 16384) + 64)  # the picture's, at least
    text = blueprint_of(pipe.processor, tokens, image, size)

    def edit() -> None:
        pipe(
            image,
            text,
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=preset.guidance_scale,
            generator=torch.Generator().manual_seed(0),
        )

    result: dict[str, Any] = {"size": size, "num_inference_steps": steps}
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result |= measure({"edit": edit}, 1, bench.device)["edit"]
    if bench.device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


@torch.no_grad()
def bench_growth(bench: Bench) -> dict[str, Any]:
    """
    A later step and a stock one of one picture a condition, unguided, over sizes, batches and condition lengths; each
    with the exponent that fits best: time grows as the number of pixels, pictures or tokens to that power.
    """
    preset = bench.preset
    config = {**preset.transformer, "num_layers": preset.growth_layers}
    if preset.trained:
        transformer = bench.pipeline().transformer
    else:
        torch.manual_seed(0)
        transformer = build_transformer(config, bench.device, bench.dtype)
    stock = share_weights(SanaTransformer2DModel, transformer)
    base = {"size": preset.size, "batch": preset.batch, "tokens": preset.tokens}
    schedule = torch.tensor([900, 800], device=bench.device)
    results: dict[str, Any] = {"layers": preset.growth_layers, "base": base}
    for axis, values in preset.growth.items():
        cells: dict[str, Any] = {}
        for value in values:
            sizes = {**base, axis: value}
            side = preset.latent_size * sizes["size"] // preset.size
            hidden_states = bench.randn(sizes["batch"], config["in_channels"], side, side)
            condition = bench.randn(sizes["batch"], sizes["tokens"], config["caption_channels"])
            cache = DIMDenoisingCache(schedule)
            works = {
                "ours": partial(transformer, hidden_states, condition, schedule[:1], denoising_cache=cache),
                "stock": partial(stock, hidden_states, condition, schedule[:1].expand(sizes["batch"])),
            }
            floor = transformer_cost(
                config,
                pictures=sizes["batch"],
                height=side,
                width=side,
                conditions=sizes["batch"],
                tokens=sizes["tokens"],
                timesteps=0,
                condition_is_cached=True,
                bytes_per_number=bench.dtype.itemsize,
            )
            cells[str(value)] = bench.summary(measure(works, min(preset.runs, 3), bench.device), step=floor)
        for value in [] if preset.trained else PRESETS["full"].growth[axis]:
            cells.setdefault(str(value), {"unmeasured": "too large for this preset"})
        results[axis] = {
            "cells": cells,
            "exponents": {name: exponent(axis, cells, name) for name in ("ours", "stock")},
        }
    return results


def exponent(axis: str, cells: dict[str, Any], name: str) -> float | None:
    """Slope of the straight line through the logarithms of time and amount; a size counts by its pixels."""
    measured = {
        float(value) ** (2 if axis == "size" else 1): cell["variants"][name]["median_seconds"]
        for value, cell in cells.items()
        if "seconds" in cell.get("variants", {}).get(name, {})
    }
    if len(measured) < 2:
        return None
    return float(np.polyfit(np.log(list(measured)), np.log(list(measured.values())), 1)[0])

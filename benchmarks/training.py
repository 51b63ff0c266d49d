"""Times training steps of this package against a plain loop over stock diffusers parts, and looks at their memory.

    python benchmarks/training.py --preset cpu
    python benchmarks/training.py --preset full --device cuda

Steps are those of connector and transformer on precomputed conditions: float32 weights under autocast, the gradient
clipped, AdamW. The plain loop is what diffusers' training scripts do, with `SanaTransformer2DModel`. Both sides train
the very same weights on the same batches. Results go to `benchmarks/results/training_NAME.json`, and
`benchmarks/report.py` makes tables of them.
"""

import argparse
import concurrent.futures
import ctypes
import dataclasses
import gc
import json
import math
import multiprocessing
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from bench import check_sections, run_sections
from diffusers_dim import DIMConnector, DIMTransformer2DModel
from diffusers_dim.training import (
    DIMTrainingModel,
    collate_encoded,
    create_optimizer,
    sample_noise,
    training_flops,
)
from diffusers_dim.training.monitor import peak_tflops
from measure import Unmeasured, device_name, measure, package_versions, synchronize, unmeasured
from presets import EMBEDDED, PRESETS, Preset


LEARNING_RATE = 2e-5  # SANA's, as its clipping
MAX_GRAD_NORM = 0.1
FLOW_SHIFT = 3.0
VLM_PATCH = 28  # pixels on a side that are one vision token
FITS = 0.1  # what the search for the largest batch leaves open, as a share of it
# Where Linux tells a process of its memory, and forgets the peak.
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
BLOCK_8BIT, SMALLEST_8BIT = 256, 4096  # bitsandbytes' blocks, and the weights that it keeps in 32 bits


@dataclass(frozen=True)
class TrainingPreset(Preset):
    """
    What is trained.

    Args:
        connector (`dict`): Configuration of the connector.
        memory (`int`, *optional*): Bytes that a training may take; on a GPU all that it has by default.
        largest_batch (`int`): At which the search for the largest batch ends.
        table (`dict`): Sizes and batches of the table; conditions there have the vision tokens of their size.
    """

    connector: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 2048, "caption_channels": 2304})
    memory: int | None = None
    largest_batch: int = 1024
    table: dict[str, list[int]] = field(default_factory=dict)


def training_preset(name: str, connector: dict[str, Any], **changes: Any) -> TrainingPreset:
    """A preset of `presets.py` as one of training."""
    preset = {item.name: getattr(PRESETS[name], item.name) for item in dataclasses.fields(Preset)}
    return TrainingPreset(**{**preset, "connector": connector, **changes})


PUBLISHED = {"hidden_size": 2048, "caption_channels": 2304}
TRAINING_PRESETS = {
    # The published model, for a GPU.
    "full": training_preset("full", PUBLISHED, table={"size": [512, 1024, 2048], "batch": [1, 2, 4, 8, 16, 32, 64]}),
    # Its width, with few layers and small pictures, for two CPU cores.
    "cpu": training_preset(
        "cpu",
        PUBLISHED,
        transformer={**PRESETS["cpu"].transformer, "num_layers": 2},
        size=256,
        tokens=160,
        runs=5,
        memory=5_000_000_000,
        largest_batch=32,
        table={"size": [128, 256, 512], "batch": [1, 4]},
    ),
    # The embedded model's.
    "embedded": training_preset(
        "embedded",
        json.loads((EMBEDDED / "connector" / "config.json").read_text()),
        memory=1_500_000_000,
        table={"size": [64, 128], "batch": [1, 8, 64]},
    ),
    # For tests of the script.
    "tiny": training_preset(
        "tiny",
        {"hidden_size": 40, "caption_channels": 48, "max_sequence_length": 64},
        memory=2_000_000_000,
        largest_batch=3,
        table={"size": [64], "batch": [1, 2]},
    ),
}


class PlainTrainingModel(nn.Module):
    r"""
    The objective as a plain loop over stock parts has it, on the weights of a connector and of a transformer.

    Args:
        connector ([`DIMConnector`]): Its two linear layers, with a GELU between them, and its null condition.
        transformer (`SanaTransformer2DModel`): diffusers' own.
    """

    def __init__(self, connector: DIMConnector, transformer: SanaTransformer2DModel):
        super().__init__()
        self.connector = nn.Sequential(connector.linear_1, nn.GELU(), connector.linear_2)
        self.null_condition = connector.null_condition
        self.transformer = transformer

    def forward(
        self,
        hidden_states: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        dropped: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments and result are those of [`DIMTrainingModel`]."""
        prompt_embeds = self.connector(hidden_states)
        null_embeds = self.null_condition[: hidden_states.shape[1]].to(prompt_embeds.dtype)
        prompt_embeds = torch.where(dropped[:, None, None], null_embeds, prompt_embeds)
        s = timesteps.double() / 1000
        sigmas = FLOW_SHIFT * s / (1 + (FLOW_SHIFT - 1) * s)
        scale = sigmas.to(latents.dtype)[:, None, None, None]
        model_input = (1 - scale) * latents + scale * noise
        if image_latents is not None:
            model_input = torch.cat([model_input, image_latents], dim=1)
        prediction = self.transformer(
            model_input,
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=attention_mask,
            timestep=(1000 * sigmas).long(),
            return_dict=False,
        )[0]
        return (prediction.float() - (noise - latents).float()).square().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Variant:
    """A way to train: by stock parts or by ours, with blocks computed again in the backward pass, compiled."""

    stock: bool = False
    gradient_checkpointing: bool = False
    compiled: bool = False


VARIANTS = {
    "stock": Variant(stock=True),
    "stock_checkpointing": Variant(stock=True, gradient_checkpointing=True),
    "ours": Variant(),
    "ours_checkpointing": Variant(gradient_checkpointing=True),
    "ours_compiled": Variant(compiled=True),
    "ours_compiled_checkpointing": Variant(gradient_checkpointing=True, compiled=True),
}


@dataclass(frozen=True)
class TrainingBench:
    """What to train, on what, in which dtype under autocast, and with how many threads of the CPU."""

    preset: TrainingPreset
    device: torch.device
    dtype: torch.dtype
    matmul_rate: float
    variants: list[str]
    threads: int

    def connector_and_transformer(self) -> tuple[DIMConnector, DIMTransformer2DModel]:
        """Weights to train, random ones from a fixed seed, or the embedded model's."""
        if self.preset.trained:
            connector = DIMConnector.from_pretrained(EMBEDDED / "connector")
            transformer = DIMTransformer2DModel.from_pretrained(EMBEDDED / "transformer")
            return connector.to(self.device), transformer.to(self.device)
        torch.manual_seed(0)
        with self.device:
            return DIMConnector(**self.preset.connector), DIMTransformer2DModel(**self.preset.transformer)

    def batch(self, batch_size: int, size: int | None = None, drop_first: bool = False) -> dict[str, torch.Tensor]:
        r"""
        A batch of precomputed samples. A condition's vision tokens are those of its picture; of the rest, the text,
        samples have between half and all, evenly spread, so that those of a batch are padded to the longest.

        Args:
            batch_size (`int`): Samples.
            size (`int`, *optional*): In place of the preset's; conditions have more or fewer vision tokens then.
            drop_first (`bool`, defaults to `False`): Whether the first sample's condition is dropped.
        """
        size = size or self.preset.size
        side = self.preset.latent_size * size // self.preset.size
        channels = self.preset.transformer["out_channels"]
        generator = torch.Generator().manual_seed(0)
        samples = [
            {
                "hidden_states": torch.randn(tokens, self.preset.connector["hidden_size"], generator=generator),
                "latents": torch.randn(channels, side, side, generator=generator),
                "image_latents": torch.randn(channels, side, side, generator=generator),
            }
            for tokens in self.lengths(batch_size, size)
        ]
        batch = collate_encoded(samples, self.device)
        del batch["weights"]
        noise, timesteps, dropped = sample_noise(list(range(batch_size)), (channels, side, side), seed=0)
        dropped[0] = drop_first
        return batch | {
            "noise": noise.to(self.device),
            "timesteps": timesteps.to(self.device),
            "dropped": dropped.to(self.device),
        }

    def lengths(self, batch_size: int, size: int) -> list[int]:
        """The conditions' lengths of a batch, the longest first."""
        text = self.preset.tokens - round(self.preset.size / VLM_PATCH) ** 2
        longest = round(size / VLM_PATCH) ** 2 + text
        return [longest - text * i // (2 * batch_size) for i in range(batch_size)]

    def flops(self, batch_size: int, size: int | None = None) -> int:
        """The work of a step: padding and blocks that are computed again do not count."""
        size = size or self.preset.size
        side = self.preset.latent_size * size // self.preset.size
        configs = self.preset.transformer, self.preset.connector
        return sum(training_flops(*configs, side, side, tokens) for tokens in self.lengths(batch_size, size))

    def rates(
        self, seconds: float, processor_seconds: float | None, batch_size: int, size: int | None = None
    ) -> dict[str, float]:
        """What a step's time comes to; on a CPU the share of the matmul rate is by the processor's time."""
        flops = self.flops(batch_size, size)
        rates = {
            "seconds_a_sample": seconds / batch_size,
            "tflops": flops / seconds / 1e12,
            "share_of_matmul_rate": flops / (processor_seconds or seconds) / self.matmul_rate,
        }
        peak = peak_tflops(device_name(self.device))
        if peak is not None and self.dtype == torch.bfloat16:
            rates["mfu"] = rates["tflops"] / peak
        return rates


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """
    Multiplications and additions a second of a product of two square matrices, at best; on a CPU by the processor's
    time, of which those who share the machine take nothing.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronize(device)
        start = clock()
        left @ right
        synchronize(device)
        seconds.append(clock() - start)
    return 2 * size**3 / min(seconds)


class Trainer:
    r"""
    Steps of several variants on one set of weights, gradients and moments.

    Args:
        bench ([`TrainingBench`]): Settings.
        optimizer (`str`, defaults to `"adamw"`): Of ours; the plain loop always has torch's AdamW as it is by default.
    """

    def __init__(self, bench: TrainingBench, optimizer: str = "adamw"):
        self.bench = bench
        self.connector, self.transformer = bench.connector_and_transformer()
        self.parameters = [*self.connector.parameters(), *self.transformer.parameters()]
        self.optimizers = {False: create_optimizer(self.parameters, optimizer, LEARNING_RATE)}
        if optimizer == "adamw":
            self.optimizers[True] = torch.optim.AdamW(self.parameters, LEARNING_RATE, weight_decay=0.0)
        self.models: dict[str, nn.Module] = {}

    def model(self, name: str) -> nn.Module:
        """The variant's own modules around the common weights."""
        if name not in self.models:
            variant = VARIANTS[name]
            transformer_class = SanaTransformer2DModel if variant.stock else DIMTransformer2DModel
            transformer = share_parameters(transformer_class, self.transformer)
            if variant.gradient_checkpointing:
                transformer.enable_gradient_checkpointing()
            if variant.compiled:
                transformer.compile_repeated_blocks(fullgraph=True)
            if variant.stock:
                self.models[name] = PlainTrainingModel(self.connector, transformer).train()
            else:
                self.models[name] = DIMTrainingModel(self.connector, transformer, FLOW_SHIFT).train()
        return self.models[name]

    def losses(self, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A variant's forward pass under autocast, which float32 does without."""
        device, dtype = self.bench.device, self.bench.dtype
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return self.model(name)(**batch)

    def backward(self, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Forward and backward pass; gradients are left in the weights."""
        losses = self.losses(name, batch)
        losses.mean().backward()
        return losses.detach()

    def step(self, name: str, batch: dict[str, torch.Tensor]) -> None:
        """One step."""
        self.backward(name, batch)
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        optimizer = self.optimizers[VARIANTS[name].stock]
        optimizer.step()
        optimizer.zero_grad()

    def make_moments(self) -> None:
        """Makes the optimizers' moments, of which both sides share one set, so that memory is that of one."""
        for optimizer in self.optimizers.values():
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        if len(self.optimizers) == 2:
            for parameter, state in self.optimizers[False].state.items():
                moments = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
                self.optimizers[True].state[parameter] |= moments


def share_parameters(model_class: type[ModelMixin], transformer: ModelMixin) -> ModelMixin:
    """A `model_class` of `transformer`'s configuration with its very parameters: their gradients are shared, too."""
    with init_empty_weights():
        model = model_class.from_config(transformer.config)
    model.load_state_dict(transformer.state_dict(keep_vars=True), assign=True)
    return model.train()


def bench_equality(bench: TrainingBench) -> dict[str, Any]:
    """
    Losses and gradients of all variants by those of the plain loop in float32, on a batch that is padded and has a
    dropped condition: in float32, and in the dtype that is timed, where the plain loop's own rounding is the measure.
    """
    results: dict[str, Any] = {}
    for dtype in dict.fromkeys((torch.float32, bench.dtype)):
        trainer = Trainer(dataclasses.replace(bench, dtype=dtype))
        batch = trainer.bench.batch(2, drop_first=True)
        differences = {}
        for name in dict.fromkeys(["stock", *bench.variants]):
            try:
                losses = trainer.backward(name, batch)
            except RuntimeError as error:
                differences[name] = unmeasured(error)
                continue
            gradients = [parameter.grad for parameter in trainer.parameters]
            for parameter in trainer.parameters:
                parameter.grad = None
            if not results and name == "stock":
                expected_losses, expected = losses, [gradient.clone() for gradient in gradients]
            differences[name] = {
                "loss": ((losses - expected_losses).abs().max() / expected_losses.abs().max()).item(),
                "gradient": relative_difference(gradients, expected),
                "largest_gradient_of_a_weight": max(
                    relative_difference([ours], [stock]) for ours, stock in zip(gradients, expected)
                ),
            }
        results[str(dtype).removeprefix("torch.")] = differences
    return results


def relative_difference(tensors: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The norm of the difference by the norm of what was expected."""
    difference = sum((a - b).double().square().sum() for a, b in zip(tensors, expected))
    norm = sum(b.double().square().sum() for b in expected)
    return float((difference / norm).sqrt()) if norm else float(difference)


def time_steps(
    bench: TrainingBench, trainer: Trainer, batches: dict[str, int], size: int | None = None
) -> dict[str, dict[str, Any]]:
    """Steps of variants side by side, each at its own batch."""
    inputs = {batch_size: bench.batch(batch_size, size) for batch_size in set(batches.values())}
    processor_seconds: dict[str, list[float]] = {name: [] for name in batches}

    def step(name: str) -> None:
        start = time.process_time()
        trainer.step(name, inputs[batches[name]])
        processor_seconds[name].append(time.process_time() - start)

    def warm_up(name: str) -> None:
        if not trainer.losses(name, inputs[batches[name]]).isfinite().all():
            raise Unmeasured("the loss is not finite")
        trainer.step(name, inputs[batches[name]])

    # The name is bound as it is now.
    steps = {name: (lambda name=name: step(name)) for name in batches}
    warmups = {name: (lambda name=name: warm_up(name)) for name in batches}
    timings = measure(steps, bench.preset.runs, bench.device, warmups)
    for name, timing in timings.items():
        if "seconds" not in timing:
            continue
        timing["batch"] = batches[name]
        median = None
        if bench.device.type == "cpu":
            # Of this process alone, whatever else the machine does.
            median = statistics.median(processor_seconds[name])
            timing |= {"processor_seconds": processor_seconds[name], "median_processor_seconds": median}
        timing |= bench.rates(timing["median_seconds"], median, batches[name], size)
    return timings


def compare(timings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Timings with each one's ratio, by the sample, to the faster of the plain loops."""
    keys = {"times_faster_than_stock": "median_seconds", "times_faster_by_processor": "median_processor_seconds"}
    for ratio, key in keys.items():
        stock = [
            timing[key] / timing["batch"] for name, timing in timings.items() if VARIANTS[name].stock and key in timing
        ]
        for timing in timings.values():
            if stock and key in timing:
                timing[ratio] = min(stock) * timing["batch"] / timing[key]
    return {"variants": timings}


def bench_step(bench: TrainingBench) -> dict[str, Any]:
    """A step at batch 1."""
    trainer = Trainer(bench)
    trainer.make_moments()
    return compare(time_steps(bench, trainer, dict.fromkeys(bench.variants, 1)))


def bench_largest_batch(bench: TrainingBench) -> dict[str, Any]:
    """The largest batch that fits the memory, by variant, and the time of a sample in it."""
    memory = bench.preset.memory
    if memory is None:
        if bench.device.type != "cuda":
            raise Unmeasured("no memory was given")
        memory = torch.cuda.get_device_properties(bench.device).total_memory
    found = {name: search_in_child(bench, name, memory) for name in bench.variants}
    batches = {name: result["batch"] for name, result in found.items() if result["batch"]}
    trainer = Trainer(bench)
    trainer.make_moments()
    timings = time_steps(bench, trainer, batches)
    for name, result in found.items():
        if name in timings:
            timings[name] |= {key: result[key] for key in ("peak_bytes", "probes", "capped")}
        else:
            timings[name] = {"unmeasured": f"not even one sample fits {memory / 1e9:.3g} GB"}
    return {"memory": memory, **compare(timings)}


def search_in_child(bench: TrainingBench, variant: str, memory: int) -> dict[str, Any]:
    """[`find_largest_batch`] in a process of its own, whose memory is that of this training alone."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(find_largest_batch, bench, variant, memory).result()


def find_largest_batch(bench: TrainingBench, variant: str, memory: int) -> dict[str, Any]:
    r"""
    Doubles the batch until a step of it, with the optimizer's moments beside it, does not fit any more, then halves
    what is left open between the two.

    Args:
        bench ([`TrainingBench`]): Settings.
        variant (`str`): What is trained.
        memory (`int`): Bytes that all may take: on a GPU all that torch takes of it, which it then is kept from
            exceeding, on a CPU the process's resident memory, all libraries counted.

    Returns:
        `dict`: the largest `batch`, 0 if none fits; its `peak_bytes`; what each probed batch took, `None` where it ran
        out of a GPU's memory; and whether the search ended at the preset's largest batch, `capped`.

    Raises:
        Unmeasured: On a CPU, where the system does not tell a process's peak memory as Linux does.
    """
    if bench.device.type == "cuda":
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), bench.device)
    torch.set_num_threads(bench.threads)
    probes: dict[int, int | None] = {}
    try:
        trainer = Trainer(bench)
        trainer.optimizers = {stock: o for stock, o in trainer.optimizers.items() if stock == VARIANTS[variant].stock}
        trainer.make_moments()
    except torch.OutOfMemoryError:
        return {"batch": 0, "peak_bytes": None, "probes": probes, "capped": False}

    def fits(batch_size: int) -> bool:
        probes[batch_size] = peak_of_step(trainer, variant, batch_size)
        print(f"{variant}, batch {batch_size}: {probes[batch_size]} bytes", file=sys.stderr, flush=True)
        return probes[batch_size] is not None and probes[batch_size] <= memory

    largest = largest_that_fits(fits, bench.preset.largest_batch)
    return {
        "batch": largest,
        "peak_bytes": probes.get(largest),
        "probes": {str(batch_size): peak for batch_size, peak in sorted(probes.items())},
        "capped": largest == bench.preset.largest_batch,
    }


def largest_that_fits(fits: Callable[[int], bool], ceiling: int) -> int:
    """The largest number up to `ceiling` that `fits`, or a tenth less; 0 if 1 does not."""
    largest, above = 0, 1
    while above <= ceiling and fits(above):
        largest, above = above, min(2 * above, ceiling) if above < ceiling else ceiling + 1
    while above - largest > max(1, int(FITS * largest)):
        middle = (largest + above) // 2
        largest, above = (middle, above) if fits(middle) else (largest, middle)
    return largest


def peak_of_step(trainer: Trainer, variant: str, batch_size: int) -> int | None:
    """Peak memory in bytes of a step, `None` if it ran out of a GPU's."""
    device = trainer.bench.device
    if device.type != "cuda":
        reset_peak_memory()
        trainer.step(variant, trainer.bench.batch(batch_size))
        return peak_memory()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        trainer.step(variant, trainer.bench.batch(batch_size))
    except torch.OutOfMemoryError:
        for parameter in trainer.parameters:
            parameter.grad = None
        return None
    return torch.cuda.max_memory_reserved(device)


def reset_peak_memory() -> None:
    """Lets [`peak_memory`] begin anew (`man proc_pid_clear_refs`), with nothing that only the allocator holds."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")
    except OSError as error:
        raise Unmeasured("this system does not tell a process's peak memory") from error


def peak_memory() -> int:
    """The most bytes of memory that this process has held at once since [`reset_peak_memory`]."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def bench_table(bench: TrainingBench) -> dict[str, Any]:
    """Steps of ours over sizes and batches, with gradient checkpointing; and on a GPU their peak memory."""
    cells: dict[str, dict[str, Any]] = {}
    trainer = Trainer(bench)
    trainer.make_moments()
    # Compiled for each size and batch, which takes longer than it is worth on a CPU.
    names = [name for name in bench.variants if name in ("ours_checkpointing", "ours_compiled_checkpointing")]
    for size in bench.preset.table["size"]:
        cells[str(size)] = {}
        for batch_size in bench.preset.table["batch"]:
            torch._dynamo.reset()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(bench.device)
            timings = time_steps(bench, trainer, dict.fromkeys(names, batch_size), size)
            cell: dict[str, Any] = {"tokens": bench.lengths(1, size)[0], "variants": timings}
            if bench.device.type == "cuda":
                cell["peak_bytes"] = torch.cuda.max_memory_allocated(bench.device)
            cells[str(size)][str(batch_size)] = cell
    return cells


def bench_optimizers(bench: TrainingBench) -> dict[str, Any]:
    """Bytes that optimizers keep of the published model, counted; on a GPU also peak memory and time of a step."""
    results: dict[str, Any] = {}
    for name in ("adamw", "adamw8bit", "came"):
        results[name] = {"published_state_bytes": state_bytes(TRAINING_PRESETS["full"], name)}
        if bench.device.type != "cuda":
            continue
        try:
            trainer = Trainer(bench, name)
            torch.cuda.reset_peak_memory_stats(bench.device)
            variant = dataclasses.replace(bench, variants=["ours_checkpointing"])
            results[name] |= time_steps(variant, trainer, {"ours_checkpointing": bench.preset.batch})
            results[name]["peak_bytes"] = torch.cuda.max_memory_allocated(bench.device)
        except (ImportError, RuntimeError) as error:
            results[name]["unmeasured"] = str(error).splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
    return results


def state_bytes(preset: TrainingPreset, optimizer: str) -> int:
    """
    Bytes of an optimizer's state of the preset's model, counted on weights that have shapes but no memory: of AdamW
    two float32 moments; of 8-bit AdamW, by bitsandbytes' rule, two moments of a byte and two float32 for each block of
    256, of small weights two float32 moments; of CAME what a step of it leaves.
    """
    with init_empty_weights():
        models = DIMConnector(**preset.connector), DIMTransformer2DModel(**preset.transformer)
    parameters = [parameter for model in models for parameter in model.parameters()]
    counts = [parameter.numel() for parameter in parameters]
    if optimizer == "adamw":
        return sum(2 * 4 * count for count in counts)
    if optimizer == "adamw8bit":
        return sum(
            2 * count + 2 * 4 * math.ceil(count / BLOCK_8BIT) if count >= SMALLEST_8BIT else 2 * 4 * count
            for count in counts
        )
    made = create_optimizer(parameters, optimizer, LEARNING_RATE)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    made.step()
    return sum(
        value.nbytes for state in made.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    )


SECTIONS: dict[str, Callable[[TrainingBench], dict[str, Any]]] = {
    "equality": bench_equality,
    "step": bench_step,
    "largest_batch": bench_largest_batch,
    "table": bench_table,
    "optimizers": bench_optimizers,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"Among {', '.join(SECTIONS)}; all by default.")
    parser.add_argument("--preset", choices=TRAINING_PRESETS, default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="Under autocast; weights are float32."
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="All by default, on a CPU all uncompiled.")
    parser.add_argument("--name", help="Of the JSON, after `training_`; the preset's by default.")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="The JSON's folder.")
    parser.add_argument("--layers", type=int, help="Of the transformer.")
    parser.add_argument("--memory_gb", type=float, help="That a training may take, in place of the preset's.")
    for name in ("size", "tokens", "runs", "largest_batch"):
        parser.add_argument(f"--{name}", type=int, help="In place of the preset's.")
    args = parser.parse_args()
    check_sections(parser, args.sections, SECTIONS)
    return args


def main() -> None:
    args = parse_arguments()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    preset = TRAINING_PRESETS[args.preset]
    given = {name: getattr(args, name) for name in ("size", "tokens", "runs", "largest_batch")}
    preset = dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})
    if args.layers is not None:
        preset = dataclasses.replace(preset, transformer={**preset.transformer, "num_layers": args.layers})
    if args.memory_gb is not None:
        preset = dataclasses.replace(preset, memory=int(args.memory_gb * 1e9))
    uncompiled = [name for name, variant in VARIANTS.items() if not variant.compiled]
    bench = TrainingBench(
        preset=preset,
        device=device,
        dtype=dtype,
        matmul_rate=measure_matmul_rate(device, dtype, preset.matmul_size),
        variants=args.variants or (uncompiled if device.type == "cpu" else list(VARIANTS)),
        threads=torch.get_num_threads(),
    )
    environment = {
        "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "device": device_name(device),
        "threads": bench.threads,
        "dtype": args.dtype,
        "preset": args.preset,
        "layers": preset.transformer["num_layers"],
        **{name: getattr(preset, name) for name in given},
        "matmul_flops_per_second": bench.matmul_rate,
        "versions": package_versions(),
    }
    path = args.results / f"training_{args.name or args.preset}.json"
    run_sections(SECTIONS, args.sections, bench, environment, path)
    print(path)


if __name__ == "__main__":
    main()

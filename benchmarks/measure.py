"""What is timed, and what could be: timings, the machine's rates, and counted work."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffusers_dim.ops import set_kernels
from diffusers_dim.training.flops import transformer_work


PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")


class Unmeasured(RuntimeError):
    """Why something is not measured here."""


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    variants: dict[str, Callable[[], Any]],
    runs: int,
    device: torch.device,
    warmups: dict[str, Callable[[], Any]] | None = None,
    repeat: int = 1,
) -> dict[str, dict[str, Any]]:
    r"""
    Times variants of one work side by side: after a warm-up of each, `runs` rounds in which each runs once, the order
    turned by one from round to round, so that what disturbs the machine meets all of them. A variant whose warm-up
    fails for want of memory or of a compiler does not take part.

    Args:
        variants (`dict[str, Callable]`): What to run, by name.
        runs (`int`): Rounds.
        device (`torch.device`): Waited for before and after each run.
        warmups (`dict[str, Callable]`, *optional*): In place of a variant itself as its warm-up.
        repeat (`int`, defaults to 1): Runs within a timing, for work of microseconds.

    Returns:
        `dict`: For each name `seconds`, all samples in order, and their median, `median_seconds`; or why it is
        `unmeasured`.
    """
    timings: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        try:
            (warmups or {}).get(name, variant)()
        except RuntimeError as error:
            timings[name] = unmeasured(error)
    names = [name for name in variants if name not in timings]
    samples: dict[str, list[float]] = {name: [] for name in names}
    for run in range(runs):
        turn = run % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeat):
                variants[name]()
            synchronize(device)
            samples[name].append((time.perf_counter() - start) / repeat)
    for name, seconds in samples.items():
        timings[name] = {"median_seconds": statistics.median(seconds), "seconds": seconds}
    return timings


def unmeasured(error: RuntimeError) -> dict[str, str]:
    """What stands in a result's place: the error in one line."""
    reason = str(error) if isinstance(error, Unmeasured) else f"{type(error).__name__}: {error}"
    return {"unmeasured": reason.strip().splitlines()[0][:200]}


@dataclass(frozen=True)
class Machine:
    """
    What a machine does at best, as measured.

    Args:
        flops_per_second (`float`): Of a large square matrix product.
        bytes_per_second (`float`): Read and written by a large copy.
    """

    flops_per_second: float
    bytes_per_second: float


def measure_machine(device: torch.device, dtype: torch.dtype, matmul_size: int, copy_bytes: int) -> Machine:
    """The rates of a product of two square matrices of `matmul_size` and of a copy of `copy_bytes`."""
    left, right = (torch.randn(matmul_size, matmul_size, device=device).to(dtype) for _ in range(2))
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    timings = measure({"matmul": lambda: left @ right, "copy": lambda: target.copy_(source)}, runs=5, device=device)
    # The best of them: a floor is what cannot be got under.
    return Machine(
        flops_per_second=2 * matmul_size**3 / min(timings["matmul"]["seconds"]),
        bytes_per_second=2 * source.nbytes / min(timings["copy"]["seconds"]),
    )


@dataclass(frozen=True)
class Cost:
    """
    Work that cannot be left out.

    Args:
        flops (`int`): Multiplications and additions of matrix products, convolutions and attention.
        bytes (`int`): Weights, inputs and outputs, each moved once; what lies between could stay on the chip.
    """

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)

    def seconds(self, machine: Machine) -> float:
        """The time under which `machine` cannot get: its arithmetic or its memory, whichever takes longer."""
        return max(self.flops / machine.flops_per_second, self.bytes / machine.bytes_per_second)


def transformer_cost(
    config: dict[str, Any],
    pictures: int,
    height: int,
    width: int,
    conditions: int,
    tokens: int,
    timesteps: int | None = None,
    guidance_branches: int = 1,
    condition_is_cached: bool = False,
    bytes_per_number: int = 4,
) -> Cost:
    r"""
    One forward of SANA's transformer, counted from its configuration.

    Args:
        config, ..., condition_is_cached: As those of [`transformer_work`].
        bytes_per_number (`int`): 4 for float32, 2 for bfloat16.
    """
    work = transformer_work(
        config, pictures, height, width, conditions, tokens, timesteps, guidance_branches, condition_is_cached
    )
    cross_dim = config["num_cross_attention_heads"] * config["cross_attention_head_dim"]
    condition_rows = conditions * tokens
    numbers = sum(product.inner * product.outer for product in work.all_products)  # weights
    numbers += height * width * pictures * config["out_channels"]
    numbers += height * width * pictures // guidance_branches * config["in_channels"]
    numbers += config["num_layers"] * 2 * condition_rows * cross_dim  # keys and values, written or read
    if not condition_is_cached:
        numbers += condition_rows * config["caption_channels"]
    return Cost(work.flops, numbers * bytes_per_number)


def denoising_cost(config: dict[str, Any], steps: int, **sizes: Any) -> Cost:
    """All steps of a call at the least work: condition and timesteps are embedded once. `sizes` as above."""
    first = transformer_cost(config, timesteps=steps, **sizes)
    return first + transformer_cost(config, timesteps=0, condition_is_cached=True, **sizes) * (steps - 1)


def count_flops(function: Callable[[], Any]) -> int:
    """Matrix products, convolutions and attention of `function()`, counted by torch as it runs."""
    # torch does not count this one, the CPU's attention, by itself.
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {operation: lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, key, value)}
    # Nor does it look into kernels.
    with set_kernels(False), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def run_cost(function: Callable[[], Any], modules: Iterable[nn.Module]) -> Cost:
    """The work of `function()`, counted as it runs, and the bytes of the weights of `modules`."""
    weights = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    return Cost(count_flops(function), weights)


def device_name(device: torch.device) -> str:
    """The accelerator's own name, or the processor's model where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Versions of python, this package and those under it."""
    names = ("diffusers-dim", *PACKAGES)
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}

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
"""What is seen of a run while it trains: losses by timestep, rates, memory."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from ..files import write_lines


logger = logging.getLogger(__name__)

# Dense bfloat16 TFLOP/s with float32 accumulation by the vendors' datasheets (half of what is stated "with sparsity"),
# by a part of the name that CUDA gives the device. The first that fits counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "MI300X": 1307.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a device at best, by its name as CUDA gives it, or `None` if it is unknown."""
    return next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device_name), None)


def read_losses(path: Path) -> list[dict[str, float]]:
    """The lines of a `losses.jsonl`, without what a killed run has left half written; none if it is not there."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries


def cut_losses(path: Path, step: int) -> None:
    """Cuts a `losses.jsonl` back to `step`: a killed run has gone further than its last checkpoint."""
    kept = [json.dumps(entry) for entry in read_losses(path) if entry["step"] <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, kept)


def draw_curves(losses: str | Path, path: str | Path) -> Path | None:
    r"""
    Draws a run's loss, its loss by timesteps, learning rate and gradient norm over the steps, noisy ones smoothed.

    Args:
        losses (`str` or `Path`): The run's `losses.jsonl`.
        path (`str` or `Path`): The picture to write, such as a PNG.

    Returns:
        `path`, or `None` where there is nothing to draw or nothing to draw with: matplotlib is optional.
    """
    entries = read_losses(Path(losses))
    if not entries:
        logger.warning("No curves: %s holds no steps.", losses)
        return None
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No curves: they need matplotlib, `pip install matplotlib`.")
        return None

    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, by_timestep, rate, norm = figure.subplots(2, 2, sharex=True).flat
    parts = sorted({key for entry in entries for key in entry if key.startswith("loss/")}, key=_low_end)
    curves = [(loss, "loss", "loss", "C0"), (rate, "lr", None, "C0"), (norm, "grad_norm", "gradient norm", "C0")]
    colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(parts)))
    curves += [(by_timestep, part, part.removeprefix("loss/"), color) for part, color in zip(parts, colors)]
    for axes, key, label, color in curves:
        steps, values = np.array([(e["step"], e[key]) for e in entries if key in e]).reshape(-1, 2).T
        if axes is not rate and len(values):
            if axes is not by_timestep:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, max(1, len(values) // 50))
        axes.plot(steps, values, color=color, label=label, linewidth=1.4)
    for axes, title in zip(
        (loss, by_timestep, rate, norm), ("Loss", "Loss by sampled timestep", "Learning rate", "Gradient norm")
    ):
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        drawn = np.concatenate([line.get_ydata() for line in axes.lines] or [[]])
        drawn = drawn[np.isfinite(drawn)]
        if axes is not rate and drawn.size and drawn.min() > 0:
            axes.set_yscale("log")
    rate.set_ylim(bottom=0)
    rate.set_xlabel("Step")
    norm.set_xlabel("Step")
    if parts:
        by_timestep.legend(title="part of all timesteps", fontsize=8, title_fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    return Path(path)


def _low_end(part: str) -> float:
    """Where the timesteps of a key "loss/0.1-0.2" begin."""
    return float(part.removeprefix("loss/").split("-")[0])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over up to `window` values to each side, without those that are not finite."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window, 0), np.minimum(index + window + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


class TrainingMonitor:
    r"""
    Gathers what a training shows of itself, over micro-batches and processes, and writes it once a step to the
    accelerator's trackers and, a line a step, to `losses.jsonl`.

    All processes make one and call it alike.

    Args:
        accelerator (`Accelerator`):
            The run's.
        output_dir (`str` or `Path`):
            Where `losses.jsonl` is written.
        step (`int`, defaults to 0):
            Optimizer steps done; lines of `losses.jsonl` behind it, those of a killed run, are cut off.
        flops_per_sample (`Callable[[int, int, int], int]`, *optional*):
            Counted operations of one sample's training step by the latents' height, their width and the condition's
            tokens, see [`training_flops`]; without it there are no "tflops" and no "mfu".
        num_buckets (`int`, defaults to 10):
            Into how many equal parts of the timesteps losses are sorted.
        device_tflops (`float`, *optional*):
            Dense TFLOP/s of one device at best, in the training's precision; by default that of bfloat16 by the
            vendor's datasheet, and no "mfu" for a device that is not known.
        num_train_timesteps (`int`, defaults to 1000):
            Number of timesteps.

    Raises:
        ValueError: If `num_buckets` or `device_tflops` is not positive.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        step: int = 0,
        flops_per_sample: Callable[[int, int, int], int] | None = None,
        num_buckets: int = 10,
        device_tflops: float | None = None,
        num_train_timesteps: int = 1000,
    ):
        if num_buckets < 1:
            raise ValueError(f"`num_buckets` has to be at least 1, but is {num_buckets}.")
        if device_tflops is not None and not device_tflops > 0:
            raise ValueError(f"`device_tflops` has to be above 0, but is {device_tflops}.")
        device = accelerator.device
        if device_tflops is None and device.type == "cuda":
            device_tflops = peak_tflops(torch.cuda.get_device_name(device))
        self.accelerator = accelerator
        self.flops_per_sample = flops_per_sample
        self.num_buckets = num_buckets
        self.device_tflops = device_tflops
        self.num_train_timesteps = num_train_timesteps
        self.path = Path(output_dir) / "losses.jsonl"
        if accelerator.is_main_process:
            cut_losses(self.path, step)
        self._process = psutil.Process()
        self._peak_memory = 0
        # Of this process since the last step: losses by bucket, weights by bucket, operations, and its peak memory.
        # In float64, where the sum of a batch's float32 losses is exact to the last digit that is shown.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(2 * num_buckets + 2, dtype=dtype, device=device)
        self._buckets = torch.arange(num_buckets, device=device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of "samples_per_second" what was done since the last step: validation, saving, compiling."""
        self._start = time.perf_counter()

    def add(
        self,
        losses: torch.Tensor,
        timesteps: torch.Tensor,
        weights: torch.Tensor | None = None,
        height: int = 0,
        width: int = 0,
        tokens: int = 0,
    ) -> None:
        """
        Takes note of a micro-batch of this process. The host does not wait for the device.

        Args:
            losses (`torch.Tensor` of shape `(batch_size,)`): One a sample.
            timesteps (`torch.LongTensor` of shape `(batch_size,)`): As sampled, in [0, num_train_timesteps).
            weights (`torch.Tensor` of shape `(batch_size,)`, *optional*): 1 for a sample, 0 for a placeholder.
            height, width (`int`): Of the latents.
            tokens (`int`): Of the conditions, padding counted.
        """
        device = self._sums.device
        losses = losses.detach().to(self._sums)
        weights = torch.ones_like(losses) if weights is None else weights.detach().to(self._sums)
        losses = torch.where(weights > 0, losses * weights, 0)  # a placeholder's may be anything
        buckets = (timesteps.to(device) * self.num_buckets).div(self.num_train_timesteps, rounding_mode="floor")
        members = (buckets[:, None] == self._buckets).to(self._sums)
        parts = [losses @ members, weights @ members]
        flops = 0 if self.flops_per_sample is None else self.flops_per_sample(height, width, tokens)
        parts += [weights.sum(0, keepdim=True) * flops, self._sums.new_zeros(1)]
        self._sums += torch.cat(parts)

    def log(
        self, step: int, lr: float, grad_norm: torch.Tensor | float | None = None, **values: float
    ) -> dict[str, float]:
        r"""
        Sums up what was added since the last call, over all processes, and writes it. All processes call it, after
        each optimizer step.

        Args:
            step (`int`): Optimizer steps done.
            lr (`float`): Learning rate.
            grad_norm (`torch.Tensor` or `float`, *optional*): The gradients' norm, as `clip_grad_norm_` gives it.
            **values (`float`): What else is to be written, as it is.

        Returns:
            `dict[str, float]`, equal on all processes: "loss", the mean over samples; "lr"; "grad_norm";
            "samples_per_second", of all processes; "tflops", counted operations a second and device, and "mfu", what
            part of the device's peak that is; "memory_gb", the most that was in use on any device, or, on a CPU, by
            any process, in 10^9 bytes; "loss/0.0-0.1" and so on, the mean loss of the sampled timesteps in this part
            of all, for parts that had samples.
        """
        self._sums[-1] = self._memory()
        gathered = self.accelerator.gather(self._sums[None]).tolist()
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        self._sums.zero_()

        sums = [sum(column) for column in zip(*gathered)]
        losses, counts = sums[: self.num_buckets], sums[self.num_buckets : 2 * self.num_buckets]
        samples = sum(counts)
        log: dict[str, float] = {}
        if samples:
            log["loss"] = sum(losses) / samples
        log["lr"] = lr
        if grad_norm is not None:
            # FSDP2's is spread over the devices.
            log["grad_norm"] = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
        log["samples_per_second"] = samples / seconds
        if self.flops_per_sample is not None:
            log["tflops"] = sums[-2] / seconds / len(gathered) / 1e12
            if self.device_tflops is not None:
                log["mfu"] = log["tflops"] / self.device_tflops
        log["memory_gb"] = max(row[-1] for row in gathered) / 1e9
        for bucket, (loss, count) in enumerate(zip(losses, counts)):
            if count:
                low, high = bucket / self.num_buckets, (bucket + 1) / self.num_buckets
                log[f"loss/{round(low, 3)}-{round(high, 3)}"] = loss / count
        log |= values

        if self.accelerator.is_main_process:
            # Opened for each line, so that a killed run has lost none.
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **log}) + "\n")
        self.accelerator.log(log, step=step)
        return log

    def _memory(self) -> int:
        """Bytes in use at most so far: of the device, or of this process on the CPU."""
        device = self.accelerator.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        self._peak_memory = max(self._peak_memory, self._process.memory_info().rss)
        return self._peak_memory

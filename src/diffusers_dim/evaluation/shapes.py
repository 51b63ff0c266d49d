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
"""Edit success in the picture world of the embedded model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..tiny.world import EditSample


MAX_ERROR_RATIO = 0.5
MIN_PSNR = 25.0


@dataclass(frozen=True)
class EditScore:
    """
    How well one edit was done.

    Args:
        error_ratio (`float`):
            Over the pixels that the true edit changes, mean absolute error to the target, as a part of that between
            source and target.
        psnr (`float`):
            Over the other pixels, peak signal-to-noise ratio to the source in dB.
    """

    error_ratio: float
    psnr: float

    @property
    def success(self) -> bool:
        """Whether the change was made (ratio under one half) and the rest kept (at least 25 dB)."""
        return self.error_ratio < MAX_ERROR_RATIO and self.psnr >= MIN_PSNR


def score_edit(sample: EditSample, edited: Image.Image) -> EditScore:
    """
    Scores an edited picture against the true edit.

    Args:
        sample (`EditSample`): Source and target.
        edited (`PIL.Image.Image`): The edited picture, of the same size.

    Raises:
        ValueError: If the sizes differ.
    """
    if edited.size != sample.target.size:
        raise ValueError(f"The edited picture is of size {edited.size}, but the target is of {sample.target.size}.")
    source, target, result = (
        np.asarray(image.convert("RGB"), dtype=np.float64) for image in (sample.source, sample.target, edited)
    )
    changed = (source != target).any(axis=-1)
    error = np.abs(result - target)[changed].mean() / np.abs(source - target)[changed].mean()
    square = np.square(result - source)[~changed].mean() if (~changed).any() else 0.0
    psnr = 10 * np.log10(255.0**2 / square) if square > 0 else float("inf")
    return EditScore(error_ratio=float(error), psnr=float(psnr))


@dataclass
class ShapesReport:
    """Scores of the picture world's edits by kind; printed as a table."""

    scores: dict[str, list[EditScore]] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """The part of all edits that succeeded, in [0, 1]."""
        every = [score.success for scores in self.scores.values() for score in scores]
        return sum(every) / len(every)

    def by_kind(self) -> dict[str, float]:
        """The part of each kind's edits that succeeded, in [0, 1]."""
        return {kind: sum(s.success for s in scores) / len(scores) for kind, scores in sorted(self.scores.items())}

    def to_dict(self) -> dict:
        """The report as plain numbers, for JSON."""
        return {
            "overall": self.overall,
            "edits": sum(map(len, self.scores.values())),
            "by_kind": {
                kind: {
                    "edits": len(scores),
                    "success": self.by_kind()[kind],
                    "not_changed": sum(s.error_ratio >= MAX_ERROR_RATIO for s in scores) / len(scores),
                    "not_kept": sum(s.psnr < MIN_PSNR for s in scores) / len(scores),
                }
                for kind, scores in sorted(self.scores.items())
            },
        }

    def __str__(self) -> str:
        rows = [f"{'kind':<12}{'edits':>6}{'success':>9}{'not made':>10}{'not kept':>10}"]
        for kind, row in self.to_dict()["by_kind"].items():
            rows.append(
                f"{kind:<12}{row['edits']:>6}{row['success']:>9.1%}{row['not_changed']:>10.1%}{row['not_kept']:>10.1%}"
            )
        rows.append(f"{'overall':<12}{sum(map(len, self.scores.values())):>6}{self.overall:>9.1%}")
        return "\n".join(rows)


def evaluate_shapes(
    pipe: Callable,
    samples: Sequence[EditSample],
    batch_size: int = 32,
    seed: int = 0,
    keep: list[Image.Image] | None = None,
    blueprints: bool = False,
    **call_kwargs: Any,
) -> ShapesReport:
    r"""
    Edits the picture world's samples by their plain instructions, or by their blueprints, and reports success by kind.

    Args:
        pipe ([`DIMEditPipeline`]):
            The pipeline to judge.
        samples (`Sequence[EditSample]`):
            What to edit, from seeds not used in training.
        batch_size (`int`, defaults to 32):
            Edits a call.
        seed (`int`, defaults to 0):
            Of the noise: edit i starts from the noise of seed `seed + i`, whatever the batch size.
        keep (`list`, *optional*):
            Receives the edited pictures, in order.
        blueprints (`bool`, defaults to `False`):
            Paint from each sample's own blueprint.
        call_kwargs:
            Passed to the pipeline (`guidance_scale`, `num_inference_steps`, ...).
    """
    report = ShapesReport()
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        width, height = batch[0].source.size
        images = pipe(
            [sample.source for sample in batch],
            [sample.instruction for sample in batch],
            height=height,
            width=width,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
            # A designer of the pipeline's is no part of what is scored.
            blueprint=[sample.blueprint if blueprints else sample.instruction for sample in batch],
            **call_kwargs,
        ).images
        for sample, image in zip(batch, images):
            report.scores.setdefault(sample.kind, []).append(score_edit(sample, image))
        if keep is not None:
            keep.extend(images)
    return report

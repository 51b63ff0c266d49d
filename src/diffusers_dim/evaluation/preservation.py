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
What edits kept and what they changed, measured between pictures, without a judge.

The changed area is the data engine's [`change_mask`] of source and target or, where there is no target, of source and
edit: outside of the latter nothing differs by more than the mask's threshold, so that its figures tell of faint
changes alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageChops
from tqdm.auto import tqdm

from ..data.engine.pictures import change_mask
from ..files import read_picture
from ..image_processor import DIMImageProcessor
from .benchmark import Figure, refuse
from .embedding import PictureEmbedder
from .statistics import mean_interval


METRICS = ("psnr", "ssim", "lpips", "dino", "clip")
TITLES = {"psnr": "PSNR, dB ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓", "dino": "DINO ↓", "clip": "CLIP ↓"}
AREAS = ("inside", "outside")
# Of areas that are the same to the last bit, so that there is a mean.
MAX_PSNR = 100.0

# Of two RGB pictures of one size, over an area: an "L" picture of that size, 255 where it is. The first picture is the
# edit.
Metric = Callable[[Image.Image, Image.Image, Image.Image], float]


@dataclass(frozen=True)
class Pair:
    """
    An edit and what it is compared with; pictures by their files.

    Args:
        key, group (`str`): The case's.
        source, edit (`pathlib.Path`): Before and after.
        target (`pathlib.Path`, *optional*): The true edit, where there is one.
    """

    key: str
    group: str
    source: Path
    edit: Path
    target: Path | None = None


@dataclass(frozen=True)
class PairFigures:
    """
    What was measured of a pair.

    Args:
        key, group (`str`): The case's.
        area (`"source and target"` or `"source and edit"`): What the changed area lies between.
        changed (`float`): The part of the picture that it takes, in [0, 1].
        inside, outside (`dict[str, float]`):
            By metric. Outside of the area the edit is compared with the source; inside it with the target or, without
            one, with the source. Empty where there is no such area.
    """

    key: str
    group: str
    area: Literal["source and target", "source and edit"]
    changed: float
    inside: dict[str, float]
    outside: dict[str, float]


@dataclass
class Preservation:
    """
    What was measured of a run.

    Args:
        metrics (`tuple[str, ...]`): Which were, of `METRICS`.
        unmeasured (`dict[str, str]`): Those that could not be, and why.
        cases (`int`): How many the benchmark has, also such as were left out.
        pairs (`list[PairFigures]`): One a pair.
    """

    metrics: tuple[str, ...]
    unmeasured: dict[str, str]
    cases: int
    pairs: list[PairFigures] = field(default_factory=list)

    def figure(self, area: str, metric: str, group: str | None = None) -> Figure:
        """The mean over the pairs of a group, or over all; of all cases for the latter, else of the group's pairs."""
        pairs = [pair for pair in self.pairs if group in (None, pair.group)]
        found = [getattr(pair, area) for pair in pairs]
        values = [figures[metric] for figures in found if metric in figures]
        value = float(np.mean(values)) if values else None
        return Figure(value, len(values), self.cases if group is None else len(pairs), *mean_interval(values))

    def to_dict(self) -> dict[str, Any]:
        """All as plain numbers, for JSON."""
        groups: dict[str, str | None] = {"overall": None, **{pair.group: pair.group for pair in self.pairs}}
        figures = {
            name: {
                area: {metric: asdict(self.figure(area, metric, group)) for metric in self.metrics} for area in AREAS
            }
            for name, group in groups.items()
        }
        areas = [pair.area for pair in self.pairs]
        return {
            "cases": self.cases,
            "areas": {area: areas.count(area) for area in sorted(set(areas))},
            "unmeasured": self.unmeasured,
            "figures": figures,
            "pairs": [asdict(pair) for pair in self.pairs],
        }

    def __str__(self) -> str:
        """A Markdown table, and what it is of."""
        lines = ["| metric | inside | n of N | outside | n of N |", "| --- | ---: | ---: | ---: | ---: |"]
        for metric in self.metrics:
            cells = []
            for area in AREAS:
                figure = self.figure(area, metric)
                cells += [_number(figure), f"{figure.scored} of {figure.cases}"]
            lines.append(f"| {TITLES[metric]} | {' | '.join(cells)} |")
        lines.append("")
        for area, count in self.to_dict()["areas"].items():
            inside = "target" if area.endswith("target") else "source"
            lines.append(
                f"{count} of {len(self.pairs)} changed areas are between {area}; inside, the edit is compared with the"
                f" {inside}, outside with the source."
            )
        lines += [f"{TITLES[metric]}: not measured, {reason}" for metric, reason in self.unmeasured.items()]
        return "\n".join(lines)


def _number(figure: Figure) -> str:
    if figure.value is None:
        return "–"
    interval = "" if figure.low is None else f" ({figure.low:.3f} to {figure.high:.3f})"
    return f"{figure.value:.3f}{interval}"


def load_metrics(
    names: Iterable[str], dino: str | None = None, clip: str | None = None, device: torch.device | str = "cpu"
) -> tuple[dict[str, Metric], dict[str, str]]:
    """
    The metrics of these names.

    Args:
        names (`Iterable[str]`): Some of `METRICS`.
        dino (`str`, *optional*): Folder or Hub repository id of a DINOv2 model, for "dino".
        clip (`str`, *optional*): The same of a CLIP model, for "clip".
        device (`torch.device` or `str`, defaults to `"cpu"`): Where networks run.

    Returns:
        `tuple`: Those that can be had, and why the others cannot.

    Raises:
        ValueError: If a name is unknown, or a model is not of the kind.
    """
    names = list(names)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"Metrics have to be of {', '.join(METRICS)}, but {', '.join(unknown)} were asked for.")
    loaders: dict[str, Callable[[], Metric]] = {
        "psnr": _load_psnr,
        "ssim": _load_ssim,
        "lpips": lambda: _load_lpips(device),
        "dino": lambda: _load_embedding("dino", dino, device),
        "clip": lambda: _load_embedding("clip", clip, device),
    }
    metrics, unmeasured = {}, {}
    for name in METRICS:
        if name in names:
            try:
                metrics[name] = loaders[name]()
            except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
                unmeasured[name] = " ".join(str(error).split())
    return metrics, unmeasured


def measure_preservation(
    pairs: Sequence[Pair],
    metrics: dict[str, Metric],
    unmeasured: dict[str, str] | None = None,
    cases: int | None = None,
    progress: bool = False,
) -> Preservation:
    """
    Measures pairs. Source and target are resized and cropped to the edit's size, as the painter saw the source.

    Args:
        pairs (`Sequence[Pair]`): At least one.
        metrics (`dict[str, Callable]`), unmeasured (`dict[str, str]`, *optional*): As from [`load_metrics`].
        cases (`int`, *optional*): How many the benchmark has, where there are more than pairs.
        progress (`bool`, defaults to `False`): Whether to show a bar.

    Raises:
        ValueError: If there is no pair, or pictures are missing; all of these are listed.
    """
    if not pairs:
        raise ValueError("There are no pairs of pictures to measure.")
    files = [path for pair in pairs for path in (pair.source, pair.edit, pair.target) if path is not None]
    refuse("Pictures are missing", [str(path) for path in files if not path.is_file()])
    report = Preservation(tuple(metrics), unmeasured or {}, len(pairs) if cases is None else cases)
    for pair in tqdm(pairs, desc="Pairs measured", disable=not progress):
        edit = read_picture(pair.edit)
        source, target = (_fitted(path, edit) for path in (pair.source, pair.target))
        inside = change_mask(source, edit if target is None else target)
        changed = inside.histogram()[255] / (inside.width * inside.height)
        found: dict[str, dict[str, float]] = {area: {} for area in AREAS}
        if changed > 0:
            reference = source if target is None else target
            found["inside"] = {name: metric(edit, reference, inside) for name, metric in metrics.items()}
        if changed < 1:
            outside = ImageChops.invert(inside)
            found["outside"] = {name: metric(edit, source, outside) for name, metric in metrics.items()}
        between: Any = "source and edit" if target is None else "source and target"
        report.pairs.append(PairFigures(pair.key, pair.group, between, changed, **found))
    return report


def _fitted(path: Path | None, edit: Image.Image) -> Image.Image | None:
    return None if path is None else DIMImageProcessor().resize_and_crop(read_picture(path), edit.height, edit.width)


def _tensor(picture: Image.Image) -> torch.Tensor:
    """Of shape `(1, 3, height, width)`, in [0, 1]."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float() / 255


def _mean_over(values: torch.Tensor, area: Image.Image) -> float:
    """The mean over an area of values of shape `(1, channels, height, width)`."""
    return values[..., torch.from_numpy(np.array(area) > 0).to(values.device)].double().mean().item()


def _load_psnr() -> Metric:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def psnr(first: Image.Image, second: Image.Image, area: Image.Image) -> float:
        pixels = np.array(area) > 0
        values = (torch.from_numpy(np.array(picture)[pixels]).double() for picture in (first, second))
        return min(peak_signal_noise_ratio(*values, data_range=255.0).item(), MAX_PSNR)

    return psnr


def _load_ssim() -> Metric:
    from torchmetrics.functional.image import structural_similarity_index_measure

    def ssim(first: Image.Image, second: Image.Image, area: Image.Image) -> float:
        _, values = structural_similarity_index_measure(
            _tensor(first), _tensor(second), data_range=1.0, return_full_image=True
        )
        return _mean_over(values, area)

    return ssim


def _load_lpips(device: torch.device | str) -> Metric:
    import lpips

    network = lpips.LPIPS(net="alex", spatial=True, verbose=False).to(device).eval()

    @torch.no_grad()
    def distance(first: Image.Image, second: Image.Image, area: Image.Image) -> float:
        values = network(*(_tensor(picture).to(device) for picture in (first, second)), normalize=True)
        return _mean_over(values, area)

    return distance


def _load_embedding(kind: Literal["dino", "clip"], model: str | None, device: torch.device | str) -> Metric:
    """One minus the cosine of two pictures' embeddings, with the mean colour in the place of all but the area."""
    if model is None:
        raise ImportError(f"no model is given by --{kind}.")
    embedder = PictureEmbedder(model, device)
    if not embedder.kind.startswith(kind):
        raise ValueError(f"--{kind} {model}: has to be a {kind.upper()} model, but is a {embedder.kind}.")
    side, mean, std = (embedder.side, embedder.side), embedder.mean.cpu(), embedder.std.cpu()

    @torch.no_grad()
    def distance(first: Image.Image, second: Image.Image, area: Image.Image) -> float:
        # The whole picture, without the processors' crop, which may cut the area off.
        shown = torch.from_numpy(np.array(area.resize(side, Image.Resampling.BOX))) / 255
        pictures = [_tensor(picture.resize(side, Image.Resampling.BICUBIC)) for picture in (first, second)]
        embeddings = embedder.embed((torch.cat([(picture - mean) / std for picture in pictures]) * shown).to(device))
        return max(0.0, 1 - torch.cosine_similarity(embeddings[0].double(), embeddings[1].double(), dim=0).item())

    return distance

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
MJHQ-30K (https://huggingface.co/datasets/playgroundai/MJHQ-30K): Fréchet Inception Distance to 30,000 pictures of ten
categories, computed by torchmetrics.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional
from tqdm.auto import tqdm

from ..files import read_picture, written_aside
from .benchmark import Answers, Benchmark, Case, CaseScore, Figure, Scores, read_json, refuse
from .embedding import PictureEmbedder


SIDE = 299  # of pictures as Inception v3 takes them, in pixels
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
OTHER_FEATURES = "Or name a CLIP or DINOv2 model by --features, for a distance that is no FID."
Resize = Literal["clean", "legacy_pytorch"]

_SAFE_KEY = re.compile(r"(?!\.)[\w.-]+")


class _Given(torch.nn.Module):
    """A metric's feature extractor where features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class MJHQ(Benchmark):
    """
    MJHQ-30K.

    Args:
        data (`str` or `Path`):
            A folder with `meta_data.json` and the reference pictures as `{category}/{id}.jpg`, there or in its
            `mjhq30k_imgs`.
        resize (`"clean"` or `"legacy_pytorch"`, defaults to `"clean"`):
            How pictures are brought to 299x299, by clean-fid's names: PIL's bicubic with antialiasing, as clean-fid
            does, or PyTorch's bilinear without, as pytorch-fid does. Unlike there, both then round to 8 bits.
        features (`str` or `torch.nn.Module`, *optional*):
            What makes features of pictures: a CLIP or DINOv2 model by its folder or Hub repository id, see
            [`PictureEmbedder`]; or a module, of uint8 of shape (batch, 3, side, side) to (batch, features), where
            `side` is its own, else 299. By default torchmetrics' Inception v3 with 2,048 features, whose weights
            torch-fidelity downloads. With another network the figures are Fréchet distances, but no FID.
        batch_size (`int`, defaults to 64): Pictures at once.
        device (`str` or `torch.device`, *optional*): Where features are made; a GPU by default, where there is one.
    """

    name = "mjhq"
    title = "MJHQ-30K"
    kind = "t2i"
    groups = ("animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people", "plants", "vehicles")
    best = 0.0

    def __init__(
        self,
        data: str | Path,
        resize: Resize = "clean",
        features: str | torch.nn.Module | None = None,
        batch_size: int = 64,
        device: str | torch.device | None = None,
    ):
        if resize not in ("clean", "legacy_pytorch"):
            raise ValueError(f'`resize` has to be "clean" or "legacy_pytorch", but is {resize!r}.')
        if batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1, but is {batch_size}.")
        self.resize = resize
        self.features = features
        self.side = SIDE
        self.batch_size = batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        super().__init__(data)

    @property
    def references(self) -> Path:
        """The folder of reference pictures by category."""
        unpacked = self.data / "mjhq30k_imgs"
        return unpacked if unpacked.is_dir() else self.data

    def read_cases(self) -> list[Case]:
        path = self.data / "meta_data.json"
        rows = read_json(path)
        if not rows or not all(isinstance(row, dict) for row in rows.values()):
            raise ValueError(f"{path} has to be a JSON object of an object for each picture, by its id.")
        problems, cases = [], []
        there = {
            group: set(os.listdir(folder)) for group in self.groups if (folder := self.references / group).is_dir()
        }
        for key, row in rows.items():
            category, prompt = row.get("category"), row.get("prompt")
            if not _SAFE_KEY.fullmatch(key):
                problems.append(f"{key!r}: an id has to be letters, digits, dots, - and _")
            if not isinstance(prompt, str) or not prompt.strip():
                problems.append(f"{key}: there is no prompt")
            if category not in self.groups:
                problems.append(f"{key}: the category {category!r} is none of {', '.join(self.groups)}")
            elif f"{key}.jpg" not in there.get(category, ()):
                problems.append(f"{key}: there is no {self.references / category / key}.jpg")
            cases.append(Case(key, prompt, category, (f"{category}/{key}.png",)))
        refuse(path, problems)
        return cases

    def score(self, run: dict[str, Any], pictures: Path, answers: dict[str, Answers] | None, judge: str) -> Scores:
        """
        See [`Benchmark.score`]. Features of whole categories are kept in a folder `features` beside that of pictures.
        No picture has a score of its own, and no figure an interval. All references count, also those whose picture
        is missing; of fewer than two pictures there is no figure.

        Raises:
            ImportError: If torchmetrics or its Inception v3 is not there.
            ValueError: If a picture cannot be read.
        """
        network, what = self._network()
        kept = pictures.parent / "features"
        kept.mkdir(exist_ok=True)
        features: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with tqdm(total=2 * len(self.cases), desc="Features", unit="picture", disable=None) as progress:
            for group in self.groups:
                if cases := [case for case in self.cases if case.group == group]:
                    real = [self.references / group / f"{case.key}.jpg" for case in cases]
                    made = [path for case in cases if (path := pictures / case.files[0]).exists()]
                    features[group] = (
                        self._make_features(network, what, real, kept / f"references-{group}.safetensors", progress),
                        self._make_features(network, what, made, kept / f"pictures-{group}.safetensors", progress),
                    )
        sets = {"overall": list(features.values())} | {group: [pair] for group, pair in features.items()}
        figures = {name: self._figure(pairs) for name, pairs in tqdm(sets.items(), desc="FID", disable=None)}
        scores = [CaseScore(case.key, case.group, None) for case in self.cases]
        made_by = {} if self.features is None else {"features": getattr(network, "name", type(network).__name__)}
        return Scores(self.name, run | {"fid": what} | made_by, figures, scores, judge, lower_is_better=True)

    def _network(self) -> tuple[torch.nn.Module, str]:
        """What makes features, and the FID's protocol in words."""
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            network = PictureEmbedder(self.features) if isinstance(self.features, str) else self.features
            if network is None:
                network = FrechetInceptionDistance(feature=2048).inception
        except (ImportError, RuntimeError) as error:  # the second of a torchvision for another torch
            raise ImportError(
                "FID is computed by torchmetrics with torch-fidelity's Inception v3: `pip install torchmetrics "
                f"torch-fidelity torchvision` ({' '.join(str(error).split())}). {OTHER_FEATURES}"
            ) from error
        except OSError as error:
            if self.features is not None:
                raise ValueError(f"--features {self.features}: {' '.join(str(error).split())}") from error
            raise ImportError(
                f"The weights of Inception v3 cannot be downloaded ({error}): put {WEIGHTS}, of torch-fidelity's"
                f" release v0.2.0, into {Path(torch.hub.get_dir(), 'checkpoints')}. {OTHER_FEATURES}"
            ) from error
        self.side = getattr(network, "side", SIDE)
        digest = hashlib.sha256()
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        version = importlib.metadata.version("torchmetrics")
        name = f"{getattr(network, 'name', type(network).__name__)} {digest.hexdigest()[:16]}"
        resize = f"{self.resize} resize to {self.side}x{self.side}"
        return network.to(self.device).eval(), f"torchmetrics {version}, {name}, {resize}"

    def _make_features(
        self, network: torch.nn.Module, what: str, paths: Sequence[Path], kept: Path, progress: tqdm
    ) -> torch.Tensor:
        """Features (pictures, features) of files, from `kept` if these were made of the same files in the same way."""
        if not paths:
            return torch.empty(0, 0)
        facts = [(path.parent.name, path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
        digest = hashlib.sha256(json.dumps([what, facts]).encode()).hexdigest()
        if kept.exists():
            try:
                with safe_open(kept, "pt") as file:
                    if (file.metadata() or {}).get("made_of") == digest:
                        progress.update(len(paths))
                        return file.get_tensor("features")
            except SafetensorError:
                pass  # of another program, or broken: made anew
        parts = []
        with ThreadPoolExecutor() as readers, torch.inference_mode():
            for start in range(0, len(paths), self.batch_size):
                batch = torch.stack(list(readers.map(self._read, paths[start : start + self.batch_size])))
                parts.append(network(batch.to(self.device)).float().cpu())
                progress.update(len(batch))
        features = torch.cat(parts)
        with written_aside(kept) as aside:
            save_file({"features": features}, aside, metadata={"made_of": digest})
        return features

    def _read(self, path: Path) -> torch.Tensor:
        """A picture as uint8 of shape (3, side, side)."""
        image, size = read_picture(path), (self.side, self.side)
        if self.resize == "clean":
            # Each channel by itself in floats, so that nothing is rounded between PIL's two passes.
            sizes = [
                np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC))
                for channel in np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
            ]
            resized = torch.from_numpy(np.stack(sizes))
        else:
            pixels = torch.from_numpy(np.array(image, dtype=np.float32).transpose(2, 0, 1))
            resized = functional.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
        return resized.round().clamp(0, 255).to(torch.uint8)

    def _figure(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Figure:
        """The FID between references and pictures, of one or several categories."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        count, cases = sum(len(made) for _, made in pairs), sum(len(real) for real, _ in pairs)
        if min(count, cases) < 2:
            return Figure(None, 0, cases)
        metric = FrechetInceptionDistance(feature=_Given(pairs[0][0].shape[-1]))
        for real, made in pairs:
            metric.update(real.double(), real=True)
            if len(made):
                metric.update(made.double(), real=False)
        return Figure(float(metric.compute()), count, cases)

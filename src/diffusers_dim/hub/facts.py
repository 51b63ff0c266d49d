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
What model cards tell of Draw-In-Mind's released models and of what they are made of, in one place.

Facts are those of the paper and its authors' pages, as far as they were found written; what was not found is not here.
Figures are in `evaluation/paper.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ingredient:
    """
    A model or data set that a model is made of.

    Args:
        repo_id (`str`): On the Hub.
        what (`str`): What it is, in a few words.
        licence (`str`): Its terms in a sentence, and where they were read.
    """

    repo_id: str
    what: str
    licence: str


@dataclass(frozen=True)
class ReleasedModel:
    """
    One of the models that Draw-In-Mind's authors released.

    Args:
        repo_id (`str`): Their repository.
        kind (`str`): "edit" or "t2i".
        summary (`str`): What it is.
        training (`str`): How the authors trained it.
        datasets (`tuple[str, ...]`): Of what: names in `INGREDIENTS`.
        rows (`dict[str, tuple[str, ...]]`): By benchmark, its rows' names in the paper's tables.
    """

    repo_id: str
    kind: str
    summary: str
    training: str
    datasets: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        return self.repo_id.partition("/")[2]


PAPER_URL = "https://huggingface.co/papers/2509.01986"

# The authors' licence stands in the front matter of one of their pages, and was read there alone.
DIM_LICENCE = (
    "CC BY-NC 4.0, so for non-commercial use, by the page of"
    " [stdKonjac/DIM-4.6B-Edit-Stage1](https://huggingface.co/stdKonjac/DIM-4.6B-Edit-Stage1)"
)

INGREDIENTS = {
    "qwen": Ingredient(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen2.5-VL-3B-Instruct, the vision-language model that reads picture and text",
        "a research licence, the [Qwen Research License"
        " Agreement](https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE): research and other"
        " non-commercial use; commercial use needs a licence of Alibaba Cloud. Built with Qwen",
    ),
    "sana": Ingredient(
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "SANA1.5-1.6B, the painter's first weights",
        "[NVIDIA License](https://huggingface.co/Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/blob/main/LICENSE.txt)"
        ', "NSCL v2-custom" by its page: non-commercial use; its terms speak of NVIDIA processors and of a safety'
        " model (ShieldGemma-2B), too, and have to be read before any use. SANA's code alone is under Apache-2.0",
    ),
    "dc-ae": Ingredient(
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
        "DC-AE, the autoencoder between pictures and latents",
        "MIT, by [its page](https://huggingface.co/mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers)",
    ),
    "dim-t2i": Ingredient(
        "stdKonjac/DIM-T2I",
        "DIM-T2I: 14 million pictures with long captions",
        "see [its page](https://huggingface.co/datasets/stdKonjac/DIM-T2I)",
    ),
    "dim-edit": Ingredient(
        "stdKonjac/DIM-Edit",
        "DIM-Edit: 233 thousand edits with blueprints that GPT-4o wrote",
        "see [its page](https://huggingface.co/datasets/stdKonjac/DIM-Edit)",
    ),
    "ultraedit": Ingredient(
        "BleachNick/UltraEdit",
        "UltraEdit: about 4 million edits made by models on real pictures",
        "CC BY 4.0, by [its page](https://huggingface.co/datasets/BleachNick/UltraEdit)",
    ),
}

# Of these every Draw-In-Mind model is made.
DIM_PARTS = ("qwen", "sana", "dc-ae")

# What a Draw-In-Mind model is made of, in the order of the pipeline: component, what, whether it was trained.
COMPONENTS = (
    ("`text_encoder`, `processor`", INGREDIENTS["qwen"].what, "no"),
    ("`connector`", "two linear layers from 2048 to 2304 channels, and the learned null condition", "yes"),
    ("`transformer`", "a linear-attention diffusion transformer of 20 layers, from SANA1.5-1.6B", "yes"),
    ("`vae`", "DC-AE f32c32: 32 times smaller sides, 32 channels", "no"),
    ("`scheduler`", "DPM-Solver++ of order 2 on flow sigmas with shift 3.0; 30 steps, guidance 7.5", ""),
)

_STAGE1 = "DIM-4.6B-T2I, its patch embedding widened to take the source's latents beside the noisy ones, on UltraEdit"

RELEASED = {
    model.name: model
    for model in (
        ReleasedModel(
            "stdKonjac/DIM-4.6B-T2I",
            "t2i",
            "Paints pictures from text: Draw-In-Mind's painter before it learned to edit.",
            "The authors trained connector, null condition and transformer, from SANA1.5-1.6B, on DIM-T2I, with the"
            " vision-language model and the autoencoder frozen.",
            ("dim-t2i",),
            {"geneval": ("DIM-4.6B-T2I (rewritten)",), "mjhq": ("DIM-4.6B-T2I",)},
        ),
        ReleasedModel(
            "stdKonjac/DIM-4.6B-Edit-Stage1",
            "edit",
            "Edits pictures by instruction: Draw-In-Mind's editor after the first of its two stages, before it learned"
            " to read blueprints.",
            f"The authors trained connector, null condition and transformer of {_STAGE1}.",
            ("dim-t2i", "ultraedit"),
            {"imgedit": ("DIM-4.6B-Edit-Stage1",)},
        ),
        ReleasedModel(
            "stdKonjac/DIM-4.6B-Edit",
            "edit",
            "Edits pictures by instruction: a designer, which may be any vision-language model, writes the edit down"
            " as a blueprint, and this model paints it.",
            f"The authors trained connector, null condition and transformer in two stages: {_STAGE1}; then on"
            " DIM-Edit, with its blueprints as prompts.",
            ("dim-t2i", "ultraedit", "dim-edit"),
            {"imgedit": ("DIM-4.6B-Edit",)},
        ),
    )
}

# By which a painter of the released size is known.
SANA_SHAPE = {"num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32, "caption_channels": 2304}

# Parameters of all components together, as the models' names have them.
PARAMETERS = 4.6e9

# Who or what judged the paper's figures.
JUDGES = {"imgedit": "GPT-4.1", "geneval": "GenEval's object detector", "mjhq": "pytorch-fid"}

RELEASED_LIMITS = """- Sizes are about one megapixel, in SANA's aspect ratios; others are brought to the nearest.
- An edit redraws the whole picture through an autoencoder of 32 times smaller sides: small text, faces and fine
  patterns change even where nothing was asked.
- It is only as good as what it reads. Plain instructions score lower than blueprints, and a blueprint that is wrong is
  painted as it is.
- SANA's authors name complex scenes, text and hands as weak.
- Captions and blueprints it was trained on are in English; other languages were not measured."""

RELEASED_BIAS = """It inherits what its parts learned from pictures of the Web and from texts that models wrote:
people, places and styles are shown as often, and as stereotyped, as they are there. No filter is part of the pipeline,
neither for prompts nor for pictures. Bias was not measured by this project."""

CITATION = """@inproceedings{draw-in-mind,
  title = {Draw-In-Mind: Rebalancing Designer-Painter Roles in Unified Multimodal Models Benefits Image Editing},
  author = {{The Draw-In-Mind authors}},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year = {2026},
  eprint = {2509.01986},
  archivePrefix = {arXiv}
}"""

SOFTWARE_CITATION = """@software{diffusers-dim,
  title = {diffusers-dim},
  author = {{The diffusers-dim authors}},
  version = {VERSION},
  license = {Apache-2.0}
}"""

# Seconds of a picture by this package and by the same parts of stock diffusers: benchmarks/results/cpu.json.
SPEED_SETTING = "AMD EPYC, 2 CPU threads, float32: 4 of the painter's 20 layers, random weights, 1024 px, 8 steps"
SPEED = {"t2i": ("text_to_image", 63.71, 84.59), "edit": ("edit", 64.26, 81.04)}

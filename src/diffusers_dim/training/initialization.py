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
"""Where trainings start: SANA with a vision-language model as a text-to-image pipeline, and that one as an editor."""

import argparse
import os
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ..models import DIMConnector, DIMProcessor, DIMTransformer2DModel
from ..pipelines import DIMEditPipeline, DIMPipeline
from .setup import read_pipeline_kind


def load_pipeline(args: argparse.Namespace, allowed: tuple[str, ...], components: dict[str, Any]) -> DIMPipeline:
    """
    Reads the pipeline of the model options, of one of the `allowed` kinds of [`read_pipeline_kind`]: in float32, its
    vision-language model in `args.frozen_dtype`, and with `components` in place of its own, which are then not read.
    """
    kind = read_pipeline_kind(args, allowed)
    text_encoder_dtype = getattr(torch, args.frozen_dtype)
    if kind == "sana":
        return load_sana(
            args.pretrained_model_name_or_path,
            args.text_encoder_name_or_path,
            args.max_sequence_length,
            torch.Generator().manual_seed(args.seed),
            revision=args.revision,
            variant=args.variant,
            text_encoder_dtype=text_encoder_dtype,
            **components,
        )
    return (DIMEditPipeline if kind == "edit" else DIMPipeline).from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype={"text_encoder": text_encoder_dtype, "default": torch.float32},
        **components,
    )


def load_sana(
    sana_name_or_path: str | os.PathLike,
    text_encoder_name_or_path: str | os.PathLike,
    max_sequence_length: int = 8192,
    generator: torch.Generator | None = None,
    revision: str | None = None,
    variant: str | None = None,
    text_encoder_dtype: torch.dtype = torch.float32,
    **components: Any,
) -> DIMPipeline:
    r"""
    A text-to-image pipeline to train, in float32: SANA's transformer, autoencoder and scheduler, a vision-language
    model in place of SANA's text encoder, and a fresh connector and null condition between them (Draw-In-Mind,
    https://huggingface.co/papers/2509.01986, section 3).

    Args:
        sana_name_or_path (`str` or `os.PathLike`):
            A folder or repository of a [`~diffusers.SanaPipeline`], such as
            "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers".
        text_encoder_name_or_path (`str` or `os.PathLike`):
            A folder or repository of the vision-language model, such as "Qwen/Qwen2.5-VL-3B-Instruct".
        max_sequence_length (`int`, defaults to 8192):
            Rows of the null condition.
        generator (`torch.Generator`, *optional*):
            Source of the fresh weights; torch's global one by default.
        revision (`str`, *optional*):
            Revision of SANA's repository.
        variant (`str`, *optional*):
            Variant of SANA's weights, such as "fp16".
        text_encoder_dtype (`torch.dtype`, defaults to `torch.float32`):
            Of the vision-language model alone.
        components:
            Components to take in place of those read or made, `None` for one that is not needed.
    """
    if "transformer" not in components:
        components["transformer"] = DIMTransformer2DModel.from_pretrained(
            sana_name_or_path, subfolder="transformer", revision=revision, variant=variant, torch_dtype=torch.float32
        )
    if "vae" not in components:
        components["vae"] = AutoencoderDC.from_pretrained(
            sana_name_or_path, subfolder="vae", revision=revision, variant=variant, torch_dtype=torch.float32
        )
    if "text_encoder" not in components:
        components["text_encoder"] = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            text_encoder_name_or_path, dtype=text_encoder_dtype
        )
    if "processor" not in components:
        components["processor"] = DIMProcessor.from_pretrained(text_encoder_name_or_path)
    if "connector" not in components:
        hidden_size = Qwen2_5_VLConfig.from_pretrained(text_encoder_name_or_path).text_config.hidden_size
        components["connector"] = fresh_connector(
            hidden_size, components["transformer"].config.caption_channels, max_sequence_length, generator
        )
    scheduler = DPMSolverMultistepScheduler.from_pretrained(
        sana_name_or_path, subfolder="scheduler", revision=revision
    )
    return DIMPipeline(**components, scheduler=scheduler)


def fresh_connector(
    hidden_size: int, caption_channels: int, max_sequence_length: int, generator: torch.Generator | None = None
) -> DIMConnector:
    """An untrained [`DIMConnector`] with weights that follow from `generator`, torch's global one by default."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DIMConnector(hidden_size, caption_channels, max_sequence_length)


def grow_null_condition(
    connector: DIMConnector, max_sequence_length: int, generator: torch.Generator | None = None
) -> DIMConnector:
    """
    The connector with a null condition of `max_sequence_length` rows: its own, and fresh ones below them. It is the
    given connector where that has as many already.
    """
    config = connector.config
    rows = config.max_sequence_length
    if rows >= max_sequence_length:
        return connector
    grown = fresh_connector(config.hidden_size, config.caption_channels, max_sequence_length, generator)
    state = connector.state_dict()
    fresh = grown.null_condition.detach()[rows:].to(state["null_condition"])
    state["null_condition"] = torch.cat([state["null_condition"], fresh])
    grown.to(connector.dtype).load_state_dict(state)
    return grown


def widen_patch_embedding(transformer: DIMTransformer2DModel) -> DIMTransformer2DModel:
    """
    A text-to-image transformer as one that edits: source latents beside the noisy ones, their new weights zero, so
    that it paints at first what it painted before (InstructPix2Pix, https://huggingface.co/papers/2211.09800, section
    3.2).

    Raises:
        ValueError: If the transformer takes other latents than its own output's.
    """
    config = transformer.config
    channels = config.in_channels
    if channels != config.out_channels:
        raise ValueError(
            f"Only a text-to-image transformer is widened, with as many input as output channels, but this one has"
            f" {channels} and {config.out_channels}."
        )
    widened = DIMTransformer2DModel.from_config({**config, "in_channels": 2 * channels}).to(transformer.dtype)
    state = transformer.state_dict()
    weight = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    widened.load_state_dict(state)
    return widened


def to_edit_pipeline(pipe: DIMPipeline) -> DIMEditPipeline:
    """An edit pipeline of a text-to-image pipeline's components, the patch embedding widened where it is not yet."""
    components = pipe.components
    if pipe.transformer.config.in_channels == pipe.transformer.config.out_channels:
        components["transformer"] = widen_patch_embedding(pipe.transformer)
    return DIMEditPipeline(**components, default_guidance_scale=pipe.config.default_guidance_scale)

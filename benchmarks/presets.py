"""Models to time, of the published sizes or smaller, with random weights made on the device in the dtype."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_dim import (
    TINY_SHAPES,
    DIMConnector,
    DIMEditPipeline,
    DIMPipeline,
    DIMProcessor,
    DIMTransformer2DModel,
)


# SANA1.5-1.6B for edits, as DIM has it.
TRANSFORMER = {
    "in_channels": 64,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "patch_size": 1,
    "qk_norm": "rms_norm_across_heads",
}
# mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers.
VAE = {
    "latent_channels": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
# Qwen2.5-VL-3B-Instruct, changes to the embedded model's configuration, whose special tokens stay.
TEXT_ENCODER = {
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "layer_types": ["full_attention"] * 36,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1000000.0, "rope_type": "default"},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
}
# Of the published VAE's geometry and next to no work, where the VAE is not what is timed.
SMALL_VAE = {
    "latent_channels": 32,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [8] * 6,
    "decoder_block_out_channels": [32] * 6,
    "encoder_layers_per_block": [1] * 6,
    "decoder_layers_per_block": [1] * 6,
    "encoder_qkv_multiscales": [[]] * 6,
    "decoder_qkv_multiscales": [[]] * 6,
    "encoder_out_shortcut": False,
    "scaling_factor": 0.41407,
}
SMALL_TRANSFORMER = {
    **TRANSFORMER,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 48,
}


@dataclass(frozen=True)
class Preset:
    """
    What is timed.

    Args:
        transformer (`dict`): Configuration of the edit transformer; text-to-image has half the input channels.
        vae (`dict`): Configuration of the VAE.
        text_encoder (`dict`, *optional*): Changes to the embedded model's configuration; no such model without.
        trained (`bool`): Whether it is the embedded model with its trained weights, whatever the above say.
        size (`int`): Height and width of the pictures in pixels.
        tokens (`int`): Length of the condition, vision tokens counted.
        steps (`int`): Denoising steps of a call.
        batch (`int`): Pictures, each with a condition of its own.
        runs (`int`): Timed runs.
        guidance_scale (`float`): Off at 1.0.
        growth (`dict`): Sizes, batches and tokens that a step is timed at, one varied at a time, the others as above.
        growth_layers (`int`): Layers of the transformer there.
        matmul_size (`int`): Of the square matrices that the machine's rate is measured with.
        copy_bytes (`int`): Of the copy that its bandwidth is measured with.
    """

    transformer: dict[str, Any] = field(default_factory=lambda: TRANSFORMER)
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    text_encoder: dict[str, Any] | None = None
    trained: bool = False
    size: int = 1024
    tokens: int = 1791
    steps: int = 30
    batch: int = 1
    runs: int = 7
    guidance_scale: float = 7.5
    growth: dict[str, list[int]] = field(default_factory=dict)
    growth_layers: int = 20
    matmul_size: int = 8192
    copy_bytes: int = 2**31

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.size // 2 ** (len(self.vae["encoder_block_out_channels"]) - 1)


EMBEDDED = Path(TINY_SHAPES)
PRESETS = {
    # The published model, for a GPU.
    "full": Preset(
        text_encoder=TEXT_ENCODER,
        growth={"size": [512, 1024, 2048, 4096], "batch": [1, 2, 4, 8, 16], "tokens": [256, 1024, 1791, 4096, 8192]},
    ),
    # Its transformer's width, for two CPU cores.
    "cpu": Preset(
        transformer={**TRANSFORMER, "num_layers": 4},
        vae=SMALL_VAE,
        steps=8,
        runs=3,
        growth={"size": [512, 1024, 2048], "batch": [1, 2, 4], "tokens": [256, 1024, 1791, 4096, 8192]},
        growth_layers=1,
        matmul_size=4096,
        copy_bytes=2**28,
    ),
    # The embedded model, which is trained.
    "embedded": Preset(
        transformer=json.loads((EMBEDDED / "transformer" / "config.json").read_text()),
        vae=json.loads((EMBEDDED / "vae" / "config.json").read_text()),
        text_encoder={},
        trained=True,
        size=64,
        tokens=48,
        guidance_scale=2.5,
        growth={"size": [64, 128, 256], "batch": [1, 2, 4, 8, 16], "tokens": [32, 64, 128, 256]},
        growth_layers=5,
        matmul_size=2048,
        copy_bytes=2**28,
    ),
    # For tests of the script.
    "tiny": Preset(
        transformer=SMALL_TRANSFORMER,
        vae=SMALL_VAE,
        text_encoder={},
        size=64,
        tokens=24,
        steps=3,
        runs=2,
        growth={"size": [64, 128], "batch": [1, 2], "tokens": [8, 24]},
        growth_layers=1,
        matmul_size=256,
        copy_bytes=2**20,
    ),
}


def build_transformer(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> DIMTransformer2DModel:
    """A transformer with random weights."""
    with device, _default_dtype(dtype):
        return DIMTransformer2DModel(**config).eval().requires_grad_(False)


def build_pipeline(
    preset: Preset, device: torch.device, dtype: torch.dtype, edits: bool = True, with_text_encoder: bool = False
) -> DIMPipeline:
    r"""
    A pipeline of the preset's parts, with random weights from a fixed seed if it is not the trained one.

    Args:
        preset ([`Preset`]): Sizes.
        device (`torch.device`): Where weights are made.
        dtype (`torch.dtype`): Of the weights.
        edits (`bool`): Whether it edits, or paints from text.
        with_text_encoder (`bool`): Whether the vision-language model is needed.
    """
    if preset.trained:
        pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES, dtype=dtype).to(device)
    else:
        torch.manual_seed(0)
        channels = preset.transformer["out_channels"]
        config = {**preset.transformer, "in_channels": 2 * channels if edits else channels}
        text_config = _text_encoder_config(preset.text_encoder or {})
        with device, _default_dtype(dtype):
            connector = DIMConnector(text_config.text_config.hidden_size, config["caption_channels"])
            vae = AutoencoderDC(**preset.vae)
            text_encoder = Qwen2_5_VLForConditionalGeneration(text_config) if with_text_encoder else None
        pipe = (DIMEditPipeline if edits else DIMPipeline)(
            text_encoder=text_encoder,
            processor=DIMProcessor.from_pretrained(EMBEDDED / "processor"),
            connector=connector,
            transformer=build_transformer(config, device, dtype),
            vae=vae,
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
            ),
        )
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_picture(size: int) -> Image.Image:
    """A square RGB picture of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def blueprint_of(processor: DIMProcessor, tokens: int, image: Image.Image, size: int) -> str:
    """
    A text that makes a condition of `tokens` tokens, those of `image` at `size` pixels counted.

    Raises:
        ValueError: If the picture alone takes more.
    """
    word = " circle"  # a token of its own
    shortest = int(processor.encode(word, [image], size, size)["condition_mask"].sum())
    if tokens < shortest:
        raise ValueError(f"{tokens} tokens are fewer than the {shortest} of a picture of {size} pixels and a word.")
    return word * (tokens - shortest + 1)


def _text_encoder_config(changes: dict[str, Any]) -> Qwen2_5_VLConfig:
    config = json.loads((EMBEDDED / "text_encoder" / "config.json").read_text())
    for part, values in changes.items():
        config[part] |= values
    return Qwen2_5_VLConfig(**config)


class _default_dtype:
    """torch's default dtype, for a block."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.previous)

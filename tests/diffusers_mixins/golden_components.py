"""Components of the golden models' size with seeded random weights, and inputs for them."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_dim import DIMConnector, DIMProcessor, DIMTransformer2DModel


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
HEIGHT = WIDTH = 32


def transformer_config(kind: str) -> dict:
    """Constructor arguments of the golden transformer of `kind` "edit" or "t2i"."""
    return json.loads((GOLDEN / kind / "transformer_config.json").read_text())


def components(kind: str, num_layers: int = 2) -> dict:
    """A pipeline's components for `kind` "edit" or "t2i", the transformer with `num_layers` layers."""
    folder = GOLDEN / kind
    torch.manual_seed(0)
    transformer = DIMTransformer2DModel(**{**transformer_config(kind), "num_layers": num_layers})
    torch.manual_seed(0)
    connector = DIMConnector(
        hidden_size=32, caption_channels=transformer.config.caption_channels, max_sequence_length=512
    )
    torch.manual_seed(0)
    vae = AutoencoderDC.from_config(AutoencoderDC.load_config(folder / "vae_base"))
    torch.manual_seed(0)
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder / "qwen"))
    return {
        "text_encoder": text_encoder.eval(),
        "processor": DIMProcessor.from_pretrained(folder / "qwen"),
        "connector": connector.eval(),
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "scheduler": DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
    }


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    """A picture of seeded noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)

"""The two pipelines as diffusers' tester mixins see them: class, components and inputs of the golden models' size."""

import torch
from diffusers_repo import import_tests
from golden_components import HEIGHT, WIDTH, components, picture

from diffusers_dim import DIMEditPipeline, DIMPipeline


pipeline_params = import_tests("pipelines.pipeline_params")

TEXT_SIDE = ("text_encoder", "processor", "connector")


def embeddings_for(inputs: dict, caption_channels: int = 48) -> dict:
    """`inputs` with embeddings of fixed values in place of the prompts."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: value for name, value in inputs.items() if name not in ("prompt", "negative_prompt")}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        inputs[name] = torch.randn(1, 7, caption_channels, generator=generator)
    return inputs


def output_of_encoded_prompt(pipeline_class, inputs: dict, kind: str) -> torch.Tensor:
    """The pictures of one pipeline with the text side alone, which encodes, and one without it, which paints."""
    parts = components(kind)
    encoder = pipeline_class(**{name: part if name in TEXT_SIDE else None for name, part in parts.items()})
    painter = pipeline_class(**{name: None if name in TEXT_SIDE else part for name, part in parts.items()})
    names = ("prompt", "negative_prompt", "height", "width", "max_sequence_length")
    source = {"image": [inputs["image"]]} if "image" in inputs else {}
    with torch.no_grad():
        encoded = encoder.encode_prompt(**{name: inputs[name] for name in names}, **source)
    embeds = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    inputs = {name: value for name, value in inputs.items() if name not in ("prompt", "negative_prompt")}
    return painter(**inputs, **dict(zip(embeds, encoded)))[0]


class EditInputs:
    kind = "edit"
    pipeline_class = DIMEditPipeline
    params = pipeline_params.TEXT_GUIDED_IMAGE_VARIATION_PARAMS
    required_input_params_in_call_signature = params
    batch_params = batch_input_params = pipeline_params.TEXT_GUIDED_IMAGE_VARIATION_BATCH_PARAMS
    image_params = frozenset(["image"])

    def inputs(self) -> dict:
        return {"image": picture(), **TextToImageInputs.inputs(self)}


class TextToImageInputs:
    kind = "t2i"
    pipeline_class = DIMPipeline
    params = required_input_params_in_call_signature = pipeline_params.TEXT_TO_IMAGE_PARAMS - {
        "cross_attention_kwargs"
    }
    batch_params = batch_input_params = pipeline_params.TEXT_TO_IMAGE_BATCH_PARAMS
    image_params = frozenset()

    def inputs(self) -> dict:
        return {
            "prompt": "Make the red circle blue.",
            "negative_prompt": "dark",
            "height": HEIGHT,
            "width": WIDTH,
            "num_inference_steps": 2,
            "guidance_scale": 6.0,
            "generator": torch.Generator().manual_seed(0),
            "max_sequence_length": 512,
            "output_type": "pt",
        }

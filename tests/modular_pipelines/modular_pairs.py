"""A pipeline and the same components in blocks, side by side."""

from typing import NamedTuple

import torch

from diffusers_dim import DIMModularPipeline, DIMPipeline


class Pair(NamedTuple):
    """The components are shared and not to be changed; guider and designer of the blocks are a test's own."""

    pipe: DIMPipeline
    modular: DIMModularPipeline

    def paint(self, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of both, in two steps unless told otherwise, of noise of the `seeds`."""
        return self.call_pipe(**inputs), self.call_blocks(**inputs)

    def call_pipe(self, **inputs):
        return self.pipe(**_complete(inputs)).images

    def call_blocks(self, output="images", **inputs):
        return self.modular(**_complete(inputs), output=output)


def _complete(inputs: dict) -> dict:
    inputs = {"num_inference_steps": 2, "output_type": "latent", **inputs}
    seeds = inputs.pop("seeds", 0)
    generators = [torch.Generator().manual_seed(seed) for seed in (seeds if isinstance(seeds, list) else [seeds])]
    return {**inputs, "generator": generators if isinstance(seeds, list) else generators[0]}


def make_modular(blocks, pipe: DIMPipeline) -> DIMModularPipeline:
    """A modular pipeline of a pipeline's own components."""
    modular = blocks.init_pipeline()
    parts = {name: part for name, part in pipe.components.items() if name in modular.component_names}
    modular.update_components(**parts)
    if "guider" in modular.component_names:
        modular.update_components(guider=modular.guider.new(guidance_scale=pipe.config.default_guidance_scale))
    modular.set_progress_bar_config(disable=True)
    return modular

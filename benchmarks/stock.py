"""The baseline: stock diffusers parts composed plainly, on the same weights.

The transformer is diffusers' `SanaTransformer2DModel` with its own attention processors, and the loop is that of
diffusers' `SanaPipeline`: the condition stands once for each picture and is projected again in each step. What comes
before and after the loop (vision-language model, connector, VAE) is the same on both sides.
"""

from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin

from diffusers_dim import DIMEditPipeline, DIMPipeline
from diffusers_dim.pipelines.denoiser_dim import pad_tokens


class PlainDenoising:
    """The denoising loop of diffusers' `SanaPipeline`, with the source's latents beside the noisy ones for an edit."""

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        prompt_attention_mask: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> torch.Tensor:
        """
        Arguments and result are those of [`DIMPipeline.denoise`].

        Raises:
            ValueError: For a callback or a guidance interval, which the baseline does not have.
        """
        if callback_on_step_end is not None or guidance_interval != (0.0, 1.0):
            raise ValueError("The baseline takes neither `callback_on_step_end` nor a `guidance_interval`.")
        self._num_timesteps = len(timesteps)
        repeats = latents.shape[0] // prompt_embeds.shape[0]
        prompt_embeds = prompt_embeds.repeat_interleave(repeats, dim=0)
        prompt_attention_mask = prompt_attention_mask.repeat_interleave(repeats, dim=0)
        if self.do_classifier_free_guidance:
            length = negative_prompt_embeds.shape[1]  # never under the prompts'
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(repeats, dim=0)
            negative_prompt_attention_mask = negative_prompt_attention_mask.repeat_interleave(repeats, dim=0)
            prompt_embeds = torch.cat([negative_prompt_embeds, pad_tokens(prompt_embeds, length)])
            prompt_attention_mask = torch.cat(
                [negative_prompt_attention_mask, pad_tokens(prompt_attention_mask, length)]
            )
        if prompt_attention_mask.all():
            prompt_attention_mask = None  # the baseline, too, gets the kernels that take no mask

        dtype = self.transformer.dtype
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for t in timesteps:
                model_input = latents if image_latents is None else torch.cat([latents, image_latents], dim=1)
                if self.do_classifier_free_guidance:
                    model_input = torch.cat([model_input] * 2)
                timestep = t.expand(model_input.shape[0]) * self.transformer.config.timestep_scale
                noise_pred = self.transformer(
                    model_input.to(dtype),
                    encoder_hidden_states=prompt_embeds.to(dtype),
                    encoder_attention_mask=prompt_attention_mask,
                    timestep=timestep,
                    return_dict=False,
                    attention_kwargs=self.attention_kwargs,
                )[0].float()
                if self.do_classifier_free_guidance:
                    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
                progress_bar.update()
        return latents


class StockPipeline(PlainDenoising, DIMPipeline):
    """Text-to-image by the plain loop."""


class StockEditPipeline(PlainDenoising, DIMEditPipeline):
    """Editing by the plain loop."""


def share_weights(model_class: type[ModelMixin], transformer: ModelMixin) -> ModelMixin:
    """A `model_class` of `transformer`'s configuration whose weights are the very same tensors."""
    with init_empty_weights():
        model = model_class.from_config(transformer.config)
    model.load_state_dict(transformer.state_dict(), assign=True)
    return model.eval().requires_grad_(False)


def with_transformer(
    pipe: DIMPipeline, model_class: type[ModelMixin], pipeline_class: type[DIMPipeline] | None = None
) -> DIMPipeline:
    """A pipeline of `pipe`'s parts, with a scheduler and a `model_class` transformer of its own that share weights."""
    components = {
        **pipe.components,
        "transformer": share_weights(model_class, pipe.transformer),
        "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config),
    }
    other = (pipeline_class or type(pipe))(**components, default_guidance_scale=pipe.config.default_guidance_scale)
    other.set_progress_bar_config(disable=True)
    return other


def stock_pipeline(pipe: DIMPipeline) -> DIMPipeline:
    """The baseline of `pipe`, of the same parts and on the same weights."""
    edits = isinstance(pipe, DIMEditPipeline)
    return with_transformer(pipe, SanaTransformer2DModel, StockEditPipeline if edits else StockPipeline)

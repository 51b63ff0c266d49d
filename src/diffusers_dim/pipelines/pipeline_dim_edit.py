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
from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image

from ..designers import SelfDesigner
from ..designers.designer import is_blueprint
from ..image_processor import ImageInput
from ..models.prefix_dim import DIMPrefix
from .pipeline_dim import DIMPipeline
from .pipeline_output import DIMPipelineOutput


MAX_VIEW_DISTORTION = 1.1


def repeat_blueprint(blueprint: str | list[str | None] | None, batch_size: int) -> list[str | None]:
    """
    One blueprint, or `None`, for each of a batch: a single one serves all.

    Raises:
        ValueError: If there are several, but not as many.
    """
    blueprints = list(blueprint) if isinstance(blueprint, list) else [blueprint] * batch_size
    if len(blueprints) != batch_size:
        raise ValueError(f"Got {len(blueprints)} blueprints for {batch_size} images.")
    return blueprints


class DIMEditPipeline(DIMPipeline):
    r"""
    Instruction image editing with Draw-In-Mind (https://huggingface.co/papers/2509.01986): a frozen vision-language
    model reads the source and the text, a connector turns its hidden states into condition tokens, and SANA paints
    with the source's latents beside the noisy ones.

    Components are those of [`DIMPipeline`]; the transformer takes twice as many channels as it gives.

    Attributes:
        designer ([`Designer`] or `object`, *optional*):
            Who writes the blueprint of an edit: `"self"`, the pipeline's own vision-language model (set by
            [`convert_released_checkpoint`] for an edit checkpoint, and kept in the pipeline's config), any
            [`Designer`], or an object whose `design(images, instructions)` returns one text for each. `None`: the
            prompt goes to the painter verbatim.
    """

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "image_latents"]
    _latent_inputs = 2

    def get_height_width(self, image: list[Image.Image], use_resolution_binning: bool = True) -> tuple[int, int]:
        """
        The size in pixels (height, width) that sources are edited at when none is asked for, see
        [`DIMImageProcessor.get_default_height_width`].

        Raises:
            ValueError: If the sources differ in shape so that they need different sizes.
        """
        sizes = {self.image_processor.get_default_height_width(item, use_resolution_binning) for item in image}
        if len(sizes) > 1:
            raise ValueError(
                f"These images differ in shape and would be edited at sizes (height, width) {sorted(sizes)}: give"
                " `height` and `width`, or edit them in calls of one shape each."
            )
        return sizes.pop()

    @staticmethod
    def views_agree(image: list[Image.Image], height: int, width: int) -> bool:
        """
        Whether the painter's view of all these sources, which has the shape of the edited picture, is near enough to
        their own shape, within a tenth, for a designer to read them by.
        """
        ratios = [item.width * height / (item.height * width) for item in image]
        return all(1 / MAX_VIEW_DISTORTION <= ratio <= MAX_VIEW_DISTORTION for ratio in ratios)

    def read_inputs(
        self, image: ImageInput, prompt: str | list[str] | None, blueprint: str | list[str | None] | None = None
    ) -> tuple[list[Image.Image], list[str] | None]:
        """
        Reads what a call was given: RGB pictures, and a list of prompts, which blueprints stand for where there are no
        prompts; `None` without either.

        Raises:
            ValueError: If `image` holds no pictures, or `blueprint` no texts.
        """
        designs = blueprint if isinstance(blueprint, list) else [blueprint]
        if not designs or not all(
            design is None or (isinstance(design, str) and design.strip()) for design in designs
        ):
            raise ValueError(f"`blueprint` has to hold at least one non-empty text, but is {blueprint!r}.")
        images = self.image_processor.to_rgb(image)
        if prompt is None and None not in designs:
            prompt = blueprint
        return images, [prompt] * len(images) if isinstance(prompt, str) else prompt

    @staticmethod
    def repeat_images(image: list[Image.Image], batch_size: int) -> list[Image.Image]:
        """
        One picture a prompt: a single one serves all.

        Raises:
            ValueError: If there are several, but not as many as prompts.
        """
        if len(image) == 1:
            return image * batch_size
        if len(image) != batch_size:
            raise ValueError(f"Got {len(image)} images for {batch_size} prompts: give one for all or one a prompt.")
        return image

    def encode_shared_prefix(
        self, image: list[Image.Image], height: int, width: int, device: torch.device | None = None
    ) -> DIMPrefix | None:
        """
        [`~DIMPipeline.encode_prefix`] where design and encoding can both go by it, so that the pictures are seen once:
        if the pipeline's own model designs, and sees the same view. Else `None`.
        """
        if not isinstance(self.designer, SelfDesigner) or not self.views_agree(image, height, width):
            return None
        return self.encode_prefix(image, height, width, device)

    def design(
        self,
        image: list[Image.Image],
        prompt: list[str],
        blueprint: str | list[str | None] | None = None,
        callback: Callable[..., Any] | None = None,
        prefix: DIMPrefix | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> list[str | None]:
        """
        The blueprints of a batch of edits: the given ones, else the designer's, else `None` for each.

        Args:
            image (`list[PIL.Image.Image]`): RGB sources.
            prompt (`list[str]`): Instructions, one an image. One that has a blueprint's five parts stands for itself.
            blueprint (`str` or `list[str | None]`, *optional*): Given blueprints, one for all or one an image.
            callback (`Callable`, *optional*): Called as `callback(pipe, index, text)` while a blueprint grows.
            prefix ([`DIMPrefix`], *optional*): For [`SelfDesigner`]: what `encode_prefix` gave for all these images.
            height (`int`, *optional*): Goes with `prefix`.
            width (`int`, *optional*): Goes with `prefix`.

        Raises:
            ValueError: If there are not as many blueprints as images.
            DesignError: If the designer gives no blueprint.
        """
        blueprints = repeat_blueprint(blueprint, len(image))
        if self.designer is None:
            return blueprints
        for row, text in enumerate(prompt):
            if blueprints[row] is None and is_blueprint(text):
                blueprints[row] = text
        rows = [row for row, text in enumerate(blueprints) if text is None]
        if not rows:
            return blueprints

        def told(pipe: DIMPipeline, index: int, text: str) -> None:
            if callback is not None:
                callback(pipe, rows[index], text)

        view: dict[str, Any] = {}
        if prefix is not None:
            view = {"prefix": prefix.select(rows), "height": height, "width": width}
        designs = self._ask_designer(
            "design", [image[row] for row in rows], [prompt[row] for row in rows], callback=callback and told, **view
        )
        for row, design in zip(rows, designs):
            blueprints[row] = design
        return blueprints

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        blueprint: str | list[str | None] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        use_resolution_binning: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int = 8192,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        callback_on_design: Callable[..., Any] | None = None,
    ) -> DIMPipelineOutput | tuple:
        r"""
        Edits pictures as instructions say.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                What to edit: one picture for all prompts or one a prompt. See [`DIMImageProcessor.to_rgb`] for what is
                taken.
            prompt (`str` or `list[str]`, *optional*):
                The instructions; one text serves all images. Either this or `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from; the learned null condition by default and for empty texts.
            height (`int`, *optional*):
                Height in pixels, a multiple of the VAE's factor (32); with `width`. The result is exactly of that
                size: the source's shorter side is brought to it and its centre is cut out. By default the nearest of
                SANA's aspect-ratio bins to the source's own.
            width (`int`, *optional*):
                Width in pixels.
            num_inference_steps (`int`, defaults to 30):
                Denoising steps.
            timesteps (`list[int]`, *optional*):
                Timesteps of one's own, descending, for a scheduler that takes them.
            sigmas (`list[float]`, *optional*):
                Sigmas of one's own, descending, for a scheduler that takes them.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance (https://huggingface.co/papers/2207.12598); the checkpoint's own by default,
                off at 1.0 and below.
            num_images_per_prompt (`int`, defaults to 1):
                Pictures a prompt; those of one prompt lie together.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise, one for all or one a picture.
            latents (`torch.Tensor`, *optional*):
                Noise to start from, of shape `(pictures, latent_channels, height / factor, width / factor)`.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`, *optional*):
                Connector outputs in place of `prompt`; the source is still painted from.
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                1 where `prompt_embeds` hold a token; all by default.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`, *optional*):
                Connector outputs to guide away from.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                1 where `negative_prompt_embeds` hold a token; all by default.
            blueprint (`str` or `list[str | None]`, *optional*):
                The edit's design in words, one for all or one a prompt, which the painter reads in the prompt's place:
                a [`Blueprint`] or any text. Where there is none the `designer` writes it, if the pipeline has one and
                the prompt is not a blueprint itself; else the prompt goes in verbatim.
            output_type (`str`, defaults to `"pil"`):
                "pil", "np" or "pt" (in [0, 1]), or "latent".
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`DIMPipelineOutput`] or a tuple.
            attention_kwargs (`dict`, *optional*):
                Passed to the transformer; `{"scale": ...}` scales its LoRA layers and the connector's.
            use_resolution_binning (`bool`, defaults to `True`):
                Without a size: whether to take SANA's nearest bin, or the source's own aspect ratio at the model's
                base area, rounded to the VAE's factor.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`; tensors in the dict it
                returns replace the pipeline's.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Which tensors `callback_kwargs` holds, among `_callback_tensor_inputs`. Embeddings have a row a prompt.
            max_sequence_length (`int`, defaults to 8192):
                The last so many condition tokens are kept, at most as many as the null condition has rows.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                The part of the steps that is guided (https://huggingface.co/papers/2404.07724), as fractions of their
                number: `(0.1, 0.6)` guides from the fourth to the eighteenth of thirty. A step without guidance takes
                half the time; the result differs from that of full guidance.
            callback_on_design (`Callable`, *optional*):
                Called as `callback(pipe, index, text)` while the `designer` writes the blueprint of the prompt of that
                index, with its words so far.

        Examples:
            ```py
            >>> from diffusers_dim import TINY_SHAPES, DIMEditPipeline
            >>> from diffusers_dim.tiny import sample_edits
            >>> pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
            >>> edit = sample_edits(1, seed=0)[0]
            >>> pipe(edit.source, edit.instruction).images[0].save("edited.png")
            ```

        Returns:
            [`DIMPipelineOutput`], or a tuple whose first element is the pictures.

        Raises:
            ValueError: For inputs that make no sense, before anything is computed.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale

        # 1. Check inputs
        if image is None:
            raise ValueError("`image` is what to edit and cannot be None: use DIMPipeline to paint from text alone.")
        if blueprint is not None and prompt_embeds is not None:
            raise ValueError("Give either `blueprint` or `prompt_embeds`, not both.")
        images, prompt = self.read_inputs(image, prompt, blueprint)
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            generator=generator,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            guidance_interval=guidance_interval,
        )
        batch_size = self._get_batch_size(prompt, prompt_embeds)
        images = self.repeat_images(images, batch_size)
        if height is None:
            height, width = self.get_height_width(images, use_resolution_binning)
        self.check_latents(latents, batch_size * num_images_per_prompt, height, width)
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device

        # 2. Prepare timesteps
        schedule = self.prepare_timesteps(num_inference_steps, device, timesteps, sigmas)

        # 3. Design the edit
        blueprints: list[str | None] = [None] * batch_size
        prefix = None
        if prompt is not None:
            if blueprint is None:
                prefix = self.encode_shared_prefix(images, height, width, device)
            blueprints = self.design(images, prompt, blueprint, callback_on_design, prefix, height, width)
            prompt = [text if design is None else str(design) for text, design in zip(prompt, blueprints)]

        # 4. Encode prompt and source
        conditions = self.encode_prompt(
            prompt,
            images,
            height,
            width,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            device=device,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            lora_scale=(attention_kwargs or {}).get("scale"),
            prefix=prefix,
        )
        del prefix
        image_latents = self.prepare_image_latents(images, height, width, device, num_images_per_prompt)

        # 5. Prepare latents
        latents = self.prepare_latents(batch_size * num_images_per_prompt, height, width, device, generator, latents)

        # 6. Denoise
        latents = self.denoise(
            latents,
            schedule,
            *conditions,
            image_latents=image_latents,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_interval=guidance_interval,
        )

        # 7. Decode
        edited = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (edited, blueprints)
        return DIMPipelineOutput(images=edited, blueprints=blueprints)

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
import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, FasterCacheConfig, MagCacheConfig
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from ..designers import Designer, SelfDesigner
from ..hub.mixin import DIMHubMixin
from ..image_processor import MAX_ASPECT_RATIO, DIMImageProcessor
from ..loaders.lora import DIMLoraLoaderMixin
from ..models import DIMConnector, DIMProcessor, DIMTransformer2DModel
from ..models.prefix_dim import DIMPrefix
from .denoiser_dim import DIMDenoiser, pad_tokens
from .pipeline_output import DIMPipelineOutput


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class _Interrupted(Exception):
    """Ends a design when the pipeline's call is interrupted."""


class DIMPipeline(DIMHubMixin, DiffusionPipeline, DIMLoraLoaderMixin):
    r"""
    Text-to-image with Draw-In-Mind (https://huggingface.co/papers/2509.01986): a frozen vision-language model reads
    the prompt, a connector turns its hidden states into condition tokens, and SANA paints.

    Args:
        text_encoder ([`~transformers.Qwen2_5_VLForConditionalGeneration`]):
            Reads the prompt. Not needed when `prompt_embeds` are given.
        processor ([`DIMProcessor`]):
            Turns prompts into its inputs. Not needed when `prompt_embeds` are given.
        connector ([`DIMConnector`]):
            Turns hidden states into condition tokens, and holds the learned null condition. Not needed when
            `prompt_embeds` and, with guidance, `negative_prompt_embeds` are given.
        transformer ([`DIMTransformer2DModel`]):
            Predicts the flow from latents to noise. Its input channels are its output channels.
        vae ([`~diffusers.AutoencoderDC`]):
            Between pictures and latents.
        scheduler ([`~diffusers.DPMSolverMultistepScheduler`]):
            Published setting: `use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"`.
        default_guidance_scale (`float`, defaults to `7.5`):
            The checkpoint's own guidance scale, used when a call names none.
        designer (`"self"`, *optional*):
            Who rewrites prompts before they are painted, by name: "self" is the text encoder itself, and prompts that
            it fails at are painted as they are, with a warning. `None` by default. Any [`Designer`] may be put in
            later, see [`~DIMPipeline.designer`].
    """

    model_cpu_offload_seq = "text_encoder->connector->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _optional_components = ["text_encoder", "processor", "connector"]
    _latent_inputs = 1  # how many sets of latents the transformer takes side by side

    def __init__(
        self,
        text_encoder: Qwen2_5_VLForConditionalGeneration | None,
        processor: DIMProcessor | None,
        connector: DIMConnector | None,
        transformer: DIMTransformer2DModel,
        vae: AutoencoderDC,
        scheduler: SchedulerMixin | KarrasDiffusionSchedulers,
        default_guidance_scale: float = 7.5,
        designer: str | None = None,
    ):
        super().__init__()
        self.register_modules(
            text_encoder=text_encoder,
            processor=processor,
            connector=connector,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(default_guidance_scale=default_guidance_scale)
        self.designer = designer
        if isinstance(self.designer, SelfDesigner):
            # Nobody asked for it in this program: a call must not fail over it.
            self.designer.on_failure = "instruction"
        vae = getattr(self, "vae", None)
        self.vae_scale_factor = 2 ** (len(vae.config.encoder_block_out_channels) - 1) if vae is not None else 32
        self.latent_channels = vae.config.latent_channels if vae is not None else 32
        transformer = getattr(self, "transformer", None)
        sample_size = transformer.config.sample_size if transformer is not None else 32
        self.image_processor = DIMImageProcessor(
            vae_scale_factor=self.vae_scale_factor, base_size=sample_size * self.vae_scale_factor
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, attn_implementation: str | None = None, **kwargs: Any
    ) -> "DIMPipeline":
        r"""
        [`~diffusers.DiffusionPipeline.from_pretrained`], whose arguments it takes, with one more.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder or a Hub repository of this pipeline.
            attn_implementation (`str`, *optional*):
                The vision-language model's attention, such as "sdpa", "eager", "flash_attention_2" or
                "flash_attention_3". By default "flash_attention_2" where that is installed and the dtype is a half
                one, and "sdpa" elsewhere. (The painter's is chosen by `pipe.transformer.set_attention_backend`.)

        Raises:
            ValueError: If `attn_implementation` is given for a pipeline without a text encoder.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if attn_implementation is None and "text_encoder" not in kwargs and pipe.text_encoder is not None:
            if is_flash_attn_2_available() and pipe.text_encoder.dtype in (torch.float16, torch.bfloat16):
                attn_implementation = "flash_attention_2"
        if attn_implementation is not None:
            if pipe.text_encoder is None:
                raise ValueError(f"{attn_implementation=} is for the text encoder, but this pipeline has none.")
            pipe.text_encoder.set_attn_implementation(attn_implementation)
        return pipe

    @property
    def designer(self) -> Designer | Any | None:
        """
        Who writes what is painted from: `None` (the prompt goes in verbatim), "self" (the pipeline's own
        vision-language model) or an object whose `design(images, instructions)` returns a text for each, and which for
        text-to-image has `rewrite(prompts)`. What has a name is saved with the pipeline and restored: "self". Set here
        it raises a [`DesignError`] where the model writes no blueprint; restored it warns and takes the plain
        instruction, as does `SelfDesigner(pipe, on_failure="instruction")`.
        """
        return self._designer

    @designer.setter
    def designer(self, designer: Designer | Any | None) -> None:
        if isinstance(designer, str):
            if designer != SelfDesigner.name:
                raise ValueError(
                    f'`designer` has to be None, "{SelfDesigner.name}" or a designer such as VLMDesigner or'
                    f" OpenAIDesigner, but is {designer!r}."
                )
            designer = SelfDesigner(self)
        method = "design" if self._latent_inputs == 2 else "rewrite"
        if designer is not None and not callable(getattr(designer, method, None)):
            raise ValueError(f"A designer of {type(self).__name__} has to have a method `{method}`: {designer!r}.")
        self._designer = designer
        self.register_to_config(designer=getattr(designer, "name", None))

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int | None,
        width: int | None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 30,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 7.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int = 8192,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """
        Raises a `ValueError` that names the value and what is allowed, before anything is computed. Arguments are
        those of `__call__`.
        """
        # 1. The checkpoint
        self.check_checkpoint()

        # 2. Size and numbers
        self.check_size(height, width)
        self.check_steps(num_inference_steps, timesteps, sigmas)
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` has to be at least 1, but is {num_images_per_prompt}.")
        steps = len(timesteps or sigmas or range(num_inference_steps))
        self.check_step_cache(steps, guidance_scale, guidance_interval)
        start, stop = guidance_interval
        if not 0.0 <= start <= stop <= 1.0:
            raise ValueError(
                f"`guidance_interval` has to be two fractions of the steps, 0 <= start <= stop <= 1, but is"
                f" {guidance_interval}."
            )
        self.check_output_type(output_type)
        unknown = [
            name for name in callback_on_step_end_tensor_inputs or [] if name not in self._callback_tensor_inputs
        ]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be among {self._callback_tensor_inputs}, but holds"
                f" {unknown}."
            )

        # 3. Prompt and embeddings
        if (prompt is None) == (prompt_embeds is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"Give either `prompt` or `prompt_embeds`, not {given}.")
        self.check_texts(prompt, negative_prompt)
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Give either `negative_prompt` or `negative_prompt_embeds`, not both.")
        needs_text = prompt is not None or negative_prompt is not None
        missing = [name for name in self._optional_components if needs_text and getattr(self, name) is None]
        if missing:
            raise ValueError(f"A prompt needs {missing}, but this pipeline has None there: give embeddings instead.")
        guided = guidance_scale > 1.0
        if guided and negative_prompt is None and negative_prompt_embeds is None and self.connector is None:
            raise ValueError(
                "Guidance needs the connector's null condition, but this pipeline's connector is None: give"
                " `negative_prompt_embeds`, or turn guidance off by `guidance_scale=1.0`."
            )
        self.check_embeds(prompt_embeds, prompt_attention_mask, "prompt")
        self.check_embeds(negative_prompt_embeds, negative_prompt_attention_mask, "negative_prompt")
        self.check_sequence_length(max_sequence_length)
        null_is_used = guided and negative_prompt_embeds is None
        if null_is_used and prompt_embeds is not None and prompt_embeds.shape[1] > self._null_length:
            raise ValueError(
                f"`prompt_embeds` hold {prompt_embeds.shape[1]} tokens, but this connector's null condition has only"
                f" {self._null_length} rows: give `negative_prompt_embeds`, or fewer tokens."
            )

        # 4. Batch sizes
        batch_size = self._get_batch_size(prompt, prompt_embeds)
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(f"Got {len(negative_prompt)} negative prompts for {batch_size} prompts.")
        if negative_prompt_embeds is not None and negative_prompt_embeds.shape[0] != batch_size:
            raise ValueError(
                f"Got {negative_prompt_embeds.shape[0]} `negative_prompt_embeds` for {batch_size} prompts."
            )
        self.check_generator(generator, batch_size, num_images_per_prompt)

    def check_checkpoint(self) -> None:
        """Raises a `ValueError` if the transformer is one for another kind of pipeline."""
        channels, expected = self.transformer.config.in_channels, self._latent_inputs * self.latent_channels
        if channels != expected:
            kind = {1: "text-to-image", 2: "edit"}.get(channels // self.latent_channels, "unknown")
            raise ValueError(
                f"{type(self).__name__} needs a transformer with {expected} input channels ({self._latent_inputs} x"
                f" {self.latent_channels} latent channels), but this one has {channels}: it is of the {kind} kind. Use"
                " DIMEditPipeline for an edit checkpoint and DIMPipeline for a text-to-image one."
            )

    def check_size(self, height: int | None, width: int | None) -> None:
        """Raises a `ValueError` if that is no size in pixels that can be painted at; both `None` are fine."""
        if (height is None) != (width is None):
            raise ValueError(f"Give both `height` and `width` or neither, not {height=} and {width=}.")
        factor = self.vae_scale_factor
        if height is not None and (height <= 0 or width <= 0 or height % factor or width % factor):
            raise ValueError(
                f"`height` and `width` have to be positive multiples of {factor}, but are {height} and {width}."
            )
        if height is not None and max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"A size of {height}x{width} pixels (height x width) is beyond the aspect ratio of"
                f" {MAX_ASPECT_RATIO}:1 that is allowed."
            )

    def check_steps(
        self, num_inference_steps: int, timesteps: list[int] | None = None, sigmas: list[float] | None = None
    ) -> None:
        """Raises a `ValueError` if the scheduler cannot make steps of these."""
        if timesteps is None and sigmas is None and num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` has to be at least 1, but is {num_inference_steps}.")
        for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            if values is not None and len(values) == 0:
                raise ValueError(f"`{name}` has to hold at least one value, but is {values}.")
        if timesteps is not None and self.scheduler.config.get("use_flow_sigmas"):
            raise ValueError(
                f"`timesteps` cannot be given to a {type(self.scheduler).__name__} with `use_flow_sigmas=True`, which"
                " makes its own: give `num_inference_steps`."
            )

    def check_step_cache(
        self, num_inference_steps: int, guidance_scale: float, guidance_interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """Raises a `ValueError` if the transformer's step cache, should one be on, is not for such a call."""
        step_cache = getattr(self.transformer, "_cache_config", None)
        name = type(step_cache).__name__
        if isinstance(step_cache, FasterCacheConfig) and guidance_scale <= 1.0:
            raise ValueError(
                f"{name} is on, which compares the branches of guidance: `guidance_scale` has to be above 1.0, but is"
                f" {guidance_scale}."
            )
        if isinstance(step_cache, MagCacheConfig) and step_cache.num_inference_steps != num_inference_steps:
            raise ValueError(
                f"{name} is on for {step_cache.num_inference_steps} steps, but this call has {num_inference_steps}."
            )
        if isinstance(step_cache, (FasterCacheConfig, MagCacheConfig)) and tuple(guidance_interval) != (0.0, 1.0):
            raise ValueError(
                f"{name} is on, which goes by the step before: `guidance_interval` has to be (0.0, 1.0), but is"
                f" {guidance_interval}."
            )

    @staticmethod
    def check_output_type(output_type: str) -> None:
        """Raises a `ValueError` if it is not one of `OUTPUT_TYPES`."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` has to be one of {list(OUTPUT_TYPES)}, but is {output_type!r}.")

    @staticmethod
    def check_texts(prompt: str | list[str] | None, negative_prompt: str | list[str] | None = None) -> None:
        """Raises a `ValueError` if these are no texts to paint from and to guide away from."""
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text is not None and not (
                isinstance(text, str) or (isinstance(text, list) and all(isinstance(item, str) for item in text))
            ):
                raise ValueError(f"`{name}` has to be a str or a list of str, but is {text!r}.")
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not prompts or not all(item.strip() for item in prompts):
                raise ValueError(f"`prompt` has to hold at least one non-empty text, but is {prompt!r}.")

    def check_embeds(self, embeds: torch.Tensor | None, mask: torch.Tensor | None, name: str) -> None:
        """Raises a `ValueError` if the `embeds` and `mask` of that name are no connector outputs."""
        if embeds is None:
            if mask is not None:
                raise ValueError(f"`{name}_attention_mask` goes with `{name}_embeds`, which are not given.")
            return
        caption_channels = self.transformer.config.caption_channels
        if embeds.ndim != 3 or embeds.shape[1] == 0 or embeds.shape[2] != caption_channels:
            raise ValueError(
                f"`{name}_embeds` have to be connector outputs of shape (batch, tokens, {caption_channels}), but"
                f" are of shape {tuple(embeds.shape)}."
            )
        if mask is not None and mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"`{name}_attention_mask` has to be of shape {tuple(embeds.shape[:2])} like `{name}_embeds`, but"
                f" is of shape {tuple(mask.shape)}."
            )
        if mask is not None and not mask.bool().any(dim=1).all():
            raise ValueError(f"`{name}_attention_mask` has to keep at least one token in each row.")

    @staticmethod
    def check_sequence_length(max_sequence_length: int) -> None:
        """Raises a `ValueError` if it is not positive."""
        if max_sequence_length < 1:
            raise ValueError(f"`max_sequence_length` has to be at least 1, but is {max_sequence_length}.")

    @staticmethod
    def check_generator(
        generator: torch.Generator | list[torch.Generator] | None, batch_size: int, num_images_per_prompt: int
    ) -> None:
        """Raises a `ValueError` if there are several generators, but not one a picture."""
        total = batch_size * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != total:
            raise ValueError(
                f"Got {len(generator)} generators for {total} images ({batch_size} prompts x {num_images_per_prompt})."
            )

    def check_latents(self, latents: torch.Tensor | None, batch_size: int, height: int, width: int) -> None:
        """Raises a `ValueError` if given `latents` are not those of `batch_size` pictures of that size."""
        shape = (batch_size, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"`latents` have to be of shape {shape}, but are of shape {tuple(latents.shape)}.")

    @property
    def _null_length(self) -> int:
        return self.connector.config.max_sequence_length

    @staticmethod
    def _get_batch_size(prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> int:
        if prompt_embeds is not None:
            return prompt_embeds.shape[0]
        return 1 if isinstance(prompt, str) else len(prompt)

    def _ask_designer(
        self, method: str, *inputs: list[Any], callback: Callable[..., Any] | None = None, **kwargs: Any
    ) -> list[str | None]:
        """Calls the designer's `method`, whose last input is a list of texts; `None` for each if interrupted."""

        def told(index: int, text: str) -> None:
            if callback is not None:
                callback(self, index, text)
            if self.interrupt:
                raise _Interrupted

        # An object of the user's own may take no more than the inputs.
        if callback is not None or isinstance(self.designer, Designer):
            kwargs["on_text"] = told
        try:
            designs = list(getattr(self.designer, method)(*inputs, **kwargs))
        except _Interrupted:
            return [None] * len(inputs[-1])
        if len(designs) != len(inputs[-1]):
            raise ValueError(f"The designer gave {len(designs)} texts for {len(inputs[-1])} prompts.")
        return designs

    def encode_prefix(
        self, image: list[Image.Image], height: int, width: int, device: torch.device | None = None
    ) -> DIMPrefix:
        """
        What the vision-language model makes of pictures before any text, for several texts to be read after them.

        Args:
            image (`list[PIL.Image.Image]`): RGB sources. One that is there several times is seen once.
            height (`int`): Height in pixels of the picture to be painted, by which the source is seen.
            width (`int`): Width in pixels of the picture to be painted.
            device (`torch.device`, *optional*): Where to compute; the pipeline's execution device by default.

        Returns:
            [`DIMPrefix`] with a row an image.
        """
        once = {id(item): item for item in image}
        places = {key: row for row, key in enumerate(once)}
        inputs = self.processor.encode_prefix(list(once.values()), height, width)
        prefix = DIMPrefix.compute(self.text_encoder, inputs.to(device or self._execution_device))
        return prefix if len(once) == len(image) else prefix.select([places[id(item)] for item in image])

    def encode_hidden_states(
        self,
        prompt: list[str],
        image: list[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        device: torch.device | None = None,
        max_sequence_length: int = 8192,
        prefix: DIMPrefix | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the vision-language model makes of prompts: its last hidden states on the user turn's content.

        Args:
            prompt (`list[str]`): Texts.
            image (`list[PIL.Image.Image]`, *optional*): For an edit: one RGB source a prompt.
            height (`int`, *optional*): For an edit: height in pixels of the picture to be painted.
            width (`int`, *optional*): For an edit: width in pixels of the picture to be painted.
            device (`torch.device`, *optional*): Where to compute; the pipeline's execution device by default.
            max_sequence_length (`int`, defaults to 8192): The last so many tokens are kept.
            prefix ([`DIMPrefix`], *optional*): For an edit: what `encode_prefix` gave for these images and this size.

        Returns:
            Hidden states `(batch_size, tokens, hidden_size)`, zeros where padded, and their mask `(batch_size,
            tokens)`.
        """
        device = device or self._execution_device
        if prefix is not None:
            inputs = self.processor.encode_continuation([(text,) for text in prompt])
            condition_mask = self.processor.get_condition_mask(
                torch.cat([prefix.input_ids.cpu(), inputs["input_ids"]], dim=1)
            )
            hidden_states = prefix.extend(self.text_encoder, **inputs.to(device))
        else:
            inputs = self.processor.encode(prompt, image, height, width)
            condition_mask = inputs.pop("condition_mask")
            # Through the model's own forward, for its hooks' sake; the last of the hidden states is the normed one.
            outputs = self.text_encoder(
                **inputs.to(device), output_hidden_states=True, use_cache=False, logits_to_keep=1
            )
            hidden_states = outputs.hidden_states[-1].to(device)
        rows = [row[mask][-max_sequence_length:] for row, mask in zip(hidden_states, condition_mask.to(device))]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        hidden_states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return hidden_states, torch.arange(hidden_states.shape[1], device=device) < lengths[:, None]

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        image: list[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int = 8192,
        lora_scale: float | None = None,
        prefix: DIMPrefix | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        r"""
        Encodes prompts, each with its source picture for an edit, into condition tokens.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The texts the painter reads; not used when `prompt_embeds` are given.
            image (`list[PIL.Image.Image]`, *optional*):
                For an edit: one RGB source a prompt.
            height (`int`, *optional*):
                For an edit: height in pixels of the picture to be painted.
            width (`int`, *optional*):
                For an edit: width in pixels of the picture to be painted.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from. `None` and empty texts stand for the learned null condition: its first rows,
                as many as the condition has, under the condition's mask.
            do_classifier_free_guidance (`bool`, defaults to `True`):
                Whether negative embeddings are wanted.
            num_images_per_prompt (`int`, defaults to 1):
                How often each row is repeated.
            device (`torch.device`, *optional*):
                Where to compute; the pipeline's execution device by default.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`, *optional*):
                Connector outputs to use as they are.
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                True or 1 where `prompt_embeds` hold a token; all by default.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`, *optional*):
                Connector outputs to guide away from.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                The same for `negative_prompt_embeds`.
            max_sequence_length (`int`, defaults to 8192):
                The last so many condition tokens are kept, at most as many as the null condition has rows.
            lora_scale (`float`, *optional*):
                Scales the connector's LoRA layers, if there are any.
            prefix ([`DIMPrefix`], *optional*):
                For an edit: what `encode_prefix` gave for these images and this size, to read the texts after it.

        Returns:
            `prompt_embeds`, `prompt_attention_mask`, `negative_prompt_embeds`, `negative_prompt_attention_mask`, each
            with `batch_size * num_images_per_prompt` rows; the last two are `None` without guidance.
        """
        device = device or self._execution_device
        attention_kwargs = None if lora_scale is None else {"scale": lora_scale}
        if self.connector is not None:
            max_sequence_length = min(max_sequence_length, self._null_length)

        if prompt_embeds is None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            hidden_states, prompt_attention_mask = self.encode_hidden_states(
                prompt, image, height, width, device, max_sequence_length, prefix
            )
            hidden_states = hidden_states.to(self.connector.dtype)
            prompt_embeds = self.connector(hidden_states, attention_kwargs=attention_kwargs).prompt_embeds
        prompt_embeds = prompt_embeds.to(device)
        if prompt_attention_mask is None:
            prompt_attention_mask = torch.ones(prompt_embeds.shape[:2], device=device)
        prompt_attention_mask = prompt_attention_mask.to(device=device, dtype=torch.bool)

        if do_classifier_free_guidance and negative_prompt_embeds is None:
            batch_size, length, _ = prompt_embeds.shape
            null_embeds = self.connector(null_length=length).null_embeds.to(device=device, dtype=prompt_embeds.dtype)
            negative_prompt_embeds = null_embeds.expand(batch_size, -1, -1)
            negative_prompt_attention_mask = prompt_attention_mask

            texts = [negative_prompt] * batch_size if isinstance(negative_prompt, str) else negative_prompt or []
            rows = [index for index, text in enumerate(texts) if text.strip()]
            if rows:
                hidden_states, mask = self.encode_hidden_states(
                    [texts[index] for index in rows],
                    None if image is None else [image[index] for index in rows],
                    height,
                    width,
                    device,
                    max_sequence_length,
                    None if prefix is None else prefix.select(rows),
                )
                hidden_states = hidden_states.to(self.connector.dtype)
                embeds = self.connector(hidden_states, attention_kwargs=attention_kwargs).prompt_embeds
                length = max(length, embeds.shape[1])
                negative_prompt_embeds = pad_tokens(negative_prompt_embeds, length).clone()
                negative_prompt_attention_mask = pad_tokens(negative_prompt_attention_mask, length).clone()
                negative_prompt_embeds[rows] = pad_tokens(embeds, length).to(negative_prompt_embeds.dtype)
                negative_prompt_attention_mask[rows] = pad_tokens(mask, length)

        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        prompt_attention_mask = prompt_attention_mask.repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return prompt_embeds, prompt_attention_mask, None, None

        negative_prompt_embeds = negative_prompt_embeds.to(device=device, dtype=prompt_embeds.dtype)
        if negative_prompt_attention_mask is None:
            negative_prompt_attention_mask = torch.ones(negative_prompt_embeds.shape[:2], device=device)
        negative_prompt_attention_mask = negative_prompt_attention_mask.to(device=device, dtype=torch.bool)
        negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        negative_prompt_attention_mask = negative_prompt_attention_mask.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def prepare_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> torch.Tensor:
        """
        Sets the scheduler to the start of a call and gives its timesteps, `(steps,)`, on `device`: as many as
        `num_inference_steps` of its own making, or those of the given `timesteps` or `sigmas`.
        """
        schedule, _ = retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # else it looks the first timestep up, and the host waits
        return schedule

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Noise of shape `(batch_size, latent_channels, height / vae_scale_factor, width / vae_scale_factor)` in float32,
        or the given `latents`.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        shape = (batch_size, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def prepare_image_latents(
        self,
        image: list[Image.Image],
        height: int,
        width: int,
        device: torch.device,
        num_images_per_prompt: int = 1,
    ) -> torch.Tensor:
        """
        Scaled latents of pictures, such as an edit's sources, `(batch_size * num_images_per_prompt, latent_channels,
        height / factor, width / factor)`, float32.
        """
        pixels = self.image_processor.preprocess(image, height, width).to(device=device, dtype=self.vae.dtype)
        image_latents = self.vae.encode(pixels, return_dict=False)[0].float() * self.vae.config.scaling_factor
        return image_latents.repeat_interleave(num_images_per_prompt, dim=0)

    def prepare_step_kwargs(
        self, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> dict[str, torch.Generator | list[torch.Generator] | None]:
        """What the scheduler's `step` takes besides: the generator, where it adds noise."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

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
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> torch.Tensor:
        r"""
        Walks `latents` from noise to picture along `timesteps` (already set on the scheduler), with one forward of the
        transformer a step, of twice the batch under guidance.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`):
                Noise, float32.
            timesteps (`torch.Tensor` of shape `(num_inference_steps,)`):
                The scheduler's timesteps.
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask:
                As returned by `encode_prompt`, a row for each picture or, which is faster, a row for each run of
                pictures of one prompt: three rows and twelve latents make four pictures a prompt.
            image_latents (`torch.Tensor` of the shape of `latents`, *optional*):
                The source's latents, joined to the noisy ones along the channels.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of noise for a scheduler that adds some at each step.
            callback_on_step_end (`Callable`, *optional*):
                See `__call__`.
            callback_on_step_end_tensor_inputs (`list[str]`):
                See `__call__`.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
                See `__call__`.

        Returns:
            `torch.Tensor`: Denoised latents, float32.
        """
        step_kwargs = self.prepare_step_kwargs(generator)
        self._num_timesteps = len(timesteps)
        first_guided, last_guided = (int(bound * len(timesteps)) for bound in guidance_interval)
        # A callback may change the embeddings, the weights or a LoRA's scale.
        denoiser = DIMDenoiser(self.transformer, timesteps, watch=callback_on_step_end is not None)

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                guided = self.do_classifier_free_guidance and first_guided <= i < last_guided
                conditions = [(prompt_embeds, prompt_attention_mask)]
                if guided:
                    conditions.insert(0, (negative_prompt_embeds, negative_prompt_attention_mask))

                model_input = latents if image_latents is None else torch.cat([latents, image_latents], dim=1)
                denoiser.start_step(len(conditions))
                noise_pred = denoiser(i, model_input, conditions, self.attention_kwargs)
                if guided:
                    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)

                latents = self.scheduler.step(noise_pred, t, latents, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                        "image_latents": image_latents,
                    }
                    kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, i, t, kwargs) or {}
                    latents = changed.get("latents", latents)
                    image_latents = changed.get("image_latents", image_latents)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = changed.get("negative_prompt_embeds", negative_prompt_embeds)

                progress_bar.update()

        self._current_timestep = None
        return latents

    def decode_latents(
        self, latents: torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """
        Pictures of the `output_type` from denoised latents `(batch_size, latent_channels, height, width)`; the latents
        themselves for "latent".
        """
        if output_type == "latent":
            return latents
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        image = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(image.float(), output_type=output_type)

    @torch.no_grad()
    def __call__(
        self,
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
        Paints pictures from text.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to paint. Either this or `prompt_embeds`.
            negative_prompt (`str` or `list[str]`, *optional*):
                What to guide away from; the learned null condition by default and for empty texts.
            height (`int`, *optional*):
                Height in pixels, a multiple of the VAE's factor (32); with `width`. The model's base size by default.
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
                Pictures a prompt.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise, one for all or one a picture.
            latents (`torch.Tensor`, *optional*):
                Noise to start from, of shape `(pictures, latent_channels, height / factor, width / factor)`.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`, *optional*):
                Connector outputs in place of `prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                1 where `prompt_embeds` hold a token; all by default.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`, *optional*):
                Connector outputs to guide away from.
            negative_prompt_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                1 where `negative_prompt_embeds` hold a token; all by default.
            output_type (`str`, defaults to `"pil"`):
                "pil", "np" or "pt" (in [0, 1]), or "latent".
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`DIMPipelineOutput`] or a tuple.
            attention_kwargs (`dict`, *optional*):
                Passed to the transformer; `{"scale": ...}` scales its LoRA layers and the connector's.
            use_resolution_binning (`bool`, defaults to `True`):
                For edits without a size; without effect here, where a size is exact.
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
                Called as `callback(pipe, index, text)` while the `designer` rewrites the prompt of that index, with
                its words so far.

        Examples:
            ```py
            >>> from diffusers_dim import DIMPipeline
            >>> pipe = DIMPipeline.from_pretrained("path/to/converted/DIM-4.6B-T2I", dtype=torch.bfloat16).to("cuda")
            >>> pipe("A table with a bowl of fruit near a window.").images[0].save("fruit.png")
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
        if height is None and width is None:
            height = width = self.image_processor.base_size

        # 1. Check inputs
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
        batch_size = self._get_batch_size(prompt, prompt_embeds) * num_images_per_prompt
        self.check_latents(latents, batch_size, height, width)
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device

        # 2. Prepare timesteps
        schedule = self.prepare_timesteps(num_inference_steps, device, timesteps, sigmas)

        # 3. Rewrite the prompt
        rewritten: list[str | None] | None = None
        if prompt is not None and self.designer is not None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
            rewritten = self._ask_designer("rewrite", prompt, callback=callback_on_design)
            prompt = [text if new is None else new for text, new in zip(prompt, rewritten)]

        # 4. Encode the prompt
        conditions = self.encode_prompt(
            prompt,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            device=device,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            lora_scale=(attention_kwargs or {}).get("scale"),
        )

        # 5. Prepare latents
        latents = self.prepare_latents(batch_size, height, width, device, generator, latents)

        # 6. Denoise
        latents = self.denoise(
            latents,
            schedule,
            *conditions,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_interval=guidance_interval,
        )

        # 7. Decode
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return DIMPipelineOutput(images=images, blueprints=rewritten)

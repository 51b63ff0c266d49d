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
"""The designer that the pipeline already holds: its own vision-language model."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import CompileConfig, DynamicCache, StaticCache

from ..models.prefix_dim import DIMPrefix
from .designer import Conversation, Design, Designer, DesignError, Draft, OnText
from .generation import AnswerStreamer, check_context, get_eos_token_ids, read_answer


if TYPE_CHECKING:
    from ..pipelines import DIMPipeline


# Lengths of static caches, so that few are made and compiled for.
CACHE_LENGTHS = 256


class SelfDesigner(Designer):
    r"""
    Writes blueprints with the pipeline's own `text_encoder` and `processor` (Draw-In-Mind,
    https://huggingface.co/papers/2509.01986, table 1: ImgEdit 3.10 without, 3.49 with it). No further weights are
    needed. Within a call of the pipeline the picture is seen once, for designing and encoding both.

    Answers are greedy; the checkpoint's own repetition penalty and end tokens hold. They are those of
    `text_encoder.generate` for the same conversation.

    Args:
        pipe ([`DIMPipeline`]): The pipeline whose model it is.
        batch_size (`int`, defaults to 8): Pictures that are designed at a time.
        static_cache (`bool`, *optional*):
            Whether keys and values lie in memory of a fixed size, as compiling needs; where it is compiled by default.
        compile (`bool`, defaults to `False`):
            Whether the model's steps are compiled, which pays off after some designs.
        kwargs: Arguments of [`Designer`].
    """

    name = "self"

    def __init__(
        self,
        pipe: "DIMPipeline",
        batch_size: int = 8,
        static_cache: bool | None = None,
        compile: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1, but is {batch_size}.")
        if compile and static_cache is False:
            raise ValueError("`compile=True` needs a static cache, but `static_cache` is False.")
        self.pipe = pipe
        self.batch_size = batch_size
        self.static_cache = compile if static_cache is None else static_cache
        self.compile = compile
        self._static_caches: dict[tuple, StaticCache] = {}
        self._prefix: DIMPrefix | None = None
        self._rows: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"SelfDesigner({type(self.pipe).__name__}, max_new_tokens={self.max_new_tokens})"

    @property
    def settings(self) -> dict[str, Any]:
        model = self.pipe.text_encoder
        name = getattr(model, "name_or_path", "") or self.pipe.config.get("_name_or_path", "")
        return {**super().settings, "model": str(name), "dtype": str(model.dtype)}

    def design_each(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        on_text: OnText | None = None,
        height: int | None = None,
        width: int | None = None,
        prefix: DIMPrefix | None = None,
    ) -> Iterator[Design]:
        """
        [`Designer.design_each`] at the view that the painter's condition has. [`~Designer.design`] takes the same.

        Args:
            images (`Sequence[PIL.Image.Image]`): The sources.
            instructions (`Sequence[str]`): What to do, one an image.
            on_text (`Callable`, *optional*): Called with the words as they grow.
            height (`int`, *optional*):
                With `width`: height in pixels of the edited picture, by which the model sees the source, see
                [`DIMProcessor.resize`]. By default the size that each source is edited at by default.
            width (`int`, *optional*): Width in pixels of the edited picture.
            prefix ([`DIMPrefix`], *optional*):
                What the model has made of these images at this size already, see [`DIMPipeline.encode_prefix`].
        """
        self._check()
        views = []
        for image in self.pipe.image_processor.to_rgb(list(images)):
            size = (height, width) if height else self.pipe.image_processor.get_default_height_width(image)
            views.append(self.pipe.processor.resize(image, *size))
        self._prefix, self._rows = prefix, {id(view): row for row, view in enumerate(views)}
        try:
            yield from self._design_pictures(views, instructions, on_text)
        finally:
            self._prefix, self._rows = None, {}

    def rewrite(self, prompts: Sequence[str], on_text: OnText | None = None) -> list[str]:
        self._check()
        return super().rewrite(prompts, on_text)

    def _check(self) -> None:
        missing = [name for name in ("text_encoder", "processor") if getattr(self.pipe, name) is None]
        if missing:
            raise ValueError(
                f"The pipeline's own model cannot design, since its {missing} is None: give `blueprint`, or another"
                " `designer`, or None for no designer."
            )

    @torch.no_grad()
    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        places: dict[tuple[int, int] | None, list[int]] = {}
        for place, conversation in enumerate(conversations):
            picture = conversation.picture
            size = None if picture is None else (picture.height, picture.width)
            if conversation.others or conversation.text_first:
                yield place, DesignError("The pipeline's own model is asked about one picture, before the text.")
                continue
            try:
                self.pipe.processor.check_text(list(conversation.turns))
            except ValueError as error:
                yield place, DesignError(str(error))
                continue
            places.setdefault(size, []).append(place)
        for size, group in places.items():
            for start in range(0, len(group), self.batch_size):
                chunk = group[start : start + self.batch_size]
                batch = [conversations[place] for place in chunk]

                def told(row: int, text: str, chunk: list[int] = chunk) -> None:
                    on_text(chunk[row], text)

                yield from zip(chunk, self._answer(batch, size, told))

    def _answer(
        self, conversations: list[Conversation], size: tuple[int, int] | None, on_text: OnText
    ) -> list[Draft | DesignError]:
        """Answers conversations about pictures of one size, or without pictures."""
        model, processor = self.pipe.text_encoder, self.pipe.processor
        device = self.pipe._execution_device
        turns = [conversation.turns for conversation in conversations]
        if size is None:
            messages = [conversation.messages() for conversation in conversations]
            texts = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            inputs = processor.tokenizer(
                texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
            ).to(device)
            prefix = None
        else:
            inputs = processor.encode_continuation(turns, add_generation_prompt=True, padding_side="left").to(device)
            prefix = self._get_prefix([conversation.picture for conversation in conversations], size, device)
            # Padding between picture and text is left out by the mask, and positions are counted past it.
            inputs["input_ids"] = torch.cat([prefix.input_ids, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.cat([torch.ones_like(prefix.input_ids), inputs["attention_mask"]], dim=1)

        length = inputs["input_ids"].shape[1]
        error = check_context(model, length, self.max_new_tokens, "edit at a smaller size")
        if error is not None:
            return [error] * len(conversations)

        cache = self._get_cache(prefix, len(conversations), length + self.max_new_tokens, device)
        if prefix is not None:
            model.model.rope_deltas = prefix.rope_deltas
        eos_token_ids = get_eos_token_ids(model, processor.tokenizer)
        compile_config = None
        if self.compile:
            compile_config = CompileConfig()
            compile_config._compile_all_devices = True  # transformers leaves CPUs out, even when asked
        output = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=eos_token_ids,
            pad_token_id=processor.tokenizer.pad_token_id,
            disable_compile=not self.compile,
            compile_config=compile_config,
            streamer=AnswerStreamer(processor.tokenizer, on_text, eos_token_ids),
        )
        return [read_answer(processor.tokenizer, row[length:], eos_token_ids) for row in output]

    def _get_prefix(self, images: list[Image.Image | None], size: tuple[int, int], device: torch.device) -> DIMPrefix:
        if self._prefix is None:
            return self.pipe.encode_prefix(images, *size, device=device)
        return self._prefix.select([self._rows[id(image)] for image in images])

    def _get_cache(
        self, prefix: DIMPrefix | None, batch_size: int, length: int, device: torch.device
    ) -> DynamicCache | StaticCache | None:
        if not self.static_cache:
            return None if prefix is None else prefix.past_key_values
        # Kept, as what is compiled is compiled for its memory.
        place = (batch_size, -(-length // CACHE_LENGTHS) * CACHE_LENGTHS, device, self.pipe.text_encoder.dtype)
        if place not in self._static_caches:
            config = self.pipe.text_encoder.config.get_text_config()
            self._static_caches = {place: StaticCache(config=config, max_cache_len=place[1])}
        cache = self._static_caches[place]
        cache.reset()
        if prefix is not None:
            prefix.copy_to(cache)
        return cache

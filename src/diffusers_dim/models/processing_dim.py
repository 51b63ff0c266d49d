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
"""What the vision-language model reads: a user turn of picture and text, and which tokens are the condition."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.processing_utils import ProcessorMixin


VISION_END = "<|vision_end|>"


def to_messages(turns: Sequence[str], pictures: int = 0) -> list[dict[str, Any]]:
    """
    A conversation as chat templates of transformers take it: the user's and the model's turns by turns, the user's
    first, which begins with as many pictures.
    """
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": turn}]}
        for i, turn in enumerate(turns)
    ]
    messages[0]["content"] = [{"type": "image"} for _ in range(pictures)] + messages[0]["content"]
    return messages


class DIMProcessor(Qwen2_5_VLProcessor, ProcessorMixin):
    r"""
    Qwen2.5-VL's processor without the video part, so that it needs no torchvision, and always with the PIL image
    processor, whose bicubic resize is the one the published model was trained with.

    Besides all that [`Qwen2_5_VLProcessor`] does it builds DIM's conversation: see [`~DIMProcessor.encode`].

    Args:
        image_processor (`Qwen2VLImageProcessorPil`):
            Resizes to multiples of 28 pixels and cuts into patches.
        tokenizer (`Qwen2Tokenizer`):
            Qwen2.5's tokenizer.
        chat_template (`str`, *optional*):
            Jinja template of a conversation; the model's own by default.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = getattr(tokenizer, "image_token", "<|image_pad|>")
        self.video_token = getattr(tokenizer, "video_token", "<|video_pad|>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # Not Qwen2_5_VLProcessor's, which insists on a video processor.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # How it was loaded is no part of what it is, but would be saved with it.
        tokenizer.init_kwargs.pop("local_files_only", None)
        return [Qwen2VLImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]

    def resize(self, image: Image.Image, height: int, width: int) -> Image.Image:
        r"""
        The vision-language model's view of a source: the whole picture, whatever its shape, with PIL's bicubic filter
        to `height` and `width` each rounded to a multiple of 28 (1024 becomes 1036), within the image processor's
        bounds on the number of pixels (Qwen2-VL, https://huggingface.co/papers/2409.12191, section 2.1).

        Args:
            image (`PIL.Image.Image`): An RGB picture.
            height (`int`): Height of the edited picture in pixels.
            width (`int`): Width of the edited picture in pixels.
        """
        processor = self.image_processor
        height, width = smart_resize(
            height,
            width,
            factor=processor.patch_size * processor.merge_size,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def encode(
        self,
        text: str | list[str],
        images: list[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> BatchFeature:
        r"""
        Turns prompts, each with its picture or all without, into the model's inputs.

        The conversation is the model's own chat template with its default system message and one user turn, picture
        first, without a generation prompt (design of the published code). Rows are padded on the right.

        Args:
            text (`str` or `list[str]`):
                The prompts. They must not hold the tokenizer's special tokens (`<|im_end|>`, `<|image_pad|>`, ...).
            images (`list[PIL.Image.Image]`, *optional*):
                One RGB picture a prompt.
            height (`int`, *optional*):
                With `width`: the edited picture's height in pixels, to which each image is resized first, see
                [`~DIMProcessor.resize`]. An image keeps its own size, rounded to multiples of 28, by default.
            width (`int`, *optional*):
                The edited picture's width in pixels.

        Returns:
            `BatchFeature` of tensors: `input_ids`, `attention_mask`, `mm_token_type_ids` and `condition_mask`, each
            `(batch_size, sequence_length)`, and with images `pixel_values` `(patches, patch_dim)` and `image_grid_thw`
            `(batch_size, 3)`. `condition_mask` is true on the user turn's content, vision tokens included, and false
            on the template around it.

        Raises:
            ValueError: If a prompt holds a special token, or there are not as many images as prompts.
        """
        text = [text] if isinstance(text, str) else list(text)
        if images is not None and len(images) != len(text):
            raise ValueError(f"Got {len(images)} images for {len(text)} prompts: give one image a prompt.")
        self.check_text(text)
        if images is not None:
            images = [self.resize(image, height or image.height, width or image.width) for image in images]
        conversations = [
            self.apply_chat_template(to_messages([prompt], pictures=images is not None), tokenize=False)
            for prompt in text
        ]
        inputs = self(images=images, text=conversations, padding=True, padding_side="right", return_tensors="pt")
        inputs["condition_mask"] = self.get_condition_mask(inputs["input_ids"])
        return inputs

    def check_text(self, text: list[str]) -> None:
        """Raises a `ValueError` if a text holds the tokenizer's special tokens, which would be read as such."""
        for prompt in text:
            found = [token for token in self.tokenizer.all_special_tokens if token in prompt]
            if found:
                raise ValueError(f"A prompt must not hold the tokenizer's special tokens, but holds {found}.")

    def encode_prefix(self, images: list[Image.Image], height: int, width: int) -> BatchFeature:
        r"""
        The start that all conversations about these pictures have in common: the default system message, the user
        turn's head and the picture's tokens. What follows is [`~DIMProcessor.encode_continuation`]'s.

        Args:
            images (`list[PIL.Image.Image]`): RGB pictures.
            height (`int`): Height of the edited picture in pixels, as in [`~DIMProcessor.encode`].
            width (`int`): Width of the edited picture in pixels.

        Returns:
            `BatchFeature` as of [`~DIMProcessor.encode`] without its `condition_mask`; no row is padded.
        """
        inputs = self.encode([""] * len(images), images, height, width)
        del inputs["condition_mask"]
        vision_end = self.tokenizer.convert_tokens_to_ids(VISION_END)
        # The views are of one size, so the pictures' tokens are as many in all rows.
        length = int((inputs["input_ids"][0] == vision_end).nonzero().max()) + 1
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = inputs[name][:, :length]
        return inputs

    def encode_continuation(
        self, turns: list[tuple[str, ...]], add_generation_prompt: bool = False, padding_side: str = "right"
    ) -> BatchFeature:
        r"""
        What follows [`~DIMProcessor.encode_prefix`]: the first turn's text and all later turns.

        Args:
            turns (`list[tuple[str, ...]]`):
                For each picture the user's and the model's turns by turns, the user's first.
            add_generation_prompt (`bool`, defaults to `False`): Whether the model's head follows, for it to answer.
            padding_side (`str`, defaults to `"right"`): Where shorter rows are padded.

        Returns:
            `BatchFeature` of `input_ids` and `attention_mask`, each `(batch_size, tokens)`.

        Raises:
            ValueError: If a text holds a special token.
        """
        texts = []
        for row in turns:
            self.check_text(list(row))
            text = self.apply_chat_template(
                to_messages(row, pictures=1), add_generation_prompt=add_generation_prompt, tokenize=False
            )
            texts.append(text.split(VISION_END, 1)[1])
        return self.tokenizer(
            texts, padding=True, padding_side=padding_side, add_special_tokens=False, return_tensors="pt"
        )

    def get_condition_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        r"""
        Marks the user turn's content: from the first token after `<|im_start|>user\n` up to, not including, its
        `<|im_end|>`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Conversations that end with one user turn, as [`~DIMProcessor.encode`] makes them.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length)`.
        """
        turn_start, turn_end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        head_length = len(self.tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"])
        positions = torch.arange(input_ids.shape[1])
        # The user turn is the last one: its head and its end are the last of their tokens.
        start = torch.where(input_ids == turn_start, positions, -1).amax(dim=1, keepdim=True) + head_length
        end = torch.where(input_ids == turn_end, positions, -1).amax(dim=1, keepdim=True)
        return (positions >= start) & (positions < end)

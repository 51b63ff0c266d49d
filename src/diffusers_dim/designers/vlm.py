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
"""A vision-language model of transformers as designer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from .designer import Conversation, Designer, DesignError, Draft, OnText
from .generation import AnswerStreamer, check_context, get_eos_token_ids, get_omitted_token_ids, read_answer


class VLMDesigner(Designer):
    r"""
    Writes blueprints with a vision-language model of transformers: Qwen2.5-VL, Qwen3-VL, InternVL3.5, MiMo-VL,
    GLM-4.1V-Thinking, Gemma 3, LLaVA-OneVision and whatever else `AutoModelForImageTextToText` loads (Draw-In-Mind,
    https://huggingface.co/papers/2509.01986: ImgEdit 3.55 with Qwen2.5-VL-7B, 3.59 with InternVL3.5-8B).

    Answers are greedy; the checkpoint's own repetition penalty and end tokens hold.

    Args:
        model (`str` or `Path`): A repo of the Hub, or a folder.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): The checkpoint's own by default.
        device (`str` or `torch.device`, *optional*): The first accelerator by default, else the CPU.
        device_map (`str` or `dict`, *optional*): Instead of `device`: where each part of the model goes.
        quantization_config (*optional*): As [`~transformers.PreTrainedModel.from_pretrained`] takes it.
        attn_implementation (`str`, *optional*): As [`~transformers.PreTrainedModel.from_pretrained`] takes it.
        trust_remote_code (`bool`, defaults to `False`): Whether code that comes with the model may run here.
        batch_size (`int`, defaults to 8): Pictures that are designed at a time.
        chat_template_kwargs (`dict`, *optional*):
            Switches of the model's chat template, as `{"enable_thinking": False}`.
        kwargs: Arguments of [`Designer`]. A model that thinks needs a larger `max_new_tokens`.

    Raises:
        ValueError: If there is no such model, it does not take pictures or talk, or needs `trust_remote_code`.
        ConnectionError: If the Hub cannot be reached.
        ImportError: If its processor needs a package that is not installed.
    """

    def __init__(
        self,
        model: str | Path,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        device_map: str | dict[str, Any] | None = None,
        quantization_config: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 8,
        chat_template_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1, but is {batch_size}.")
        if device is not None and device_map is not None:
            raise ValueError(f"Give `device` or `device_map`, not both: got {device!r} and {device_map!r}.")
        if device_map is None:
            device_map = {"": device or torch.accelerator.current_accelerator() or "cpu"}
        self.name_or_path = str(model)
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs or {}

        config = _load_config(self.name_or_path, trust_remote_code)
        self.processor = _load_processor(self.name_or_path, config, trust_remote_code)
        self._answers_are_strings = self._check_chat_template()
        self.model = AutoModelForImageTextToText.from_pretrained(
            self.name_or_path,
            config=config,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization_config,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._eos_token_ids = get_eos_token_ids(self.model, tokenizer)
        self._reserved = set(tokenizer.convert_ids_to_tokens(list(get_omitted_token_ids(tokenizer))))
        self._reserved |= {getattr(self.processor, "image_token", tokenizer.eos_token)}

    def __repr__(self) -> str:
        return (
            f"VLMDesigner({self.name_or_path!r}, dtype={self.model.dtype}, device={str(self.model.device)!r},"
            f" batch_size={self.batch_size}, max_new_tokens={self.max_new_tokens})"
        )

    @property
    def settings(self) -> dict[str, Any]:
        config = self.model.config
        quantization = getattr(config, "quantization_config", None)
        if hasattr(quantization, "to_dict"):
            quantization = quantization.to_dict()
        folder = Path(self.name_or_path)
        return {
            **super().settings,
            "model": str(folder.resolve()) if folder.is_dir() else self.name_or_path,
            "revision": getattr(config, "_commit_hash", None),
            "dtype": str(self.model.dtype),
            "quantization": None if quantization is None else str(quantization),
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        places = []
        for place, conversation in enumerate(conversations):
            found = sorted(token for token in self._reserved if any(token in turn for turn in conversation.turns))
            if found:
                error = DesignError(f"The conversation must not hold the model's special tokens, but holds {found}.")
                yield place, error
            else:
                places.append(place)
        # Processors take pictures for all of a batch or for none.
        for has_image in (True, False):
            group = [place for place in places if (conversations[place].image is not None) == has_image]
            for start in range(0, len(group), self.batch_size):
                yield from self._answer(group[start : start + self.batch_size], conversations, on_text)

    def _answer(
        self, places: list[int], conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        inputs = self._encode([conversations[place] for place in places])
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        errors = [check_context(self.model, length, self.max_new_tokens) for length in lengths]
        if any(errors):
            yield from ((place, error) for place, error in zip(places, errors) if error is not None)
            places = [place for place, error in zip(places, errors) if error is None]
            if not places:
                return
            inputs = self._encode([conversations[place] for place in places])

        tokenizer = self.processor.tokenizer
        output = self.model.generate(
            **inputs.to(self.model.device, self.model.dtype),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self._eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            streamer=AnswerStreamer(tokenizer, lambda row, text: on_text(places[row], text), self._eos_token_ids),
        )
        for place, row in zip(places, output[:, inputs["input_ids"].shape[1] :]):
            yield place, read_answer(tokenizer, row, self._eos_token_ids)

    def _encode(self, conversations: list[Conversation]) -> Any:
        """The model's inputs, rows padded on the left."""
        texts = [self._render(conversation.messages()) for conversation in conversations]
        images = (
            None if conversations[0].image is None else [list(conversation.images) for conversation in conversations]
        )
        bos = self.processor.tokenizer.bos_token
        return self.processor(
            text=texts,
            images=images,
            padding=True,
            padding_side="left",
            # Some templates write it themselves.
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors="pt",
        )

    def _render(self, messages: list[dict[str, Any]]) -> str:
        if self._answers_are_strings:
            for message in messages[1::2]:
                message["content"] = message["content"][0]["text"]
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )

    def _check_chat_template(self) -> bool:
        """Whether the template takes the model's own turns as strings only: GLM-4.1V's prints a list as it is."""
        if self.processor.chat_template is None:
            self.processor.chat_template = self.processor.tokenizer.chat_template
        if self.processor.chat_template is None:
            raise ValueError(
                f"{self.name_or_path!r} has no chat template: give a model that was trained for dialogue."
            )
        self._answers_are_strings = False
        return "'text'" in self._render(Conversation(("question", "answer", "question")).messages())


def _load_config(model: str, trust_remote_code: bool) -> PreTrainedConfig:
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = "it has no config.json"
        if (folder / "model_index.json").is_file():
            hint = 'it is a pipeline. For one of DIM, `pipe.designer = "self"` has its own model write blueprints'
        raise ValueError(f"{model!r} is no model of transformers: {hint}.")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise ConnectionError(
                f"{model!r} is neither a folder nor in the Hub's cache on this machine, and the Hub cannot be reached:"
                " mind the spelling, or download the model first."
            ) from error
        raise ValueError(
            f"There is no model {model!r}, neither as a folder nor as a repo of the Hub. {error}"
        ) from error
    has_remote_code = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not has_remote_code:
        raise ValueError(
            f"{model!r} is a model of type {config.model_type!r}, which does not read pictures and write text, as far"
            " as transformers knows: give one that `AutoModelForImageTextToText` loads."
        )
    return config


def _load_processor(model: str, config: PreTrainedConfig, trust_remote_code: bool) -> ProcessorMixin:
    try:
        processor_class = AutoProcessor
        if type(config) in PROCESSOR_MAPPING:
            processor_class = _without_video(PROCESSOR_MAPPING[type(config)])
        return processor_class.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError) as error:
        if "torchvision" in str(error).lower():
            raise ImportError(f"The processor of {model!r} needs torchvision: `pip install torchvision`.") from error
        if isinstance(error, ImportError):
            raise
        raise ValueError(f"{model!r} has no processor that can be loaded. {error}") from error


def _without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor without its part for videos, which nothing here needs and which would need torchvision."""
    parts = processor_class.get_attributes()
    # SmolVLM's chat template asks the part for videos even where there is none.
    if parts != ["image_processor", "tokenizer", "video_processor"] or "apply_chat_template" in vars(processor_class):
        return processor_class

    class Processor(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return parts[:2]

        @classmethod
        def _get_arguments_from_pretrained(cls, *args: Any, **kwargs: Any) -> list[Any]:
            return [*super()._get_arguments_from_pretrained(*args, **kwargs), None]

    return Processor

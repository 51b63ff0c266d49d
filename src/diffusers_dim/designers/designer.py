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
"""What all designers share: asking, reading the answer, asking once more, falling back, and remembering."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from ..files import PictureFile
from ..image_processor import DIMImageProcessor
from ..models.processing_dim import to_messages
from .blueprint import Blueprint, BlueprintError, strip_thoughts
from .prompts import DESIGN_PROMPT, REPAIR_PROMPT, REWRITE_PROMPT, REWRITE_REPAIR_PROMPT


if TYPE_CHECKING:
    from .cache import BlueprintCache

logger = logging.getLogger(__name__)

OnText = Callable[[int, str], Any]


class DesignError(ValueError):
    """
    A designer gave no usable text for one picture.

    Attributes:
        text (`str`): The model's own words; empty if there were none.
    """

    def __init__(self, message: str, text: str = ""):
        super().__init__(message)
        self.text = text


@dataclass(frozen=True)
class Conversation:
    """
    What a model is to answer.

    Args:
        turns (`tuple[str, ...]`): The user's and the model's turns by turns, the user's first and last.
        image (`PIL.Image.Image` or [`~diffusers_dim.files.PictureFile`], *optional*):
            An RGB picture, which comes before the text of the first turn. Its file is for designers whose
            `max_file_pixels` are enough; all others are given what [`~Designer.prepare`] makes of it.
        instruction (`str`, defaults to `""`): What was given to be designed, which the first turn holds.
        others (`tuple`, defaults to `()`): Further pictures, which follow `image`.
        text_first (`bool`, defaults to `False`): Whether the pictures come after the text of the first turn instead.
    """

    turns: tuple[str, ...]
    image: Image.Image | PictureFile | None = None
    instruction: str = ""
    others: tuple[Image.Image | PictureFile, ...] = ()
    text_first: bool = False

    @property
    def images(self) -> tuple[Image.Image | PictureFile, ...]:
        """All pictures in order."""
        return () if self.image is None else (self.image, *self.others)

    @property
    def picture(self) -> Image.Image | None:
        """The first picture itself."""
        return self.image.decode() if isinstance(self.image, PictureFile) else self.image

    def decoded(self, max_file_pixels: int = 0) -> "Conversation":
        """
        The same with the pictures themselves in the place of files, but for those of so many pixels at most.

        Raises:
            ValueError: If one cannot be read.
        """
        image, *others = (_decode(picture, max_file_pixels) for picture in self.images or (None,))
        return replace(self, image=image, others=tuple(others))

    def messages(self) -> list[dict[str, Any]]:
        """The turns as chat templates of transformers take them; the pictures themselves are passed beside them."""
        messages = to_messages(self.turns, len(self.images))
        if self.text_first:
            messages[0]["content"].reverse()  # the pictures are alike
        return messages


def _decode(picture: Image.Image | PictureFile | None, max_file_pixels: int) -> Image.Image | PictureFile | None:
    if isinstance(picture, PictureFile) and picture.size[0] * picture.size[1] > max_file_pixels:
        return picture.decode()
    return picture


@dataclass(frozen=True)
class Draft:
    """
    A model's answer.

    Args:
        text (`str`): All that it wrote, thoughts and marks of its answer too.
        tokens (`int`, defaults to 0): How many tokens that was, 0 where nobody counted.
        finished (`bool`, defaults to `True`): False where it was cut off at the limit of its length.
        prompt_tokens (`int`, defaults to 0): How many tokens it was asked with, 0 where nobody counted.
    """

    text: str
    tokens: int = 0
    finished: bool = True
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Design:
    """
    What became of one picture and instruction.

    Args:
        index (`int`): Their place in what was given.
        blueprint (`str`, *optional*):
            The blueprint; the instruction itself where the designer fell back to it, `None` where it failed.
        error ([`DesignError`], *optional*): Why there is no blueprint, also where the instruction stands for it.
        repaired (`bool`, defaults to `False`): Whether the model was asked a second time.
        cached (`bool`, defaults to `False`): Whether it came from the cache.
        tokens (`int`, defaults to 0): What the model wrote, in tokens, both times.
    """

    index: int
    blueprint: str | None
    error: DesignError | None = None
    repaired: bool = False
    cached: bool = False
    tokens: int = 0


@dataclass(frozen=True)
class _Task:
    """What is asked, how an answer is read (`read` raises a `ValueError` at a bad one), and how it is mended."""

    prompt: str
    repair: str
    read: Callable[[str], str] = field(repr=False)


def is_blueprint(text: str) -> bool:
    """Whether a text has a blueprint's five parts."""
    try:
        Blueprint.parse(text)
    except BlueprintError:
        return False
    return True


def describe_cut(max_new_tokens: int, problem: str = "") -> str:
    """What is wrong with an answer that ended at the limit of its length, and perhaps otherwise."""
    return f"it was cut off after {max_new_tokens} tokens; be brief. {problem}".strip()


def ask_again(draft: str, repair: str, problem: str) -> tuple[str, str]:
    """The two turns that follow a bad answer: what the model said, without its thoughts, and `repair` for it."""
    return strip_thoughts(draft).strip() or "...", repair.replace("{problem}", problem)


def _tell(on_text: OnText | None, places: list[int], place: int, text: str) -> None:
    if on_text is not None:
        on_text(places[place], text)


def _read_prompt(text: str) -> str:
    text = " ".join(strip_thoughts(text).split()).strip("\"'“”")
    if not text:
        raise ValueError("there is no text.")
    return text


class Designer(ABC):
    r"""
    Writes blueprints of edits (Draw-In-Mind, https://huggingface.co/papers/2509.01986, section 3). A subclass says in
    [`~Designer.write`] how its model answers; asking once more, falling back and remembering are done here.

    Args:
        on_failure (`"error"` or `"instruction"`, defaults to `"error"`):
            What to do when the model's second answer is not a blueprint either: raise a [`DesignError`] that holds
            its words, or warn and let the plain instruction stand for the blueprint.
        max_new_tokens (`int`, defaults to 1024):
            The longest answer. Published blueprints have up to 2,744 characters, about 600 tokens; a thinking model
            needs room for its thoughts, too.
        cache ([`BlueprintCache`], *optional*):
            Where blueprints are kept and looked up by picture, instruction, designer and settings.
        prompt (`str`, *optional*):
            What the model is asked, with `{instruction}` in it; DIM's five parts by default.

    Attributes:
        name (`str`, *optional*): By which a pipeline's config names the designer, `None` where it cannot.
        max_file_pixels (`int`): Up to which area it takes pictures by their files; by default it takes none so.
    """

    name: str | None = None
    max_file_pixels: int = 0

    def __init__(
        self,
        on_failure: Literal["error", "instruction"] = "error",
        max_new_tokens: int = 1024,
        cache: "BlueprintCache | None" = None,
        prompt: str | None = None,
    ):
        if on_failure not in ("error", "instruction"):
            raise ValueError(f'`on_failure` has to be "error" or "instruction", but is {on_failure!r}.')
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` has to be at least 1, but is {max_new_tokens}.")
        if prompt is not None and "{instruction}" not in prompt:
            raise ValueError(f"`prompt` has to hold {{instruction}}, but is {prompt!r}.")
        self.on_failure = on_failure
        self.max_new_tokens = max_new_tokens
        self.cache = cache
        self.prompt = DESIGN_PROMPT if prompt is None else prompt

    @property
    def settings(self) -> dict[str, Any]:
        """What the words depend on besides picture and instruction, without keys and addresses that are secret."""
        return {"designer": type(self).__name__, "max_new_tokens": self.max_new_tokens}

    def prepare(self, conversation: Conversation) -> Conversation:
        """
        Does of [`~Designer.write`] what can be done before there is a place for a conversation: pictures are decoded,
        or what is sent is put together. It may be called from several threads, and need not be called.

        Raises:
            ValueError: If a picture cannot be read.
        """
        return conversation.decoded(self.max_file_pixels)

    @abstractmethod
    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        """
        Has the model answer, and gives each answer with its conversation's index as soon as it is there, in any order.
        What fails for one conversation alone is given as a [`DesignError`]; what fails for all is raised.

        Args:
            conversations (`Sequence[Conversation]`): At least one.
            on_text (`Callable`): To be called as `on_text(index, text_so_far)` while an answer grows.
        """

    def design(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        on_text: OnText | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """
        Writes the blueprints of edits.

        Args:
            images (`Sequence[PIL.Image.Image]`): The sources, read as [`DIMImageProcessor.to_rgb`] does.
            instructions (`Sequence[str]`): What to do, one an image.
            on_text (`Callable`, *optional*):
                Called as `on_text(index, text)` with the model's words so far, thoughts too, while they grow. A
                second try starts anew. Where many are asked at once, calls come from another thread, one at a time.
            kwargs: What the designer's own [`~Designer.design_each`] takes besides.

        Returns:
            One [`Blueprint`] each, in order; the instruction itself where `on_failure="instruction"` took effect.

        Raises:
            DesignError: If a blueprint cannot be had. All others were finished, and are in the cache if there is one.
            ValueError: If there are not as many images as instructions.
        """
        return self._in_order(self.design_each(images, instructions, on_text, **kwargs))

    def design_each(
        self, images: Sequence[Image.Image], instructions: Sequence[str], on_text: OnText | None = None
    ) -> Iterator[Design]:
        """[`~Designer.design`] that gives each result as soon as it is there, in any order, failures too."""
        return self._design_pictures(DIMImageProcessor().to_rgb(list(images)), instructions, on_text)

    def _design_pictures(
        self, pictures: Sequence[Image.Image], instructions: Sequence[str], on_text: OnText | None
    ) -> Iterator[Design]:
        if len(pictures) != len(instructions):
            raise ValueError(f"Got {len(pictures)} images for {len(instructions)} instructions: give one an image.")
        task = _Task(self.prompt, REPAIR_PROMPT, Blueprint.parse)
        return self._run(task, list(pictures), list(instructions), on_text)

    def rewrite(self, prompts: Sequence[str], on_text: OnText | None = None) -> list[str]:
        """
        Rewrites prompts for text-to-image, as the paper did for GenEval: nothing left out, what is open filled in.

        Args:
            prompts (`Sequence[str]`): What to paint.
            on_text (`Callable`, *optional*): As in [`~Designer.design`].

        Returns:
            One text each, in order.

        Raises:
            DesignError: If the model gives no text.
        """
        task = _Task(REWRITE_PROMPT.replace("{prompt}", "{instruction}"), REWRITE_REPAIR_PROMPT, _read_prompt)
        return self._in_order(self._run(task, [None] * len(prompts), list(prompts), on_text))

    @staticmethod
    def _in_order(designs: Iterator[Design]) -> list[str]:
        found = sorted(designs, key=lambda design: design.index)
        for design in found:
            if design.blueprint is None and design.error is not None:
                raise design.error
        return [design.blueprint for design in found]

    def _run(
        self, task: _Task, images: list[Image.Image | None], instructions: list[str], on_text: OnText | None
    ) -> Iterator[Design]:
        keys = [self._key(task, image, text) for image, text in zip(images, instructions)]
        waiting: dict[int, Conversation] = {}
        for index, key in enumerate(keys):
            kept = self._look_up(key, task)
            if kept is not None:
                yield Design(index, kept, cached=True)
            else:
                prompt = task.prompt.replace("{instruction}", instructions[index].strip())
                waiting[index] = Conversation((prompt,), images[index], instructions[index])

        tokens = dict.fromkeys(waiting, 0)
        for repaired in (False, True):
            places, conversations = list(waiting), list(waiting.values())
            waiting = {}
            if not conversations:
                break
            # The answers' indices are places among those that still wait.
            told = partial(_tell, on_text, places)
            for place, draft in self.write(conversations, told):
                index = places[place]
                if isinstance(draft, DesignError):
                    yield self._failed(index, draft, instructions[index], repaired, tokens[index])
                    continue
                tokens[index] += draft.tokens
                text, problem = "", ""
                try:
                    text = task.read(draft.text)
                except ValueError as error:
                    problem = str(error)
                if not draft.finished:
                    problem = describe_cut(self.max_new_tokens, problem)
                if problem and not repaired:
                    asked = conversations[place]
                    waiting[index] = replace(asked, turns=asked.turns + ask_again(draft.text, task.repair, problem))
                    continue
                if problem:
                    advice = "" if draft.finished else " Raise `max_new_tokens`."
                    failure = DesignError(
                        f"The designer gave nothing usable for {instructions[index]!r}, asked twice: {problem}{advice}"
                        f" It wrote: {draft.text!r}",
                        draft.text,
                    )
                    yield self._failed(index, failure, instructions[index], True, tokens[index])
                    continue
                if self.cache is not None and keys[index] is not None:
                    self.cache.put(keys[index], str(text))
                yield Design(index, text, repaired=repaired, tokens=tokens[index])

    def _look_up(self, key: str | None, task: _Task) -> str | None:
        kept = None if self.cache is None or key is None else self.cache.get(key)
        if kept is None:
            return None
        try:
            return task.read(kept)
        except ValueError:  # kept by an earlier version, which took what this one does not
            return None

    def _failed(self, index: int, error: DesignError, instruction: str, repaired: bool, tokens: int) -> Design:
        blueprint = None
        if self.on_failure == "instruction":
            logger.warning("%s The plain instruction is used in the blueprint's place.", error)
            blueprint = instruction
        return Design(index, blueprint, error, repaired=repaired, tokens=tokens)

    def _key(self, task: _Task, image: Image.Image | None, instruction: str) -> str | None:
        if self.cache is None:
            return None
        return self.cache.key(image, instruction, {**self.settings, "prompt": task.prompt})

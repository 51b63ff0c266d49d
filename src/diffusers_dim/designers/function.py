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
"""A designer from a Python function."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from .designer import Conversation, Designer, DesignError, Draft, OnText


class FunctionDesigner(Designer):
    r"""
    Has a function write the blueprints. A text that is not one is asked for once more, with the same arguments.

    Args:
        function (`Callable[[PIL.Image.Image, str], str]`):
            Called as `function(image, instruction)` with an RGB picture, or with `None` for a prompt that is to be
            rewritten, one at a time. A [`DesignError`] that it raises is a failure of that picture alone; anything
            else that it raises ends the call of the designer.
        version (`str`, *optional*):
            What a cache tells functions, and states of one, apart by. A cache needs it.
        kwargs: `on_failure` and `cache` of [`Designer`].

    Raises:
        ValueError: If `function` cannot be called or returns no text, or there is a cache but no version.
    """

    def __init__(self, function: Callable[[Image.Image | None, str], str], version: str | None = None, **kwargs: Any):
        if not callable(function):
            raise ValueError(f"`function` has to be callable, but is {function!r}.")
        super().__init__(**kwargs)
        if self.cache is not None and not version:
            raise ValueError('A cache cannot tell functions apart: give `version`, too, such as "captions-2".')
        self.function = function
        self.version = version

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "version": self.version}

    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        for index, conversation in enumerate(conversations):
            try:
                text = self.function(conversation.picture, conversation.instruction)
            except DesignError as error:
                yield index, error
                continue
            if not isinstance(text, str):
                raise ValueError(f"The designer's function has to return a text, but returned {type(text).__name__}.")
            on_text(index, text)
            yield index, Draft(text)

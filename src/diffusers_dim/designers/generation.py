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
"""Answers of models that run here, read from their tokens: whole ones, and while they grow."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .designer import DesignError, Draft


# Tags of thoughts and answers are special tokens of some tokenizers (Kimi-VL's ◁think▷); left out like the others,
# nothing would tell the thoughts from the answer.
KEPT_TAGS = re.compile("think|thought|reason|answer", re.IGNORECASE)


def get_eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the checkpoint's generation config, else the tokenizer's."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    return list(eos) if isinstance(eos, (list, tuple)) else [eos] if eos is not None else []


def check_context(
    model: PreTrainedModel, length: int, max_new_tokens: int, advice: str = "give a smaller picture"
) -> DesignError | None:
    """
    The error of a conversation that is too long for the model with its answer, `None` if it is not.

    Args:
        model (`PreTrainedModel`): Its text config's `max_position_embeddings` are what it reads, if there are any.
        length (`int`): The conversation's tokens.
        max_new_tokens (`int`): The answer's at most.
        advice (`str`): How to have fewer tokens of pictures.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None or length + max_new_tokens <= context:
        return None
    return DesignError(
        f"The conversation's {length} tokens and `max_new_tokens={max_new_tokens}` are more than the {context} that"
        f" the model reads: {advice}, shorten the instruction, or lower `max_new_tokens`."
    )


def get_omitted_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens, which are no part of an answer's text, without the tags of thoughts and answers."""
    added = tokenizer.added_tokens_decoder.items()
    special = {index: token.content for index, token in added if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    return {index for index, content in special.items() if not KEPT_TAGS.search(content)}


def read_answer(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int] | torch.Tensor, eos_token_ids: Collection[int]
) -> Draft:
    """
    Reads one row of what `generate` wrote.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        token_ids (`Sequence[int]` or `torch.Tensor` of shape `(tokens,)`):
            The new tokens, without the prompt. What follows the first end token is padding.
        eos_token_ids (`Collection[int]`): The tokens that end an answer, see [`get_eos_token_ids`].

    Returns:
        [`Draft`]: The text without special tokens but with tags of thoughts; the number of tokens before the end
        token; not finished if there is no end token.
    """
    ids = torch.as_tensor(token_ids).tolist()
    length = next((i for i, index in enumerate(ids) if index in eos_token_ids), len(ids))
    omitted = get_omitted_token_ids(tokenizer)
    text = _decode(tokenizer, [index for index in ids[:length] if index not in omitted])
    return Draft(text, length, finished=length < len(ids))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


class _Row:
    """One answer's text, which grows by a token at the cost of decoding a few, however long it is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        # `text` is that of ids[:read]. New tokens are decoded behind those from `start` on: how a token reads depends
        # on what comes before it (a word's leading blank).
        self.start = self.read = 0
        self.ended = False

    def append(self, index: int) -> bool:
        """Returns whether the text grew. It does not amid a character of several tokens."""
        self.ids.append(index)
        before = _decode(self.tokenizer, self.ids[self.start : self.read])
        after = _decode(self.tokenizer, self.ids[self.start :])
        if after.endswith("\ufffd") or len(after) <= len(before):
            return False
        self.text += after[len(before) :]
        self.start, self.read = self.read, len(self.ids)
        return True

    def end(self) -> bool:
        """Decodes the row as a whole, so that it is exact, and returns whether that changed the text."""
        self.ended = True
        before, self.text = self.text, _decode(self.tokenizer, self.ids)
        return self.text != before


class AnswerStreamer(BaseStreamer):
    r"""
    Tells the text of each row of a batch while `generate` writes it ([`~transformers.TextStreamer`] takes one row).
    The last text of a row is the one that [`read_answer`] finds.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        on_text (`Callable`): Called as `on_text(row, text_so_far)` whenever a row's text has grown.
        eos_token_ids (`Collection[int]`): The tokens that end a row, see [`get_eos_token_ids`].
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[int, str], Any],
        eos_token_ids: Collection[int],
    ):
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.eos_token_ids = frozenset(eos_token_ids)
        self.omitted = get_omitted_token_ids(tokenizer)
        self.rows: list[_Row] | None = None

    def put(self, value: torch.Tensor) -> None:
        """
        Takes what `generate` hands over.

        Args:
            value (`torch.LongTensor` of shape `(batch_size, sequence_length)` at first, then `(batch_size,)`):
                The prompts, of which only the number counts, and then each step's tokens.
        """
        if self.rows is None:
            self.rows = [_Row(self.tokenizer) for _ in range(len(value))]
            return
        for i, (row, index) in enumerate(zip(self.rows, value.tolist())):
            if row.ended:
                continue
            if index in self.eos_token_ids:
                grew = row.end()
            else:
                grew = index not in self.omitted and row.append(index)
            if grew:
                self.on_text(i, row.text)

    def end(self) -> None:
        """Ends the rows that reached the limit of their length."""
        for i, row in enumerate(self.rows or []):
            if not row.ended and row.end():
                self.on_text(i, row.text)
        self.rows = None

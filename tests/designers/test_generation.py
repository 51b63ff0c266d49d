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
"""Answers are read from their tokens, whole and while they grow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2 import Qwen2Tokenizer

from diffusers_dim.designers import Draft
from diffusers_dim.designers.generation import AnswerStreamer, get_eos_token_ids, read_answer


TEXT = "1. Edit Instruction: Grün — 把球涂成红色 🎈👩‍🎨, ça va?\n\n2.  done "


@pytest.fixture(scope="module")
def tokenizer(golden_dir):
    return AutoTokenizer.from_pretrained(golden_dir / "edit" / "qwen")


@pytest.fixture(scope="module")
def thinking_tokenizer(golden_dir):
    """Whose tags of thoughts are special tokens."""
    tags = {"think": "<think>", "no_think": "</think>", "kimi": "◁think▷"}
    return AutoTokenizer.from_pretrained(golden_dir / "edit" / "qwen", extra_special_tokens=tags)


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    """As Llama's: blanks are marks before words, the first of which is no blank, and bytes are tokens of their own."""
    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁ball", "s", "."]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>"
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stream(tokenizer, rows, eos_token_ids):
    """Hands rows of tokens over as `generate` does, and returns the texts told of each."""
    told = [[] for _ in rows]
    streamer = AnswerStreamer(tokenizer, lambda row, text: told[row].append(text), eos_token_ids)
    streamer.put(torch.zeros(len(rows), 5, dtype=torch.long))
    for step in torch.tensor(rows).T:
        streamer.put(step)
    streamer.end()
    return told


def test_the_text_grows_by_whole_characters(tokenizer):
    ids = encode(tokenizer, TEXT)
    (told,) = stream(tokenizer, [ids], [tokenizer.eos_token_id])
    assert len(ids) > len(told) > 20
    assert all(longer.startswith(text) and longer != text for text, longer in zip(told, told[1:]))
    assert told[-1] == TEXT and not any("\ufffd" in text for text in told)


def test_rows_end_at_their_own_end_token(tokenizer):
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    short, long = encode(tokenizer, "A ball."), encode(tokenizer, "A ball lies on the grass.")
    rows = [short + [end], long + [pad]]
    width = max(map(len, rows)) + 2
    told = stream(tokenizer, [row + [short[0]] * (width - len(row)) for row in rows], [end, pad])
    assert [texts[-1] for texts in told] == ["A ball.", "A ball lies on the grass."]


def test_a_row_without_text_is_not_told_of(tokenizer):
    told = stream(
        tokenizer, [[tokenizer.eos_token_id] * 3, encode(tokenizer, " red")[:1] * 3], [tokenizer.eos_token_id]
    )
    assert told[0] == [] and len(told[1]) == 3


def test_blanks_between_words_of_sentencepiece_are_kept(sentencepiece_tokenizer):
    ids = sentencepiece_tokenizer.convert_tokens_to_ids(["▁a", "▁ball", "s", "▁", "▁ball", ".", "<0xC3>", "<0xA9>"])
    (told,) = stream(sentencepiece_tokenizer, [ids], [1])
    assert told == ["a", "a ball", "a balls", "a balls ", "a balls  ball", "a balls  ball.", "a balls  ball.é"]


def test_a_character_that_is_cut_off_is_read_as_the_tokenizer_reads_it(tokenizer):
    ids = encode(tokenizer, "A 🎈")[:-1]
    (told,) = stream(tokenizer, [ids], [])
    assert told[-1] == tokenizer.decode(ids) and told[-1].endswith("\ufffd")


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 614), min_size=12, max_size=12), min_size=1, max_size=3))
def test_the_last_text_is_the_drafts_whatever_the_tokens(tokenizer, rows):
    eos = [tokenizer.eos_token_id, 7]
    for row, texts in zip(rows, stream(tokenizer, rows, eos)):
        assert (texts or [""])[-1] == read_answer(tokenizer, row, eos).text


def test_a_step_decodes_few_tokens_however_long_the_row(golden_dir):
    decoded = []

    class Counting(Qwen2Tokenizer):
        def decode(self, token_ids, **kwargs):
            decoded.append(len(token_ids))
            return super().decode(token_ids, **kwargs)

    tokenizer = Counting.from_pretrained(golden_dir / "edit" / "qwen")
    ids = encode(tokenizer, TEXT * 40)
    (told,) = stream(tokenizer, [ids], [])
    assert told[-1] == TEXT * 40 and len(ids) > 1000
    assert max(decoded[:-1]) < 40 and decoded[-1] == len(ids)


def test_special_tokens_are_left_out_of_the_text(tokenizer):
    marked = "<|im_start|>A <|vision_start|>ball<|endoftext|>"
    assert read_answer(tokenizer, encode(tokenizer, marked), []).text == "A ball"
    assert stream(tokenizer, [encode(tokenizer, marked)], [])[0][-1] == "A ball"


def test_tags_of_thoughts_are_kept_even_if_they_are_special_tokens(thinking_tokenizer):
    assert "<think>" in thinking_tokenizer.all_special_tokens
    marked = "<think>A red one.</think>Red.<|im_end|>◁think▷"
    ids = encode(thinking_tokenizer, marked)
    assert read_answer(thinking_tokenizer, ids, []).text == "<think>A red one.</think>Red.◁think▷"
    assert stream(thinking_tokenizer, [ids], [])[0][-1] == "<think>A red one.</think>Red.◁think▷"


def test_a_draft_ends_at_its_first_end_token(tokenizer):
    ids = encode(tokenizer, "A ball.")
    row = torch.tensor([*ids, tokenizer.eos_token_id, *ids])
    assert read_answer(tokenizer, row, [3, tokenizer.eos_token_id]) == Draft("A ball.", len(ids), finished=True)


def test_a_draft_without_an_end_token_is_not_finished(tokenizer):
    ids = encode(tokenizer, "A ball.")
    assert read_answer(tokenizer, ids, [tokenizer.eos_token_id]) == Draft("A ball.", len(ids), finished=False)


def test_a_streamer_can_be_used_again(tokenizer):
    told = []
    streamer = AnswerStreamer(tokenizer, lambda row, text: told.append((row, text)), [])
    for rows in (1, 2):
        streamer.put(torch.zeros(rows, 4, dtype=torch.long))
        streamer.put(torch.tensor(encode(tokenizer, " red")[:1] * rows))
        streamer.end()
    assert [row for row, _ in told] == [0, 0, 1]


@pytest.mark.parametrize(("given", "expected"), [(7, [7]), ([7, 8], [7, 8]), (None, [593])])
def test_end_tokens_are_the_checkpoints_else_the_tokenizers(golden_dir, tokenizer, given, expected):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(golden_dir / "edit" / "qwen")
    model.generation_config.eos_token_id = given
    assert get_eos_token_ids(model, tokenizer) == expected

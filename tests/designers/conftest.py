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
"""A tiny Qwen2.5-VL that has learned to write one blueprint."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_dim.designers import Blueprint
from diffusers_dim.designers.prompts import DESIGN_PROMPT


@pytest.fixture(scope="session")
def written_blueprint() -> Blueprint:
    """What the model of `writing_vlm` answers."""
    # Each word is a token of its own that no other part has: soon learned.
    return Blueprint(
        "Make the bowl red",
        "The picture shows a table",
        "yellow lamp with white rim",
        "Only brightness changes",
        "blue sky continues",
    )


@pytest.fixture(scope="session")
def writing_vlm(golden_dir, written_blueprint, tmp_path_factory) -> Path:
    """
    A folder with a Qwen2.5-VL of the golden model's width and its processor, which answers conversations of up to some
    1,500 tokens with `written_blueprint`, whatever they are about. Not to be changed.
    """
    qwen = golden_dir / "edit" / "qwen"
    folder = tmp_path_factory.mktemp("vlm") / "writing"
    shutil.copytree(qwen, folder)
    config = AutoConfig.from_pretrained(qwen)
    config.text_config.intermediate_size = 256
    config.text_config.num_key_value_heads = 2
    # Words are told from what stands close before them.
    config.text_config.rope_parameters["rope_theta"] = 1000.0
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    head, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<|im_start|>assistant\n", f"{written_blueprint}<|im_end|>")
    )
    prompt = torch.tensor(tokenizer(DESIGN_PROMPT)["input_ids"] * 2)
    threads = torch.get_num_threads()
    # At this size threads only wait for each other.
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).train()
        _teach(model, head, answer, prompt)
    torch.set_num_threads(threads)
    model.generation_config = GenerationConfig.from_pretrained(qwen)
    model.save_pretrained(folder)
    return folder


def _teach(
    model: Qwen2_5_VLForConditionalGeneration, head: list[int], answer: list[int], prompt: torch.Tensor
) -> None:
    """Trains the language model to write the answer behind the head, whatever tokens and pictures come before."""
    steps = 350
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    written, target = torch.tensor(head + answer[:-1]), torch.tensor(answer)
    for step in range(steps):
        # Short noise first, then 16 to 1,600 tokens: something like a picture, and words or the prompt.
        rows, length = (8, 16) if step < 150 else (2, int(16 * 100 ** float(torch.rand(()))))
        before = torch.randint(model.config.text_config.vocab_size, (rows, length))
        if step % 2:
            before = prompt.roll(int(torch.randint(len(prompt), ())))[None, :length].expand(rows, -1)
        embeds = model.get_input_embeddings()(torch.cat([before, written.expand(rows, -1)], dim=1))
        seen = int(torch.randint(length, ()))
        embeds = torch.cat([torch.randn_like(embeds[:, :seen]) * 0.02, embeds[:, seen:]], dim=1)
        hidden = model.model.language_model(
            inputs_embeds=embeds, position_ids=torch.arange(embeds.shape[1]).expand(3, rows, -1)
        ).last_hidden_state
        logits = model.lm_head(hidden[:, -len(answer) :])
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.repeat(rows), reduction="none")
        optimizer.zero_grad()
        # Most words follow from the one before; the others count.
        losses.topk(len(losses) // 4).values.mean().backward()
        optimizer.step()
        schedule.step()

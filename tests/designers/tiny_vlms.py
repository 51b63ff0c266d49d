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
"""Vision-language models of several families at tiny size, with random weights and the golden case's tokenizer."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2}
OUT_VISION = {**QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 48}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
QWEN_PICTURES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 784, "longest_edge": 50_176},
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56]]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}IMAGE"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<|vision_pad|>{% endif %}"
    "{% endif %}"
)
QWEN_TEMPLATE = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")


class Family(NamedTuple):
    """
    What makes a family.

    Args:
        config (`dict`): Arguments of its config.
        template (`str`): A chat template as its own, but short.
        pictures (`dict`): Its image processor.
        processor (`dict`, *optional*): Its processor config.
        tokens (`dict`, *optional*): Special tokens besides Qwen2.5-VL's, by the names that its processor knows.
        token_ids (`dict`, *optional*): Names of its config's token ids, and the tokens.
    """

    config: dict[str, Any]
    template: str
    pictures: dict[str, Any]
    processor: dict[str, Any] = {}
    tokens: dict[str, str] = {}
    token_ids: dict[str, str] = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}


FAMILIES = {
    "qwen2_vl": Family(
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {**QWEN_VISION, "embed_dim": 32},
        },
        QWEN_TEMPLATE,
        QWEN_PICTURES,
    ),
    # MiMo-VL is of this family, too.
    "qwen2_5_vl": Family(
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {**OUT_VISION, "fullatt_block_indexes": [1], "window_size": 56},
        },
        QWEN_TEMPLATE,
        QWEN_PICTURES,
    ),
    "qwen3_vl": Family(
        {
            "text_config": {**TEXT, "head_dim": 16, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
            "vision_config": {**OUT_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
        QWEN_TEMPLATE,
        {**QWEN_PICTURES, "patch_size": 16},
    ),
    # GLM-4.1V's template prints the model's own turns as they are.
    "glm4v": Family(
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {**OUT_VISION, "image_size": 56},
        },
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}"
        "{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% endif %}",
        {**QWEN_PICTURES, "image_processor_type": "Glm4vImageProcessor"},
        {},
        {
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "image_start": "<|begin_of_image|>",
            "image_end": "<|end_of_image|>",
            "video_start": "<|begin_of_video|>",
            "video_end": "<|end_of_video|>",
        },
        {
            "image_token_id": "<|image|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
            "video_start_token_id": "<|begin_of_video|>",
            "video_end_token_id": "<|end_of_video|>",
        },
    ),
    "internvl": Family(
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
            "image_seq_length": 4,
        },
        CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
        {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 56, "width": 56}, "max_patches": 3},
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_token_id": "<IMG_CONTEXT>"},
    ),
    # Gemma's template writes the token that begins a text.
    "gemma3": Family(
        {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 16,
            },
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": False,
        },
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{% for c in m.content %}{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text | trim }}{% endif %}"
        "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}},
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        {
            "bos_token": "<bos>",
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
    ),
    # LLaVA's templates pick the texts and pictures of a turn, so that a turn has to be a list.
    "llava_onevision": Family(
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": SIGLIP,
            "image_grid_pinpoints": PINPOINTS,
        },
        "{% for m in messages %}<|im_start|>{{ m.role }} "
        "{% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
        "{% for c in m.content | selectattr('type', 'equalto', 'text') %}\n{{ c.text }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 28, "width": 28},
            "image_grid_pinpoints": PINPOINTS,
        },
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
        },
        {"image_token": "<image>", "video_token": "<video>"},
        {"image_token_index": "<image>", "video_token_index": "<video>"},
    ),
}


def save_vlm(family: str, folder: Path, tokenizer: Path, **generation: Any) -> Path:
    """
    Makes a model with random weights and its processor.

    Args:
        family (`str`): One of `FAMILIES`.
        folder (`Path`): Where it goes.
        tokenizer (`Path`): A folder with Qwen2.5-VL's tokenizer.
        generation: Of its generation config, besides the end and padding tokens.
    """
    made = FAMILIES[family]
    words = AutoTokenizer.from_pretrained(tokenizer, extra_special_tokens=made.tokens)
    words.chat_template = made.template
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(made.pictures))
    if made.processor:
        (folder / "processor_config.json").write_text(json.dumps(made.processor))

    end = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = {**made.config, "text_config": {**made.config["text_config"], "vocab_size": len(words), **end}}
    config |= {name: words.convert_tokens_to_ids(token) for name, token in made.token_ids.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **config))
        # Large enough for the answers to depend on the prompts.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    # Without a penalty, random weights repeat a token.
    model.generation_config = GenerationConfig(**{**end, "repetition_penalty": 1.5, **generation})
    model.save_pretrained(folder)
    return folder

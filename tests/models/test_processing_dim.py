import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from diffusers_dim import DIMProcessor


PROMPTS = ["Make it red.", "Remove the small green square that lies to the left of the big blue star."]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def processor(golden_edit) -> DIMProcessor:
    return DIMProcessor.from_pretrained(golden_edit.path / "qwen")


def content(processor: DIMProcessor, inputs, row: int = 0) -> str:
    """The text of the tokens that are the condition."""
    return processor.decode(inputs["input_ids"][row][inputs["condition_mask"][row]])


def test_processor_needs_no_torchvision_and_has_no_video_part(processor):
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert not hasattr(processor, "video_processor")
    if "torchvision" not in sys.modules:
        assert processor.encode("x", [picture(30, 30)])["pixel_values"].isfinite().all()


def test_conversation_is_the_models_template_with_its_system_message(processor):
    inputs = processor.encode(PROMPTS[0])
    assert processor.decode(inputs["input_ids"][0]) == f"{SYSTEM}<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n"


def test_picture_comes_before_the_text(processor):
    inputs = processor.encode(PROMPTS[0], [picture(64, 64)], 64, 64)
    pads = "<|image_pad|>" * 4  # 56 x 56 pixels, 28 x 28 a token
    vision = f"<|vision_start|>{pads}<|vision_end|>"
    assert processor.decode(inputs["input_ids"][0]) == f"{SYSTEM}<|im_start|>user\n{vision}{PROMPTS[0]}<|im_end|>\n"


def test_condition_is_the_user_turns_content(processor):
    inputs = processor.encode(PROMPTS)
    assert [content(processor, inputs, row) for row in range(2)] == PROMPTS


def test_vision_tokens_are_part_of_the_condition(processor):
    inputs = processor.encode(PROMPTS, [picture(64, 64)] * 2, 64, 64)
    vision = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert [content(processor, inputs, row) for row in range(2)] == [vision + prompt for prompt in PROMPTS]


@pytest.mark.parametrize(
    "prompt",
    ["one\ntwo\n\nthree\n", "user\n", "\nuser\nassistant\n", " spaces around ", "im_start user", "你好, 改成蓝色。🙂"],
)
def test_condition_is_found_in_any_text(processor, prompt):
    assert content(processor, processor.encode(prompt)) == prompt


def test_rows_are_padded_on_the_right(processor):
    inputs = processor.encode(PROMPTS)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    assert lengths[0] < lengths[1] == inputs["input_ids"].shape[1]
    assert inputs["attention_mask"][0, : lengths[0]].all() and not inputs["attention_mask"][0, lengths[0] :].any()
    alone = processor.encode(PROMPTS[0])
    assert torch.equal(inputs["input_ids"][0, : lengths[0]], alone["input_ids"][0])
    assert torch.equal(inputs["condition_mask"][0, : lengths[0]], alone["condition_mask"][0])


def test_token_types_mark_the_picture(processor):
    inputs = processor.encode(PROMPTS[0], [picture(64, 64)])
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)


def test_inputs_are_all_that_the_model_takes(processor, golden_edit):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(golden_edit.path / "qwen").eval()
    inputs = processor.encode(PROMPTS, [picture(64, 64), picture(64, 64, seed=1)], 64, 64)
    inputs.pop("condition_mask")
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1024, 1024, (1036, 1036)),
        (512, 512, (504, 504)),
        (64, 64, (56, 56)),
        (832, 1216, (840, 1204)),
        (32, 32, (56, 56)),  # at least 4 tokens
        (64, 12800, (56, 12796)),
    ],
)
def test_picture_is_resized_to_multiples_of_28(processor, height, width, expected):
    resized = processor.resize(picture(20, 30), height, width)
    assert (resized.height, resized.width) == expected


def test_picture_is_resized_whole_with_the_bicubic_filter(processor):
    image = picture(50, 90)
    expected = image.resize((56, 56), Image.Resampling.BICUBIC)
    assert processor.resize(image, 64, 64).tobytes() == expected.tobytes()


def test_most_pixels_bound_the_size(golden_edit, processor):
    bounded = DIMProcessor.from_pretrained(golden_edit.path / "qwen", max_pixels=112 * 112)
    resized = bounded.resize(picture(20, 30), 1024, 1024)
    assert resized.width == resized.height == 112
    assert processor.resize(picture(20, 30), 1024, 1024).width == 1036


def test_pictures_keep_their_own_sizes_by_default(processor):
    inputs = processor.encode(PROMPTS, [picture(56, 84), picture(140, 56)])
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 4], [1, 4, 10]]  # in patches of 14 pixels
    assert inputs["pixel_values"].shape[0] == 6 * 4 + 4 * 10


def test_pictures_of_unequal_sizes_take_the_asked_one(processor):
    inputs = processor.encode(PROMPTS, [picture(56, 84), picture(140, 56)], 64, 96)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 6]]


def test_pixels_are_normalised_patches_of_the_resized_picture(processor):
    image = picture(64, 64)
    inputs = processor.encode(PROMPTS[0], [image], 64, 64)
    expected = processor.image_processor(processor.resize(image, 64, 64), return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_one_text_may_be_a_str(processor):
    assert torch.equal(processor.encode(PROMPTS[0])["input_ids"], processor.encode(PROMPTS[:1])["input_ids"])


@pytest.mark.parametrize("number", [1, 3])
def test_unequal_numbers_of_pictures_and_prompts_raise(processor, number):
    with pytest.raises(ValueError, match=f"Got {number} images for 2 prompts"):
        processor.encode(PROMPTS, [picture(64, 64)] * number)


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"])
def test_special_token_in_a_prompt_raises(processor, token):
    with pytest.raises(ValueError, match="must not hold the tokenizer's special tokens") as error:
        processor.encode(["fine", f"Make it {token} red."])
    assert repr(token) in str(error.value)


def test_saved_processor_is_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = DIMProcessor.from_pretrained(tmp_path)
    images = [picture(64, 64), picture(90, 64, seed=1)]
    expected, actual = processor.encode(PROMPTS, images, 64, 96), loaded.encode(PROMPTS, images, 64, 96)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_processor_does_what_qwens_does(processor):
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]},
        {"role": "user", "content": [{"type": "image", "image": picture(56, 56)}, {"type": "text", "text": "What?"}]},
    ]
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    text = processor.decode(inputs["input_ids"][0])
    assert text.endswith("What?<|im_end|>\n<|im_start|>assistant\n") and "Hello!<|im_end|>" in text

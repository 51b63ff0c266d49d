import pytest
import torch

from diffusers_dim import DIMEditPipeline, DIMPipeline
from diffusers_dim.training import grow_null_condition, load_sana, to_edit_pipeline, widen_patch_embedding


@pytest.fixture
def pipe(t2i_folder):
    return DIMPipeline.from_pretrained(t2i_folder)


def load(sana_folder, golden_t2i, **kwargs):
    return load_sana(sana_folder, golden_t2i.path / "qwen", max_sequence_length=40, **kwargs)


def test_sana_with_a_vision_language_model_paints_text(sana_folder, golden_t2i, pipe):
    started = load(sana_folder, golden_t2i)
    assert isinstance(started, DIMPipeline)
    for name in ("transformer", "vae"):
        expected = getattr(pipe, name).state_dict()
        for key, tensor in getattr(started, name).state_dict().items():
            assert torch.equal(tensor, expected[key]), key
    assert started.connector.null_condition.shape == (40, pipe.transformer.config.caption_channels)
    assert started("a cat", height=64, width=64, num_inference_steps=2).images[0].size == (64, 64)


def test_fresh_weights_follow_from_the_generator(sana_folder, golden_t2i):
    one, same, other = (
        load(sana_folder, golden_t2i, generator=torch.Generator().manual_seed(seed)).connector for seed in (1, 1, 2)
    )
    assert torch.equal(one.linear_1.weight, same.linear_1.weight)
    assert torch.equal(one.null_condition, same.null_condition)
    assert not torch.equal(one.linear_1.weight, other.linear_1.weight)


def test_components_that_are_given_are_not_read(sana_folder, golden_t2i, pipe):
    started = load(sana_folder, golden_t2i, text_encoder=None, processor=None, vae=None, connector=pipe.connector)
    assert started.text_encoder is None and started.vae is None
    assert started.connector is pipe.connector


def test_null_condition_keeps_its_rows_when_it_grows(pipe):
    rows = pipe.connector.config.max_sequence_length
    grown = grow_null_condition(pipe.connector, rows + 5)
    assert grown.config.max_sequence_length == rows + 5
    assert torch.equal(grown.null_condition[:rows], pipe.connector.null_condition)
    assert grown.null_condition[rows:].std() > 0
    assert torch.equal(grown.linear_2.weight, pipe.connector.linear_2.weight)
    assert grow_null_condition(pipe.connector, rows) is pipe.connector


@torch.no_grad()
def test_widened_transformer_paints_what_it_painted_before_whatever_the_source(pipe):
    widened = widen_patch_embedding(pipe.transformer)
    latents, source = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs = {
        "encoder_hidden_states": torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([10, 700]),
        "return_dict": False,
    }
    expected = pipe.transformer(latents, **inputs)[0]
    torch.testing.assert_close(widened(torch.cat([latents, source], dim=1), **inputs)[0], expected)
    with pytest.raises(ValueError, match="8 and 4"):
        widen_patch_embedding(widened)


def test_editor_of_a_painter_edits(pipe, golden_edit):
    editor = to_edit_pipeline(pipe)
    assert isinstance(editor, DIMEditPipeline)
    assert editor.vae is pipe.vae
    assert to_edit_pipeline(editor).transformer is editor.transformer

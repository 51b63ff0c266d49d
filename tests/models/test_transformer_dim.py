import json

import pytest
import torch
from diffusers import FirstBlockCacheConfig, SanaTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file

from diffusers_dim import DIMTransformer2DModel


@pytest.fixture(params=["edit", "t2i"])
def transformer(request) -> DIMTransformer2DModel:
    golden = request.getfixturevalue(f"golden_{request.param}")
    torch.manual_seed(0)
    return DIMTransformer2DModel(**json.loads((golden.path / "transformer_config.json").read_text())).eval()


@torch.no_grad()
def predict(model, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(2, model.config.in_channels, 8, 12, generator=generator)
    encoder_hidden_states = torch.randn(2, 7, 48, generator=generator)
    mask = torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3])
    return model(
        hidden_states.to(dtype),
        encoder_hidden_states.to(dtype),
        timestep=torch.tensor([900, 300]),
        encoder_attention_mask=mask.to(dtype),
        return_dict=False,
    )[0]


def test_output_has_the_latents_channels(transformer):
    assert predict(transformer).shape == (2, 4, 8, 12)


def test_padded_tokens_have_no_effect(transformer):
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(1, transformer.config.in_channels, 8, 8, generator=generator)
    condition = torch.randn(1, 5, 48, generator=generator)
    padded = torch.cat([condition, torch.randn(1, 3, 48, generator=generator)], dim=1)
    mask = torch.tensor([[1.0] * 5 + [0.0] * 3])
    timestep = torch.tensor([500])
    with torch.no_grad():
        expected = transformer(hidden_states, condition, timestep).sample
        output = transformer(hidden_states, padded, timestep, encoder_attention_mask=mask).sample
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_predicts_what_sanas_transformer_does(transformer):
    sana = SanaTransformer2DModel.from_config(transformer.config).eval()
    sana.load_state_dict(transformer.state_dict())
    assert torch.equal(predict(transformer), predict(sana))


def test_saved_transformer_is_loaded_by_sanas(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    assert torch.equal(predict(SanaTransformer2DModel.from_pretrained(tmp_path)), predict(transformer))


def test_sanas_saved_transformer_is_loaded(transformer, tmp_path):
    sana = SanaTransformer2DModel.from_config(transformer.config)
    sana.load_state_dict(transformer.state_dict())
    sana.save_pretrained(tmp_path)
    loaded = DIMTransformer2DModel.from_pretrained(tmp_path)
    assert type(loaded) is DIMTransformer2DModel
    assert torch.equal(predict(loaded), predict(transformer))


def test_folders_of_both_hold_the_same_weights_and_configuration(transformer, tmp_path):
    sana = SanaTransformer2DModel.from_config(transformer.config)
    sana.load_state_dict(transformer.state_dict())
    sana.save_pretrained(tmp_path / "sana")
    transformer.save_pretrained(tmp_path / "dim")
    weights = [load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("sana", "dim")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("sana", "dim")]
    assert [config.pop("_class_name") for config in configs] == ["SanaTransformer2DModel", "DIMTransformer2DModel"]
    assert configs[0] == configs[1]


def test_sharded_transformer_is_loaded(transformer, tmp_path):
    transformer.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(predict(DIMTransformer2DModel.from_pretrained(tmp_path)), predict(transformer))


def test_variant_is_loaded(transformer, tmp_path):
    transformer.save_pretrained(tmp_path, variant="ema")
    assert torch.equal(predict(DIMTransformer2DModel.from_pretrained(tmp_path, variant="ema")), predict(transformer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_transformer_is_loaded_in_another_dtype(transformer, tmp_path, dtype):
    transformer.save_pretrained(tmp_path)
    loaded = DIMTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert all(parameter.dtype == dtype for parameter in loaded.parameters())
    output = predict(loaded, dtype=dtype)
    assert output.dtype == dtype
    assert (output.float() - predict(transformer)).abs().mean() < 0.02


def test_float8_storage_predicts_nearly_the_same(transformer):
    expected = predict(transformer)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert transformer.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert transformer.patch_embed.proj.weight.dtype == torch.float32
    assert (predict(transformer) - expected).abs().mean() < 0.1


def test_group_offloading_changes_nothing(transformer):
    expected = predict(transformer)
    transformer.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(predict(transformer), expected)


def test_fused_projections_predict_the_same(transformer):
    expected = predict(transformer)
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(predict(transformer), expected, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients(transformer):
    def gradients() -> dict[str, torch.Tensor]:
        transformer.zero_grad()
        hidden_states = torch.ones(1, transformer.config.in_channels, 8, 8)
        transformer(hidden_states, torch.ones(1, 3, 48), torch.tensor([500])).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in transformer.named_parameters()}

    expected = gradients()
    transformer.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name])


def test_adapter_is_added_saved_and_loaded(transformer, tmp_path):
    base = predict(transformer)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = predict(transformer)
    assert (adapted - base).abs().max() > 1e-3
    transformer.save_lora_adapter(tmp_path)
    transformer.unload_lora()
    assert torch.equal(predict(transformer), base)
    transformer.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(predict(transformer), adapted)


def test_first_block_cache_skips_the_later_blocks(transformer):
    transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    forwards = []
    transformer.transformer_blocks[1].attn1.register_forward_hook(lambda *_: forwards.append(1))
    with transformer.cache_context("cond"):
        predict(transformer, seed=0)
        cached = predict(transformer, seed=1)
    assert len(forwards) == 1
    transformer.disable_cache()
    assert (cached - predict(transformer, seed=1)).abs().max() > 1e-5


def test_compiled_blocks_predict_the_same(transformer):
    expected = predict(transformer)
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(predict(transformer), expected)


def test_whole_forward_is_one_graph(transformer):
    compiled = torch.compile(transformer, fullgraph=True, backend="eager")
    torch.testing.assert_close(predict(compiled), predict(transformer))

import copy
import json
from collections import Counter

import pytest
import torch
from diffusers import FirstBlockCacheConfig, SanaTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_dim import DIMTransformer2DModel
from diffusers_dim.models.transformer_dim import DIMDenoisingCache


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


def test_configuration_makes_the_same_model_again(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    config = DIMTransformer2DModel.from_pretrained(tmp_path).config
    made = DIMTransformer2DModel.from_config(config)
    assert {name: item.shape for name, item in made.state_dict().items()} == {
        name: item.shape for name, item in transformer.state_dict().items()
    }


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


def denoise(model, cache=None, mask=None, dtype=torch.float32):
    """A few forwards as a denoising loop makes them, with one cache between them or with none."""
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(2, 7, 48, generator=generator).to(dtype)
    outputs = []
    with torch.no_grad():
        for timestep in torch.tensor([900, 500, 300]).split(1):
            latents = torch.randn(2, model.config.in_channels, 8, 12, generator=generator)
            outputs.append(
                model(
                    latents.to(dtype),
                    condition,
                    timestep,
                    encoder_attention_mask=mask,
                    denoising_cache=cache,
                    return_dict=False,
                )[0]
            )
    return torch.stack(outputs)


MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])


@pytest.mark.parametrize("mask", [None, MASK], ids=["unpadded", "padded"])
def test_denoising_cache_changes_nothing(transformer, mask):
    assert torch.equal(denoise(transformer, DIMDenoisingCache(), mask), denoise(transformer, mask=mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_denoising_cache_changes_nothing_in_half_precision(transformer, dtype):
    transformer.to(dtype)
    cached = denoise(transformer, DIMDenoisingCache(), MASK, dtype)
    assert cached.dtype == dtype
    assert torch.equal(cached, denoise(transformer, mask=MASK, dtype=dtype))


def test_denoising_cache_changes_nothing_under_an_adapter_and_fused_projections(transformer):
    transformer.fuse_qkv_projections()
    fused = denoise(transformer, DIMDenoisingCache())
    assert torch.equal(fused, denoise(transformer))
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    adapted = denoise(transformer, DIMDenoisingCache())
    assert torch.equal(adapted, denoise(transformer))
    assert (adapted - fused).abs().max() > 1e-3


def test_timesteps_embedded_at_once_are_those_embedded_one_by_one(transformer):
    timesteps = torch.tensor([900, 500, 300])
    at_once = denoise(transformer, cache=DIMDenoisingCache(timesteps))
    torch.testing.assert_close(at_once, denoise(transformer), atol=1e-6, rtol=0)


def test_condition_and_timesteps_go_through_the_weights_once_a_cache(transformer):
    forwards = Counter()
    counted = {"condition": transformer.caption_projection, "timesteps": transformer.time_embed}
    for index, block in enumerate(transformer.transformer_blocks):
        counted |= {f"keys {index}": block.attn2.to_k, f"values {index}": block.attn2.to_v}
    for name, module in counted.items():
        module.register_forward_hook(lambda *_, name=name: forwards.update([name]))
    denoise(transformer, cache=DIMDenoisingCache(torch.tensor([900, 500, 300])))
    assert forwards == {name: 1 for name in counted}


@pytest.mark.parametrize("mask", [None, MASK], ids=["unpadded", "padded"])
def test_pictures_share_a_condition(transformer, mask):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, transformer.config.in_channels, 8, 12, generator=generator)
    condition = torch.randn(2, 7, 48, generator=generator)
    timestep = torch.tensor([500])
    cache = DIMDenoisingCache()
    with torch.no_grad():
        shared = transformer(
            latents, condition, timestep, encoder_attention_mask=mask, denoising_cache=cache, return_dict=False
        )[0]
        repeated = transformer(
            latents,
            condition.repeat_interleave(3, dim=0),
            timestep.expand(6),
            encoder_attention_mask=None if mask is None else mask.repeat_interleave(3, dim=0),
            return_dict=False,
        )[0]
    torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=0)
    assert {layer.key.shape[0] for layer in cache.layers} == {2}


def test_batch_that_conditions_do_not_divide_is_refused(transformer):
    latents = torch.zeros(3, transformer.config.in_channels, 8, 8)
    with pytest.raises(ValueError, match="batch of 3 has to be a multiple of the number of conditions, which is 2"):
        transformer(latents, torch.zeros(2, 7, 48), torch.tensor([500]))


@pytest.mark.parametrize("timestep", [torch.tensor([500]), torch.tensor([500, 500]), torch.tensor([500, 300] * 2)])
@pytest.mark.parametrize("conditions", [2, 4])
def test_branches_of_guidance_are_what_repeated_latents_give(transformer, timestep, conditions):
    generator = torch.Generator().manual_seed(0)
    pictures = 1 if len(timestep) == 2 else 2
    latents = torch.randn(pictures, transformer.config.in_channels, 8, 8, generator=generator)
    condition = torch.randn(conditions if pictures == 2 else 2, 7, 48, generator=generator)
    with torch.no_grad():
        found = transformer(latents, condition, timestep, guidance_branches=2).sample
        repeated = transformer(latents.repeat(2, 1, 1, 1), condition, timestep).sample
    # Equal with one thread; several divide products of another size otherwise.
    torch.testing.assert_close(found, repeated, atol=2e-6, rtol=0)


def test_second_half_of_a_cache_is_that_of_the_second_conditions(transformer):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, transformer.config.in_channels, 8, 8, generator=generator)
    condition = torch.randn(2, 7, 48, generator=generator)
    timesteps = torch.tensor([500, 300])
    cache = DIMDenoisingCache(timesteps)
    with torch.no_grad():
        transformer(latents, condition, timesteps[:1], denoising_cache=cache)
        half = cache.second_half()
        assert half.is_filled
        assert half.layers[0].key.data_ptr() == cache.layers[0].key[1].data_ptr()
        output = transformer(latents[1:], condition[1:], timesteps[1:], denoising_cache=half).sample
        expected = transformer(latents[1:], condition[1:], timesteps[1:]).sample
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_each_picture_may_have_its_own_timestep_of_those_in_the_cache(transformer):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, transformer.config.in_channels, 8, 8, generator=generator)
    condition = torch.randn(2, 7, 48, generator=generator)
    timestep = torch.tensor([300, 900])
    cache = DIMDenoisingCache(torch.tensor([900, 500, 300]))
    with torch.no_grad():
        output = transformer(latents, condition, timestep, denoising_cache=cache).sample
        torch.testing.assert_close(output, transformer(latents, condition, timestep).sample, atol=1e-6, rtol=0)


def scale_adapter(transformer):
    transformer.set_adapters("default", 0.5)


def write_weights(transformer):
    with torch.no_grad():
        transformer.transformer_blocks[1].attn2.to_v.lora_A["default"].weight.mul_(2)


def write_base_weights(transformer):
    with torch.no_grad():
        transformer.caption_projection.linear_1.weight.add_(1)


def write_past_the_version_counter(transformer):
    # As peft's hot swap does where the model is compiled.
    transformer.transformer_blocks[0].attn2.to_k.lora_B["default"].weight.data.neg_()


def swap_hot(transformer):
    weights = get_peft_model_state_dict(transformer)
    weights = {f"transformer.{key}": torch.randn_like(value) for key, value in weights.items()}
    transformer.load_lora_adapter(weights, adapter_name="default", hotswap=True)


@pytest.mark.parametrize(
    "change",
    [
        scale_adapter,
        write_weights,
        write_base_weights,
        write_past_the_version_counter,
        swap_hot,
        lambda transformer: transformer.disable_adapters(),
        lambda transformer: transformer.fuse_lora(),
        lambda transformer: transformer.delete_adapters("default"),
        lambda transformer: transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "second"),
    ],
)
def test_condition_state_tells_what_changes_the_cache(transformer, change):
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    state = transformer.condition_state()
    assert transformer.condition_state() == state
    change(transformer)
    assert transformer.condition_state() != state


def test_condition_state_counts_the_scale_of_a_call(transformer):
    assert transformer.condition_state({"scale": 0.5}) != transformer.condition_state()
    assert transformer.condition_state({"scale": 1.0}) == transformer.condition_state()


def test_condition_state_stays_where_other_weights_change(transformer):
    state = transformer.condition_state()
    with torch.no_grad():
        transformer.transformer_blocks[0].attn1.to_q.weight.add_(1)
        transformer.proj_out.weight.add_(1)
    assert transformer.condition_state() == state


def test_condition_state_of_inference_tensors_is_never_the_same(transformer):
    with torch.inference_mode():
        transformer = copy.deepcopy(transformer)
        assert transformer.condition_state() != transformer.condition_state()


def test_fused_projections_are_one_layer_and_unfused_again(transformer):
    expected = predict(transformer)
    transformer.fuse_qkv_projections()
    forwards = Counter()
    attn = transformer.transformer_blocks[0].attn1
    for name in ("to_q", "to_qkv"):
        getattr(attn, name).register_forward_hook(lambda *_, name=name: forwards.update([name]))
    predict(transformer)
    assert forwards == {"to_qkv": 1}
    transformer.unfuse_qkv_projections()
    assert torch.equal(predict(transformer), expected)


def test_adapter_that_is_loaded_after_fusing_takes_effect(transformer):
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = copy.deepcopy(transformer)
    plain.add_adapter(config)
    transformer.fuse_qkv_projections()
    torch.manual_seed(0)
    transformer.add_adapter(config)
    transformer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(predict(transformer), predict(plain))


def test_adapters_layers_are_not_fused(transformer):
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_v"]))
    with pytest.raises(ValueError, match="`to_v` is a Linear|`to_v` is a"):
        transformer.fuse_qkv_projections()


@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_cross_attention_takes_diffusers_backends(transformer, backend):
    expected = predict(transformer)
    transformer.set_attention_backend(backend)
    assert {block.attn2.processor._attention_backend.value for block in transformer.transformer_blocks} == {backend}
    torch.testing.assert_close(predict(transformer), expected, atol=1e-5, rtol=0)
    transformer.set_attention_backend("native")  # which is for all models, also those of the next tests
    assert torch.equal(predict(transformer), expected)


@pytest.mark.parametrize(
    ("backend", "padded"),
    [
        ("flash", "flash_varlen"),
        ("flash_hub", "flash_varlen_hub"),
        ("_flash_3", "_flash_varlen_3"),
        ("_flash_3_hub", "_flash_3_varlen_hub"),
        ("sage", "sage_varlen"),
    ],
)
def test_fused_attention_takes_lengths_where_the_batch_is_padded(transformer, monkeypatch, backend, padded):
    # The kernels need a GPU and their packages: native attention in their places tells which one was asked for.
    asked = []

    def stand_in(name):
        def attention(query, key, value, attn_mask=None):
            asked.append((name, attn_mask))
            return _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE](query, key, value, attn_mask)

        return attention

    for name in (backend, padded):
        member = AttentionBackendName(name)
        monkeypatch.setitem(_AttentionBackendRegistry._backends, member, stand_in(name))
        monkeypatch.setitem(
            _AttentionBackendRegistry._supported_arg_names, member, {"query", "key", "value", "attn_mask"}
        )
    for block in transformer.transformer_blocks:
        block.attn2.set_attention_backend(backend)

    denoise(transformer)
    assert {name for name, _ in asked} == {backend}
    assert all(mask is None for _, mask in asked)
    asked.clear()
    output = denoise(transformer, mask=MASK)
    assert {name for name, _ in asked} == {padded}
    assert all(mask.dtype == torch.bool and mask.shape == (2, 1, 1, 7) for _, mask in asked)
    for block in transformer.transformer_blocks:
        block.attn2.set_attention_backend("native")
    torch.testing.assert_close(output, denoise(transformer, mask=MASK), atol=1e-6, rtol=0)


def test_depthwise_adapter_is_not_passed_by(transformer):
    base = predict(transformer)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["conv_inverted", "conv_point"], init_lora_weights=False))
    assert (predict(transformer) - base).abs().max() > 1e-3


def test_residual_stream_is_contiguous(transformer):
    layouts = []
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda module, args: layouts.append(args[0].is_contiguous()))
    predict(transformer)
    assert layouts == [True] * len(transformer.transformer_blocks)


@pytest.mark.parametrize("part", ["blocks", "whole"])
def test_a_call_compiles_two_graphs_and_later_calls_none(transformer, part):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    expected = denoise(transformer)
    if part == "blocks":
        transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        compiled = transformer
    else:
        compiled = torch.compile(transformer, fullgraph=True, backend=counter)
    for _ in range(2):
        found = denoise(compiled, DIMDenoisingCache(torch.tensor([900, 500, 300])))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert counter.frame_count == 2  # one to fill the cache, one to read it


def test_unknown_qk_norm_is_refused():
    with pytest.raises(ValueError, match="`qk_norm` has to be None or 'rms_norm_across_heads', but is 'layer_norm'"):
        DIMTransformer2DModel(num_layers=1, qk_norm="layer_norm", num_attention_heads=1, cross_attention_dim=16)

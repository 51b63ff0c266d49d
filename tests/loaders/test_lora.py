"""LoRA of transformer and connector through a pipeline's calls."""

import copy
import logging

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from diffusers_dim import DIMEditPipeline, DIMPipeline


TARGETS = {"transformer": ["to_q", "to_k", "to_v", "to_out.0"], "connector": ["linear_1", "linear_2"]}
BOTH = tuple(TARGETS)


@pytest.fixture(scope="module")
def base(edit_folder) -> DIMEditPipeline:
    """Not to be changed: see `own`."""
    return DIMEditPipeline.from_pretrained(edit_folder)


@pytest.fixture
def own(base):
    """Copies the pipeline, with other components where they are given."""

    def own(**changes) -> DIMEditPipeline:
        pipe = DIMEditPipeline(**{**copy.deepcopy(base.components), **changes})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return own


@pytest.fixture
def paint(golden_edit):
    source = Image.open(golden_edit.path / "source.png").convert("RGB")

    def paint(pipe: DIMEditPipeline, **inputs) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0}
        call = {**size, "generator": generator, "output_type": "latent", **inputs}
        return pipe(source, "Make it red.", **call).images

    return paint


def add_adapter(pipe: DIMPipeline, components=BOTH, seed: int = 0, name: str = "default", rank: int = 4, **config):
    """Random LoRA layers of twice the rank as alpha, which only metadata can tell."""
    torch.manual_seed(seed)
    for component in components:
        settings = {
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": TARGETS[component],
            "init_lora_weights": False,
        }
        getattr(pipe, component).add_adapter(LoraConfig(**{**settings, **config}), name)
    return pipe


def save(pipe: DIMPipeline, folder, components=BOTH):
    models = {name: getattr(pipe, name) for name in components}
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in models.items()}
    type(pipe).save_lora_weights(folder, **layers, **_collate_lora_metadata(models))
    return folder


@pytest.fixture
def folder(own, tmp_path):
    """Saves a random adapter: `folder(name, components=..., seed=..., rank=..., use_dora=...)`."""

    def folder(name: str, components=BOTH, **settings):
        return save(add_adapter(own(), components, **settings), tmp_path / name, components)

    return folder


def sana_pipeline(transformer) -> SanaPipeline:
    """diffusers' own pipeline around a stock transformer of the same shape."""
    stock = SanaTransformer2DModel.from_config(transformer.config)
    return SanaPipeline(None, None, None, stock, FlowMatchEulerDiscreteScheduler())


# Saving and loading


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("components", [BOTH, ("transformer",), ("connector",)])
def test_saved_adapter_is_restored_bit_for_bit(own, base, paint, tmp_path, components, use_dora):
    trained = add_adapter(own(), components, use_dora=use_dora)
    if use_dora:  # its magnitudes begin as the base's norms, which a loader could make up
        for name, parameter in trained.transformer.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data.mul_(1.5)
    loaded = own()
    loaded.load_lora_weights(save(trained, tmp_path, components))
    assert loaded.get_list_adapters() == {name: ["default_0"] for name in components}
    expected = paint(trained)
    assert torch.equal(paint(loaded), expected)
    assert not torch.allclose(expected, paint(base), atol=1e-3)


def test_one_file_holds_the_keys_and_the_metadata_of_both(own, folder):
    path = folder("adapter", rank=3)
    keys = load_file(path / "pytorch_lora_weights.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"transformer", "connector"}
    assert "connector.linear_1.lora_A.weight" in keys
    _, metadata = own().lora_state_dict(path, return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == metadata["connector.lora_alpha"] == 6


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one of `transformer_lora_layers` and `connector_lora_layers`"):
        DIMEditPipeline.save_lora_weights(tmp_path)


def test_weights_without_metadata_load(own, paint, tmp_path):
    trained = add_adapter(own(), lora_alpha=4)  # the rank: what stands for an alpha that the file does not tell
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(getattr(trained, name)) for name in BOTH}
    DIMEditPipeline.save_lora_weights(tmp_path, **layers)
    loaded = own()
    loaded.load_lora_weights(tmp_path)
    assert torch.equal(paint(loaded), paint(trained))


def test_metadata_of_one_component_do_not_stand_for_the_other(own, paint, tmp_path):
    trained = add_adapter(own(), lora_alpha=4)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(getattr(trained, name)) for name in BOTH}
    metadata = _collate_lora_metadata({"connector": trained.connector})
    DIMEditPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    loaded = own()
    loaded.load_lora_weights(tmp_path)
    assert torch.equal(paint(loaded), paint(trained))


def test_weights_given_as_a_dict_are_not_changed(own, folder):
    weights = load_file(folder("adapter") / "pytorch_lora_weights.safetensors")
    keys = list(weights)
    own().load_lora_weights(weights)
    assert list(weights) == keys


@pytest.mark.parametrize("loaded_before", [False, True])
def test_dropout_of_the_training_is_off(own, folder, paint, loaded_before):
    pipe, plain = own(), own()
    if loaded_before:
        pipe.load_lora_weights(folder("before", seed=1))
    pipe.load_lora_weights(folder("with", lora_dropout=0.5))
    plain.load_lora_weights(folder("without"))
    torch.testing.assert_close(paint(pipe), paint(plain), atol=1e-5, rtol=0)


# Between pipelines


@pytest.mark.parametrize("kept", BOTH)
def test_pipeline_that_lacks_a_component_takes_its_own_part(own, folder, caplog, kept):
    missing = next(name for name in BOTH if name != kept)
    pipe = own(**{missing: None})
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(folder("adapter"))
    assert pipe.get_list_adapters() == {kept: ["default_0"]}
    assert f"weights for the {missing}, which this pipeline lacks" in caplog.text


@pytest.mark.parametrize("connector", [True, False])
def test_lora_of_sanas_pipeline_loads_without_a_warning(own, tmp_path, caplog, connector):
    sana = sana_pipeline(own().transformer)
    sana.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(sana.transformer)
    SanaPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    pipe = own() if connector else own(connector=None)
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(tmp_path)
    assert caplog.text == ""
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
    assert loaded.keys() == layers.keys()
    assert all(torch.equal(loaded[key], layers[key]) for key in layers)


def test_sanas_pipeline_reads_the_transformers_part_and_passes_over_the_connectors(own, folder):
    path = folder("adapter")
    sana = sana_pipeline(own().transformer)
    sana.load_lora_weights(path)
    assert sana.get_list_adapters() == {"transformer": ["default_0"]}
    loaded = get_peft_model_state_dict(sana.transformer, adapter_name="default_0")
    weights = load_file(path / "pytorch_lora_weights.safetensors")
    assert loaded.keys() == {key.removeprefix("transformer.") for key in weights if key.startswith("transformer.")}
    assert all(torch.equal(tensor, weights[f"transformer.{key}"]) for key, tensor in loaded.items())


# Bad input


def test_names_without_lora_are_refused(own):
    with pytest.raises(ValueError, match=r"contain 'lora', but \['transformer.proj_out.weight'\] do not"):
        own().load_lora_weights({"transformer.proj_out.weight": torch.zeros(1)})


def test_names_without_a_components_prefix_load_nothing_and_say_so(own, caplog):
    pipe = own()
    pipe.load_lora_weights({"linear_1.lora_A.weight": torch.zeros(1)})
    assert pipe.get_list_adapters() == {}
    assert (
        "begin with one of ['transformer', 'connector'] and a dot, but are ['linear_1.lora_A.weight']" in caplog.text
    )


@pytest.mark.parametrize("used_by", BOTH)
def test_name_in_use_is_refused_before_anything_is_loaded(own, folder, used_by):
    pipe = add_adapter(own(), (used_by,), name="style")
    with pytest.raises(ValueError, match=f"'style' is in use by .*{used_by}"):
        pipe.load_lora_weights(folder("adapter"), adapter_name="style")
    assert pipe.get_list_adapters() == {used_by: ["style"]}


@pytest.mark.parametrize("loaded_before", [False, True])
def test_failed_load_leaves_no_part_behind(own, folder, paint, loaded_before):
    pipe = add_adapter(own(), ("transformer",), name="style") if loaded_before else own()
    before, adapters = paint(pipe), pipe.get_list_adapters()
    weights = load_file(folder("adapter", seed=1) / "pytorch_lora_weights.safetensors")
    weights["connector.linear_1.lora_A.weight"] = torch.zeros(4, 7)
    with pytest.raises(RuntimeError, match="size mismatch for linear_1"):
        pipe.load_lora_weights(weights)
    assert pipe.get_list_adapters() == adapters
    assert torch.equal(paint(pipe), before)


# Several adapters


def test_loaded_adapter_is_the_only_active_one_in_both(own, folder, paint):
    pipe, alone = own(), own()
    pipe.load_lora_weights(folder("both", seed=1), adapter_name="both")
    pipe.load_lora_weights(folder("style", ("transformer",), seed=2), adapter_name="style")
    alone.load_lora_weights(folder("style", ("transformer",), seed=2))
    assert pipe.get_list_adapters() == {"transformer": ["both", "style"], "connector": ["both"]}
    assert pipe.get_active_adapters() == ["style"]
    torch.testing.assert_close(paint(pipe), paint(alone), atol=1e-5, rtol=0)


def test_adapters_without_names_get_the_same_one_in_both(own, folder):
    pipe = own()
    pipe.load_lora_weights(folder("style", ("transformer",)))
    pipe.load_lora_weights(folder("both"))
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "default_1"], "connector": ["default_1"]}


def test_weights_are_set_by_component(own, folder, paint):
    pipe, painter = own(), own()
    path = folder("adapter")
    pipe.load_lora_weights(path, adapter_name="one")
    pipe.set_adapters("one", {"transformer": 0.5, "connector": 0.0})
    painter.load_lora_weights({name: w for name, w in own().lora_state_dict(path).items() if "transformer." in name})
    painter.set_adapters("default_0", 2 * 0.5)  # weights alone do not tell that alpha is twice the rank
    torch.testing.assert_close(paint(pipe), paint(painter), atol=1e-5, rtol=0)


def test_scale_of_a_call_scales_both_components(own, folder, paint):
    scaled, weighted = own(), own()
    for pipe in (scaled, weighted):
        pipe.load_lora_weights(folder("adapter"))
    weighted.set_adapters("default_0", 0.5)
    call = {"negative_prompt": "dark"}
    images = paint(scaled, attention_kwargs={"scale": 0.5}, **call)
    torch.testing.assert_close(images, paint(weighted, **call), atol=1e-5, rtol=0)
    assert scaled.connector.linear_1.scaling == {"default_0": 2.0}


@pytest.mark.parametrize("use_dora", [False, True])
def test_fused_adapter_paints_as_before_and_is_taken_out_again(own, folder, paint, use_dora):
    pipe = own()
    pipe.load_lora_weights(folder("adapter", use_dora=use_dora))
    expected = paint(pipe)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    assert pipe.connector.linear_1.merged
    torch.testing.assert_close(paint(pipe), expected, atol=1e-3, rtol=0)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    assert not pipe.connector.linear_1.merged
    torch.testing.assert_close(paint(pipe), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "remove",
    [
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.delete_adapters("one"),
        lambda pipe: pipe.unload_lora_weights(),
        lambda pipe: pipe.set_adapters("one", 0.0),
    ],
    ids=["disabled", "deleted", "unloaded", "weighted by zero"],
)
@pytest.mark.parametrize("components", [BOTH, ("transformer",)])
def test_removed_adapter_leaves_the_base(own, base, folder, paint, remove, components):
    pipe = own()
    pipe.load_lora_weights(folder("adapter", components), adapter_name="one")
    remove(pipe)
    torch.testing.assert_close(paint(pipe), paint(base), atol=1e-6, rtol=0)


def test_disabled_adapter_is_enabled_again(own, folder, paint):
    pipe = own()
    pipe.load_lora_weights(folder("adapter"))
    expected = paint(pipe)
    pipe.disable_lora()
    pipe.enable_lora()
    assert torch.equal(paint(pipe), expected)


# Hot swap


@pytest.mark.parametrize("rank", [4, 2])
def test_hotswapped_adapter_equals_one_loaded(own, folder, paint, rank):
    pipe, expected = own(), own()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(folder("first", seed=1), adapter_name="one")
    pipe.load_lora_weights(folder("second", seed=2, rank=rank), adapter_name="one", hotswap=True)
    expected.load_lora_weights(folder("second", seed=2, rank=rank))
    torch.testing.assert_close(paint(pipe), paint(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("second", [("transformer",), ("connector",)])
def test_hotswap_of_other_components_is_refused_before_it_begins(own, folder, paint, second):
    pipe = own()
    pipe.load_lora_weights(folder("first", seed=1), adapter_name="one")
    before = paint(pipe)
    with pytest.raises(ValueError, match=rf"an adapter 'one' of \['{second[0]}'\].*by \['transformer', 'connector'\]"):
        pipe.load_lora_weights(folder("second", second, seed=2), adapter_name="one", hotswap=True)
    assert torch.equal(paint(pipe), before)


def test_hotswap_of_an_unknown_adapter_is_refused(own, folder):
    with pytest.raises(ValueError, match=r"`hotswap` needs an adapter 'one'.*in use by \[\]"):
        own().load_lora_weights(folder("adapter"), adapter_name="one", hotswap=True)


# Offloading


def test_adapter_loads_into_a_pipeline_offloaded_by_groups(own, folder, paint):
    expected, pipe = own(), own()
    path = folder("adapter")
    expected.load_lora_weights(path)
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    pipe.load_lora_weights(path)
    torch.testing.assert_close(paint(pipe), paint(expected), atol=1e-5, rtol=0)

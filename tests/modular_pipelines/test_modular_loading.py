"""Blocks load from converted folders and from those that they save."""

import json

import torch
from diffusers import ComponentsManager, ComponentSpec
from diffusers.guiders import AdaptiveProjectedGuidance
from modular_pairs import Pair
from peft import LoraConfig, get_peft_model_state_dict

from diffusers_dim import DIMBlocks, DIMEditBlocks, DIMEditModularPipeline, DIMEditPipeline, DIMModularPipeline


INPUTS = {"prompt": "Make the red circle blue.", "height": 32, "width": 32, "num_inference_steps": 2}


def paint(pipe, source, **inputs):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(image=source, generator=generator, output_type="latent", output="images", **{**INPUTS, **inputs})


def load(pipe):
    pipe.load_components(dtype=torch.float32)
    return pipe


def test_from_pretrained_reads_a_converted_folder(edit_folder, edit, source):
    pipe = load(DIMEditModularPipeline.from_pretrained(edit_folder))
    assert isinstance(pipe.blocks, DIMEditBlocks)
    assert torch.equal(paint(pipe, source), edit.call_pipe(image=source, **INPUTS))


def test_text_to_image_pipeline_has_its_own_blocks(t2i_folder):
    pipe = load(DIMModularPipeline.from_pretrained(t2i_folder))
    assert isinstance(pipe.blocks, DIMBlocks)
    assert all(part is not None for part in pipe.components.values())


def test_saved_folder_loads_and_paints_the_same(edit_folder, source, tmp_path):
    pipe = load(DIMEditBlocks().init_pipeline(edit_folder))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert index["_class_name"] == "DIMEditModularPipeline"
    assert index["default_guidance_scale"] == pipe.config.default_guidance_scale
    assert index["transformer"][2]["pretrained_model_name_or_path"] == str(tmp_path)
    again = load(DIMEditModularPipeline.from_pretrained(tmp_path))
    assert torch.equal(paint(again, source), paint(pipe, source))


def test_folder_of_a_pipeline_that_was_saved_with_code_runs_none_of_it(edit_folder, source, tmp_path):
    DIMEditPipeline.from_pretrained(edit_folder).save_pretrained(tmp_path)
    pipe = load(DIMEditBlocks().init_pipeline(tmp_path))
    assert type(pipe.transformer).__module__ == "diffusers_dim.models.transformer_dim"


def test_designer_that_a_folder_names_comes_along_and_only_warns(edit_folder, tmp_path):
    pipe = DIMEditPipeline.from_pretrained(edit_folder)
    pipe.designer = "self"
    pipe.save_pretrained(tmp_path / "standard")
    modular = load(DIMEditBlocks().init_pipeline(tmp_path / "standard"))
    assert modular.designer.pipe is modular and modular.designer.on_failure == "instruction"
    modular.save_pretrained(tmp_path / "modular")
    assert DIMEditModularPipeline.from_pretrained(tmp_path / "modular").designer.name == "self"
    modular.designer = None
    modular.save_pretrained(tmp_path / "without")
    assert DIMEditModularPipeline.from_pretrained(tmp_path / "without").designer is None


def test_guider_that_was_saved_is_loaded_again(edit_folder, tmp_path):
    pipe = load(DIMEditBlocks().init_pipeline(edit_folder))
    AdaptiveProjectedGuidance(5.0).save_pretrained(tmp_path / "guiders" / "projected")
    folder = str(tmp_path / "guiders")
    spec = ComponentSpec(
        "guider", AdaptiveProjectedGuidance, pretrained_model_name_or_path=folder, subfolder="projected"
    )
    pipe.update_components(guider=spec.load())
    pipe.save_pretrained(tmp_path / "model")
    again = load(DIMEditModularPipeline.from_pretrained(tmp_path / "model"))
    assert isinstance(again.guider, AdaptiveProjectedGuidance) and again.guider.guidance_scale == 5.0


def test_lora_is_loaded_as_by_the_pipeline(edit_folder, source, tmp_path):
    pipe = DIMEditPipeline.from_pretrained(edit_folder)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    layers = get_peft_model_state_dict(pipe.transformer)
    DIMEditPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    modular = load(DIMEditBlocks().init_pipeline(edit_folder))
    plain = paint(modular, source)
    modular.load_lora_weights(tmp_path)
    painted = paint(modular, source)
    assert torch.equal(painted, Pair(pipe, modular).call_pipe(image=source, **INPUTS))
    assert not torch.equal(painted, plain)
    modular.unload_lora_weights()
    assert torch.equal(paint(modular, source), plain)


def test_components_manager_lends_one_set_of_models_to_several_pipelines(edit_folder, edit, source):
    manager = ComponentsManager()
    first = load(DIMEditBlocks().init_pipeline(edit_folder, components_manager=manager, collection="dim"))
    second = DIMEditBlocks().init_pipeline(edit_folder, components_manager=manager)
    names = second.pretrained_component_names
    second.update_components(**manager.get_components_by_names(names))
    assert all(getattr(second, name) is getattr(first, name) for name in names)
    assert torch.equal(paint(second, source), edit.call_pipe(image=source, **INPUTS))

"""The node pack keeps ComfyUI's contract, and its workflows paint what the pipelines paint."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_graph import Graph, InvalidWorkflow, load_pack, to_api
from PIL import Image

from diffusers_dim import TINY_SHAPES, DIMEditPipeline, DIMPipeline, __version__
from diffusers_dim.tiny import sample_edits


PACK = Path(__file__).parents[2] / "comfyui"
WORKFLOWS = PACK / "example_workflows"
NAMES = ["edit", "design_and_edit", "generate"]
SAMPLE = sample_edits(1, seed=1)[0]


@pytest.fixture(scope="module")
def pack():
    return load_pack(PACK)


@pytest.fixture(scope="module")
def nodes(pack):
    return pack.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def graph(nodes, tmp_path_factory):
    """With the example's picture in its folder; the model is loaded once."""
    folder = tmp_path_factory.mktemp("comfy")
    shutil.copy(WORKFLOWS / "shapes.png", folder)
    return Graph(nodes, folder)


@pytest.fixture(scope="module")
def pipe():
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def edit_workflow():
    workflow = json.loads((WORKFLOWS / "edit_api.json").read_text())
    workflow["4"]["inputs"] |= {"steps": 4, "candidates": 1}
    return workflow


@pytest.fixture
def settings():
    return {"steps": 3, "guidance": 0.0, "seed": 5, "width": 0, "height": 0, "candidates": 1}


def to_comfy(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0) for image in images])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_nodes_keep_the_contract(pack, nodes):
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes)
    for node in nodes.values():
        types = node.INPUT_TYPES()
        assert set(types) <= {"required", "optional", "hidden"}
        for kind, *rest in [*types["required"].values(), *types.get("optional", {}).values()]:
            assert isinstance(kind, (str, list)) and all(isinstance(extra, dict) for extra in rest)
        assert isinstance(node.RETURN_TYPES, tuple) and len(node.RETURN_NAMES) == len(node.RETURN_TYPES)
        assert callable(getattr(node, node.FUNCTION)) and node.CATEGORY
        assert json.loads(json.dumps(types)) == json.loads(json.dumps(node.INPUT_TYPES()))


def test_pack_adds_nothing_to_comfyui_s_start():
    heavy = {"torch", "diffusers", "transformers", "diffusers_dim"}
    code = f"import sys; import comfyui; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=PACK.parent, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_metadata_of_comfy_s_registry():
    project = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert project["project"]["name"] == "diffusers-dim"
    assert project["project"]["dependencies"] == (PACK / "requirements.txt").read_text().split()
    assert project["tool"]["comfy"]["DisplayName"]
    assert project["project"]["version"] == __version__


@pytest.mark.parametrize("name", NAMES)
def test_example_workflows_are_valid_in_both_formats(nodes, tmp_path, name):
    api = json.loads((WORKFLOWS / f"{name}_api.json").read_text())
    for node in api.values():
        if node["class_type"] == "LoadImage":
            SAMPLE.source.save(tmp_path / node["inputs"]["image"])
    graph = Graph(nodes, tmp_path)
    assert [problem for node_id in api for problem in graph.check(copy.deepcopy(api), node_id)] == []
    assert to_api(json.loads((WORKFLOWS / f"{name}.json").read_text()), graph.nodes) == api


def test_example_workflow_paints_what_the_pipeline_paints(graph, pipe, edit_workflow):
    edit_workflow["4"]["inputs"]["candidates"] = 2
    shown = graph.run(edit_workflow)
    source = Image.open(WORKFLOWS / "shapes.png")
    instruction = edit_workflow["4"]["inputs"]["instruction"]
    inputs = {"num_inference_steps": 4, "num_images_per_prompt": 2, "generator": generators(1, 2)}
    expected = pipe(source, instruction, output_type="np", **inputs).images
    for path, picture in zip(shown["5"], expected, strict=True):
        assert (np.asarray(Image.open(path)) == (picture * 255).astype(np.uint8)).all()
    assert shown["6"] == ""  # nobody designed


def test_only_what_changed_runs_again(graph, edit_workflow):
    graph.run(edit_workflow)
    graph.run(edit_workflow)
    assert graph.executed == []
    edit_workflow["4"]["inputs"]["seed"] += 1
    graph.run(edit_workflow)
    assert graph.executed == ["4", "5", "6"]


def test_model_that_was_written_anew_is_another_one(nodes, tmp_path):
    load = nodes["DIMLoadEdit"]
    shutil.copy(Path(TINY_SHAPES) / "model_index.json", tmp_path)
    before = load.IS_CHANGED(model=str(tmp_path), dtype="auto")
    assert load.IS_CHANGED(model=str(tmp_path), dtype="auto") == before
    os.utime(tmp_path / "model_index.json", ns=(1, 1))
    assert load.IS_CHANGED(model=str(tmp_path), dtype="auto") != before
    assert load.IS_CHANGED(model="tiny-shapes") == ""


BAD_WORKFLOWS = {
    "a picture for a model": (("4", "model", ["2", 0]), "4.model: takes DIM_EDIT_MODEL, but is given IMAGE"),
    "a text for a wire": (("4", "blueprint", "blue"), "4.blueprint: takes a wire of STRING"),
    "no steps": (("4", "steps", 0), "4.steps: 0 is out of bounds"),
    "an unknown designer": (("3", "kind", "gpt"), r"3.kind: 'gpt' is not in \['self', 'openai', 'none'\]"),
}


@pytest.mark.parametrize(("change", "message"), BAD_WORKFLOWS.values(), ids=BAD_WORKFLOWS)
def test_types_keep_bad_workflows_out(graph, edit_workflow, change, message):
    node_id, name, value = change
    edit_workflow[node_id]["inputs"][name] = value
    with pytest.raises(InvalidWorkflow, match=message):
        graph.run(edit_workflow)


def test_batch_of_pictures_by_blueprint_and_negative_prompt(nodes, pipe, settings):
    images = [sample.source for sample in sample_edits(2, seed=3)]
    found, blueprint = nodes["DIMEdit"]().edit(
        pipe,
        to_comfy(*images),
        "Turn it blue.",
        blueprint=SAMPLE.blueprint,
        negative_prompt="a red circle",
        **{**settings, "candidates": 2, "guidance": 3.0},
    )
    expected = pipe(
        images,
        "Turn it blue.",
        blueprint=SAMPLE.blueprint,
        negative_prompt="a red circle",
        guidance_scale=3.0,
        num_inference_steps=3,
        num_images_per_prompt=2,
        generator=generators(5, 6, 7, 8),
        output_type="pt",
    ).images
    assert torch.equal(found, expected.movedim(1, -1))
    assert blueprint.startswith("Picture 1:\n") and "Picture 2:\n" in blueprint


def test_size_is_what_was_asked_for(nodes, pipe, settings):
    found, _ = nodes["DIMEdit"]().edit(pipe, to_comfy(SAMPLE.source), "x", **{**settings, "width": 64, "height": 32})
    assert found.shape == (1, 32, 64, 3)
    assert found.dtype == torch.float32 and 0 <= found.min() and found.max() <= 1


def test_values_beyond_a_picture_s_are_cut_off(nodes, pipe, settings):
    image = to_comfy(SAMPLE.source)
    found, _ = nodes["DIMEdit"]().edit(pipe, image * 1.2 - 0.05, "x", **settings)
    expected, _ = nodes["DIMEdit"]().edit(pipe, (image * 1.2 - 0.05).clamp(0, 1), "x", **settings)
    assert torch.equal(found, expected)


def test_text_to_image(nodes, t2i_folder, settings):
    model = nodes["DIMLoadText2Image"]().load(str(t2i_folder), "float32", "cpu", "none", True)[0]
    found, prompt = nodes["DIMGenerate"]().generate(model, "A blue circle.", **{**settings, "width": 32, "height": 32})
    expected = DIMPipeline.from_pretrained(t2i_folder)(
        "A blue circle.", width=32, height=32, num_inference_steps=3, generator=generators(5), output_type="pt"
    ).images
    torch.testing.assert_close(found, expected.movedim(1, -1), atol=1e-5, rtol=0)
    assert prompt == "A blue circle."


def choose(nodes, **settings):
    defaults = {"kind": "self", "max_new_tokens": 8, "on_failure": "instruction"}
    return nodes["DIMDesigner"]().choose(**{**defaults, **settings})[0]


def test_designer_is_lent_for_one_call(nodes, pipe, settings, caplog):
    found, blueprint = nodes["DIMEdit"]().edit(
        pipe, to_comfy(SAMPLE.source), "Turn it blue.", designer=choose(nodes), **settings
    )
    assert blueprint == "Turn it blue."  # the embedded model writes no blueprints
    assert "The plain instruction is used" in caplog.text
    assert pipe.designer is None
    with pytest.raises(ValueError, match="nothing usable for 'Turn it blue.'"):
        nodes["DIMDesign"]().design(
            pipe, to_comfy(SAMPLE.source), "Turn it blue.", designer=choose(nodes, on_failure="error")
        )
    assert pipe.designer is None


def test_design_by_a_server_is_what_an_edit_is_painted_from(nodes, pipe, settings, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "designers")
    from chat_server import blueprint_for, serve

    monkeypatch.setenv("OPENAI_API_KEY", "a key of no one")
    with serve() as server:
        designer = choose(nodes, kind="openai", model="any", base_url=server.url, max_new_tokens=256)
        blueprint = nodes["DIMDesign"]().design(pipe, to_comfy(SAMPLE.source), SAMPLE.instruction, designer)[0]
    assert blueprint == blueprint_for(SAMPLE.instruction)
    found, _ = nodes["DIMEdit"]().edit(pipe, to_comfy(SAMPLE.source), "", blueprint=blueprint, **settings)
    expected = pipe(
        SAMPLE.source, blueprint=blueprint, num_inference_steps=3, generator=generators(5), output_type="pt"
    ).images
    assert torch.equal(found, expected.movedim(1, -1))


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


def test_progress_is_told_and_a_press_of_the_button_ends_the_call(pack, nodes, pipe, settings, monkeypatch):
    told = []

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            told.append((value, self.total))

    class Comfy:
        pressed = False
        utils = type("utils", (), {"ProgressBar": ProgressBar})

        def throw_exception_if_processing_interrupted(self):
            if self.pressed:
                raise Interrupted

    comfy, module = Comfy(), sys.modules[f"{pack.__name__}.dim_nodes"]
    monkeypatch.setattr(module, "model_management", comfy)
    monkeypatch.setattr(module, "comfy_utils", Comfy.utils)
    nodes["DIMEdit"]().edit(pipe, to_comfy(SAMPLE.source), "x", **settings)
    assert told == [(1, 3), (2, 3), (3, 3)]
    comfy.pressed = True
    with pytest.raises(Interrupted):
        nodes["DIMEdit"]().edit(pipe, to_comfy(SAMPLE.source), "x", **settings)
    with pytest.raises(Interrupted):
        nodes["DIMDesign"]().design(pipe, to_comfy(SAMPLE.source), "x", choose(nodes))
    assert len(told) == 3


BAD_CALLS = {
    "no words": ("DIMEdit", {"instruction": " "}, "`instruction` is empty: say what to do, or connect a `blueprint`"),
    "no words to design": ("DIMDesign", {"instruction": ""}, "`instruction` is empty"),
    "nobody to design": ("DIMDesign", {}, "Nobody designs: connect a DIM Designer"),
    "two pictures to design": (
        "DIMDesign",
        {"image": torch.zeros(2, 8, 8, 3)},
        "batch of 2 pictures: a blueprint",
    ),
    "a mask": (
        "DIMEdit",
        {"image": torch.zeros(1, 8, 8)},
        r"`image` has to be pictures.*is of \(1, 8, 8\)",
    ),
    "one side": ("DIMEdit", {"width": 64}, "Give both `height` and `width` or neither"),
    "an odd size": ("DIMEdit", {"width": 33, "height": 33}, "positive multiples of 8, but are 33 and 33"),
    "nothing to paint": ("DIMGenerate", {"prompt": ""}, "`prompt` is empty: say what to paint"),
}


@pytest.mark.parametrize(("name", "inputs", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_said_in_words(nodes, pipe, settings, name, inputs, message):
    node = nodes[name]
    known = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES()["optional"]}
    defaults = {"model": pipe, "image": to_comfy(SAMPLE.source), "instruction": "x", "prompt": "x", **settings}
    given = {key: value for key, value in {**defaults, **inputs}.items() if key in known}
    with pytest.raises(ValueError, match=message):
        getattr(node(), node.FUNCTION)(**given)


def test_bad_model_and_device_are_said_in_words(nodes, t2i_folder, tmp_path):
    load = nodes["DIMLoadEdit"]()
    with pytest.raises(ValueError, match=f"^model {tmp_path}: holds no model_index.json"):
        load.load(str(tmp_path), "auto", "cpu", "none", False)
    with pytest.raises(ValueError, match="has to be a DIMEditPipeline, but is a DIMPipeline"):
        load.load(str(t2i_folder), "auto", "cpu", "none", False)
    with pytest.raises(ValueError, match="^device abc: is no device"):
        load.load("tiny-shapes", "auto", "abc", "none", False)
    with pytest.raises(ValueError, match="^offload model: needs an accelerator"):
        load.load("tiny-shapes", "auto", "cpu", "model", False)
    with pytest.raises(ValueError, match="`model` is empty"):
        choose(nodes, kind="openai", model=" ")

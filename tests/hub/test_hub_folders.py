"""Folders and repositories load with this package, trusting nothing, and without it."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from hub_cases import REPO_ID, paint_edit
from hub_server import use_hub

from diffusers_dim import TINY_SHAPES, DIMConnector, DIMEditPipeline, DIMPipeline, DIMProcessor, DIMTransformer2DModel
from diffusers_dim.hub.code import COMPONENTS, get_code_path, read_index, save_code


CODE = ["pipeline.py", *map(get_code_path, COMPONENTS)]
POISON = "\nraise RuntimeError('code of the folder was run')\n"


@pytest.fixture
def hub(repository, monkeypatch, tmp_path):
    """This program's Hub is the one with the pushed model, and nothing of it is here yet."""
    use_hub(monkeypatch, repository["url"])
    return {"cache_dir": tmp_path / "cache"}


def load(*arguments, **options):
    pipe = DIMEditPipeline.from_pretrained(*arguments, dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# With this package


def test_folder_holds_code_beside_the_weights(saved):
    index = read_index(saved / "edit")
    assert index["_class_name"] == ["pipeline", "DIMEditPipeline"]
    assert index["connector"] == ["connector_dim", "DIMConnector"]
    assert index["transformer"] == ["transformer_dim", "DIMTransformer2DModel"]
    assert index["processor"] == ["processing_dim", "DIMProcessor"]
    assert all((saved / "edit" / path).is_file() for path in CODE)
    assert not list((saved / "edit").rglob("*.bin"))


def test_package_loads_the_folder_by_its_own_classes(saved, edit, edit_picture):
    pipe = load(saved / "edit")
    assert type(pipe) is DIMEditPipeline
    assert type(pipe.connector) is DIMConnector and type(pipe.transformer) is DIMTransformer2DModel
    assert type(pipe.processor) is DIMProcessor
    assert np.array_equal(paint_edit(pipe, edit), edit_picture)


def test_package_runs_nothing_of_the_folder(saved, tmp_path, edit, edit_picture, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(saved / "edit", tmp_path / "edit")
    for path in CODE:
        with open(tmp_path / "edit" / path, "a") as file:
            file.write(POISON)
    assert np.array_equal(paint_edit(load(tmp_path / "edit"), edit), edit_picture)
    with pytest.raises(RuntimeError, match="code of the folder was run"):  # it would have shown
        DiffusionPipeline.from_pretrained(tmp_path / "edit", trust_remote_code=True)


def test_saving_what_was_loaded_from_such_a_folder_gives_the_same(saved, tmp_path):
    load(saved / "edit").save_pretrained(tmp_path)
    first, second = read_index(saved / "edit"), read_index(tmp_path)
    assert {**first, "_name_or_path": None} == {**second, "_name_or_path": None}


def test_folder_without_code_loads_too(tiny_pipe, tmp_path, edit, edit_picture):
    tiny_pipe.save_pretrained(tmp_path, self_contained=False)
    assert not list(tmp_path.rglob("*.py"))
    assert read_index(tmp_path)["_class_name"] == "DIMEditPipeline"
    assert np.array_equal(paint_edit(load(tmp_path), edit), edit_picture)


def test_absent_components_need_no_code(t2i_folder, tmp_path):
    painter = DIMPipeline.from_pretrained(t2i_folder, text_encoder=None, processor=None, connector=None)
    painter.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.py")) == ["pipeline.py", "transformer_dim.py"]
    assert DIMPipeline.from_pretrained(tmp_path).connector is None


def test_class_of_ones_own_is_saved_as_it_is(tiny_pipe, tmp_path):
    class MyPipeline(DIMEditPipeline):
        pass

    MyPipeline(**tiny_pipe.components).save_pretrained(tmp_path)
    assert read_index(tmp_path)["_class_name"] == "MyPipeline" and not (tmp_path / "pipeline.py").exists()


def test_code_is_for_pipelines_of_this_package(sana_folder, tmp_path):
    with pytest.raises(ValueError, match=r"has to hold one of .*, but holds a SanaPipeline"):
        save_code(sana_folder)
    with pytest.raises(ValueError, match=r"holds no model_index.json"):
        save_code(tmp_path)


def test_designer_is_kept(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "designer": "self"}))
    pipe = load(tmp_path)
    pipe.save_pretrained(tmp_path / "again")
    assert read_index(tmp_path / "again")["designer"] == "self"


def test_package_loads_the_repository_trusting_nothing(hub, edit, edit_picture):
    pipe = load(REPO_ID, **hub)
    assert type(pipe.transformer) is DIMTransformer2DModel
    assert np.array_equal(paint_edit(pipe, edit), edit_picture)


def test_package_loads_a_repository_that_has_no_code(repository, hub, monkeypatch):
    plain = {name: content for name, content in repository["files"].items() if not name.endswith(".py")}
    with open(f"{TINY_SHAPES}/model_index.json", "rb") as file:
        plain["model_index.json"] = file.read()
    kept = dict(repository["files"])
    try:
        repository["files"].clear()
        repository["files"].update(plain)
        assert type(load(REPO_ID, **hub)) is DIMEditPipeline
    finally:
        repository["files"].clear()
        repository["files"].update(kept)


# Without it


def test_package_is_not_there_elsewhere(elsewhere):
    assert not elsewhere["installed"]


def test_every_way_to_name_the_code_leads_to_the_pipeline(elsewhere):
    ways = ("by_index", "by_folder", "by_name", "by_file")
    assert elsewhere["classes"] == {**dict.fromkeys(ways, "DIMEditPipeline"), "t2i": "DIMPipeline"}


@pytest.mark.parametrize("name", ["edit", "again", "repository", "repository_named"])
def test_edit_without_the_package_is_the_same_picture(elsewhere, edit_picture, name):
    assert np.array_equal(elsewhere["pictures"][name], edit_picture)


def test_text_to_image_without_the_package_is_the_same_picture(elsewhere, t2i_picture):
    assert np.array_equal(elsewhere["pictures"]["t2i"], t2i_picture)


def test_nothing_runs_that_is_not_trusted(elsewhere):
    assert "trust_remote_code=True" in elsewhere["refused_folder"]
    assert "trust_remote_code=True" in elsewhere["refused_repository"]
    assert elsewhere["modules_before"] == []


def test_components_come_from_their_own_folders(elsewhere):
    own = {name for name in elsewhere["modules"] if name.startswith("diffusers_modules.local.")}
    names = {"pipeline", "connector_dim", "processing_dim", "transformer_dim"}
    assert own == {f"diffusers_modules.local.{name}" for name in names}


def test_code_elsewhere_warns_of_nothing(elsewhere):
    for words in ("Expected types", "were not found in your environment", "Traceback"):
        assert words not in elsewhere["stderr"]


def test_kernels_are_in_the_code(elsewhere):
    if not elsewhere["has_triton"]:
        pytest.skip("triton is not installed")
    assert elsewhere["uses_kernels"] and 0 < elsewhere["kernel_difference"] < 1e-4


def test_designers_are_in_the_code(elsewhere, edit):
    assert elsewhere["design"] == ["Blueprint", str(edit.blueprint)]
    assert elsewhere["designers"] == ["VLMDesigner", "SelfDesigner", "Blueprint"]


def test_saved_elsewhere_is_the_same_code(elsewhere, saved):
    for path in CODE:
        assert (elsewhere["folder"] / "again" / path).read_text() == (saved / "edit" / path).read_text()
    assert read_index(elsewhere["folder"] / "again")["connector"] == ["connector_dim", "DIMConnector"]

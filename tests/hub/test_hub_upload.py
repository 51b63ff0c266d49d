"""What goes to the Hub, by `push_to_hub`, `save_pretrained` and `diffusers-dim push`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import assert_refused
from hub_server import serve_hub, use_hub
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from diffusers_dim import TINY_SHAPES, DIMEditPipeline, DIMPipeline
from diffusers_dim.cli import app
from diffusers_dim.hub.facts import SANA_SHAPE
from diffusers_dim.hub.upload import find_stale, list_files, prepare_folder, recognise
from diffusers_dim.training import save_model_card


WEIGHTS = ["connector", "transformer", "vae"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    with serve_hub(monkeypatch, "models", "me/shapes") as received:
        yield received


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "shapes"
    prepare_folder(TINY_SHAPES, folder)
    return folder


@pytest.fixture
def own(tmp_path) -> Path:
    """The embedded model's folder, to be changed."""
    return Path(shutil.copytree(TINY_SHAPES, tmp_path / "own"))


def dtypes(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}


# What is sent


def test_pushed_repository_holds_weights_code_and_card(repository):
    names = set(repository["files"])
    assert {"model_index.json", "pipeline.py", "README.md"} <= names
    assert {f"{name}/diffusion_pytorch_model.safetensors" for name in WEIGHTS} <= names
    assert {"connector/connector_dim.py", "processor/processing_dim.py", "transformer/transformer_dim.py"} <= names
    assert {"text_encoder/model.safetensors", "processor/tokenizer.json", "scheduler/scheduler_config.json"} <= names
    card = repository["files"]["README.md"].decode()
    assert card == (Path(TINY_SHAPES) / "README.md").read_text()
    assert "library_name: diffusers" in card and "pipeline_tag: image-to-image" in card
    assert repository["tokens"] == {"Bearer hf_of_the_environment"}


def test_nothing_that_is_sent_tells_where_it_was(repository):
    for name, content in repository["files"].items():
        assert TINY_SHAPES.encode() not in content and b'_name_or_path":' not in content, name


def test_save_pretrained_pushes_the_folder(tiny_pipe, hub, tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "notes.txt").write_text("mine")
    (tmp_path / "shapes" / "old.bin").write_bytes(b"pickled")
    tiny_pipe.save_pretrained(tmp_path / "shapes", push_to_hub=True, private=True, commit_message="First")
    assert hub["created"][0]["name"] == "shapes" and '"private"' in json.dumps(hub["created"])
    assert {"model_index.json", "pipeline.py", "README.md"} <= set(hub["files"])
    assert not {"notes.txt", "old.bin"} & set(hub["files"])


def test_weights_that_a_push_replaces_go_away(tiny_pipe, hub):
    hub["there"] = [
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model.bf16.safetensors",
        "notes.md",
    ]
    tiny_pipe.push_to_hub("me/shapes")
    assert sorted(hub["deleted"]) == hub["there"][:2]


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_pickled_weights_are_not_pushed(tiny_pipe, hub, tmp_path, how):
    with pytest.raises(ValueError, match="Only safetensors are uploaded"):
        if how == "push_to_hub":
            tiny_pipe.push_to_hub("me/shapes", safe_serialization=False)
        else:
            tiny_pipe.save_pretrained(tmp_path, push_to_hub=True, safe_serialization=False)
    assert not hub["files"] and not hub["created"]


def test_push_without_a_card_is_refused_before_anything_is_made(tiny_pipe, hub, t2i_folder):
    pipe = DIMPipeline.from_pretrained(t2i_folder)
    with pytest.raises(ValueError, match="There is no model card for me/shapes"):
        pipe.push_to_hub("me/shapes")
    assert not hub["files"] and not hub["created"]


def test_push_with_a_card_that_is_not_whole_is_refused(tiny_pipe, hub, tmp_path):
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n\n# Shapes\n\nTODO\n")
    with pytest.raises(ValueError, match="is not whole:\n  library_name: missing"):
        tiny_pipe.push_to_hub("me/shapes", model_card=tmp_path / "card.md")
    assert not hub["files"] and not hub["created"]


def test_card_of_the_repository_is_kept(hub, t2i_folder, tmp_path):
    card = (Path(TINY_SHAPES) / "README.md").read_text().replace("image-to-image", "text-to-image")
    hub["files"]["README.md"] = card.encode()
    DIMPipeline.from_pretrained(t2i_folder).push_to_hub("me/shapes")
    kept = ModelCard(hub["files"]["README.md"].decode())
    assert kept.text == ModelCard(card).text and kept.data.to_dict() == ModelCard(card).data.to_dict()


def test_unknown_argument_of_push_to_hub_is_refused(tiny_pipe):
    with pytest.raises(ValueError, match=r"has no arguments \['branch'\]"):
        tiny_pipe.push_to_hub("me/shapes", branch="dev")


# Folders


def test_prepared_folder_keeps_the_stored_dtype(prepared):
    for name in WEIGHTS:
        assert dtypes(prepared / name / "diffusion_pytorch_model.safetensors") == {"F16"}


def test_prepared_folder_is_listed_whole(prepared):
    there = {path.relative_to(prepared) for path in prepared.rglob("*") if path.is_file()}
    assert set(list_files(prepared)) == there


def test_variant_is_of_its_dtype_and_name(tmp_path, edit):
    files = prepare_folder(TINY_SHAPES, tmp_path / "shapes", variant="bf16")
    assert Path("transformer/diffusion_pytorch_model.bf16.safetensors") in files
    assert Path("text_encoder/model.bf16.safetensors") in files
    assert not [path for path in files if path.name == "diffusion_pytorch_model.safetensors"]
    assert dtypes(tmp_path / "shapes/transformer/diffusion_pytorch_model.bf16.safetensors") == {"BF16"}
    pipe = DIMEditPipeline.from_pretrained(tmp_path / "shapes", variant="bf16", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16


def test_shards_are_of_that_size(tmp_path):
    files = prepare_folder(TINY_SHAPES, tmp_path / "shapes", max_shard_size="2MB")
    shards = [path for path in files if path.parent.name == "transformer" and path.suffix == ".safetensors"]
    assert len(shards) > 2
    assert Path("transformer/diffusion_pytorch_model.safetensors.index.json") in files
    assert DIMEditPipeline.from_pretrained(tmp_path / "shapes").transformer.dtype == torch.float32


def test_pictures_of_the_card_are_sent(own, tmp_path):
    Image.new("RGB", (4, 4)).save(own / "sheet.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    card = (own / "README.md").read_text()
    (own / "README.md").write_text(card + "\n![sheet](sheet.png) ![away](../outside.png) ![page](https://a.b/c.png)\n")
    files = prepare_folder(own, tmp_path / "shapes")
    assert Path("sheet.png") in files and not [path for path in files if "outside" in path.name]


def test_pickled_weights_are_left_behind(own, tmp_path):
    torch.save({}, own / "transformer" / "diffusion_pytorch_model.bin")
    files = prepare_folder(own, tmp_path / "shapes")
    assert not [path for path in files if path.suffix == ".bin"]


def test_model_of_pickled_weights_alone_is_refused(own):
    weights = own / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"transformer holds \['diffusion_pytorch_model.bin'\] and no safetensors"):
        list_files(own)


def test_failure_leaves_nothing_behind(own, tmp_path):
    (own / "README.md").write_text("# No card\n")
    with pytest.raises(ValueError, match="front matter: missing"):
        prepare_folder(own, tmp_path / "shapes")
    (own / "README.md").unlink()
    with pytest.raises(ValueError, match="no model card for shapes"):
        prepare_folder(own, tmp_path / "shapes")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="has to be a new or an empty folder"):
        prepare_folder(TINY_SHAPES, tmp_path)


def test_unknown_variant_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of \['bf16', 'fp16'\], but is 'int8'"):
        prepare_folder(TINY_SHAPES, tmp_path / "shapes", variant="int8")


def test_stale_weights_are_those_of_the_same_variant():
    sent = ["vae/diffusion_pytorch_model.bf16.safetensors", "text_encoder/model.bf16.safetensors"]
    there = [
        "text_encoder/model.bf16-00001-of-00002.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/model.safetensors.index.bf16.json",
        "text_encoder/model.safetensors.index.json",
        "transformer/diffusion_pytorch_model.bf16.safetensors",
        "vae/diffusion_pytorch_model.bf16.safetensors",
    ]
    assert find_stale(there, sent) == [there[0], there[2]]


@pytest.mark.parametrize(
    ("names", "shape", "found"),
    [
        (["DIM-4.6B-Edit"], SANA_SHAPE, "DIM-4.6B-Edit"),
        (["/models/mine", "me/DIM-4.6B-Edit-Stage1"], SANA_SHAPE, "DIM-4.6B-Edit-Stage1"),
        (["DIM-4.6B-T2I"], SANA_SHAPE, None),  # of the other kind
        (["DIM-4.6B-Edit"], {**SANA_SHAPE, "num_layers": 5}, None),
        (["mine"], SANA_SHAPE, None),
    ],
)
def test_released_models_are_known_by_kind_size_and_name(tmp_path, names, shape, found):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "DIMEditPipeline"]}')
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(shape))
    assert recognise(tmp_path, names) == found


# The command


def test_command_pushes(hub, prepared):
    result = run("push", TINY_SHAPES, "me/shapes", "--private")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith("/me/shapes")
    assert '"private"' in json.dumps(hub["created"])
    sent = {path.as_posix(): (prepared / path).read_bytes() for path in list_files(prepared)}
    assert hub["files"] == sent


def test_command_shows_what_it_would_send(hub):
    result = run("push", TINY_SHAPES, "me/shapes", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "transformer/diffusion_pytorch_model.safetensors" in result.stdout and "pipeline.py" in result.stdout
    assert not hub["files"] and not hub["created"]


def test_command_writes_the_folder_alone(hub, tmp_path):
    result = run("push", TINY_SHAPES, "--output", tmp_path / "shapes", "--variant", "fp16")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "shapes" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert not hub["created"]


def test_command_takes_a_repository(repository, monkeypatch, tmp_path):
    use_hub(monkeypatch, repository["url"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run("push", "me/shapes", "--output", tmp_path / "shapes")
    assert result.exit_code == 0, result.output
    assert {path.as_posix() for path in list_files(tmp_path / "shapes")} == set(repository["files"])
    assert (tmp_path / "shapes" / "README.md").read_bytes() == repository["files"]["README.md"]


def test_command_without_a_place_is_refused():
    assert_refused(run("push", TINY_SHAPES), "REPO_ID", "--output", "--dry-run")


def test_command_without_a_login_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert_refused(run("push", TINY_SHAPES, "me/shapes"), "hf auth login", "HF_TOKEN")


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_config.json"])
def test_lora_is_refused_in_words(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    assert_refused(run("push", tmp_path, "--dry-run"), "is a LoRA, no whole model", "hf upload")


def test_released_file_is_refused_in_words(golden_edit):
    assert_refused(run("push", golden_edit.path, "--dry-run"), "holds no model_index.json", "diffusers-dim convert")


def test_other_pipelines_are_refused(sana_folder):
    assert_refused(run("push", sana_folder, "--dry-run"), "has to hold one of", "SanaPipeline")


def test_model_without_a_card_is_refused(t2i_folder):
    assert_refused(run("push", t2i_folder, "me/picture", "--dry-run"), "no model card for me/picture", "card")


def test_result_of_a_training_run_is_pushed_with_its_card(own, hub):
    save_model_card(own, kind="edit", args={"pretrained_model_name_or_path": "me/base"}, repo_id="me/shapes")
    result = run("push", own, "me/shapes")
    assert result.exit_code == 0, result.output
    assert "An image editor trained by diffusers-dim" in hub["files"]["README.md"].decode()


def test_card_command_writes_a_released_models_card(tmp_path):
    result = run("card", "DIM-4.6B-T2I", "--output", tmp_path / "README.md", "--repo-id", "me/dim")
    assert result.exit_code == 0, result.output
    assert 'DIMPipeline.from_pretrained("me/dim"' in (tmp_path / "README.md").read_text()
    assert run("card", tmp_path / "README.md", "--check").exit_code == 0
    assert run("card", "DIM-4.6B-T2I").stdout.startswith("---\n")


def test_card_command_refuses_what_is_not_whole(tmp_path):
    (tmp_path / "card.md").write_text("# A model\n\nIt edits.\n")
    result = run("card", tmp_path / "card.md", "--check")
    assert result.exit_code == 2 and "front matter: missing" in result.stderr
    assert_refused(run("card", "DIM-9B"), "no released model 'DIM-9B'")


def test_code_command_makes_a_folder_self_contained(own):
    result = run("code", own)
    assert result.exit_code == 0, result.output
    assert (own / "pipeline.py").is_file() and (own / "transformer" / "transformer_dim.py").is_file()
    assert type(DIMEditPipeline.from_pretrained(own)) is DIMEditPipeline

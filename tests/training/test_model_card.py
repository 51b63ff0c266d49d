import json
import re

import pytest
from hub_server import serve_hub
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_dim.training import push_to_hub, save_model_card


ARGS = {
    "pretrained_model_name_or_path": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "text_encoder_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct",
    "dataset_name": "somebody/edits",
    "jsonl": None,
    "resolution": 512,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": "came",
    "learning_rate": 0.0001,
    "seed": 7,
    "mixed_precision": "bf16",
    "use_ema": True,
    "ema_decay": 0.999,
    "aspect_ratio_bucketing": True,
    "compile": False,
    "hub_token": "hf_abcdefghij",
    "report_to": "wandb",
}


@pytest.fixture
def output_dir(tmp_path):
    """A run's folder, as a finished run leaves it."""
    folder = tmp_path / "my-editor"
    (folder / "validation").mkdir(parents=True)
    lines = [
        {"step": step, "loss": 1.0 if step <= 20 else 0.25, "loss/0.1-0.2": 0.5, "samples_per_second": 3.0}
        for step in range(1, 121)
    ]
    lines[40]["memory_gb"] = 61.5
    (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "validation.jsonl").write_text('{"step": 100, "success": 0.5}\n{"step": 120, "success": 0.75}\n')
    for name in ("validation/120.png", "losses.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def rows(card: str) -> dict[str, str]:
    """The tables of a card, as one."""
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", card, re.MULTILINE))


def test_card_tells_the_runs_settings_and_results(output_dir):
    path = save_model_card(
        output_dir,
        kind="t2i",
        args=ARGS,
        facts={"num_processes": 4, "skipped_samples": 3},
        sheet=output_dir / "validation" / "120.png",
        curve=output_dir / "losses.png",
    )
    assert path == output_dir / "README.md"
    told = rows(path.read_text())
    expected = {
        "base model": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "data set": "somebody/edits",
        "resolution": "512",
        "optimizer": "came",
        "learning rate": "0.0001",
        "moving average": "decay 0.999",
        "aspect ratio bucketing": "yes",
        "steps": "120",
        "loss, mean of the last 100 steps": "0.25",
        "loss at 0.1-0.2 of all timesteps": "0.5",
        "samples/s": "3",
        "peak memory, GB": "61.5",
        "validation success": "0.75",
        "num processes": "4",
        "skipped samples": "3",
    }
    assert {key: told.get(key) for key in expected} == expected
    assert not {"compiled", "data: jsonl"} & set(told)  # what was not used is not told
    assert {"torch", "diffusers", "diffusers-dim"} <= set(told)
    text = path.read_text()
    assert "(validation/120.png)" in text and "(losses.png)" in text
    assert "research licence" in text and "NVIDIA" in text


@pytest.mark.parametrize(
    ("kind", "pipeline_tag", "use"),
    [
        ("edit", "image-to-image", 'DIMEditPipeline.from_pretrained("me/painter"'),
        ("t2i", "text-to-image", 'DIMPipeline.from_pretrained("me/painter"'),
        ("lora", "image-to-image", 'pipe.load_lora_weights("me/painter")'),
    ],
)
def test_card_says_how_to_use_each_kind(output_dir, kind, pipeline_tag, use):
    card = ModelCard.load(save_model_card(output_dir, kind=kind, args=ARGS, repo_id="me/painter"))
    assert card.data.pipeline_tag == pipeline_tag
    assert card.data.base_model == [ARGS["pretrained_model_name_or_path"], ARGS["text_encoder_name_or_path"]]
    assert card.data.datasets == ["somebody/edits"]
    assert (card.data.library_name, card.data.license) == ("diffusers", "other")
    assert "diffusers-dim" in card.data.tags and ("lora" in card.data.tags) == (kind == "lora")
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert use in code


def test_card_tells_no_local_paths_and_no_secrets(output_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    (tmp_path / "base").mkdir()
    sheet = tmp_path / "elsewhere" / "sheet.png"
    sheet.parent.mkdir()
    Image.new("RGB", (4, 4)).save(sheet)
    args = {
        **ARGS,
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "text_encoder_name_or_path": None,
        "dataset_name": None,
        "jsonl": str(tmp_path / "secret" / "edits.jsonl"),
        "train_data_dir": r"C:\Users\somebody\pictures",
        "precomputed_conditions": "../encoded/all",
        "output_dir": str(output_dir),
    }
    path = save_model_card(output_dir, kind="lora", args=args, facts={"cache": tmp_path / "cache"}, sheet=sheet)
    text = path.read_text()
    for secret in (str(tmp_path), "hf_abcdefghij", "hf_environment", "somebody", "encoded/", "wandb"):
        assert secret not in text
    told = rows(text)
    assert told["base model"] == "base" and told["data: jsonl"] == "edits.jsonl"
    assert told["data: folder"] == "pictures" and told["data: precomputed"] == "all"
    assert (output_dir / "sheet.png").exists() and "(sheet.png)" in text
    assert ModelCard.load(path).data.base_model is None


def test_card_of_a_run_without_curves_or_facts(tmp_path):
    text = save_model_card(tmp_path, kind="edit", args={"resolution": 64}).read_text()
    assert "## Results" not in text and "![" not in text and rows(text)["resolution"] == "64"


def test_an_older_card_is_replaced(output_dir):
    (output_dir / "README.md").write_text("---\nlicense: mit\n---\n\nAn older run.\n")
    assert "An older run" not in save_model_card(output_dir, kind="edit", args=ARGS).read_text()


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of \['edit', 't2i', 'lora'\], but is 'video'"):
        save_model_card(tmp_path, kind="video", args={})


@pytest.fixture
def hub(monkeypatch):
    with serve_hub(monkeypatch, "models", "me/painter") as received:
        yield received


@pytest.mark.parametrize("private", [False, True])
def test_upload_leaves_out_what_is_no_result(output_dir, hub, private):
    save_model_card(output_dir, kind="edit", args=ARGS)
    kept = ["model_index.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
    left_out = [
        "checkpoint-100/model.safetensors",
        "checkpoint-100/optimizer.bin",
        "saving-120/model.safetensors",
        "logs/run/events.out.tfevents.1",
        "elsewhere/events.out.tfevents.2",
        "wandb/run/config.yaml",
        "run.json",
        "run.aside",
    ]
    for name in kept + left_out:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (output_dir / name).write_text(json.dumps({"what": name, "_name_or_path": "/home/somebody"}))
    (output_dir / "model_index.json").write_text(json.dumps({"transformer": ["diffusers_dim.models", "DIM"]}))
    url = push_to_hub(output_dir, "painter", private=private)
    assert url.endswith("/me/painter")
    assert [made["name"] for made in hub["created"]] == ["painter"]
    assert ('"private"' in json.dumps(hub["created"])) == private
    results = ["README.md", "losses.jsonl", "losses.png", "validation.jsonl", "validation/120.png"]
    assert sorted(hub["files"]) == sorted(kept + results)
    # Where it was on this machine is nobody's business.
    assert json.loads(hub["files"]["transformer/config.json"]) == {"what": "transformer/config.json"}
    assert hub["tokens"] == {"Bearer hf_of_the_environment"}

# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Released checkpoints become diffusers folders, or one clear error."""

import filecmp
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffusers_dim import DIMConnector, DIMEditPipeline, DIMPipeline, DIMProcessor, DIMTransformer2DModel
from diffusers_dim.loaders import convert_released_checkpoint, released
from diffusers_dim.loaders.released import infer_transformer_config


KINDS = ["edit", "t2i"]
HEADS = {"num_cross_attention_heads": 2}  # all that the golden checkpoints' shapes do not tell


@pytest.fixture
def golden(request, golden_edit, golden_t2i):
    return {"edit": golden_edit, "t2i": golden_t2i}[request.param]


@pytest.fixture
def folder(request, edit_folder, t2i_folder):
    return {"edit": edit_folder, "t2i": t2i_folder}[request.param]


both = pytest.mark.parametrize(("golden", "folder"), [(kind, kind) for kind in KINDS], indirect=True, ids=KINDS)


@pytest.fixture
def weights(golden_edit) -> dict[str, torch.Tensor]:
    """The golden edit checkpoint's tensors, for a test to change."""
    return load_file(golden_edit.path / "model.safetensors")


@pytest.fixture
def convert(golden_edit, tmp_path):
    """Converts tensors, or a checkpoint at a path, with the golden edit model's bases into `tmp_path / "output"`."""

    def run(checkpoint, **kwargs):
        if isinstance(checkpoint, dict):
            save_file(checkpoint, tmp_path / "changed.safetensors", metadata={"format": "pt"})
            checkpoint = tmp_path / "changed.safetensors"
        arguments = {
            "text_encoder": golden_edit.path / "qwen",
            "vae": golden_edit.path / "vae_base",
            "output": tmp_path / "output",
            "transformer_config": golden_edit.path / "transformer_config.json",
            "designer": "none",
        }
        return convert_released_checkpoint(checkpoint, **{**arguments, **kwargs})

    return run


def assert_same_files(first: Path, second: Path) -> None:
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    different = [name for name in names if not filecmp.cmp(first / name, second / name, shallow=False)]
    assert not different


def save_shards(weights: dict[str, torch.Tensor], folder: Path, max_shard_size: int) -> Path:
    folder.mkdir(parents=True)
    shards = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    for filename, names in shards.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / filename)
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def get_complaints(convert, weights, **kwargs) -> list[str]:
    """The lines of the error, each stripped."""
    with pytest.raises(ValueError) as error:
        convert(weights, **kwargs)
    return [line.strip() for line in str(error.value).splitlines()]


# What the folder computes


@both
def test_text_encoder_and_processor_give_the_published_hidden_states(golden, folder):
    processor = DIMProcessor.from_pretrained(folder / "processor")
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
    images = None if golden.settings["t2i"] else [Image.open(golden.path / "source.png").convert("RGB")]
    size = golden.settings["res"]
    inputs = processor.encode(golden.settings["prompt"], images, size, size)
    condition_mask = inputs.pop("condition_mask")
    with torch.no_grad():
        hidden = text_encoder(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states[-1]
    assert torch.equal(inputs["input_ids"], golden.tensors["input_ids"])
    assert torch.equal(condition_mask, golden.tensors["user_mask"])
    torch.testing.assert_close(hidden, golden.tensors["hidden"], atol=1e-5, rtol=0)


@both
def test_connector_gives_the_published_condition(golden, folder):
    connector = DIMConnector.from_pretrained(folder / "connector")
    hidden = golden.tensors["hidden"][golden.tensors["user_mask"]][None]
    with torch.no_grad():
        condition = connector(hidden).prompt_embeds
    torch.testing.assert_close(condition, golden.tensors["cond"], atol=1e-5, rtol=0)
    stored = load_file(golden.path / "model.safetensors")["decoder.model.y_embedder.y_embedding"]
    assert torch.equal(connector.null_condition, stored)


def test_vae_gives_the_published_source_latents(golden_edit, edit_folder):
    vae = AutoencoderDC.from_pretrained(edit_folder / "vae")
    size = golden_edit.settings["res"]
    image = Image.open(golden_edit.path / "source.png").convert("RGB")
    scale = size / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent * vae.config.scaling_factor
    torch.testing.assert_close(latents, golden_edit.tensors["z_src"], atol=1e-5, rtol=0)


@both
def test_transformer_folder_is_a_plain_sana_transformer(golden, folder):
    transformer = DIMTransformer2DModel.from_pretrained(folder / "transformer").eval()
    sana = SanaTransformer2DModel.from_pretrained(folder / "transformer").eval()
    sample = torch.cat([golden.tensors["z"], golden.tensors["z_src"]], dim=1)[:, : transformer.config.in_channels]
    inputs = {
        "hidden_states": sample,
        "encoder_hidden_states": golden.tensors["cond"],
        "timestep": torch.tensor([500]),
    }
    with torch.no_grad():
        assert torch.equal(transformer(**inputs).sample, sana(**inputs).sample)


def test_transformer_gives_the_published_training_losses(golden_edit, edit_folder):
    """Only the right transformer weights give them."""
    transformer = DIMTransformer2DModel.from_pretrained(edit_folder / "transformer").eval()
    tensors = golden_edit.tensors
    for step, loss in zip(tensors["train_t"], tensors["train_loss"], strict=True):
        s = step.item() / 1000
        sigma = 3 * s / (1 + 2 * s)
        sample = (1 - sigma) * tensors["train_target"] + sigma * tensors["train_noise"]
        with torch.no_grad():
            flow = transformer(
                torch.cat([sample, tensors["z_src"]], dim=1), tensors["cond"], torch.tensor([int(1000 * sigma)])
            ).sample
        error = flow - (tensors["train_noise"] - tensors["train_target"])
        torch.testing.assert_close(error.square().mean(), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("folder", "pipeline_class"), [("edit", DIMEditPipeline), ("t2i", DIMPipeline)], indirect=["folder"], ids=KINDS
)
def test_folder_is_what_the_pipeline_saves(folder, pipeline_class, tmp_path):
    pipe = pipeline_class.from_pretrained(folder)
    assert pipe.config.default_guidance_scale == 7.5
    pipe.save_pretrained(tmp_path / "saved")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*.*"))
    for name in names:
        first, second = folder / name, tmp_path / "saved" / name
        if name.suffix == ".json":
            content = json.loads(second.read_text())
            content.pop("_name_or_path", None)
            assert json.loads(first.read_text()) == content, name
        else:
            assert filecmp.cmp(first, second, shallow=False), name


def test_scheduler_is_the_published_one(edit_folder):
    scheduler = DPMSolverMultistepScheduler.from_pretrained(edit_folder / "scheduler")
    assert scheduler.config.use_flow_sigmas
    assert scheduler.config.flow_shift == 3.0
    assert scheduler.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
def test_text_encoder_config_is_the_one_that_transformers_makes_of_the_base(golden_edit, convert, dtype, tmp_path):
    output = convert(golden_edit.path, dtype=dtype).path
    dtype = torch.float32 if dtype == "float32" else dtype
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(golden_edit.path / "qwen", dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        assert filecmp.cmp(tmp_path / "base" / name, output / "text_encoder" / name, shallow=False), name
    text_config = Qwen2_5_VLConfig.from_pretrained(output / "text_encoder").text_config
    assert text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert text_config.rope_parameters["rope_theta"] == 1e6


# What goes in


@both
def test_kind_is_told_by_shapes(golden, folder):
    kind = "t2i" if golden.settings["t2i"] else "edit"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", {"edit": "DIMEditPipeline", "t2i": "DIMPipeline"}[kind]]
    transformer = DIMTransformer2DModel.load_config(folder / "transformer")
    assert transformer["in_channels"] == transformer["out_channels"] * {"edit": 2, "t2i": 1}[kind]


def test_result_tells_kind_path_and_size(golden_edit, convert, tmp_path):
    converted = convert(golden_edit.path / "model.safetensors")
    assert (converted.kind, converted.pipeline_class) == ("edit", "DIMEditPipeline")
    assert converted.path == tmp_path / "output"
    pipe = DIMEditPipeline.from_pretrained(converted.path)
    models = (pipe.text_encoder, pipe.connector, pipe.transformer, pipe.vae)
    assert converted.num_parameters == sum(item.numel() for model in models for item in model.parameters())


@pytest.mark.parametrize("where", [".", "model"])
def test_shards_give_the_same_folder_as_one_file(convert, weights, where, tmp_path, edit_folder):
    save_shards(weights, tmp_path / "sharded" / where, max_shard_size=200_000)
    assert len(list((tmp_path / "sharded" / where).glob("*.safetensors"))) > 4
    assert_same_files(convert(tmp_path / "sharded").path, edit_folder)


def test_a_folder_of_one_file_gives_the_same_folder(golden_edit, convert, edit_folder):
    assert_same_files(convert(golden_edit.path).path, edit_folder)


def test_base_weights_are_used_only_for_what_the_checkpoint_lacks(
    golden_edit, convert, weights, edit_folder, tmp_path
):
    """The bases are changed, so that using them shows."""
    qwen, vae = tmp_path / "qwen", tmp_path / "vae"
    shutil.copytree(golden_edit.path / "qwen", qwen)
    shutil.copytree(golden_edit.path / "vae_base", vae)
    base = {name: tensor + 1 for name, tensor in load_file(qwen / "model.safetensors").items()}
    save_file(base, qwen / "model.safetensors")
    vae_base = {name: tensor + 1 for name, tensor in load_file(vae / "diffusion_pytorch_model.safetensors").items()}
    save_file(vae_base, vae / "diffusion_pytorch_model.safetensors")

    assert_same_files(convert(weights, text_encoder=qwen, vae=vae).path, edit_folder)

    bare = {name: weights[name] for name in weights if not name.startswith(("mllm.", "decoder.vae."))}
    output = convert(bare, text_encoder=qwen, vae=vae, output=tmp_path / "bare").path
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(output / "text_encoder")
    norm = text_encoder.model.language_model.norm.weight
    assert torch.equal(norm, base["model.norm.weight"])
    converted = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
    assert converted.keys() == vae_base.keys()
    assert all(torch.equal(converted[name], vae_base[name]) for name in vae_base)
    for name in ("connector", "transformer"):
        assert_same_files(output / name, edit_folder / name)


@pytest.mark.parametrize("sharded", [False, True])
def test_base_text_encoder_may_have_todays_names_and_shards(
    golden_edit, convert, weights, sharded, edit_folder, tmp_path
):
    bare = {name: weights[name] for name in weights if not name.startswith("mllm.")}
    qwen = tmp_path / "qwen"
    shutil.copytree(golden_edit.path / "qwen", qwen, ignore=shutil.ignore_patterns("*.safetensors"))
    today = load_file(edit_folder / "text_encoder" / "model.safetensors")
    assert "model.language_model.norm.weight" in today
    if sharded:
        save_shards(today, tmp_path / "shards", max_shard_size=100_000)
        shutil.copytree(tmp_path / "shards", qwen, dirs_exist_ok=True)
    else:
        save_file(today, qwen / "model.safetensors")
    assert_same_files(convert(bare, text_encoder=qwen).path, edit_folder)


@pytest.mark.parametrize("dropped", ["mllm.lm_head.weight", "mllm.model.embed_tokens.weight"])
def test_of_a_tied_pair_one_is_enough(convert, weights, dropped, edit_folder):
    del weights[dropped]
    assert_same_files(convert(weights).path, edit_folder)


def test_a_tied_pair_has_to_be_equal(convert, weights, tmp_path):
    weights["mllm.lm_head.weight"][-1, -1] += 1
    with pytest.raises(ValueError, match=r"mllm\.lm_head\.weight differs from mllm\.model\.embed_tokens\.weight"):
        convert(weights)
    assert not (tmp_path / "output").exists()


def test_untied_head_is_kept(golden_edit, convert, weights, tmp_path):
    qwen = tmp_path / "qwen"
    shutil.copytree(golden_edit.path / "qwen", qwen)
    config = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights["mllm.lm_head.weight"] += 1
    output = convert(weights, text_encoder=qwen).path
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(output / "text_encoder")
    assert torch.equal(text_encoder.lm_head.weight, weights["mllm.lm_head.weight"])
    assert not torch.equal(text_encoder.lm_head.weight, text_encoder.get_input_embeddings().weight)


def test_what_is_of_no_use_is_dropped(convert, weights, edit_folder):
    assert "decoder.model.pos_embed" in weights
    weights["decoder.text_encoder.model.embed_tokens.weight"] = torch.zeros(4, 4)
    assert_same_files(convert(weights).path, edit_folder)


@pytest.fixture
def hub(golden_edit, tmp_path):
    """A local Hugging Face Hub of three repositories; gives its address and the files it was asked for."""
    commit = "0" * 40
    checkpoint = tmp_path / "hub" / "DIM"
    shutil.copytree(golden_edit.path, checkpoint, ignore=shutil.ignore_patterns("qwen", "vae_base"))
    repositories = {
        "me/DIM": checkpoint,
        "me/qwen": golden_edit.path / "qwen",
        "me/vae": golden_edit.path / "vae_base",
    }
    downloads = []

    class Handler(BaseHTTPRequestHandler):
        def send(self, body: bytes, status: int = 200):
            self.send_response(status)
            for header in (("X-Repo-Commit", commit), ("ETag", f'"{hash(body):x}"'), ("Content-Length", len(body))):
                self.send_header(header[0], str(header[1]))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
            owner, name, action, *rest = path.split("/")
            root = repositories.get(f"{owner}/{name}")
            if root is None:
                self.send(b"{}", status=404)
            elif action == "resolve":
                if self.command == "GET":
                    downloads.append(f"{name}/{rest[1]}")
                self.send((root / rest[1]).read_bytes())
            else:
                files = sorted(item for item in root.iterdir() if item.is_file())
                tree = [
                    {"type": "file", "path": item.name, "size": item.stat().st_size, "oid": commit} for item in files
                ]
                siblings = [{"rfilename": item.name} for item in files]
                info = {"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}
                self.send(json.dumps(tree if action == "tree" else info).encode())

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", downloads
    server.shutdown()
    server.server_close()


def convert_from_hub(address: str, checkpoint: str, config: Path, tmp_path: Path) -> subprocess.CompletedProcess:
    """In a process of its own, as huggingface_hub reads its settings at import."""
    command = (
        "from diffusers_dim.loaders import convert_released_checkpoint\n"
        f"convert_released_checkpoint({checkpoint!r}, 'me/qwen', 'me/vae', {str(tmp_path / 'output')!r},"
        f" transformer_config={str(config)!r}, designer='none')"
    )
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_hub_repositories(golden_edit, hub, edit_folder, tmp_path):
    """Only what is needed is downloaded: no base weights when the checkpoint has them."""
    address, downloads = hub
    result = convert_from_hub(address, "me/DIM", golden_edit.path / "transformer_config.json", tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_files(tmp_path / "output", edit_folder)
    assert [name for name in downloads if name.endswith(".safetensors")] == ["DIM/model.safetensors"]
    assert [name for name in downloads if name.startswith("vae/")] == ["vae/config.json"]


@pytest.mark.slow
def test_absent_hub_repository(golden_edit, hub, tmp_path):
    result = convert_from_hub(hub[0], "me/DIM2", golden_edit.path / "transformer_config.json", tmp_path)
    assert "FileNotFoundError: `checkpoint`: there is no file or folder me/DIM2, and the Hub gives no" in result.stderr
    assert not (tmp_path / "output").exists()


# What comes out


def test_bfloat16(golden_edit, convert, edit_folder):
    output = convert(golden_edit.path, dtype=torch.bfloat16).path
    for path in edit_folder.rglob("*.safetensors"):
        full, half = load_file(path), load_file(output / path.relative_to(edit_folder))
        assert full.keys() == half.keys()
        assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)
    pipe = DIMEditPipeline.from_pretrained(output, torch_dtype=torch.bfloat16)
    assert (
        pipe.text_encoder.dtype == pipe.connector.dtype == pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    )


def test_default_guidance_scale(golden_edit, convert):
    output = convert(golden_edit.path, default_guidance_scale=2.0).path
    assert DIMEditPipeline.from_pretrained(output).config.default_guidance_scale == 2.0


def test_small_shards_load(golden_edit, convert, edit_folder):
    output = convert(golden_edit.path, max_shard_size="50KB").path
    for name in ("text_encoder", "transformer", "vae"):
        assert len(list((output / name).glob("*.safetensors"))) > 1
        assert len(list((output / name).glob("*.safetensors.index.json"))) == 1
    first, second = DIMEditPipeline.from_pretrained(edit_folder), DIMEditPipeline.from_pretrained(output)
    for name in ("text_encoder", "connector", "transformer", "vae"):
        expected, found = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_files_have_the_metadata_that_from_pretrained_asks_for(edit_folder):
    for path in edit_folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_no_more_than_a_shard_is_in_memory(golden_edit, convert, monkeypatch):
    """Counts the bytes of the weights that live whenever a shard is written."""
    limit = 100_000
    read, sizes = [], []

    def watched_read(source, dtype):
        tensor = read_source(source, dtype)
        read.append(weakref.ref(tensor))
        return tensor

    def watched_save_file(tensors, path, metadata):
        sizes.append(sum(tensor().nbytes for tensor in read if tensor() is not None))
        assert sizes[-1] == sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, path, metadata)

    read_source = released.Source.read
    monkeypatch.setattr(released.Source, "read", watched_read)
    monkeypatch.setattr(released, "save_file", watched_save_file)
    convert(golden_edit.path, dtype="bfloat16", max_shard_size=limit)
    assert len(sizes) > 8
    assert max(sizes) <= limit


# What the shapes tell


def test_released_size_needs_no_config():
    shapes = {"decoder.model.final_layer.scale_shift_table": (2, 2240)}
    for layer in range(20):
        shapes[f"decoder.model.blocks.{layer}.scale_shift_table"] = (6, 2240)
        shapes[f"decoder.model.blocks.{layer}.mlp.inverted_conv.conv.bias"] = (11200,)
    shapes["decoder.model.x_embedder.proj.weight"] = (2240, 64, 1, 1)
    shapes["decoder.model.final_layer.linear.weight"] = (32, 2240)
    shapes["projector.2.bias"] = (2304,)
    config = infer_transformer_config(shapes)
    assert config == {
        "in_channels": 64,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_layers": 20,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "mlp_ratio": 2.5,
        "attention_bias": False,
        "sample_size": 32,
        "patch_size": 1,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "qk_norm": "rms_norm_across_heads",
    }


def test_shapes_tell_all_but_the_heads(golden_edit, convert, edit_folder):
    assert_same_files(convert(golden_edit.path, transformer_config=HEADS).path, edit_folder)


def test_heads_that_shapes_do_not_tell_are_asked_for(golden_edit, convert):
    with pytest.raises(ValueError, match=r"width is 64.*heads of 112.*`num_cross_attention_heads`"):
        convert(golden_edit.path, transformer_config=None)


# What is refused


def test_foreign_missing_and_misshapen_tensors_are_all_listed(convert, weights, tmp_path):
    del weights["projector.2.bias"]
    del weights["decoder.model.blocks.1.attn.qkv.weight"]
    del weights["mllm.visual.merger.ln_q.weight"]
    del weights["decoder.vae.encoder.conv_in.bias"]
    weights["decoder.model.logvar_linear.weight"] = torch.zeros(4, 64)
    weights["decoder.model.blocks.2.scale_shift_table"] = torch.zeros(6, 64)
    weights["mllm.model.layers.2.input_layernorm.weight"] = torch.zeros(32)
    weights["optimizer.step"] = torch.zeros(1)
    weights["projector.0.weight"] = torch.zeros(48, 31)
    weights["decoder.model.blocks.0.cross_attn.kv_linear.weight"] = torch.zeros(127, 64)
    weights["mllm.model.norm.weight"] = torch.zeros(33)
    weights["decoder.vae.decoder.conv_in.weight"] = torch.zeros(16, 4, 3, 1)
    lines = get_complaints(convert, weights)
    assert sorted(lines[2:]) == [
        "missing: decoder.model.blocks.1.attn.qkv.weight (192, 64)",
        "missing: decoder.vae.encoder.conv_in.bias (8,)",
        "missing: mllm.visual.merger.ln_q.weight (32,)",
        "missing: projector.2.bias (48,)",
        "unknown: decoder.model.blocks.2.scale_shift_table (6, 64)",
        "unknown: decoder.model.logvar_linear.weight (4, 64)",
        "unknown: mllm.model.layers.2.input_layernorm.weight (32,)",
        "unknown: optimizer.step (1,)",
        "wrong shape: decoder.model.blocks.0.cross_attn.kv_linear.weight is (127, 64), expected (128, 64)",
        "wrong shape: decoder.vae.decoder.conv_in.weight is (16, 4, 3, 1), expected (16, 4, 3, 3)",
        "wrong shape: mllm.model.norm.weight is (33,), expected (32,)",
        "wrong shape: projector.0.weight is (48, 31), expected (48, 32)",
    ]
    assert str(tmp_path / "changed.safetensors") in lines[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        "decoder.model.x_embedder.proj.weight",
        "decoder.model.final_layer.linear.weight",
        "decoder.model.y_embedder.y_embedding",
        "decoder.model.y_embedder.y_proj.fc1.weight",
        "decoder.model.final_layer.scale_shift_table",
        "decoder.model.blocks.1.mlp.inverted_conv.conv.bias",
        "projector.0.bias",
    ],
)
@pytest.mark.parametrize("how", ["missing", "wider", "flat", "empty"])
def test_a_tensor_that_tells_the_sizes_may_be_wrong_too(convert, weights, name, how):
    """No config is given for what they tell: the others outvote it, and only it is complained of."""
    tensor = weights.pop(name)
    if how == "wider":
        weights[name] = torch.cat([tensor, tensor[..., :1]], dim=-1)
    elif how == "flat":
        weights[name] = tensor.flatten()[:7].clone()
    elif how == "empty":
        weights[name] = torch.zeros(*tensor.shape[:-1], 0)
    lines = get_complaints(convert, weights, transformer_config=HEADS)
    assert [line for line in lines[2:] if not line.startswith("wrong channels")] == [
        line for line in lines if f" {name} " in line and not line.startswith("wrong channels")
    ]
    assert lines[2:]


def test_nothing_of_a_transformer(convert, weights):
    bare = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.model.")}
    lines = get_complaints(convert, bare)
    assert "missing: decoder.model.x_embedder.proj.weight (64, 8, 1, 1)" in lines
    assert "missing: decoder.model.y_embedder.y_embedding (8192, 48)" in lines


def test_base_weights_are_held_to_the_same(golden_edit, convert, weights, tmp_path):
    bare = {name: weights[name] for name in weights if not name.startswith(("mllm.", "decoder.vae."))}
    qwen = tmp_path / "qwen"
    shutil.copytree(golden_edit.path / "qwen", qwen)
    base = load_file(qwen / "model.safetensors")
    base["model.norm.weights"] = base.pop("model.norm.weight")
    save_file(base, qwen / "model.safetensors")
    del bare["projector.0.bias"]
    lines = get_complaints(convert, bare, text_encoder=qwen)
    assert lines[1:] == [
        f"{tmp_path / 'changed.safetensors'}:",
        "missing: projector.0.bias (48,)",
        f"{qwen}:",
        "missing: model.norm.weight (32,)",
        "unknown: model.norm.weights (32,)",
    ]


def test_integers_are_no_weights(convert, weights):
    weights["projector.0.bias"] = torch.zeros(48, dtype=torch.int64)
    assert get_complaints(convert, weights)[2:] == [
        "wrong type: projector.0.bias is I64, expected one of F64, F32, F16, BF16"
    ]


def test_neither_edit_nor_t2i(convert, weights):
    weights["decoder.model.x_embedder.proj.weight"] = torch.zeros(64, 12, 1, 1)
    lines = get_complaints(convert, weights, transformer_config=HEADS)
    assert lines[2:] == [
        "wrong channels: decoder.model.x_embedder.proj.weight takes 12 and decoder.model.final_layer.linear.weight"
        " gives 4; expected twice as many in as out (edit) or as many (text-to-image)"
    ]


def test_channels_have_to_be_the_vaes(convert, weights):
    weights["decoder.model.x_embedder.proj.weight"] = torch.zeros(64, 6, 1, 1)
    weights["decoder.model.final_layer.linear.weight"] = torch.zeros(3, 64)
    weights["decoder.model.final_layer.linear.bias"] = torch.zeros(3)
    assert get_complaints(convert, weights, transformer_config=HEADS)[2:] == [
        "wrong channels: decoder.model.final_layer.linear.weight gives 3, but the VAE's latents have 4"
    ]


@pytest.mark.parametrize(
    "kind, designer, found",
    [("edit", "default", "self"), ("t2i", "default", None), ("edit", "none", None), ("t2i", "self", "self")],
)
def test_the_designer_is_the_models_own_for_edits_unless_told_otherwise(kind, designer, found, request, tmp_path):
    golden = request.getfixturevalue(f"golden_{kind}")
    folder = convert_released_checkpoint(
        golden.path / "model.safetensors",
        golden.path / "qwen",
        golden.path / "vae_base",
        tmp_path / "model",
        transformer_config=golden.path / "transformer_config.json",
        designer=designer,
    ).path
    assert json.loads((folder / "model_index.json").read_text())["designer"] == found


def test_an_unknown_designer_is_refused(golden_edit, convert, tmp_path):
    with pytest.raises(ValueError, match='"default", "self" or "none", but is \'gpt-4o\''):
        convert(golden_edit.path / "model.safetensors", designer="gpt-4o")
    assert not (tmp_path / "output").exists()


def test_config_and_checkpoint_have_to_agree(golden_t2i, convert):
    """A T2I checkpoint with the edit model's configuration."""
    lines = get_complaints(convert, golden_t2i.path)
    assert lines[2:] == ["wrong shape: decoder.model.x_embedder.proj.weight is (64, 4, 1, 1), expected (64, 8, 1, 1)"]


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_truncated_file(golden_edit, convert, length, tmp_path):
    path = tmp_path / "truncated.safetensors"
    path.write_bytes((golden_edit.path / "model.safetensors").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"truncated\.safetensors is truncated or not a safetensors file"):
        convert(path)
    assert [item.name for item in tmp_path.iterdir()] == ["truncated.safetensors"]


def test_truncated_shard(convert, weights, tmp_path):
    folder = save_shards(weights, tmp_path / "sharded", max_shard_size=200_000)
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated"):
        convert(folder)


def test_absent_shard(convert, weights, tmp_path):
    folder = save_shards(weights, tmp_path / "sharded", max_shard_size=200_000)
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names files that are not there.*{shard.name}"):
        convert(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "JSON object"), ("{}", "no `weight_map`")])
def test_broken_index(convert, text, message, tmp_path):
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json.*{message}"):
        convert(tmp_path / "sharded")


def test_several_checkpoints_in_a_folder(golden_edit, golden_t2i, convert, tmp_path):
    for name, golden in (("a", golden_edit), ("b", golden_t2i)):
        shutil.copytree(golden.path, tmp_path / "both" / name)
    with pytest.raises(ValueError, match="holds several checkpoints"):
        convert(tmp_path / "both")


@pytest.mark.parametrize("argument", ["checkpoint", "text_encoder", "vae", "transformer_config"])
def test_absent_path(golden_edit, convert, argument, tmp_path):
    arguments = {"checkpoint": golden_edit.path, argument: tmp_path / "absent"}
    with pytest.raises(FileNotFoundError, match=f"`{argument}`: there is no file.*absent"):
        convert(**arguments)


@pytest.mark.parametrize(
    ("argument", "base", "file"),
    [
        ("checkpoint", ".", "model.safetensors"),
        ("text_encoder", "qwen", "config.json"),
        ("text_encoder", "qwen", "preprocessor_config.json"),
        ("text_encoder", "qwen", "model.safetensors"),
        ("vae", "vae_base", "config.json"),
        ("vae", "vae_base", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_absent_file(golden_edit, convert, weights, argument, base, file, tmp_path):
    bare = {name: weights[name] for name in weights if not name.startswith(("mllm.", "decoder.vae."))}
    save_file(bare, tmp_path / "bare.safetensors")
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("qwen", "vae_base", file) if base == "." else shutil.ignore_patterns(file)
    shutil.copytree(golden_edit.path / base, copy, ignore=ignore)
    (copy / "golden.safetensors").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=f"`{argument}`: there is no {file}"):
        convert(**{"checkpoint": tmp_path / "bare.safetensors", argument: copy})
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("dtype", "float16", r"`dtype` has to be one of \['float32', 'bfloat16'\], but is float16"),
        ("dtype", torch.float16, "`dtype` has to be one of"),
        ("default_guidance_scale", -1.0, "`default_guidance_scale` has to be at least 0, but is -1"),
        ("default_guidance_scale", math.nan, "`default_guidance_scale`"),
        ("max_shard_size", "5 apples", "5 apples"),
        ("transformer_config", {"layers": 2}, r"`transformer_config` holds \['layers'\]"),
    ],
)
def test_bad_argument(golden_edit, convert, argument, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(golden_edit.path, **{argument: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("argument", "base"), [("text_encoder", "vae_base"), ("vae", "qwen")])
def test_the_wrong_kind_of_base(golden_edit, convert, argument, base):
    with pytest.raises(ValueError, match=f"`{argument}`: .*config.json has to be of a model with"):
        convert(golden_edit.path, **{argument: golden_edit.path / base})


def test_output_that_holds_something_is_left_alone(golden_edit, convert, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"`output` has to be a new or an empty folder, but .*output already holds"):
        convert(golden_edit.path)
    assert [path.name for path in tmp_path.rglob("*")] == ["output", "mine.txt"]


def test_output_may_be_an_empty_folder_or_lie_in_new_ones(golden_edit, convert, edit_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_same_files(convert(golden_edit.path, output=tmp_path / "empty").path, edit_folder)
    assert_same_files(convert(golden_edit.path, output=tmp_path / "new" / "newer").path, edit_folder)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_half_written_stays(golden_edit, convert, error, exists, monkeypatch, tmp_path):
    if exists:
        (tmp_path / "output").mkdir()
    written = []

    def failing_save_file(tensors, path, metadata):
        if len(written) == 4:
            raise error
        save_file(tensors, path, metadata)
        written.append(path)

    monkeypatch.setattr(released, "save_file", failing_save_file)
    with pytest.raises(type(error)):
        convert(golden_edit.path, max_shard_size="50KB")
    assert len(written) == 4
    assert [path.name for path in tmp_path.rglob("*")] == (["output"] if exists else [])

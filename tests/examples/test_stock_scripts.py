"""
What diffusers' own scripts for SANA train, on our components and for them. Tests that run a script want a checkout of
huggingface/diffusers in DIFFUSERS_REPO.
"""

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from diffusers_dim import DIMEditPipeline, DIMPipeline, DIMTransformer2DModel


WEIGHTS = "pytorch_lora_weights.safetensors"
DREAMBOOTH = "dreambooth/train_dreambooth_lora_sana.py"
SPRINT = "research_projects/sana/train_sana_sprint_diffusers.py"
SIZE = 64


@pytest.fixture(scope="module")
def picture(golden_edit) -> Image.Image:
    return Image.open(golden_edit.path / "source.png").convert("RGB").resize((SIZE, SIZE))


@pytest.fixture(scope="module")
def as_sana(golden_t2i, tmp_path_factory):
    """
    `as_sana(folder)`: a SanaPipeline's folder around the transformer and the autoencoder of a folder of DIM's, with a
    text encoder as wide as the golden transformers' conditions.
    """
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=json.loads((golden_t2i.path / "transformer_config.json").read_text())["caption_channels"],
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    torch.manual_seed(0)
    text_encoder = Gemma2Model(config)

    def as_sana(base: Path) -> Path:
        pipe = SanaPipeline(
            tokenizer=GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[]),
            text_encoder=text_encoder,
            vae=AutoencoderDC.from_pretrained(base, subfolder="vae"),
            transformer=SanaTransformer2DModel.from_pretrained(base, subfolder="transformer"),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        folder = tmp_path_factory.mktemp("as_sana")
        pipe.save_pretrained(folder)
        return folder

    return as_sana


@pytest.fixture(scope="module")
def run_stock(tmp_path_factory):
    """
    Runs a script of diffusers for two steps: `run_stock(script, model, option=value, ...)` gives the finished process
    and the folder of its output.
    """
    if "DIFFUSERS_REPO" not in os.environ:
        pytest.skip(
            "diffusers' examples are no part of its package: set DIFFUSERS_REPO to a checkout of its repository"
        )

    def run_stock(name: str, model: Path, *flags: str, **options) -> tuple[subprocess.CompletedProcess, Path]:
        script = Path(os.environ["DIFFUSERS_REPO"]) / "examples" / name
        if not script.exists():
            pytest.skip(f"DIFFUSERS_REPO holds no examples/{name}")
        output = tmp_path_factory.mktemp("stock")
        options |= {
            "pretrained_model_name_or_path": model,
            "output_dir": output,
            "resolution": SIZE,
            "max_train_steps": 2,
            "learning_rate": 0.1,
            "lr_warmup_steps": 0,
            "seed": 0,
        }
        command = [sys.executable, str(Path(__file__).with_name("run_stock_script.py")), str(script), *flags]
        for option, value in options.items():
            command += [f"--{option}", str(value)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600), output

    return run_stock


@pytest.fixture(scope="module")
def train_lora(run_stock, picture, tmp_path_factory):
    """`train_lora(model)`: the DreamBooth script on one picture."""
    pictures = tmp_path_factory.mktemp("pictures")
    picture.save(pictures / "0.png")
    data = {"instance_data_dir": pictures, "instance_prompt": "a red circle", "max_sequence_length": 16}

    def train_lora(model: Path) -> tuple[subprocess.CompletedProcess, Path]:
        return run_stock(DREAMBOOTH, model, "--center_crop", train_batch_size=1, **data)

    return train_lora


def load(pipeline: type[DIMPipeline], base: Path, lora: Path) -> DIMPipeline:
    pipe = pipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora)
    return pipe


def assert_every_weight_is_in_use(pipe: DIMPipeline, lora: Path) -> None:
    saved = load_file(lora / WEIGHTS)
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="default_0")
    assert {f"transformer.{name}" for name in layers} == saved.keys()
    assert all(torch.equal(layer, saved[f"transformer.{name}"]) for name, layer in layers.items())


def assert_the_lora_shows(pipe: DIMPipeline, *source: Image.Image) -> None:
    settings = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "latent"}
    painted = []
    for switch in (pipe.enable_lora, pipe.disable_lora):
        switch()
        generator = torch.Generator().manual_seed(0)
        painted.append(pipe(*source, prompt="Make it red.", generator=generator, **settings).images)
    pipe.enable_lora()
    assert not torch.allclose(*painted, atol=1e-2)


def predict(transformer: SanaTransformer2DModel, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config
    latents = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    condition = torch.randn(2, 5, config.caption_channels, generator=generator)
    with torch.no_grad():
        return transformer(latents, condition, timestep=torch.tensor([700, 200])).sample


# Weights


@pytest.mark.parametrize("folder", ["t2i_folder", "edit_folder"])
def test_sanas_transformer_reads_dims_and_computes_the_same(request, folder):
    path = request.getfixturevalue(folder)
    stock = SanaTransformer2DModel.from_pretrained(path, subfolder="transformer")
    ours = DIMTransformer2DModel.from_pretrained(path, subfolder="transformer")
    weights, expected = stock.state_dict(), ours.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    torch.testing.assert_close(predict(stock), predict(ours), rtol=0, atol=1e-5)


# LoRA


@pytest.fixture(scope="module")
def sana_lora(t2i_folder, tmp_path_factory) -> tuple[SanaTransformer2DModel, Path]:
    """SANA's transformer with a LoRA of a few training steps, and the file that SanaPipeline makes of it."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel.from_pretrained(t2i_folder, subfolder="transformer")
    transformer.requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point", "linear_1"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=layers))
    optimizer = torch.optim.AdamW([weight for weight in transformer.parameters() if weight.requires_grad], lr=0.05)
    latents, target = torch.randn(2, 2, transformer.config.in_channels, 8, 8)
    condition, timestep = torch.randn(2, 5, transformer.config.caption_channels), torch.tensor([700, 200])
    for _ in range(2):
        prediction = transformer(latents, condition, timestep=timestep).sample
        (prediction - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("sana_lora")
    SanaPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return transformer.eval(), folder


def test_lora_trained_on_sanas_transformer_computes_the_same_in_dims(sana_lora, t2i_folder):
    stock, folder = sana_lora
    pipe = load(DIMPipeline, t2i_folder, folder)
    assert_every_weight_is_in_use(pipe, folder)
    expected = predict(stock)
    torch.testing.assert_close(predict(pipe.transformer), expected, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    assert not torch.allclose(predict(pipe.transformer), expected, atol=1e-2)


def test_lora_trained_on_sanas_transformer_paints_the_same_pictures_in_both_pipelines(sana_lora, t2i_folder):
    stock, folder = sana_lora
    pipe = load(DIMPipeline, t2i_folder, folder)
    width = stock.config.caption_channels
    condition, null = torch.randn(2, 1, 5, width, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 5, dtype=torch.long)
    settings = {
        "negative_prompt": None,
        "prompt_embeds": condition,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": null,
        "negative_prompt_attention_mask": mask,
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": 4,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "output_type": "pt",
    }
    sana = SanaPipeline(None, None, pipe.vae, stock, pipe.scheduler)
    pictures = [pipeline(generator=torch.Generator().manual_seed(0), **settings).images for pipeline in (pipe, sana)]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-5)


def test_lora_of_a_text_to_image_transformer_works_in_the_editor(sana_lora, edit_folder, picture):
    _, folder = sana_lora
    pipe = load(DIMEditPipeline, edit_folder, folder)
    assert_every_weight_is_in_use(pipe, folder)
    assert_the_lora_shows(pipe, picture)


# Scripts


def test_stock_script_trains_dims_transformer_inside_sanas_pipeline(
    train_lora, as_sana, t2i_folder, edit_folder, picture
):
    process, lora = train_lora(as_sana(t2i_folder))
    assert process.returncode == 0, process.stderr[-3000:]
    pipe = load(DIMPipeline, t2i_folder, lora)
    assert_every_weight_is_in_use(pipe, lora)
    assert_the_lora_shows(pipe)
    stock = SanaTransformer2DModel.from_pretrained(t2i_folder, subfolder="transformer")
    SanaPipeline(None, None, None, stock, pipe.scheduler).load_lora_weights(lora)
    torch.testing.assert_close(predict(pipe.transformer), predict(stock), rtol=0, atol=1e-5)

    editor = load(DIMEditPipeline, edit_folder, lora)
    assert_every_weight_is_in_use(editor, lora)
    assert_the_lora_shows(editor, picture)


def test_stock_script_finds_no_tokenizer_of_its_kind_in_a_folder_of_dim(train_lora, t2i_folder):
    process, output = train_lora(t2i_folder)
    assert process.returncode == 1
    assert "tokenizer = AutoTokenizer.from_pretrained(" in process.stderr
    assert not (output / WEIGHTS).exists()


def test_stock_script_cannot_feed_the_editors_transformer(train_lora, as_sana, edit_folder):
    process, output = train_lora(as_sana(edit_folder))
    assert process.returncode == 1
    assert "to have 8 channels, but got 4 channels" in process.stderr
    assert not (output / WEIGHTS).exists()


def test_distilled_transformer_paints_the_same_in_sanas_sprint_pipeline(
    run_stock, as_sana, t2i_folder, picture, tmp_path
):
    pixels = BytesIO()
    picture.save(pixels, "PNG")
    data = tmp_path / "data.parquet"
    Dataset.from_dict({"image": [pixels.getvalue()] * 4, "llava": ["a red circle"] * 4}).to_parquet(data)
    process, output = run_stock(
        SPRINT,
        as_sana(t2i_folder),
        dataset_name="parquet",
        file_path=data,
        train_batch_size=2,
        dataloader_num_workers=1,
        head_block_ids=1,
        mixed_precision="bf16",
    )
    assert process.returncode == 0, process.stderr[-3000:]

    def paint(kind: type[SanaTransformer2DModel]) -> torch.Tensor:
        transformer = kind.from_pretrained(output, subfolder="transformer", dtype=torch.float32)
        vae = AutoencoderDC.from_pretrained(t2i_folder, subfolder="vae")
        pipe = SanaSprintPipeline(None, None, vae, transformer, SCMScheduler())
        generator = torch.Generator().manual_seed(0)
        condition = torch.randn(1, 5, transformer.config.caption_channels, generator=generator)
        return pipe(
            prompt_embeds=condition,
            prompt_attention_mask=torch.ones(1, 5),
            height=SIZE,
            width=SIZE,
            num_inference_steps=2,
            generator=generator,
            use_resolution_binning=False,
            output_type="pt",
        ).images

    torch.testing.assert_close(paint(DIMTransformer2DModel), paint(SanaTransformer2DModel), rtol=0, atol=1e-5)

"""Makes the embedded tiny edit model from nothing, on two CPU cores: `python examples/make_tiny_shapes.py`.

Stages, each skipped where its folder exists already in `--work_dir`:

1. `text_encoder`, `processor`: a byte-level BPE tokenizer of the picture world's words, and a frozen random
   Qwen2.5-VL whose last hidden states keep tokens, their context and the image apart.
2. `vae`: an 8x AutoencoderDC with 16 latent channels, trained on pictures of the world.
3. `base`: a pipeline of the above with an untrained connector and transformer.
4. `edits1`, `conditions1`, `stage1`: pairs of pictures with plain instructions, in the form in which DIM-Edit was
   released; what the frozen models make of them, by `precompute_conditions.py`; and `base` trained on that by
   `train_dim_edit.py`, with checkpoints and loss curve. A run that was stopped goes on from its last checkpoint.
5. `edits2`, `conditions2`, `stage2-1`, `stage2-2`, ...: the same from `stage1` on other edits, each told once by its
   blueprint and once by its plain instruction, in passes that each start from the one before.
6. `figures.json`: success on held-out edits by kind and guidance scale, by instructions and by blueprints.

At last the pipeline is written to `--output` in float16.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffusers_dim import DIMConnector, DIMEditPipeline, DIMProcessor, DIMTransformer2DModel
from diffusers_dim.evaluation.shapes import evaluate_shapes
from diffusers_dim.tiny import TINY_SHAPES
from diffusers_dim.tiny.dataset import write_edits
from diffusers_dim.tiny.scenes import SHAPE_COLORS
from diffusers_dim.tiny.world import sample_edits, sample_scenes
from diffusers_dim.training.setup import cpu_emulates_bfloat16


HELD_OUT_SEED = 1_000_000_007
# Steps and learning rate of each pass of stage 2: one cosine, then warm restarts.
STAGE2_PASSES = ((1800, 5e-4), (1500, 7e-4), (1500, 6e-4))
# Qwen2.5-VL's own special tokens, in the order of their ids, and its chat template.
SPECIAL_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Not yet said by the world, but single tokens all the same: relations, counts and sizes, so that the world can grow
# without a new tokenizer.
SPARE_WORDS = """
    above below beside between next near under over inside outside behind left right leftmost rightmost highest lowest
    nearest farthest first last one two three four five six seven eight nine every each both all other others same
    different than not and or bigger smaller larger largest smallest big tiny double half size resize grow shrink
    rotate flip mirror swap row column edge side corner shapes circles squares triangles stars count many only keep
    everything dark light pale bright magenta object objects
"""
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "temporal_patch_size": 2,
    "processor_class": "Qwen2_5_VLProcessor",
}


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write aside; it takes the name `folder` when the block ends without an error."""
    aside = folder.with_name(folder.name + ".part")
    aside.mkdir(parents=True, exist_ok=True)
    yield aside
    os.replace(aside, folder)


def train_tokenizer(seed: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE on the world's text until each of its words, with its leading space, is one token."""
    edits = sample_edits(20000, seed, size=32)
    text = [sample.instruction for sample in edits] + [sample.blueprint for sample in edits[:4000]]
    text += [caption for _, caption in sample_scenes(2000, seed, size=32)]
    text += [f" {word}" for word in SPARE_WORDS.split()] * 2
    text += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 2
    backend = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=4000, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token != "<|endoftext|>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _look_back(distances: tuple[int, ...], frequencies: torch.Tensor, strength: float) -> torch.Tensor:
    """Query biases with which heads look so many tokens back, for keys whose bias is 1 in the first half, else 0.

    Rotary embeddings turn query q at m and key k at n into sum_i |q_i||k_i| cos(f_i (m - n) - phase_i), which is
    greatest at m - n = distance where phase_i = f_i distance. The result has shape (heads, head_dim).
    """
    phase = torch.tensor(distances)[:, None] * frequencies
    return strength * torch.cat([phase.cos(), -phase.sin()], dim=1)


@torch.no_grad()
def initialize_text_encoder(model: Qwen2_5_VLForConditionalGeneration, seed: int) -> None:
    """Give the frozen encoder weights that keep apart what was said, where it was said, and beside what.

    Embeddings are N(0, 1). In each layer the first group of heads looks a fixed number of tokens back (a painter's
    cross-attention knows no word order, so each state must carry its neighbours); the second looks for content, with
    logits of standard deviation 2.5. What attention brings is as large as the token's own state.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal_(weight: torch.Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    config = model.config.text_config
    width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    heads_of_group = config.num_attention_heads // config.num_key_value_heads
    frequencies = model.model.language_model.rotary_emb.inv_freq.float()
    normal_(model.model.language_model.embed_tokens.weight, 1.0)
    for layer, distances in zip(model.model.language_model.layers, ((1, 2), (1, 3)), strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj):
            normal_(projection.weight, (2.5 / width) ** 0.5)
            projection.bias.zero_()
        local = heads_of_group * head_dim
        attention.q_proj.weight[:local] = 0.0
        attention.k_proj.weight[:head_dim] = 0.0
        attention.q_proj.bias[:local] = _look_back(distances, frequencies, 24.0).flatten()
        attention.k_proj.bias[: head_dim // 2] = 1.0
        normal_(attention.v_proj.weight, width**-0.5)
        attention.v_proj.bias.zero_()
        normal_(attention.o_proj.weight, 1.2 * width**-0.5)
        normal_(mlp.gate_proj.weight, width**-0.5)
        normal_(mlp.up_proj.weight, width**-0.5)
        normal_(mlp.down_proj.weight, 0.4 * config.intermediate_size**-0.5)
    for name, parameter in model.model.visual.named_parameters():
        if "norm" in name or "ln_q" in name:
            parameter.fill_(1.0)
        elif parameter.ndim == 1:
            parameter.zero_()
        else:
            normal_(parameter, parameter[0].numel() ** -0.5)
    # After the GELU about two thirds of the size are left: the image tokens get the words' own size.
    model.model.visual.merger.mlp[2].weight *= 1.5


def build_text_encoder(work_dir: Path, seed: int) -> None:
    """Train the tokenizer, initialise the vision-language model, and save `work_dir/processor` and `/text_encoder`."""
    if (work_dir / "text_encoder").exists():
        return
    tokenizer = train_tokenizer(seed)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 8) * 8,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "tokens_per_second": 4,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    initialize_text_encoder(model, seed)
    with finished_folder(work_dir / "processor") as folder:
        tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    with finished_folder(work_dir / "text_encoder") as folder:
        model.half().save_pretrained(folder)
        # Stored in half the bytes, but to be run in float32, as it is when the painter is trained.
        saved = (folder / "config.json").read_text()
        (folder / "config.json").write_text(saved.replace('"float16"', '"float32"'))


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Stack RGB pictures to a float tensor (batch, 3, height, width) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def new_autoencoder() -> AutoencoderDC:
    """The untrained autoencoder: 8x smaller sides, 16 latent channels, no block at full resolution."""
    return AutoencoderDC(
        latent_channels=16,
        attention_head_dim=16,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(12, 24, 48, 64),
        decoder_block_out_channels=(16, 32, 64, 64),
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
    )


@torch.no_grad()
def measure_autoencoder(vae: AutoencoderDC, count: int = 200) -> dict[str, float]:
    """Reconstruction of held-out pictures: PSNR in dB over whole pictures and over the insides of shapes."""
    pixels = to_tensor([image for image, _ in sample_scenes(count, HELD_OUT_SEED)])
    latents = torch.cat([vae.encode(batch).latent for batch in pixels.split(50)])
    decoded = torch.cat([vae.decode(batch).sample for batch in latents.split(50)]).clamp(-1, 1)
    error = ((decoded - pixels) / 2).square().mean(dim=1)
    palette = torch.tensor(list(SHAPE_COLORS.values())) / 127.5 - 1.0
    inside = ((pixels[:, None] - palette[None, :, :, None, None]).abs().amax(dim=2) < 1e-4).any(dim=1)
    psnr = -10 * error.mean(dim=(1, 2)).log10()
    psnr_inside = -10 * ((error * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2))).log10()
    channel_std = latents.std(dim=(0, 2, 3))
    noisy = latents + 0.1 * latents.std() * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    error_noisy = ((vae.decode(noisy).sample.clamp(-1, 1) - pixels) / 2).square().mean(dim=(1, 2, 3))
    return {
        "psnr": psnr.mean().item(),
        "psnr_min": psnr.min().item(),
        "psnr_5_percent": psnr.quantile(0.05).item(),
        "psnr_inside": psnr_inside.mean().item(),
        "psnr_inside_min": psnr_inside.min().item(),
        "psnr_inside_5_percent": psnr_inside.quantile(0.05).item(),
        "psnr_latents_with_10_percent_noise": (-10 * error_noisy.log10()).mean().item(),
        "latents_std": latents.std().item(),
        "latents_mean": latents.mean().item(),
        "latents_channel_std_min": channel_std.min().item(),
        "latents_channel_std_max": channel_std.max().item(),
    }


def train_autoencoder(work_dir: Path, seed: int, steps: int = 6000, batch_size: int = 16) -> None:
    """Train the autoencoder on fresh pictures of the world and save it, float32, to `work_dir/vae`.

    The latents get a little noise, so that the decoder forgives a painter's small errors, and a pull of each channel
    to mean 0 and standard deviation 1. The loss curve and the final figures go to `work_dir/vae_training.json`.
    """
    if (work_dir / "vae").exists():
        return
    torch.manual_seed(seed)
    vae = new_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    curve = []
    start = time.time()
    for step in tqdm(range(steps), desc="autoencoder", mininterval=10):
        rate = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        pictures = sample_scenes(batch_size, seed * 10_000_000 + step)
        pixels = to_tensor([image for image, _ in pictures]).contiguous(memory_format=torch.channels_last)
        # Bfloat16 is faster here, but too coarse for the last decibels: the end is trained in float32.
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 0.75 * steps):
            latents = vae.encode(pixels).latent.float()
            level = 0.1 * torch.rand(batch_size, 1, 1, 1) * latents.detach().std()
            decoded = vae.decode(latents + level * torch.randn_like(latents)).sample.float()
        spread = (latents.mean(dim=(0, 2, 3)).square() + (latents.std(dim=(0, 2, 3)) - 1).square()).mean()
        error = decoded - pixels
        loss = error.square().mean() + 0.1 * error.abs().mean() + 0.01 * spread
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(vae)
        if step % 50 == 0 or step == steps - 1:
            curve.append(
                {
                    "step": step,
                    "seconds": round(time.time() - start, 1),
                    "loss": loss.item(),
                    "psnr": -10 * math.log10(error.detach().square().mean().item() / 4),
                    "spread": spread.item(),
                }
            )
            (work_dir / "vae_training.json").write_text(json.dumps({"curve": curve}, indent=1))
            if step % 500 == 0:
                print(json.dumps(curve[-1]), flush=True)
    vae.load_state_dict(average.module.state_dict())
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    figures = measure_autoencoder(vae)
    figures["parameters"] = sum(parameter.numel() for parameter in vae.parameters())
    figures["seconds"] = round(time.time() - start, 1)
    (work_dir / "vae_training.json").write_text(json.dumps({"figures": figures, "curve": curve}, indent=1))
    print(json.dumps(figures, indent=1), flush=True)
    vae.register_to_config(scaling_factor=round(1 / figures["latents_std"], 5))
    with finished_folder(work_dir / "vae") as folder:
        vae.save_pretrained(folder)


def build_base(work_dir: Path, seed: int) -> None:
    """Save the pipeline with an untrained painter to `work_dir/base`."""
    if (work_dir / "base").exists():
        return
    torch.manual_seed(seed)
    vae = AutoencoderDC.from_pretrained(work_dir / "vae")
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(work_dir / "text_encoder", dtype=torch.float32)
    transformer = DIMTransformer2DModel(
        in_channels=2 * vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=5,
        num_cross_attention_heads=6,
        cross_attention_head_dim=32,
        cross_attention_dim=192,
        caption_channels=128,
        mlp_ratio=2.0,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
    )
    pipe = DIMEditPipeline(
        text_encoder=text_encoder,
        processor=DIMProcessor.from_pretrained(work_dir / "processor"),
        connector=DIMConnector(text_encoder.config.text_config.hidden_size, 128, max_sequence_length=512),
        transformer=transformer,
        vae=vae,
        scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        default_guidance_scale=2.5,
    )
    with finished_folder(work_dir / "base") as folder:
        pipe.save_pretrained(folder)


def fast_precision() -> str:
    """The mixed precision to train in here."""
    return "bf16" if torch.cuda.is_available() or not cpu_emulates_bfloat16() else "no"


def launch(script: str, options: dict[str, object], mixed_precision: str = "no") -> None:
    """Run an example by accelerate on all cores; an option without a value is a flag."""
    # Without a number accelerate gives a process one thread.
    threads = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--num_cpu_threads_per_process", threads, "--mixed_precision", mixed_precision]
    command += [str(Path(__file__).parent / script)]
    for name, value in options.items():
        command += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    subprocess.run(command, check=True)


def train_stage(
    work_dir: Path,
    stage: int,
    start: str,
    output: Path,
    seed: int,
    number: int,
    edits: int,
    steps: int,
    learning_rate: float,
    precision: str,
) -> None:
    """
    Train connector, null condition and transformer of the pipeline `work_dir/{start}` on the stage's `edits` edits for
    `steps` steps of 64, along a cosine of the learning rate, to the pipeline `output`. `number` is the pass's.
    """
    data, conditions = (work_dir / f"{name}{stage}" for name in ("edits", "conditions"))
    if not data.exists():
        with finished_folder(data) as aside:
            write_edits(aside, edits, seed + 1_000_003 * (stage - 1), prompts="both" if stage == 2 else "instruction")
    model = {"pretrained_model_name_or_path": work_dir / start, "resolution": 64}
    launch(
        "precompute_conditions.py",
        {**model, "kind": "edit", "jsonl": data / "edits.jsonl", "output_dir": conditions, "batch_size": 64},
    )
    if (output / "model_index.json").exists():
        return
    launch(
        "train_dim_edit.py",
        {
            **model,
            "precomputed_conditions": conditions,
            "group_by_length": None,
            "output_dir": output,
            "seed": seed + number,
            "train_batch_size": 64,
            "max_train_steps": steps,
            "learning_rate": learning_rate,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 200,
            "max_grad_norm": 1.0,
            "use_ema": None,
            "ema_decay": 0.999,
            "checkpointing_steps": 500,
            "checkpoints_total_limit": 2,
            "resume_from_checkpoint": "latest",
            "validation_shapes": 60,
            "validation_shapes_prompt": "blueprint" if stage == 2 else "instruction",
            "validation_steps": 1000,
        },
        precision,
    )


def export(work_dir: Path, output: Path) -> None:
    """Write the trained pipeline to `output` in float16, for the wheel's sake; it loads and runs in float32."""
    pipe = DIMEditPipeline.from_pretrained(work_dir / f"stage2-{len(STAGE2_PASSES)}", dtype=torch.float32)
    text_encoder = work_dir / "text_encoder"
    pipe.to(dtype=torch.float16)
    with finished_folder(output) as folder:
        pipe.save_pretrained(folder, self_contained=False)  # the package is there where the model is
        shutil.copyfile(Path(TINY_SHAPES) / "README.md", folder / "README.md")
        shutil.copytree(text_encoder, folder / "text_encoder", dirs_exist_ok=True)
        for path in folder.rglob("*.json"):
            config = json.loads(path.read_text())
            if config.pop("_name_or_path", None) is not None:  # where it was made is of no use elsewhere
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def measure(work_dir: Path, model: Path, count: int) -> None:
    """Edit held-out samples, at several guidance scales by plain instructions, and keep the success by kind."""
    if (work_dir / "figures.json").exists():
        return
    pipe = DIMEditPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    samples = sample_edits(count, HELD_OUT_SEED + 2)
    figures = {}
    for guidance_scale in (1.0, 1.5, 2.0, 2.5, 3.0, 4.5):
        report = evaluate_shapes(pipe, samples, guidance_scale=guidance_scale)
        print(f"instructions, guidance {guidance_scale}\n{report}", flush=True)
        figures[str(guidance_scale)] = report.to_dict()
    report = evaluate_shapes(pipe, samples, blueprints=True)
    print(f"blueprints\n{report}", flush=True)
    figures["blueprints"] = report.to_dict()
    (work_dir / "figures.json").write_text(json.dumps(figures, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(".tiny_work"))
    parser.add_argument("--output", type=Path, help="Where the pipeline goes; `work_dir/shapes` by default.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage1_edits", type=int, default=40_000)
    parser.add_argument("--stage1_steps", type=int, default=3600)
    parser.add_argument("--stage2_edits", type=int, default=10_000)
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "bf16"],
        default=fast_precision(),
        help="bf16 by default on a GPU or with AVX-512, otherwise no.",
    )
    parser.add_argument("--held_out", type=int, default=300, help="Edits to measure success on.")
    args = parser.parse_args()
    output = args.output or args.work_dir / "shapes"
    if output.exists():
        parser.error(f"{output} exists already.")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    build_text_encoder(args.work_dir, args.seed)
    train_autoencoder(args.work_dir, args.seed)
    build_base(args.work_dir, args.seed)
    passes = [("stage1", 1, args.stage1_edits, args.stage1_steps, 1e-3)]
    passes += [(f"stage2-{i}", 2, args.stage2_edits, *settings) for i, settings in enumerate(STAGE2_PASSES, start=1)]
    start = "base"
    for number, (name, stage, *settings) in enumerate(passes, start=1):
        output_dir = args.work_dir / name
        train_stage(args.work_dir, stage, start, output_dir, args.seed, number, *settings, args.mixed_precision)
        start = name
    export(args.work_dir, output)
    measure(args.work_dir, output, args.held_out)


if __name__ == "__main__":
    main()

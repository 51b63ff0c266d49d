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
"""The first steps that the training scripts share: accelerator, data, and the checks that need no weights."""

import argparse
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderDC, DiffusionPipeline

from ..data import SkippedSamples, TrainingLoader, load_training_data
from ..data.records import Kind
from ..files import write_lines
from ..pipelines import DIMPipeline
from .checkpoints import checkpoint_step, latest_checkpoint
from .conditions import PrecomputedDataset, read_vae_facts
from .distributed import MIXED_DTYPES, check_optimizer, distributed_accelerator, shard_frozen
from .model_card import push_to_hub, save_model_card
from .monitor import draw_curves


logger = logging.getLogger(__name__)

FROZEN_COMPONENTS = ("text_encoder", "processor", "vae")
PIPELINE_KINDS = {"DIMEditPipeline": "edit", "DIMPipeline": "t2i", "SanaPipeline": "sana"}


def cpu_emulates_bfloat16() -> bool:
    """
    Whether bfloat16 on this processor is emulated: an x86 one without AVX-512, where a training step takes many times
    as long as in float32.
    """
    return torch.backends.cpu.get_cpu_capability() in ("NO AVX", "AVX2")


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """
    The accelerator of the run options, with seeds, logging and TF32 set. `args.mixed_precision` and
    `args.frozen_dtype` take the launcher's where none was given.
    """
    accelerator = distributed_accelerator(
        args.train_batch_size,
        args.max_grad_norm,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))
        ),
    )
    args.mixed_precision = accelerator.mixed_precision
    if args.frozen_dtype is None:
        dtype = MIXED_DTYPES.get(accelerator.mixed_precision, torch.float32)
        args.frozen_dtype = str(dtype).removeprefix("torch.")
    check_optimizer(accelerator, optimizer_settings(args, accelerator)["name"])
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.INFO if accelerator.is_main_process else logging.WARNING,
    )
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.device.type == "cpu":
        # At a few dozen tokens a CPU's fused attention has a backward slower than the plain one's.
        torch.backends.cuda.enable_flash_sdp(False)
        if accelerator.mixed_precision == "bf16" and cpu_emulates_bfloat16():
            logger.warning("This processor has no bfloat16: --mixed_precision no trains many times as fast.")
    return accelerator


def read_pipeline_kind(args: argparse.Namespace, allowed: tuple[str, ...]) -> str:
    """
    What `--pretrained_model_name_or_path` holds, by its `model_index.json`: "edit", "t2i" or "sana".

    Raises:
        ValueError: If it is of none of the `allowed` kinds, or a SanaPipeline without `--text_encoder_name_or_path`.
    """
    path = args.pretrained_model_name_or_path
    class_name = DiffusionPipeline.load_config(path, revision=args.revision)["_class_name"]
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    kind = PIPELINE_KINDS.get(class_name)
    if kind not in allowed:
        names = [name for name, of in PIPELINE_KINDS.items() if of in allowed]
        raise ValueError(f"{path} holds a {class_name}, but this script trains from a {' or '.join(names)}.")
    if kind == "sana" and args.text_encoder_name_or_path is None:
        raise ValueError("A SanaPipeline needs a vision-language model: give --text_encoder_name_or_path.")
    return kind


def open_data(args: argparse.Namespace, kind: Kind) -> Any:
    """Samples by the data options, or the encoded ones of `--precomputed_conditions`; `kind` is "edit" or "t2i"."""
    if getattr(args, "precomputed_conditions", None) is not None:
        return PrecomputedDataset(args.precomputed_conditions, args.max_train_samples)
    columns = {
        "source": getattr(args, "original_image_column", None),
        "target": getattr(args, "edited_image_column", None) or getattr(args, "image_column", None),
        "prompt": getattr(args, "edit_prompt_column", None) or getattr(args, "caption_column", None),
    }
    return load_training_data(
        kind,
        jsonl=args.jsonl,
        image_root=args.image_root,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        dataset_revision=args.dataset_revision,
        split=args.dataset_split,
        train_data_dir=args.train_data_dir,
        streaming=args.streaming,
        columns={name: column for name, column in columns.items() if column is not None} or None,
        max_train_samples=args.max_train_samples,
        cache_dir=args.cache_dir,
    )


def create_loader(args: argparse.Namespace, dataset: Any, accelerator: Accelerator) -> TrainingLoader:
    """This process's part of the batches; unreadable samples are listed in the output folder."""
    config = AutoencoderDC.load_config(args.pretrained_model_name_or_path, subfolder="vae", revision=args.revision)
    return TrainingLoader(
        dataset,
        args.train_batch_size,
        resolution=args.resolution,
        vae_scale_factor=read_vae_facts(config)["vae_scale_factor"],
        aspect_ratio_bucketing=args.aspect_ratio_bucketing,
        group_by_length=args.group_by_length,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        num_workers=args.dataloader_num_workers,
        skipped=SkippedSamples(args.output_dir, accelerator.process_index),
    )


def count_train_steps(args: argparse.Namespace, loader: TrainingLoader) -> int:
    """Optimizer steps in all: `--max_train_steps`, or those of `--num_train_epochs`."""
    if args.max_train_steps is not None:
        return args.max_train_steps
    return math.ceil(args.num_train_epochs * loader.batches_per_epoch / args.gradient_accumulation_steps)


def prepare_pipeline(
    args: argparse.Namespace,
    accelerator: Accelerator,
    loader: TrainingLoader,
    load: Callable[[dict[str, torch.nn.Module | None]], DIMPipeline],
) -> DIMPipeline:
    """
    The pipeline that `load` reads, its frozen models on the device to encode, or `None` with
    `--precomputed_conditions`, which have to fit; with `--shard_text_encoder` each process holds its part of that one.

    Raises:
        ValueError: If the precomputed conditions were made for another model or other settings.
    """
    if args.precomputed_conditions is not None:
        pipe = load(dict.fromkeys(FROZEN_COMPONENTS))
        loader.dataset.check(pipe, args)
        return pipe
    pipe = load({})
    pipe.text_encoder.requires_grad_(False)
    if args.shard_text_encoder:
        shard_frozen(pipe.text_encoder, accelerator)
    else:
        pipe.text_encoder.to(accelerator.device)
    pipe.vae.requires_grad_(False).to(accelerator.device)
    return pipe


def optimizer_settings(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """What [`create_optimizer`] is told by the optimizer options."""
    scale = args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
    betas = (args.adam_beta1, args.adam_beta2)
    return {
        "name": "adamw8bit" if args.use_8bit_adam else args.optimizer,
        "learning_rate": args.learning_rate * (scale if args.scale_lr else 1),
        "betas": (*betas, args.came_beta3) if args.optimizer == "came" else betas,
        "weight_decay": args.adam_weight_decay,
        "epsilon": args.adam_epsilon,
    }


def begin_run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """
    Writes the options to `run.json` in the output folder and starts the trackers. All processes call it.

    Raises:
        ValueError: If a resumed run had another number of samples a step.
    """
    path = Path(args.output_dir) / "run.json"
    settings = {**vars(args), "global_batch_size": args.train_batch_size * accelerator.num_processes}
    before = json.loads(path.read_text()) if args.resume_from_checkpoint is not None and path.exists() else {}
    if before.get("global_batch_size", settings["global_batch_size"]) != settings["global_batch_size"]:
        raise ValueError(
            f"This run began with {before['global_batch_size']} samples a micro-batch over all processes, but would go"
            f" on with {args.train_batch_size} on each of {accelerator.num_processes}: change --train_batch_size."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, [json.dumps(settings, indent=2)])
    if args.report_to != "none":
        config = {key: value for key, value in settings.items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers(args.tracker_project_name, config)


def resume(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """Loads the checkpoint of `--resume_from_checkpoint`; the optimizer steps before it, 0 without one."""
    if args.resume_from_checkpoint is None:
        return 0
    latest = args.resume_from_checkpoint == "latest"
    path = latest_checkpoint(args.output_dir) if latest else Path(args.resume_from_checkpoint)
    if path is None:
        logger.info("%s holds no checkpoint yet: a new run begins.", args.output_dir)
        return 0
    accelerator.load_state(str(path))
    logger.info("Resumed from %s", path)
    return checkpoint_step(path)


def publish(args: argparse.Namespace, kind: str, accelerator: Accelerator, loader: TrainingLoader) -> None:
    """On one process, when the result is saved: its curves and model card, and with `--push_to_hub` its upload."""
    output_dir = Path(args.output_dir)
    curves = draw_curves(output_dir / "losses.jsonl", output_dir / "losses.png")
    sheets = sorted((output_dir / "validation").glob("*.png"), key=lambda path: int(path.stem))
    facts = {
        "num_processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        "skipped_samples": len(loader.skipped),
    }
    save_model_card(
        output_dir,
        kind=kind,
        args=vars(args),
        facts=facts,
        sheet=sheets[-1] if sheets else None,
        curve=curves,
        repo_id=args.hub_model_id,
    )
    if args.push_to_hub:
        push_to_hub(output_dir, args.hub_model_id or output_dir.resolve().name, private=args.hub_private_repo)

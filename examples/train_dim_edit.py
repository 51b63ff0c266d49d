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
"""
Trains DIM's painter to edit: connector, null condition and transformer learn, vision-language model and VAE do not.

    accelerate launch examples/train_dim_edit.py --pretrained_model_name_or_path EDIT_MODEL \
        --jsonl edits.jsonl --output_dir outputs/edit --resolution 1024 --mixed_precision bf16

The data is a jsonl file with `id`, `image_path`, `image_path_target` and `prompt` a line, as DIM-Edit was released.
"""

import argparse
import json
import logging
import math
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from diffusers_dim import DIMEditPipeline
from diffusers_dim.data import EditDataset, EpochSampler
from diffusers_dim.evaluation.sheets import SheetRow, draw_sheet
from diffusers_dim.training import (
    DIMTrainingModel,
    checkpoint_step,
    latest_checkpoint,
    prune_checkpoints,
    sample_timesteps,
    save_checkpoint,
)


logger = get_logger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train DIM's painter to edit.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path", required=True, help="A DIMEditPipeline folder or repository."
    )
    model.add_argument("--revision", help="Revision of the repository.")
    model.add_argument("--variant", help="Variant of the weights, such as bf16.")
    data = parser.add_argument_group("data")
    data.add_argument("--jsonl", required=True, help="Edits, one a line: id, image_path, image_path_target, prompt.")
    data.add_argument("--image_root", help="What image paths are relative to; the jsonl's own folder by default.")
    data.add_argument("--max_train_samples", type=int, help="Use only the first so many edits.")
    data.add_argument("--resolution", type=int, default=1024, help="Side of the square pictures in pixels.")
    data.add_argument("--max_sequence_length", type=int, default=8192, help="The last condition tokens that are kept.")
    data.add_argument(
        "--cache_latents",
        action="store_true",
        help="Encode all edits once, before training, and keep hidden states and latents in memory.",
    )
    data.add_argument("--dataloader_num_workers", type=int, default=0)
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default="dim-edit-model", help="Checkpoints, and at the end the pipeline.")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--train_batch_size", type=int, default=4, help="Edits a device and step.")
    run.add_argument("--max_train_steps", type=int, required=True, help="Optimizer steps in all.")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action="store_true")
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    run.add_argument(
        "--frozen_dtype",
        choices=["float32", "bfloat16", "float16"],
        help="Of the vision-language model; that of --mixed_precision by default.",
    )
    run.add_argument("--allow_tf32", action="store_true")
    run.add_argument("--checkpointing_steps", type=int, default=500)
    run.add_argument("--checkpoints_total_limit", type=int)
    run.add_argument("--resume_from_checkpoint", help='A checkpoint folder of --output_dir, or "latest".')
    run.add_argument("--report_to", default="none", help='Trackers: "tensorboard", "wandb", "all" or "none".')
    run.add_argument("--logging_dir", default="logs", help="Within --output_dir.")
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument("--learning_rate", type=float, default=2e-5)
    optimizer.add_argument("--lr_scheduler", default="constant_with_warmup")
    optimizer.add_argument("--lr_warmup_steps", type=int, default=2000)
    optimizer.add_argument("--adam_beta1", type=float, default=0.9)
    optimizer.add_argument("--adam_beta2", type=float, default=0.999)
    optimizer.add_argument("--adam_weight_decay", type=float, default=0.0)
    optimizer.add_argument("--adam_epsilon", type=float, default=1e-8)
    optimizer.add_argument("--max_grad_norm", type=float, default=0.1)
    optimizer.add_argument("--use_ema", action="store_true", help="Save the moving average of the weights.")
    optimizer.add_argument("--ema_decay", type=float, default=0.9999)
    optimizer.add_argument(
        "--conditioning_dropout_prob", type=float, default=0.1, help="How often the null condition stands in."
    )
    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_image", nargs="+", help="Pictures to edit while training.")
    validation.add_argument("--validation_prompt", nargs="+", help="Their instructions, one a picture.")
    validation.add_argument("--validation_steps", type=int, default=500)
    args = parser.parse_args(arguments)

    for name in (
        "resolution train_batch_size max_train_steps gradient_accumulation_steps checkpointing_steps validation_steps"
    ).split():
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}.")
    if not args.learning_rate > 0:
        parser.error(f"--learning_rate has to be above 0, but is {args.learning_rate}.")
    if not 0 <= args.conditioning_dropout_prob <= 1:
        parser.error(f"--conditioning_dropout_prob has to lie in [0, 1], but is {args.conditioning_dropout_prob}.")
    if len(args.validation_image or []) != len(args.validation_prompt or []):
        parser.error(
            f"Got {len(args.validation_image or [])} --validation_image for {len(args.validation_prompt or [])}"
            " --validation_prompt: give one instruction a picture."
        )
    for path in [args.jsonl, *(args.validation_image or [])]:
        if not Path(path).is_file():
            parser.error(f"{path} is not a file.")
    if args.resume_from_checkpoint is None and latest_checkpoint(args.output_dir) is not None:
        parser.error(
            f"--output_dir {args.output_dir} holds checkpoints of another run: resume it by --resume_from_checkpoint"
            " latest, or choose another folder."
        )
    return args


@torch.no_grad()
def encode_edits(
    pipe: DIMEditPipeline, samples: list[dict], args: argparse.Namespace
) -> list[dict[str, torch.Tensor]]:
    """What the frozen models make of edits: hidden states `(tokens, hidden_size)`, source and target latents, each."""
    sources, targets = ([sample[name] for sample in samples] for name in ("source", "target"))
    size = (args.resolution, args.resolution)
    hidden_states, mask = pipe.encode_hidden_states(
        [sample["prompt"] for sample in samples],
        sources,
        *size,
        max_sequence_length=min(args.max_sequence_length, pipe.connector.config.max_sequence_length),
    )
    image_latents = pipe.prepare_image_latents(sources, *size, pipe.device)
    latents = pipe.prepare_image_latents(targets, *size, pipe.device)
    return [
        {"hidden_states": row[kept].clone(), "image_latents": source.clone(), "latents": target.clone()}
        for row, kept, source, target in zip(hidden_states, mask, image_latents, latents)
    ]


def collate_encoded(items: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor]:
    """Batches encoded edits, hidden states padded on the right."""
    lengths = torch.tensor([len(item["hidden_states"]) for item in items])
    batch = {name: torch.stack([item[name] for item in items]) for name in ("latents", "image_latents")}
    batch["hidden_states"] = pad_sequence([item["hidden_states"] for item in items], batch_first=True)
    if (lengths != lengths[0]).any():  # nothing padded, no mask
        batch["attention_mask"] = torch.arange(batch["hidden_states"].shape[1]) < lengths[:, None]
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def log_validation(pipe: DIMEditPipeline, args: argparse.Namespace, accelerator: Accelerator, step: int) -> None:
    """Edits the validation pictures and draws them, source and edit, on one sheet: `validation/{step}.png`."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": args.resolution, "width": args.resolution, "max_sequence_length": args.max_sequence_length}
    rows = []
    for path, prompt in zip(args.validation_image, args.validation_prompt):
        source = pipe.image_processor.to_rgb(Image.open(path))[0]
        edit = pipe(source, prompt, generator=torch.Generator().manual_seed(args.seed), **settings).images[0]
        seen = pipe.image_processor.resize_and_crop(source, args.resolution, args.resolution)
        rows.append(SheetRow(prompt, [("source", seen), ("edit", edit)]))
    sheet = draw_sheet(rows, heading=f"Step {step}")
    path = Path(args.output_dir) / "validation" / f"{step}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(sheet), step, dataformats="HWC")
        if tracker.name == "wandb":
            import wandb

            tracker.log({"validation": wandb.Image(sheet)}, step=step)


def open_curve(path: Path, step: int) -> TextIO:
    """The loss curve's file, cut back to `step` where a killed run had gone further than its last checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    curve = open(path, "w")
    curve.writelines(line for line in lines[:step])
    return curve


def main(args: argparse.Namespace) -> None:
    # 1. Accelerator, data, models
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=args.logging_dir),
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    if accelerator.device.type == "cpu":
        # At a few dozen tokens a CPU's fused attention has a backward slower than the plain one's.
        torch.backends.cuda.enable_flash_sdp(False)
    dataset = EditDataset(args.jsonl, args.image_root)
    if args.max_train_samples is not None:
        dataset = Subset(dataset, range(min(args.max_train_samples, len(dataset))))
    global_batch = args.train_batch_size * accelerator.num_processes
    if len(dataset) < global_batch:
        raise ValueError(
            f"{args.jsonl} holds {len(dataset)} edits, fewer than one batch of {args.train_batch_size} on each of"
            f" {accelerator.num_processes} processes: lower --train_batch_size."
        )

    pipe = DIMEditPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=torch.float32
    )
    mixed_dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(accelerator.mixed_precision, "float32")
    frozen_dtype = getattr(torch, args.frozen_dtype or mixed_dtype)
    pipe.text_encoder.requires_grad_(False).to(accelerator.device, frozen_dtype)
    pipe.vae.requires_grad_(False).to(accelerator.device)
    model = DIMTrainingModel(pipe.connector, pipe.transformer, pipe.scheduler.config.flow_shift).train()
    if args.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()

    # 2. Optimizer and schedules
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    # accelerate steps the schedule once a process, so it is told of that many steps.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )

    # 3. The frozen models' part, once for all or batch by batch
    if args.cache_latents:
        pipe.to(accelerator.device)
        encoded = []
        bar = tqdm(range(0, len(dataset), 64), desc="Encoding", disable=not accelerator.is_local_main_process)
        for start in bar:
            samples = [dataset[index] for index in range(start, min(start + 64, len(dataset)))]
            encoded += [{k: v.cpu() for k, v in item.items()} for item in encode_edits(pipe, samples, args)]
        dataset = encoded
    sampler = EpochSampler(len(dataset), args.seed)
    loader = DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        sampler=sampler,
        drop_last=True,
        collate_fn=list,
        num_workers=args.dataloader_num_workers,
    )
    model, optimizer, lr_scheduler, loader = accelerator.prepare(model, optimizer, lr_scheduler, loader)
    ema = None
    if args.use_ema:
        ema = EMAModel(parameters, decay=args.ema_decay)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)

    # 4. Resume
    step = 0
    if args.resume_from_checkpoint:
        latest = args.resume_from_checkpoint == "latest"
        path = latest_checkpoint(args.output_dir) if latest else Path(args.resume_from_checkpoint)
        if path is None or not path.is_dir():
            raise ValueError(f"No checkpoint to resume from: {path or args.output_dir} is not there or holds none.")
        accelerator.load_state(str(path))
        step = checkpoint_step(path)
        logger.info("Resumed from %s", path)
    if accelerator.is_main_process and args.report_to != "none":
        accelerator.init_trackers(
            "dim-edit", {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str))}
        )

    # 5. Train
    logger.info(
        "%d edits, %d a step, steps %d to %d, %.1fM parameters",
        len(dataset),
        global_batch * args.gradient_accumulation_steps,
        step,
        args.max_train_steps,
        sum(p.numel() for p in parameters) / 1e6,
    )
    steps_an_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    bar = tqdm(total=args.max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
    curve = open_curve(Path(args.output_dir) / "losses.jsonl", step) if accelerator.is_main_process else None
    while step < args.max_train_steps:
        epoch, done = divmod(step, steps_an_epoch)
        sampler.epoch = epoch
        batches = accelerator.skip_first_batches(loader, done * args.gradient_accumulation_steps) if done else loader
        losses = []
        for items in batches:
            items = items if args.cache_latents else encode_edits(pipe, items, args)
            batch = collate_encoded(items, accelerator.device)
            # Noise of a step depends on nothing before it, so a resumed run draws what an unbroken one would.
            micro_batch = step * args.gradient_accumulation_steps + len(losses)
            generator = torch.Generator().manual_seed(
                args.seed * 1_000_003 + micro_batch * accelerator.num_processes + accelerator.process_index
            )
            noise = torch.randn(batch["latents"].shape, generator=generator).to(accelerator.device)
            timesteps = sample_timesteps(len(items), generator).to(accelerator.device)
            dropped = torch.rand(len(items), generator=generator) < args.conditioning_dropout_prob

            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = model(**batch, noise=noise, timesteps=timesteps, dropped=dropped.to(noise.device)).mean()
                accelerator.backward(loss)
                grad_norm = None
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                continue

            if ema is not None:
                ema.step(parameters)
            step += 1
            mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            losses = []
            log = {"loss": mean_loss, "lr": lr_scheduler.get_last_lr()[0], "grad_norm": float(grad_norm)}
            bar.update()
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            accelerator.log(log, step=step)
            if curve is not None:
                curve.write(json.dumps({"step": step, **log}) + "\n")

            last = step == args.max_train_steps
            if step % args.checkpointing_steps == 0 or last:
                if curve is not None:
                    curve.flush()
                save_checkpoint(accelerator, args.output_dir, step)
                if accelerator.is_main_process:
                    prune_checkpoints(args.output_dir, args.checkpoints_total_limit)
            if accelerator.is_main_process and args.validation_image and (step % args.validation_steps == 0 or last):
                if ema is not None:
                    ema.store(parameters)
                    ema.copy_to(parameters)
                log_validation(pipe.to(accelerator.device), args, accelerator, step)
                if ema is not None:
                    ema.restore(parameters)
            if last:
                break

    # 6. Save the pipeline
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(parameters)
        pipe.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

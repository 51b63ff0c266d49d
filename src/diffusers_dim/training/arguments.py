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
"""The command line that the training scripts share, in the names of diffusers' examples, and its checks."""

import argparse
import json
from pathlib import Path

from huggingface_hub import get_token

from .checkpoints import latest_checkpoint


# What decides which sample and which noise a step sees, and what a LoRA is: a resumed run must have the same.
FIXED_SETTINGS = (
    "jsonl image_root dataset_name dataset_config_name dataset_revision dataset_split train_data_dir streaming"
    " precomputed_conditions max_train_samples resolution aspect_ratio_bucketing group_by_length"
    " gradient_accumulation_steps seed conditioning_dropout_prob"
    " rank lora_alpha lora_layers lora_dropout use_dora train_connector"
).split()

SOURCES = ("jsonl", "dataset_name", "train_data_dir", "precomputed_conditions")
RESULTS = ("model_index.json", "pytorch_lora_weights.safetensors")


def add_data_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """
    Adds where samples come from and how they are put into batches.

    Args:
        parser (`argparse.ArgumentParser`): The script's parser.
        kind (`str`): "edit" or "t2i"; names the columns as diffusers' instruct_pix2pix or text_to_image example does.
    """
    data = parser.add_argument_group("data", "One of --jsonl, --dataset_name and --train_data_dir.")
    fields = "id, image_path, image_path_target, prompt" if kind == "edit" else "id, image_path, prompt"
    data.add_argument("--jsonl", help=f"Samples, one a line: {fields}.")
    data.add_argument("--image_root", help="What the jsonl's image paths are relative to; its own folder by default.")
    data.add_argument(
        "--dataset_name", help="A dataset of the Hub, or a folder that `datasets` can load or has saved."
    )
    data.add_argument("--dataset_config_name", help="Configuration of the dataset.")
    data.add_argument("--dataset_revision", help="Revision of the dataset on the Hub.")
    data.add_argument("--dataset_split", default="train", help="Split of the dataset.")
    data.add_argument("--train_data_dir", help="A folder of pictures with their metadata file, or of WebDataset tars.")
    data.add_argument("--streaming", action="store_true", help="Read the dataset as it comes, without a copy on disk.")
    if kind == "edit":
        data.add_argument("--original_image_column", help="The dataset's column of pictures before the edit.")
        data.add_argument("--edited_image_column", help="The dataset's column of pictures after the edit.")
        data.add_argument("--edit_prompt_column", help="The dataset's column of instructions or blueprints.")
    else:
        data.add_argument("--image_column", help="The dataset's column of pictures.")
        data.add_argument("--caption_column", help="The dataset's column of captions.")
    data.add_argument("--cache_dir", help="Where `datasets` keeps what it downloads.")
    data.add_argument("--max_train_samples", type=int, help="Use only the first so many samples.")
    data.add_argument("--resolution", type=int, default=1024, help="Side in pixels of the square that is trained at.")
    data.add_argument(
        "--aspect_ratio_bucketing",
        action="store_true",
        help="Keep the pictures' shapes: the nearest of SANA's aspect ratios at the area of --resolution. Without it"
        " the centre square is cut out, as the published code does.",
    )
    data.add_argument("--group_by_length", action="store_true", help="Batch prompts of like length: less padding.")
    data.add_argument("--max_sequence_length", type=int, default=8192, help="The last condition tokens that are kept.")
    data.add_argument("--dataloader_num_workers", type=int, default=0, help="Threads that read pictures ahead.")


def add_run_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """
    Adds precomputed conditions, batches, steps, precision, checkpoints, trackers and the Hub; `output_dir` is the
    default folder.
    """
    run = parser.add_argument_group("run")
    run.add_argument(
        "--precomputed_conditions",
        help="A folder of precompute_conditions.py, in place of other data: no vision-language model and no VAE is"
        " loaded to train.",
    )
    run.add_argument("--output_dir", default=output_dir, help="Checkpoints, curves, and at the end the result.")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--train_batch_size", type=int, default=4, help="Samples a device and micro-batch.")
    run.add_argument("--num_train_epochs", type=int, help="Passes over the data, in place of --max_train_steps.")
    run.add_argument("--max_train_steps", type=int, help="Optimizer steps in all.")
    run.add_argument("--gradient_accumulation_steps", type=int, default=1)
    run.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, a third more arithmetic.")
    run.add_argument("--compile", action="store_true", help="Compile the transformer's blocks by torch.compile.")
    run.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="accelerate's own by default.")
    run.add_argument(
        "--frozen_dtype",
        choices=["float32", "bfloat16", "float16"],
        help="Of the vision-language model; that of --mixed_precision by default.",
    )
    run.add_argument(
        "--shard_text_encoder",
        action="store_true",
        help="Each process holds a part of the frozen vision-language model, not a whole one.",
    )
    run.add_argument("--allow_tf32", action="store_true", help="TF32 on Ampere GPUs and later.")
    run.add_argument("--checkpointing_steps", type=int, default=500)
    run.add_argument("--checkpoints_total_limit", type=int)
    run.add_argument("--resume_from_checkpoint", help='A checkpoint folder of --output_dir, or "latest".')
    run.add_argument("--report_to", default="none", help='Trackers: "tensorboard", "wandb", "all" or "none".')
    run.add_argument("--logging_dir", default="logs", help="Of tensorboard's files, within --output_dir.")
    run.add_argument("--tracker_project_name", default="diffusers-dim")
    run.add_argument(
        "--device_tflops", type=float, help="The device's dense peak in TFLOP/s, for MFU on a device not in our table."
    )
    run.add_argument("--push_to_hub", action="store_true", help="Upload the result at the end; log in first.")
    run.add_argument("--hub_model_id", help="Repository to upload to; the name of --output_dir by default.")
    run.add_argument("--hub_private_repo", action="store_true")


def add_optimizer_arguments(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    """Adds optimizer, schedule, moving average and objective."""
    optimizer = parser.add_argument_group("optimizer and objective")
    optimizer.add_argument("--learning_rate", type=float, default=learning_rate)
    optimizer.add_argument("--scale_lr", action="store_true", help="Times processes, accumulation and batch size.")
    optimizer.add_argument("--lr_scheduler", default="constant_with_warmup", help="Of diffusers' get_scheduler.")
    optimizer.add_argument("--lr_warmup_steps", type=int, default=500)
    optimizer.add_argument("--lr_num_cycles", type=int, default=1, help='Of "cosine_with_restarts".')
    optimizer.add_argument("--lr_power", type=float, default=1.0, help='Of "polynomial".')
    optimizer.add_argument("--optimizer", choices=["adamw", "came", "prodigy"], default="adamw")
    optimizer.add_argument("--use_8bit_adam", action="store_true", help="AdamW with 8-bit states (bitsandbytes).")
    optimizer.add_argument("--adam_beta1", type=float, default=0.9)
    optimizer.add_argument("--adam_beta2", type=float, default=0.999)
    optimizer.add_argument("--came_beta3", type=float, default=0.9999, help="CAME's third.")
    optimizer.add_argument("--adam_weight_decay", type=float, default=0.0)
    optimizer.add_argument("--adam_epsilon", type=float, default=1e-8)
    optimizer.add_argument("--max_grad_norm", type=float, default=0.1)
    optimizer.add_argument("--use_ema", action="store_true", help="Save the moving average of the weights.")
    optimizer.add_argument("--ema_decay", type=float, default=0.9999)
    optimizer.add_argument("--offload_ema", action="store_true", help="Keep the moving average on the CPU.")
    optimizer.add_argument(
        "--conditioning_dropout_prob", type=float, default=0.1, help="How often the null condition stands in."
    )
    optimizer.add_argument(
        "--weighting_scheme",
        choices=["none", "sigma_sqrt", "cosmap", "min_snr"],
        default="none",
        help="Of the loss over timesteps; the published training has none.",
    )
    optimizer.add_argument("--snr_gamma", type=float, default=5.0, help='Of "min_snr".')


def add_validation_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Adds what is painted while training."""
    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_prompt", nargs="+", help="Prompts to paint while training.")
    if kind == "edit":
        validation.add_argument("--validation_image", nargs="+", help="Pictures to edit, one a prompt.")
        validation.add_argument("--validation_target", nargs="+", help="How the edits should look, one a prompt.")
        validation.add_argument("--validation_blueprint", nargs="+", help="Blueprints to edit by, one a prompt.")
        validation.add_argument(
            "--validation_shapes", type=int, default=0, help="Held-out edits of the picture world to score."
        )
        validation.add_argument(
            "--validation_shapes_prompt",
            choices=["instruction", "blueprint"],
            default="instruction",
            help="What those are painted from.",
        )
    validation.add_argument("--validation_steps", type=int, default=500)
    validation.add_argument("--num_inference_steps", type=int, default=30, help="Of a validation picture.")
    validation.add_argument(
        "--guidance_scale", type=float, help="Of a validation picture; the model's own by default."
    )


def check_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, names: str) -> None:
    """Ends the script where one of the options named, that is given, is below 1."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} has to be at least 1, but is {value}.")


def check_data_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """
    Ends the script where the data options make no sense: not one source, a file or folder that is not there, a number
    out of range.
    """
    check_positive(parser, args, "resolution max_sequence_length max_train_samples")
    if args.dataloader_num_workers < 0:
        parser.error(f"--dataloader_num_workers has to be at least 0, but is {args.dataloader_num_workers}.")
    sources = [name for name in SOURCES if hasattr(args, name)]
    given = [f"--{name} {getattr(args, name)}" for name in sources if getattr(args, name) is not None]
    if len(given) != 1:
        parser.error(f"Give one of {', '.join(f'--{name}' for name in sources)}, not {', '.join(given) or 'none'}.")
    if args.jsonl is not None and not Path(args.jsonl).is_file():
        parser.error(f"{args.jsonl} is not a file.")
    for name in "image_root train_data_dir precomputed_conditions".split():
        path = getattr(args, name, None)
        if path is not None and not Path(path).is_dir():
            parser.error(f"--{name} {path} is not a folder.")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """
    Ends the script by `parser.error` where options make no sense, before anything loads: numbers out of range, files
    that are not there, sources of data that exclude each other, an output folder of another run.
    """
    check_positive(
        parser,
        args,
        "train_batch_size max_train_steps num_train_epochs gradient_accumulation_steps checkpointing_steps"
        " checkpoints_total_limit validation_steps num_inference_steps",
    )
    for name in "learning_rate max_grad_norm snr_gamma".split():
        if not getattr(args, name) > 0:
            parser.error(f"--{name} has to be above 0, but is {getattr(args, name)}.")
    for name in "conditioning_dropout_prob ema_decay".split():
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} has to lie in [0, 1], but is {getattr(args, name)}.")
    for name in "lr_warmup_steps validation_shapes".split():
        if getattr(args, name, 0) < 0:
            parser.error(f"--{name} has to be at least 0, but is {getattr(args, name)}.")
    if (args.max_train_steps is None) == (args.num_train_epochs is None):
        parser.error("Give either --max_train_steps or --num_train_epochs.")
    if args.num_train_epochs is not None and args.streaming:
        parser.error("--streaming data have no known length: give --max_train_steps in place of --num_train_epochs.")
    if args.use_8bit_adam and args.optimizer != "adamw":
        parser.error(f"--use_8bit_adam goes with --optimizer adamw, but that is {args.optimizer}.")

    check_data_arguments(parser, args)
    prompts = args.validation_prompt or []
    for name in "validation_image validation_target validation_blueprint".split():
        values = getattr(args, name, None) or []
        if len(values) != len(prompts) and (values or name == "validation_image") and hasattr(args, name):
            parser.error(f"Got {len(values)} --{name} for {len(prompts)} --validation_prompt: give one a prompt.")
    pictures = [*(getattr(args, "validation_image", None) or []), *(getattr(args, "validation_target", None) or [])]
    for path in pictures:
        if not Path(path).is_file():
            parser.error(f"{path} is not a file.")
    if args.push_to_hub and get_token() is None:
        parser.error("--push_to_hub needs a login: run `hf auth login`, or set HF_TOKEN in the environment.")
    check_output_dir(parser, args)


def check_output_dir(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses an output folder that another run has begun, and a resumed run that would go on otherwise."""
    output_dir = Path(args.output_dir)
    finished = any((output_dir / name).exists() for name in RESULTS)
    if args.resume_from_checkpoint is None:
        if latest_checkpoint(output_dir) is not None or finished:
            parser.error(
                f"--output_dir {args.output_dir} holds another run: go on with it by --resume_from_checkpoint latest,"
                " or choose another folder."
            )
        return
    if args.resume_from_checkpoint == "latest":
        if latest_checkpoint(output_dir) is None and finished:
            parser.error(f"--output_dir {args.output_dir} holds a result but no checkpoint to resume from.")
    elif not Path(args.resume_from_checkpoint).is_dir():
        parser.error(f"--resume_from_checkpoint {args.resume_from_checkpoint} is not a folder.")
    settings = output_dir / "run.json"
    if settings.exists():
        before = json.loads(settings.read_text())
        changed = [
            f"--{name} was {before.get(name)}, now {getattr(args, name, None)}"
            for name in FIXED_SETTINGS
            if name in before and before[name] != getattr(args, name, None)
        ]
        if changed:
            parser.error(f"A resumed run must go on as it began, but {'; '.join(changed)}.")

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

Stage 1, from a text-to-image pipeline, whose patch embedding is widened first, on pairs with instructions:

    accelerate launch examples/train_dim_edit.py --pretrained_model_name_or_path DIM-4.6B-T2I --output_dir stage1 \
        --dataset_name BleachNick/UltraEdit --streaming --max_train_steps 100000 --mixed_precision bf16

Stage 2, from there, on pairs with blueprints:

    accelerate launch examples/train_dim_edit.py --pretrained_model_name_or_path stage1 --output_dir stage2 \
        --jsonl DIM-Edit/edits.jsonl --max_train_steps 20000 --mixed_precision bf16
"""

import argparse
from functools import partial

import torch

from diffusers_dim import DIMEditPipeline
from diffusers_dim.training import (
    DIMTrainingModel,
    add_data_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    add_validation_arguments,
    check_arguments,
    complete_pipeline,
    create_accelerator,
    create_loader,
    load_pipeline,
    open_data,
    prepare_pipeline,
    publish,
    read_pipeline_kind,
    to_edit_pipeline,
    train,
    trained_weights,
)


KINDS = ("edit", "t2i")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train DIM's painter to edit.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="A folder or repository of a DIMEditPipeline, or of a DIMPipeline to make an editor of.",
    )
    model.add_argument("--revision", help="Revision of the repository.")
    model.add_argument("--variant", help="Variant of the weights, such as bf16.")
    add_data_arguments(parser, "edit")
    add_run_arguments(parser, output_dir="dim-edit-model")
    add_optimizer_arguments(parser, learning_rate=2e-5)
    add_validation_arguments(parser, "edit")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def load_editor(args: argparse.Namespace, components: dict[str, torch.nn.Module | None]) -> DIMEditPipeline:
    """The pipeline to train, with `components` in place of its own, its patch embedding widened if it is not yet."""
    return to_edit_pipeline(load_pipeline(args, KINDS, components))


def main(args: argparse.Namespace) -> None:
    # 1. Data and settings: what is wrong with them is told before any weights load
    accelerator = create_accelerator(args)
    read_pipeline_kind(args, KINDS)
    loader = create_loader(args, open_data(args, "edit"), accelerator)

    # 2. Models
    load = partial(load_editor, args)
    pipe = prepare_pipeline(args, accelerator, loader, load)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    model = DIMTrainingModel(pipe.connector, pipe.transformer, pipe.scheduler.config.flow_shift).train()

    # 3. Train
    model, ema = train(args, accelerator, loader, pipe, model, load)

    # 4. Save the pipeline
    with trained_weights(accelerator, model, ema) as (connector, transformer):
        if accelerator.is_main_process:
            trained = complete_pipeline(pipe, load, connector=connector, transformer=transformer)
            trained.save_pretrained(args.output_dir)
            publish(args, "edit", accelerator, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

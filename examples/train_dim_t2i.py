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
Trains DIM's painter to paint from text: connector, null condition and transformer learn, vision-language model and VAE
do not.

From SANA, whose text encoder a vision-language model takes the place of:

    accelerate launch examples/train_dim_t2i.py \
        --pretrained_model_name_or_path Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers \
        --text_encoder_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --train_data_dir pictures --output_dir dim-t2i \
        --max_train_steps 100000 --mixed_precision bf16

or on from a DIMPipeline. The null condition gets as many rows as --max_sequence_length.
"""

import argparse
from functools import partial

import torch

from diffusers_dim import DIMPipeline
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
    grow_null_condition,
    load_pipeline,
    open_data,
    prepare_pipeline,
    publish,
    read_pipeline_kind,
    train,
    trained_weights,
)


KINDS = ("t2i", "sana")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train DIM's painter to paint from text.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="A folder or repository of a SanaPipeline, or of a DIMPipeline.",
    )
    model.add_argument(
        "--text_encoder_name_or_path", help="With a SanaPipeline: a folder or repository of the vision-language model."
    )
    model.add_argument("--revision", help="Revision of the repository.")
    model.add_argument("--variant", help="Variant of the weights, such as bf16.")
    add_data_arguments(parser, "t2i")
    add_run_arguments(parser, output_dir="dim-t2i-model")
    add_optimizer_arguments(parser, learning_rate=2e-5)
    add_validation_arguments(parser, "t2i")
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def load_painter(args: argparse.Namespace, components: dict[str, torch.nn.Module | None]) -> DIMPipeline:
    """The pipeline to train, with `components` in place of its own, the null condition as long as asked for."""
    pipe = load_pipeline(args, KINDS, components)
    generator = torch.Generator().manual_seed(args.seed)
    pipe.connector = grow_null_condition(pipe.connector, args.max_sequence_length, generator)
    return pipe


def main(args: argparse.Namespace) -> None:
    # 1. Data and settings: what is wrong with them is told before any weights load
    accelerator = create_accelerator(args)
    read_pipeline_kind(args, KINDS)
    loader = create_loader(args, open_data(args, "t2i"), accelerator)

    # 2. Models
    load = partial(load_painter, args)
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
            publish(args, "t2i", accelerator, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

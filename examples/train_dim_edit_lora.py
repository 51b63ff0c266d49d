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
Trains a LoRA, or a DoRA, of DIM's editor: small matrices beside the transformer's weights, with `--train_connector`
beside the connector's too. All else is frozen, and kept in the dtype of `--mixed_precision`.

    accelerate launch examples/train_dim_edit_lora.py --pretrained_model_name_or_path DIM-4.6B-Edit \
        --jsonl edits.jsonl --output_dir sticker-lora --rank 16 --lora_alpha 16 --max_train_steps 1000 \
        --mixed_precision bf16 --gradient_checkpointing

The result is one file, `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights("sticker-lora")`; so is each
`checkpoint-N`.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType, set_seed
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from diffusers_dim import DIMEditPipeline, DIMTransformer2DModel
from diffusers_dim.training import (
    DIMTrainingModel,
    add_data_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    add_validation_arguments,
    check_arguments,
    create_accelerator,
    create_loader,
    load_pipeline,
    open_data,
    prepare_pipeline,
    publish,
    read_pipeline_kind,
    train,
    trained_weights,
)
from diffusers_dim.training.distributed import MIXED_DTYPES


KINDS = ("edit",)
CONNECTOR_LAYERS = ["linear_1", "linear_2"]
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a LoRA of DIM's editor.")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path", required=True, help="A folder or repository of a DIMEditPipeline."
    )
    model.add_argument("--revision", help="Revision of the repository.")
    model.add_argument("--variant", help="Variant of the weights, such as bf16.")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--rank", type=int, default=4, help="Of the update matrices.")
    lora.add_argument("--lora_alpha", type=float, default=4, help="The update counts lora_alpha / rank.")
    lora.add_argument("--lora_dropout", type=float, default=0.0, help="How often an input of the update is left out.")
    lora.add_argument(
        "--lora_layers",
        default="to_k,to_q,to_v",
        help='The transformer\'s layers to adapt, comma separated: "to_k,to_q,to_v,to_out.0,conv_inverted,conv_point"'
        " are all that are large.",
    )
    lora.add_argument("--use_dora", action="store_true", help="Learn the weights' magnitudes apart (DoRA).")
    lora.add_argument("--train_connector", action="store_true", help="Adapt the connector, too.")
    add_data_arguments(parser, "edit")
    add_run_arguments(parser, output_dir="dim-edit-lora")
    add_optimizer_arguments(parser, learning_rate=1e-4)
    add_validation_arguments(parser, "edit")
    parser.set_defaults(max_grad_norm=1.0)
    args = parser.parse_args(arguments)
    if args.rank < 1:
        parser.error(f"--rank has to be at least 1, but is {args.rank}.")
    if not args.lora_alpha > 0:
        parser.error(f"--lora_alpha has to be above 0, but is {args.lora_alpha}.")
    if not 0 <= args.lora_dropout < 1:
        parser.error(f"--lora_dropout has to lie in [0, 1), but is {args.lora_dropout}.")
    check_arguments(parser, args)
    return args


def read_lora_layers(args: argparse.Namespace) -> list[str]:
    """
    The names of `--lora_layers`.

    Raises:
        ValueError: If the transformer, by its configuration, has no layer of such a name.
    """
    config = DIMTransformer2DModel.load_config(
        args.pretrained_model_name_or_path, subfolder="transformer", revision=args.revision
    )
    with init_empty_weights():
        transformer = DIMTransformer2DModel.from_config(config)
    names = [name for name, module in transformer.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    layers = [layer.strip() for layer in args.lora_layers.split(",")]
    unknown = [layer for layer in layers if not any(f".{name}".endswith(f".{layer}") for name in names)]
    if unknown:
        block = "transformer_blocks.0."
        allowed = [name.removeprefix(block) for name in names if name.startswith(block)]
        raise ValueError(f"--lora_layers has to name layers of the transformer, such as {allowed}, not {unknown}.")
    return layers


def add_adapters(
    args: argparse.Namespace, pipe: DIMEditPipeline, layers: list[str], dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Gives transformer and connector, by name, LoRA in float32 where asked for, and freezes all else in `dtype`."""
    targets = {"transformer": layers}
    if args.train_connector:
        targets["connector"] = CONNECTOR_LAYERS
    set_seed(args.seed)  # whatever was drawn before
    for name, target_modules in targets.items():
        config = LoraConfig(
            r=args.rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_dora=args.use_dora,
            init_lora_weights="gaussian",
            target_modules=target_modules,
        )
        getattr(pipe, name).add_adapter(config)
    for model in (pipe.transformer, pipe.connector):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return {name: getattr(pipe, name) for name in targets}


def save_lora(adapted: dict[str, nn.Module], folder: str | Path) -> None:
    """Writes the adapters of components, by name, as `pytorch_lora_weights.safetensors`."""
    contents = {}
    for name, model in adapted.items():
        contents[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
        # diffusers' own loaders would leave the dropout of training on.
        metadata = {**model.peft_config["default"].to_dict(), "lora_dropout": 0.0}
        contents[f"{name}_lora_adapter_metadata"] = metadata
    DIMEditPipeline.save_lora_weights(folder, **contents)


def load_lora(adapted: dict[str, nn.Module], folder: str | Path) -> None:
    """Reads what `save_lora` wrote into the same adapters."""
    state_dict = DIMEditPipeline.lora_state_dict(folder, weight_name="pytorch_lora_weights.safetensors")
    for name, model in adapted.items():
        prefix = f"{name}."
        layers = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        set_peft_model_state_dict(model, layers)


def checkpoint_adapters_alone(accelerator: Accelerator, adapted: dict[str, nn.Module]) -> None:
    """Lets the accelerator's checkpoints hold a LoRA file in place of the whole model."""

    def save(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_lora(adapted, folder)

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_lora(adapted, folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def main(args: argparse.Namespace) -> None:
    # 1. Data and settings: what is wrong with them is told before any weights load
    accelerator = create_accelerator(args)
    if accelerator.distributed_type in SHARDING:
        engine = accelerator.distributed_type.value
        raise ValueError(f"A LoRA trains one whole model a device: launch it without {engine}, as --multi_gpu does.")
    read_pipeline_kind(args, KINDS)
    layers = read_lora_layers(args)
    loader = create_loader(args, open_data(args, "edit"), accelerator)

    # 2. Models; adapters come before anything wraps or compiles
    load = partial(load_pipeline, args, KINDS)
    pipe = prepare_pipeline(args, accelerator, loader, load)
    adapted = add_adapters(args, pipe, layers, MIXED_DTYPES.get(accelerator.mixed_precision, torch.float32))
    checkpoint_adapters_alone(accelerator, adapted)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=not args.use_dora)  # PEFT's DoRA breaks the graph
    model = DIMTrainingModel(pipe.connector, pipe.transformer, pipe.scheduler.config.flow_shift).train()

    # 3. Train
    model, ema = train(args, accelerator, loader, pipe, model, load)

    # 4. Save the LoRA
    with trained_weights(accelerator, model, ema):
        if accelerator.is_main_process:
            save_lora(adapted, args.output_dir)
            publish(args, "lora", accelerator, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

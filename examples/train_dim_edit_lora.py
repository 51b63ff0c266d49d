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
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm

from diffusers_dim import DIMEditPipeline, DIMTransformer2DModel
from diffusers_dim.training import (
    FROZEN_COMPONENTS,
    DIMTrainingModel,
    ShardedEMAModel,
    TrainingMonitor,
    add_data_arguments,
    add_optimizer_arguments,
    add_run_arguments,
    add_validation_arguments,
    autocast,
    begin_run,
    check_arguments,
    complete_pipeline,
    count_train_steps,
    create_accelerator,
    create_loader,
    create_optimizer,
    freeze,
    log_validation,
    loss_weights,
    make_inputs,
    open_data,
    optimizer_settings,
    publish,
    read_pipeline_kind,
    resume,
    save_checkpoint,
    trained_weights,
    training_flops,
    wants_validation,
)
from diffusers_dim.training.distributed import MIXED_DTYPES


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


def load_pipeline(
    args: argparse.Namespace, components: dict[str, torch.nn.Module | None] | None = None
) -> DIMEditPipeline:
    """The pipeline to adapt, in float32, with `components` in place of its own, which are then not read."""
    return DIMEditPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype={"text_encoder": getattr(torch, args.frozen_dtype), "default": torch.float32},
        **components or {},
    )


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
    read_pipeline_kind(args, ("edit",))
    layers = read_lora_layers(args)
    loader = create_loader(args, open_data(args, "edit"), accelerator)
    max_train_steps = count_train_steps(args, loader)

    # 2. Models: the frozen ones are there to encode alone, adapters come before anything wraps or compiles
    precomputed = args.precomputed_conditions is not None
    pipe = load_pipeline(args, dict.fromkeys(FROZEN_COMPONENTS) if precomputed else None)
    if precomputed:
        loader.dataset.check(pipe, args)
    else:
        freeze(pipe, args, accelerator)
    adapted = add_adapters(args, pipe, layers, MIXED_DTYPES.get(accelerator.mixed_precision, torch.float32))
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=not args.use_dora)  # PEFT's DoRA breaks the graph
    flow_shift = pipe.scheduler.config.flow_shift
    model = DIMTrainingModel(pipe.connector, pipe.transformer, flow_shift).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # 3. Optimizer, schedule, moving average
    optimizer = create_optimizer(parameters, **optimizer_settings(args, accelerator))
    # accelerate steps the schedule once a process, so it is told of that many steps.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    checkpoint_adapters_alone(accelerator, adapted)
    ema = None
    if args.use_ema:
        ema = ShardedEMAModel(parameters, decay=args.ema_decay)
        ema.to("cpu" if args.offload_ema else accelerator.device)
        accelerator.register_for_checkpointing(ema)
    begin_run(args, accelerator)
    step = resume(args, accelerator)

    # 4. Train
    flops = partial(training_flops, pipe.transformer.config, pipe.connector.config, frozen_weights=True)
    monitor = TrainingMonitor(accelerator, args.output_dir, step, flops, device_tflops=args.device_tflops)
    bar = tqdm(total=max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
    batches = loader.batches(start=step * args.gradient_accumulation_steps)
    while step < max_train_steps:
        batch = next(batches)
        inputs, weights = make_inputs(batch, pipe, args, accelerator.device)
        with accelerator.accumulate(model):
            with autocast(accelerator):
                losses = model(**inputs)
            # The mean over the samples of all processes, of which some may have fewer: unreadable ones are left out.
            count = accelerator.reduce(weights.sum(), "sum").clamp(min=1)
            scale = loss_weights(inputs["timesteps"], args.weighting_scheme, flow_shift, args.snr_gamma).to(losses)
            accelerator.backward((losses * scale * weights).sum() * accelerator.num_processes / count)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        height, width = inputs["latents"].shape[2:]
        monitor.add(losses, inputs["timesteps"], weights, height, width, inputs["hidden_states"].shape[1])
        if not accelerator.sync_gradients:
            continue

        step += 1
        if ema is not None:
            ema.to(accelerator.device)
            ema.step(parameters)
            ema.to("cpu" if args.offload_ema else accelerator.device)
        log = monitor.log(step, lr_scheduler.get_last_lr()[0], grad_norm)
        bar.update()
        bar.set_postfix(loss=f"{log['loss']:.3f}")
        last = step == max_train_steps
        if step % args.checkpointing_steps == 0 or last:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
        if wants_validation(args) and (step % args.validation_steps == 0 or last):
            model.eval()  # without LoRA dropout
            with trained_weights(accelerator, model, ema) as (connector, transformer):
                if accelerator.is_main_process:
                    trained = complete_pipeline(
                        pipe, partial(load_pipeline, args), connector=connector, transformer=transformer
                    )
                    log_validation(trained.to(accelerator.device), args, accelerator, step)
            model.train()
            monitor.restart_clock()

    # 5. Save the LoRA
    with trained_weights(accelerator, model, ema):
        if accelerator.is_main_process:
            save_lora(adapted, args.output_dir)
            publish(args, "lora", accelerator, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

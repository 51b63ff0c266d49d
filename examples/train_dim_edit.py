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
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from diffusers_dim import DIMEditPipeline, DIMPipeline
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
    to_edit_pipeline,
    trained_weights,
    training_flops,
    wants_validation,
)


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


def load_pipeline(
    args: argparse.Namespace, components: dict[str, torch.nn.Module | None] | None = None
) -> DIMEditPipeline:
    """The pipeline to train, in float32, with `components` in place of its own, which are then not read."""
    kind = read_pipeline_kind(args, ("edit", "t2i"))
    pipe = (DIMEditPipeline if kind == "edit" else DIMPipeline).from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype={"text_encoder": getattr(torch, args.frozen_dtype), "default": torch.float32},
        **components or {},
    )
    return pipe if kind == "edit" else to_edit_pipeline(pipe)


def main(args: argparse.Namespace) -> None:
    # 1. Data and settings: what is wrong with them is told before any weights load
    accelerator = create_accelerator(args)
    read_pipeline_kind(args, ("edit", "t2i"))
    loader = create_loader(args, open_data(args, "edit"), accelerator)
    max_train_steps = count_train_steps(args, loader)

    # 2. Models: the frozen ones are there to encode alone
    precomputed = args.precomputed_conditions is not None
    pipe = load_pipeline(args, dict.fromkeys(FROZEN_COMPONENTS) if precomputed else None)
    if precomputed:
        loader.dataset.check(pipe, args)
    else:
        freeze(pipe, args, accelerator)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    flow_shift = pipe.scheduler.config.flow_shift
    model = DIMTrainingModel(pipe.connector, pipe.transformer, flow_shift).train()

    # 3. Optimizer, schedule, moving average
    optimizer = create_optimizer(model.parameters(), **optimizer_settings(args, accelerator))
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
    ema = None
    if args.use_ema:
        ema = ShardedEMAModel(model.parameters(), decay=args.ema_decay)
        ema.to("cpu" if args.offload_ema else accelerator.device)
        accelerator.register_for_checkpointing(ema)
    begin_run(args, accelerator)
    step = resume(args, accelerator)

    # 4. Train
    flops = partial(training_flops, pipe.transformer.config, pipe.connector.config)
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
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
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
            ema.step(model.parameters())
            ema.to("cpu" if args.offload_ema else accelerator.device)
        log = monitor.log(step, lr_scheduler.get_last_lr()[0], grad_norm)
        bar.update()
        bar.set_postfix(loss=f"{log['loss']:.3f}")
        last = step == max_train_steps
        if step % args.checkpointing_steps == 0 or last:
            save_checkpoint(accelerator, args.output_dir, step, args.checkpoints_total_limit)
            monitor.restart_clock()
        if wants_validation(args) and (step % args.validation_steps == 0 or last):
            with trained_weights(accelerator, model, ema) as (connector, transformer):
                if accelerator.is_main_process:
                    trained = complete_pipeline(
                        pipe, partial(load_pipeline, args), connector=connector, transformer=transformer
                    )
                    log_validation(trained.to(accelerator.device), args, accelerator, step)
            monitor.restart_clock()

    # 5. Save the pipeline
    with trained_weights(accelerator, model, ema) as (connector, transformer):
        if accelerator.is_main_process:
            trained = complete_pipeline(
                pipe, partial(load_pipeline, args), connector=connector, transformer=transformer
            )
            trained.save_pretrained(args.output_dir)
            publish(args, "edit", accelerator, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

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
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from diffusers_dim import DIMPipeline
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
    grow_null_condition,
    load_sana,
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


def load_pipeline(
    args: argparse.Namespace, components: dict[str, torch.nn.Module | None] | None = None
) -> DIMPipeline:
    """The pipeline to train, in float32, with `components` in place of its own, which are then not read."""
    components = components or {}
    if read_pipeline_kind(args, ("t2i", "sana")) == "sana":
        return load_sana(
            args.pretrained_model_name_or_path,
            args.text_encoder_name_or_path,
            args.max_sequence_length,
            torch.Generator().manual_seed(args.seed),
            revision=args.revision,
            variant=args.variant,
            text_encoder_dtype=getattr(torch, args.frozen_dtype),
            **components,
        )
    pipe = DIMPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype={"text_encoder": getattr(torch, args.frozen_dtype), "default": torch.float32},
        **components,
    )
    pipe.connector = grow_null_condition(
        pipe.connector, args.max_sequence_length, torch.Generator().manual_seed(args.seed)
    )
    return pipe


def main(args: argparse.Namespace) -> None:
    # 1. Data and settings: what is wrong with them is told before any weights load
    accelerator = create_accelerator(args)
    if read_pipeline_kind(args, ("t2i", "sana")) == "sana" and args.text_encoder_name_or_path is None:
        raise ValueError("A SanaPipeline needs a vision-language model: give --text_encoder_name_or_path.")
    loader = create_loader(args, open_data(args, "t2i"), accelerator)
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
            publish(args, "t2i", accelerator, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())

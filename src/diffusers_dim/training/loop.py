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
"""The training itself, the same for all that is trained: from the optimizer to the last step."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ..data import TrainingLoader
from ..pipelines import DIMPipeline
from .batches import complete_pipeline, make_inputs
from .checkpoints import save_checkpoint
from .distributed import ShardedEMAModel, autocast, trained_weights
from .flops import training_flops
from .monitor import TrainingMonitor
from .objective import DIMTrainingModel, loss_weights
from .optimizers import create_optimizer
from .setup import begin_run, count_train_steps, optimizer_settings, resume
from .validation import log_validation, wants_validation


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    loader: TrainingLoader,
    pipe: DIMPipeline,
    model: DIMTrainingModel,
    load: Callable[[dict[str, torch.nn.Module]], DIMPipeline],
) -> tuple[torch.nn.Module, ShardedEMAModel | None]:
    r"""
    Trains all of a model's parameters that require gradients, from the checkpoint that `args` name or from the start,
    with checkpoints, curves and validation on the way.

    Args:
        args (`argparse.Namespace`):
            The script's options.
        accelerator (`Accelerator`):
            Of [`create_accelerator`].
        loader ([`TrainingLoader`]):
            This process's batches.
        pipe ([`DIMPipeline`]):
            Whose frozen models encode, unless conditions are precomputed.
        model ([`DIMTrainingModel`]):
            Of the pipeline's connector and transformer.
        load (`Callable`):
            Reads the pipeline anew for validation, given the components it need not read, see [`complete_pipeline`].

    Returns:
        The model as the accelerator prepared it, and its moving average with `--use_ema`, else `None`: what
        [`trained_weights`] takes.
    """
    # 1. Optimizer, schedule, moving average
    max_train_steps = count_train_steps(args, loader)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen_weights = len(parameters) < len(list(model.parameters()))
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
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]  # sharded ones are new
    ema = None
    if args.use_ema:
        ema = ShardedEMAModel(parameters, decay=args.ema_decay)
        ema.to("cpu" if args.offload_ema else accelerator.device)
        accelerator.register_for_checkpointing(ema)
    begin_run(args, accelerator)
    step = resume(args, accelerator)

    # 2. Train
    configs = (pipe.transformer.config, pipe.connector.config)
    flops = partial(training_flops, *configs, frozen_weights=frozen_weights)
    monitor = TrainingMonitor(accelerator, args.output_dir, step, flops, device_tflops=args.device_tflops)
    flow_shift = pipe.scheduler.config.flow_shift
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
            monitor.restart_clock()
        if wants_validation(args) and (step % args.validation_steps == 0 or last):
            model.eval()  # without a LoRA's dropout
            with trained_weights(accelerator, model, ema) as (connector, transformer):
                if accelerator.is_main_process:
                    trained = complete_pipeline(pipe, load, connector=connector, transformer=transformer)
                    log_validation(trained.to(accelerator.device), args, accelerator, step)
            model.train()
            monitor.restart_clock()
    return model, ema

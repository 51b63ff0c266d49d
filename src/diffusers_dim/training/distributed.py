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
Training on many processes: the accelerator of each engine (DDP, FSDP2, DeepSpeed ZeRO), and whole weights and moving
averages out of what the processes hold in parts.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState, init_empty_weights
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)
from diffusers.training_utils import EMAModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..models import DIMConnector, DIMTransformer2DModel


MIXED_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def distributed_accelerator(
    train_batch_size: int,
    max_grad_norm: float,
    gradient_accumulation_steps: int = 1,
    mixed_precision: str | None = None,
    **kwargs: Any,
) -> Accelerator:
    """
    An `Accelerator` for the engine that `accelerate launch` (or its environment variables, with torchrun) asks for:
    one process, DDP, FSDP2 or DeepSpeed ZeRO, on accelerators or, by gloo, on CPUs.

    The script's options win over the launcher's where both have a value, as a run's arithmetic rests on them. FSDP2
    and DeepSpeed do not touch the frozen models: each process loads them whole; see [`shard_frozen`].

    Args:
        train_batch_size (`int`): Samples a process and micro-batch.
        max_grad_norm (`float`): Of gradient clipping, which DeepSpeed does itself.
        gradient_accumulation_steps (`int`, defaults to 1): Micro-batches an optimizer step.
        mixed_precision (`str`, *optional*): "no", "fp16" or "bf16"; the launcher's by default.
        kwargs: Other arguments of `Accelerator`.

    Raises:
        ValueError: If the processes do not find each other, or FSDP's first version is asked for.
    """
    on_cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    launched = "LOCAL_RANK" in os.environ
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        # Told cpu=True, accelerate would drop DeepSpeed.
        handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpu and launched else []
        kwargs["kwargs_handlers"] = [*kwargs.get("kwargs_handlers", []), *handlers]
    elif on_cpu:
        # Without cpu=True processes that torchrun starts would not find each other, and each train alone.
        kwargs["cpu"] = True
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        kwargs["fsdp_plugin"] = _fsdp_plugin(mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
        if on_cpu and launched:
            # accelerate shards on accelerators only, and on CPUs would quietly fall back to DDP.
            PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU

    accelerator = Accelerator(mixed_precision=mixed_precision, **kwargs)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", accelerator.num_processes)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but this one sees {accelerator.num_processes}:"
            " launch with `accelerate launch --multi_gpu` or `torchrun`."
        )
    accelerator.gradient_accumulation_steps = gradient_accumulation_steps
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=train_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clipping=max_grad_norm,
        )
        # Under ZeRO-3 transformers would partition every model that it loads, the frozen ones too.
        unset_hf_deepspeed_config()
    return accelerator


def _fsdp_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin:
    """
    What the environment says of FSDP2, but that inputs, losses and reductions stay in float32 under mixed precision,
    and that transformers does not leave the frozen models empty on all processes but the first.
    """
    dtype = MIXED_DTYPES.get(mixed_precision)
    plugin = FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if dtype is not None and os.environ.get("FSDP_VERSION") == "2"
        else None,
        cpu_ram_efficient_loading=False,
    )
    if plugin.fsdp_version != 2:
        raise ValueError(f"Of FSDP only version 2 is supported: set fsdp_version to 2, not {plugin.fsdp_version}.")
    return plugin


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Mixed precision for a forward under every engine; `accelerator.autocast()` does nothing under DeepSpeed."""
    dtype = MIXED_DTYPES.get(accelerator.mixed_precision)
    return nullcontext() if dtype is None else torch.autocast(accelerator.device.type, dtype)


def check_optimizer(accelerator: Accelerator, name: str) -> None:
    """
    Refuses an optimizer that would fail or, worse, be another one on the parts of weights that an engine gives it.

    Args:
        accelerator (`Accelerator`): Of the run.
        name (`str`): As [`create_optimizer`] takes it.

    Raises:
        ValueError: If they do not go together.
    """
    engine = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}.get(accelerator.distributed_type)
    if engine is None or name == "adamw":
        return
    reasons = {
        "came": "takes rows and columns of whole weights",
        "prodigy": "takes its step size from all weights together",
    }
    if engine == "FSDP2":
        reasons["adamw8bit"] = "of bitsandbytes does not know sharded tensors"
    if name in reasons:
        raise ValueError(f"{name} {reasons[name]}, which {engine} shards: choose adamw, or launch with DDP.")


def _local_shard(parameter: Any) -> torch.Tensor:
    """What this process holds of a parameter, in the optimizer's precision where the engine has that at hand."""
    if isinstance(parameter, DTensor):
        shard = parameter.to_local()
    elif hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.utils import safe_get_local_fp32_param

        shard = safe_get_local_fp32_param(parameter)
    else:
        return parameter
    return shard.detach().requires_grad_(parameter.requires_grad)


def _join_shards(parameter: Any, shard: torch.Tensor) -> torch.Tensor:
    """The whole tensor whose shards of the layout of `parameter` the processes hold; all of them call it."""
    shard = shard.detach().to(parameter.device)
    if isinstance(parameter, DTensor):
        mesh, placements, stride = parameter.device_mesh, parameter.placements, parameter.stride()
        return DTensor.from_local(shard, mesh, placements, shape=parameter.shape, stride=stride).full_tensor()
    if hasattr(parameter, "ds_id"):
        group = parameter.ds_process_group
        whole = shard.new_empty(shard.numel() * torch.distributed.get_world_size(group))
        torch.distributed.all_gather_into_tensor(whole, shard.contiguous(), group=group)
        return whole[: parameter.ds_numel].view(parameter.ds_shape)
    return shard


def _cut_shard(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """This process's shard of a whole tensor, in the layout of `parameter`; all processes call it."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local().clone()
    if hasattr(parameter, "ds_id"):
        length = _local_shard(parameter).numel()
        start = torch.distributed.get_rank(parameter.ds_process_group) * length
        shard = whole.new_zeros(length)
        part = whole.flatten()[start : start + length]
        shard[: part.numel()] = part
        return shard
    return whole


def _whole_parameter(parameter: Any) -> torch.Tensor:
    """A whole parameter, in the optimizer's float32 where it is trained; all processes call it."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id") and not parameter.requires_grad:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # ZeRO-3, ZeRO-1 and 2
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.detach()


class ShardedEMAModel(EMAModel):
    r"""
    diffusers' `EMAModel` under every engine. Each process averages what it holds: whole parameters under DDP, its
    shards under FSDP2 and ZeRO-3, the rounded weights under ZeRO-2 with bf16. Its state is of whole tensors, so that
    it loads under any engine and number of processes. Make it after `accelerator.prepare`.

    Args:
        parameters (`Iterable[torch.nn.Parameter]`): Of the prepared model.
        kwargs: Other arguments of `EMAModel`.
    """

    shadow_params: list[torch.Tensor]

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **kwargs: Any):
        self.parameters = list(parameters)
        super().__init__([_local_shard(parameter) for parameter in self.parameters], **kwargs)
        self.to(dtype=torch.float32)

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Averages the prepared model's parameters in, after an optimizer step."""
        super().step([_local_shard(parameter) for parameter in parameters])

    def state_dict(self) -> dict[str, Any]:
        """Settings and whole averages, these on the main process of each node only; all processes call it."""
        shadow_params = []
        for parameter, shadow in zip(self.parameters, self.shadow_params):
            whole = _join_shards(parameter, shadow)
            if PartialState().is_local_main_process:
                shadow_params.append(whole.cpu())
        return {**super().state_dict(), "shadow_params": shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state as [`state_dict`] of a main process gave it; all processes call it."""
        devices = [shadow.device for shadow in self.shadow_params]
        super().load_state_dict(state_dict)
        pairs = zip(self.parameters, self.shadow_params, devices)
        self.shadow_params = [_cut_shard(parameter, whole).to(device) for parameter, whole, device in pairs]


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether an engine keeps parameters of the module, or the optimizer's precision of them, in parts."""
    return any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        for parameter in module.parameters()
    )


def gather_weights(
    accelerator: Accelerator, model: torch.nn.Module, ema: ShardedEMAModel | None = None, trained_only: bool = False
) -> dict[str, dict[str, torch.Tensor]]:
    """
    Whole weights of a prepared [`DIMTrainingModel`], one parameter after the other, so that no device holds more than
    one whole. All processes call it.

    Args:
        accelerator (`Accelerator`): That prepared the model.
        model (`torch.nn.Module`): The prepared model.
        ema ([`ShardedEMAModel`], *optional*): Its averages take the place of the parameters that it was made with.
        trained_only (`bool`, defaults to `False`): Leave out frozen parameters, as a LoRA's base is.

    Returns:
        `dict[str, dict[str, torch.Tensor]]`: On the main process the state dicts "connector" and "transformer" on the
        CPU, in float32 where trained; elsewhere two empty ones.
    """
    weights: dict[str, dict[str, torch.Tensor]] = {"connector": {}, "transformer": {}}
    averages = {} if ema is None else {id(p): shadow for p, shadow in zip(ema.parameters, ema.shadow_params)}
    for name, parameter in accelerator.unwrap_model(model, keep_torch_compile=False).named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        if id(parameter) in averages:
            whole = _join_shards(parameter, averages[id(parameter)])
        else:
            whole = _whole_parameter(parameter)
        if accelerator.is_main_process:
            # What torch.compile and checkpointing by FSDP's plugin wrap a layer in has a name of its own.
            component, name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "").split(".", 1)
            weights[component][name] = whole.cpu()
    return weights


@contextmanager
def trained_weights(
    accelerator: Accelerator, model: torch.nn.Module, ema: ShardedEMAModel | None = None
) -> Iterator[tuple[DIMConnector, DIMTransformer2DModel]]:
    """
    Connector and transformer with whole weights in float32, to save or to put into a pipeline on the main process.
    All processes enter it; what the others are given is not to be used.

    Without sharding these are the trained modules themselves, which the moving average is swapped into for as long;
    with it, new modules on the accelerator's device.

    Args:
        accelerator (`Accelerator`): That prepared the model.
        model (`torch.nn.Module`): The prepared [`DIMTrainingModel`].
        ema ([`ShardedEMAModel`], *optional*): Whose averages to take.
    """
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    if is_sharded(unwrapped):
        weights = gather_weights(accelerator, model, ema)
        modules = [getattr(unwrapped, name) for name in weights]
        if accelerator.is_main_process:
            modules = [_rebuild(module, state) for module, state in zip(modules, weights.values())]
            modules = [module.to(accelerator.device) for module in modules]
        yield tuple(modules)
    elif ema is None or not accelerator.is_main_process:
        yield unwrapped.connector, unwrapped.transformer
    else:
        ema.store(ema.parameters)
        ema.copy_to(ema.parameters)
        try:
            yield unwrapped.connector, unwrapped.transformer
        finally:
            ema.restore(ema.parameters)
    accelerator.wait_for_everyone()


def _rebuild(module: torch.nn.Module, state_dict: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A new module of the configuration, adapters and weights given, which it takes without a copy."""
    cls = DIMConnector if isinstance(module, DIMConnector) else DIMTransformer2DModel
    with init_empty_weights():
        rebuilt = cls.from_config(module.config)
        for name, config in getattr(module, "peft_config", {}).items():
            rebuilt.add_adapter(config, adapter_name=name)
    rebuilt.load_state_dict(state_dict, assign=True)
    return rebuilt


def shard_frozen(module: torch.nn.Module, accelerator: Accelerator) -> None:
    """
    Shards a frozen model over all processes, layer by layer of its `_no_split_modules`, whatever engine the trained
    one has: each process then holds its part, and a forward, which all of them have to enter together, gathers one
    layer at a time. Its parameters move to the accelerator's device.

    Args:
        module (`torch.nn.Module`): Such as the vision-language model, in one dtype, equal on all processes.
        accelerator (`Accelerator`): Of the run.
    """
    if accelerator.num_processes == 1:
        module.to(accelerator.device)
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    names = set(getattr(module, "_no_split_modules", None) or ())
    for layer in module.modules():
        if type(layer).__name__ in names:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)

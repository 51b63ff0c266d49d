"""Launch settings, whole weights and moving averages, in one process; several are in tests/examples."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from diffusers_dim import DIMConnector, DIMTransformer2DModel
from diffusers_dim.training import DIMTrainingModel
from diffusers_dim.training.distributed import (
    ShardedEMAModel,
    autocast,
    check_optimizer,
    distributed_accelerator,
    gather_weights,
    is_sharded,
    shard_frozen,
    trained_weights,
)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "DIMTransformerBlock",
}


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """No accelerator of another test, and none of its marks on the environment."""
    before = dict(os.environ)
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for state in states:
        state._reset_state()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def launched(monkeypatch):
    """The environment of the only process of a distributed run."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launch = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launch.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def model():
    torch.manual_seed(0)
    connector = DIMConnector(hidden_size=8, caption_channels=12, max_sequence_length=5)
    transformer = DIMTransformer2DModel(
        in_channels=8,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=12,
        sample_size=2,
        qk_norm="rms_norm_across_heads",
    )
    return DIMTrainingModel(connector, transformer)


def prepare(accelerator, model):
    """The model as a script prepares it, after one step of training."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=0.1))
    latents = torch.ones(2, 4, 2, 2)
    hidden_states, timesteps = torch.ones(2, 3, 8), torch.tensor([100, 500])
    dropped = torch.tensor([False, True])
    ema = ShardedEMAModel([p for p in model.parameters() if p.requires_grad], decay=0.5)
    for _ in range(3):
        losses = model(hidden_states, latents, -latents, timesteps, dropped, image_latents=latents)
        accelerator.backward(losses.mean())
        optimizer.step()
        optimizer.zero_grad()
        ema.step([p for p in model.parameters() if p.requires_grad])
    return model, ema


def engine(monkeypatch, name):
    for key, value in (FSDP2 if name == "fsdp2" else {}).items():
        monkeypatch.setenv(key, value)
    return distributed_accelerator(2, 1.0)


def test_script_options_win_over_the_launchers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    accelerator = distributed_accelerator(2, 1.0, gradient_accumulation_steps=3)
    assert accelerator.gradient_accumulation_steps == 3


def test_processes_that_do_not_find_each_other_are_told(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but this one sees 1"):
        distributed_accelerator(2, 1.0)


def test_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="set fsdp_version to 2, not 1"):
        distributed_accelerator(2, 1.0)


def test_frozen_models_are_read_by_all_processes_under_fsdp(monkeypatch, launched):
    for key, value in {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}.items():
        monkeypatch.setenv(key, value)
    assert distributed_accelerator(2, 1.0).is_fsdp2
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"].lower() == "false"


def test_fsdp_keeps_inputs_losses_and_reductions_in_float32(monkeypatch, launched):
    for key, value in FSDP2.items():
        monkeypatch.setenv(key, value)
    policy = distributed_accelerator(2, 1.0, mixed_precision="bf16").state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.output_dtype is None and not policy.cast_forward_inputs


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_that_of_mixed_precision(precision, dtype):
    accelerator = distributed_accelerator(2, 1.0, mixed_precision=precision)
    with autocast(accelerator):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("distributed_type", "name", "allowed"),
    [
        (DistributedType.MULTI_GPU, "came", True),
        (DistributedType.FSDP, "adamw", True),
        (DistributedType.FSDP, "adamw8bit", False),
        (DistributedType.FSDP, "came", False),
        (DistributedType.FSDP, "prodigy", False),
        (DistributedType.DEEPSPEED, "adamw8bit", True),
        (DistributedType.DEEPSPEED, "came", False),
        (DistributedType.DEEPSPEED, "prodigy", False),
    ],
)
def test_optimizers_of_whole_weights_go_with_whole_weights(distributed_type, name, allowed):
    accelerator = SimpleNamespace(distributed_type=distributed_type)
    if allowed:
        check_optimizer(accelerator, name)
    else:
        with pytest.raises(ValueError, match=f"{name} .* choose adamw"):
            check_optimizer(accelerator, name)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_gathered_weights_are_the_models_or_the_averages(monkeypatch, launched, model, name):
    accelerator = engine(monkeypatch, name)
    names = {f"{part}.{key}" for part in ("connector", "transformer") for key in getattr(model, part).state_dict()}
    model, ema = prepare(accelerator, model)
    assert is_sharded(model) == (name == "fsdp2")
    for average in (None, ema):
        weights = gather_weights(accelerator, model, average)
        assert {f"{part}.{key}" for part, state in weights.items() for key in state} == names
        sources = list(model.parameters()) if average is None else average.shadow_params
        for source, whole in zip(sources, [value for state in weights.values() for value in state.values()]):
            assert not isinstance(whole, DTensor)
            torch.testing.assert_close(whole, source.full_tensor() if isinstance(source, DTensor) else source.detach())


def test_weights_that_are_trained_can_be_gathered_alone(launched, model):
    accelerator = distributed_accelerator(2, 1.0)
    model.requires_grad_(False)
    model.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model, _ = prepare(accelerator, model)
    weights = gather_weights(accelerator, model, trained_only=True)
    assert weights["connector"] == {}
    assert weights["transformer"] and all("lora_" in key for key in weights["transformer"])


def test_averages_are_swapped_in_for_as_long_as_they_are_wanted(launched, model):
    accelerator = distributed_accelerator(2, 1.0)
    model, ema = prepare(accelerator, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with trained_weights(accelerator, model, ema) as (connector, transformer):
        for parameter, average in zip([*connector.parameters(), *transformer.parameters()], ema.shadow_params):
            assert torch.equal(parameter, average)
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before))


@pytest.mark.parametrize("adapter", [False, True])
def test_sharded_weights_come_in_new_modules_that_work(monkeypatch, launched, model, adapter):
    accelerator = engine(monkeypatch, "fsdp2")
    if adapter:
        model.requires_grad_(False)
        model.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model, ema = prepare(accelerator, model)
    weights = gather_weights(accelerator, model, ema)
    with trained_weights(accelerator, model, ema) as modules:
        for module, state in zip(modules, weights.values()):
            assert not is_sharded(module)
            assert module.state_dict().keys() == state.keys()
            assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        connector, transformer = modules
        inputs = DIMTrainingModel(connector, transformer).eval()
        latents = torch.ones(1, 4, 2, 2)
        losses = inputs(
            torch.ones(1, 3, 8), latents, -latents, torch.tensor([100]), torch.tensor([False]), None, latents
        )
        assert losses.isfinite().all()


def test_averages_of_one_engine_load_under_another(monkeypatch, launched, model):
    accelerator = engine(monkeypatch, "fsdp2")
    model, ema = prepare(accelerator, model)
    state = ema.state_dict()
    assert not any(isinstance(shadow, DTensor) for shadow in state["shadow_params"])

    plain = EMAModel([torch.zeros(parameter.shape) for parameter in model.parameters()])
    plain.load_state_dict(state)
    sharded = ShardedEMAModel(model.parameters(), decay=0.9)
    sharded.load_state_dict(plain.state_dict())
    assert (sharded.decay, sharded.optimization_step) == (0.5, 3)
    for one, other in zip(sharded.shadow_params, ema.shadow_params):
        assert torch.equal(one, other)


def test_one_process_keeps_a_frozen_model_whole(launched, model):
    shard_frozen(model, distributed_accelerator(2, 1.0))
    assert not is_sharded(model)

import pytest
import torch
import torch.nn.functional as F

from diffusers_dim import DIMConnector


@pytest.fixture
def connector() -> DIMConnector:
    torch.manual_seed(0)
    return DIMConnector(hidden_size=32, caption_channels=48, max_sequence_length=16).eval()


@pytest.fixture
def hidden_states() -> torch.Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def test_defaults_are_the_released_models_sizes():
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in DIMConnector().named_parameters()}
    assert shapes == {
        "null_condition": (8192, 2304),
        "linear_1.weight": (2304, 2048),
        "linear_1.bias": (2304,),
        "linear_2.weight": (2304, 2304),
        "linear_2.bias": (2304,),
    }


@torch.no_grad()
def test_two_linear_layers_with_an_exact_gelu_between(connector, hidden_states):
    expected = F.gelu(hidden_states @ connector.linear_1.weight.T + connector.linear_1.bias, approximate="none")
    expected = expected @ connector.linear_2.weight.T + connector.linear_2.bias
    torch.testing.assert_close(connector(hidden_states).prompt_embeds, expected)


@torch.no_grad()
def test_each_token_is_mapped_by_itself(connector, hidden_states):
    whole = connector(hidden_states).prompt_embeds
    torch.testing.assert_close(connector(hidden_states[:, 3:4]).prompt_embeds, whole[:, 3:4])


@torch.no_grad()
def test_null_condition_is_its_first_rows(connector, hidden_states):
    output = connector(hidden_states, null_length=7)
    assert output.prompt_embeds.shape == (2, 5, 48)
    assert torch.equal(output.null_embeds, connector.null_condition[:7])
    alone = connector(null_length=16)
    assert alone.prompt_embeds is None and torch.equal(alone.null_embeds, connector.null_condition)


def test_null_condition_learns(connector, hidden_states):
    output = connector(hidden_states, null_length=7)
    (output.prompt_embeds.sum() + output.null_embeds.sum()).backward()
    assert (connector.null_condition.grad[:7] == 1).all() and (connector.null_condition.grad[7:] == 0).all()
    assert connector.linear_1.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_tuple_holds_the_same_values(connector, hidden_states):
    prompt_embeds, null_embeds = connector(hidden_states, null_length=3, return_dict=False)
    output = connector(hidden_states, null_length=3)
    assert torch.equal(prompt_embeds, output.prompt_embeds) and torch.equal(null_embeds, output.null_embeds)
    assert connector(hidden_states, return_dict=False)[1] is None


def test_more_null_rows_than_there_are_raise(connector):
    with pytest.raises(ValueError, match="`null_length` is 17, but this connector's null condition has only 16 rows"):
        connector(null_length=17)


@torch.no_grad()
def test_saved_connector_is_loaded(connector, hidden_states, tmp_path):
    connector.save_pretrained(tmp_path)
    loaded = DIMConnector.from_pretrained(tmp_path)
    assert loaded.config.max_sequence_length == 16
    expected = connector(hidden_states, null_length=16, return_dict=False)
    for actual, value in zip(loaded(hidden_states, null_length=16, return_dict=False), expected):
        assert torch.equal(actual, value)


@torch.no_grad()
def test_sharded_connector_is_loaded(connector, hidden_states, tmp_path):
    connector.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DIMConnector.from_pretrained(tmp_path)
    assert torch.equal(loaded(hidden_states).prompt_embeds, connector(hidden_states).prompt_embeds)


@torch.no_grad()
def test_variant_is_loaded(connector, hidden_states, tmp_path):
    connector.save_pretrained(tmp_path, variant="ema")
    assert (tmp_path / "diffusion_pytorch_model.ema.safetensors").is_file()
    loaded = DIMConnector.from_pretrained(tmp_path, variant="ema")
    assert torch.equal(loaded(hidden_states).prompt_embeds, connector(hidden_states).prompt_embeds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_connector_is_loaded_in_another_dtype(connector, hidden_states, tmp_path, dtype):
    connector.save_pretrained(tmp_path)
    loaded = DIMConnector.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == loaded.null_condition.dtype == dtype
    output = loaded(hidden_states.to(dtype)).prompt_embeds
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), connector(hidden_states).prompt_embeds, atol=0.02, rtol=0)


@torch.no_grad()
def test_null_condition_is_not_stored_in_float8(connector, hidden_states):
    expected = connector(hidden_states).prompt_embeds
    connector.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert connector.linear_1.weight.dtype == connector.linear_2.weight.dtype == torch.float8_e4m3fn
    assert connector.null_condition.dtype == torch.float32
    torch.testing.assert_close(connector(hidden_states).prompt_embeds, expected, atol=0.1, rtol=0)


@torch.no_grad()
def test_null_condition_is_onloaded_by_group_offloading(connector, hidden_states):
    expected = connector(hidden_states, null_length=4, return_dict=False)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    connector.enable_group_offload(device, offload_type="leaf_level")
    for actual, value in zip(connector(hidden_states.to(device), null_length=4, return_dict=False), expected):
        assert actual.device.type == device.type
        torch.testing.assert_close(actual.cpu(), value)

import pytest
import torch

from diffusers_dim.ops import (
    relu_linear_attention,
    relu_linear_attention_apply,
    relu_linear_attention_reference,
    relu_linear_attention_state,
    relu_linear_attention_state_reference,
)


def fused(random, batch_size, tokens, heads, head_dim):
    """Views of one (batch_size, tokens, 3 * heads * head_dim) projection."""
    return random(batch_size, tokens, 3 * heads, head_dim).chunk(3, dim=2)


def heads_first(random, batch_size, tokens, heads, head_dim):
    return random(3, batch_size, heads, tokens, head_dim).transpose(2, 3).unbind()


def tokens_last(random, batch_size, tokens, heads, head_dim):
    return random(3, batch_size, heads, head_dim, tokens).permute(0, 1, 4, 2, 3).unbind()


def every_second(random, batch_size, tokens, heads, head_dim):
    return random(3, batch_size, 2 * tokens, heads, 2 * head_dim)[:, :, ::2, :, 1::2].unbind()


@pytest.mark.parametrize(
    ("layout", "batch_size", "tokens", "heads", "head_dim", "dtype"),
    [
        (fused, 2, 37, 3, 32, torch.float32),
        (fused, 1, 300, 1, 32, torch.bfloat16),  # two parts of the sequence
        (fused, 1, 129, 1, 112, torch.float16),
        (fused, 1, 33, 1, 112, torch.float32),
        (heads_first, 2, 128, 2, 16, torch.float16),
        (heads_first, 1, 2049, 1, 16, torch.float32),  # five parts, the last of one token
        (tokens_last, 1, 65, 2, 24, torch.float32),
        (tokens_last, 1, 3, 3, 8, torch.bfloat16),
        (every_second, 1, 50, 2, 64, torch.bfloat16),
        (every_second, 1, 31, 1, 128, torch.float32),
        (every_second, 1, 7, 2, 5, torch.float16),
    ],
)
def test_output_and_gradients(device, random, close, layout, batch_size, tokens, heads, head_dim, dtype):
    views = layout(lambda *shape: random(*shape, dtype=dtype), batch_size, tokens, heads, head_dim)
    inputs = [states.requires_grad_() for states in views]
    grad = random(batch_size, heads, tokens, head_dim, dtype=dtype).transpose(1, 2)

    output = relu_linear_attention(*inputs)
    found = dict(zip(("output", "query", "key", "value"), (output, *torch.autograd.grad(output, inputs, grad))))

    wide = [states.detach().float().requires_grad_() for states in inputs]
    output = relu_linear_attention_reference(*wide)
    wanted = dict(zip(found, (output, *torch.autograd.grad(output, wide, grad.float()))))
    close(found, wanted, dtype)
    assert found["output"].dtype == dtype


def test_query_of_another_length(device, random, close):
    query, (key, value) = random(2, 5, 2, 16), random(2, 2, 40, 2, 16)
    found = relu_linear_attention(query, key, value)
    close({"output": found}, {"output": relu_linear_attention_reference(query, key, value)}, torch.float32)


def test_key_and_value_of_two_types(device, random, close):
    key, value = random(1, 20, 2, 16), random(1, 20, 2, 16, dtype=torch.bfloat16)
    found = relu_linear_attention_state(key, value)
    close({"state": found}, {"state": relu_linear_attention_state_reference(key, value)}, torch.float32)


def test_states_of_parts_add_up(device, random, close):
    query, key, value = random(3, 1, 40, 2, 16)
    state = sum(relu_linear_attention_state(key[:, part], value[:, part]) for part in (slice(0, 13), slice(13, 40)))
    found = relu_linear_attention_apply(query, state)
    close({"output": found}, {"output": relu_linear_attention_reference(query, key, value)}, torch.float32)


def test_query_without_a_positive_channel_gives_zeros(device, random):
    query, key, value = random(3, 1, 20, 1, 16)
    query = -query.abs().requires_grad_()
    output = relu_linear_attention(query, key, value)
    assert not output.any()
    (grad,) = torch.autograd.grad(output.sum(), query)
    assert not grad.any()


def test_nan_is_not_hidden(device, random):
    query, key, value = random(3, 1, 20, 1, 16)
    query[0, 3, 0, 5] = torch.nan
    output = relu_linear_attention(query, key, value)
    assert output[0, 3].isnan().all()
    assert not output[0, 4:].isnan().any()


def test_two_runs_agree_bit_for_bit(device, random):
    query, key, value = random(3, 1, 600, 1, 16, dtype=torch.bfloat16).requires_grad_().unbind()
    runs = []
    for _ in range(2):
        output = relu_linear_attention(query, key, value)
        runs.append((output, *torch.autograd.grad(output.float().square().sum(), (query, key, value))))
    assert all(torch.equal(first, second) for first, second in zip(*runs))

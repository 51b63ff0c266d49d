"""What the denoising loop keeps between its steps, when it begins anew, and which steps are guided."""

import contextlib

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_dim import DIMTransformer2DModel


@pytest.fixture
def uncached(monkeypatch):
    """A context in which nothing is kept between steps."""

    @contextlib.contextmanager
    def uncached():
        with monkeypatch.context() as patch:
            patch.setattr(DIMTransformer2DModel, "splits_guidance", True)
            yield

    return uncached


@contextlib.contextmanager
def recorded(pipe):
    """Pictures and conditions of each forward, and in which ones the condition was projected."""
    calls, projected = [], []
    handles = [
        pipe.transformer.register_forward_hook(
            lambda _, args, kwargs, output: calls.append((len(output[0]), len(kwargs["encoder_hidden_states"]))),
            with_kwargs=True,
        ),
        pipe.transformer.caption_projection.register_forward_hook(lambda *_: projected.append(len(calls))),
    ]
    yield calls, projected
    for handle in handles:
        handle.remove()


PROMPTS = ["Make the red circle blue.", "Add a small green square in the upper left corner, please."]


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"guidance_scale": 1.0},
        {"prompt": PROMPTS},
        {"prompt": PROMPTS, "negative_prompt": ["", "A very dark and blurred picture of nothing at all."]},
        {"guidance_interval": (0.3, 0.7)},
    ],
    ids=["guided", "unguided", "padded", "negative prompt", "interval"],
)
def test_what_is_kept_between_steps_changes_nothing(pipe, paint, uncached, inputs):
    inputs = {"num_inference_steps": 4, **inputs}
    with recorded(pipe) as (_, projected):
        kept = paint(pipe, **inputs)
    assert projected in ([0], [0, 1])  # the second where guidance begins later
    with uncached():
        assert torch.equal(kept, paint(pipe, **inputs))


def test_pictures_of_a_prompt_share_its_condition(pipe, paint, uncached):
    inputs = {"prompt": PROMPTS, "num_images_per_prompt": 3}
    with recorded(pipe) as (calls, _):
        shared = paint(pipe, **inputs)
    assert calls == [(12, 4)] * 2
    with uncached(), recorded(pipe) as (calls, _):
        repeated = paint(pipe, **inputs)
    assert calls == [(12, 12)] * 2
    torch.testing.assert_close(shared, repeated, atol=1e-4, rtol=0)


def test_latents_go_in_once_for_both_branches_of_guidance(pipe, paint, own):
    latents = []
    with recorded(pipe) as (calls, _):
        handle = pipe.transformer.register_forward_pre_hook(lambda _, args: latents.append(len(args[0])))
        once = paint(pipe, height=64, width=64)
        handle.remove()
    assert latents == [1, 1]
    assert calls == [(2, 2)] * 2
    compiled = own(pipe)
    compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled.transformer.register_forward_pre_hook(lambda _, args: latents.append(len(args[0])))
    torch.testing.assert_close(paint(compiled, height=64, width=64), once, atol=1e-4, rtol=0)
    assert latents == [1, 1, 2, 2]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_picture_of_a_shared_condition_is_that_of_a_call_of_its_own(pipe, paint, index):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    shared = paint(pipe, num_images_per_prompt=3, generator=generators)
    alone = paint(pipe, generator=torch.Generator().manual_seed(index))
    torch.testing.assert_close(shared[index : index + 1], alone, atol=1e-4, rtol=0)


def halve_adapter(pipe):
    pipe.set_adapters("default", 0.5)


def scale_call(pipe):
    pipe._attention_kwargs = {"scale": 0.3}


def write_weights(pipe):
    pipe.transformer.transformer_blocks[0].attn2.to_k.lora_A["default"].weight.data.mul_(2)


@pytest.mark.parametrize("change", [halve_adapter, scale_call, write_weights, lambda pipe: pipe.disable_lora()])
def test_adapter_that_a_callback_changes_takes_effect_at_the_next_step(pipe, own, paint, uncached, change):
    def changed_at_the_second_step():
        torch.manual_seed(0)
        adapted = own(pipe)
        adapted.transformer.add_adapter(
            LoraConfig(r=2, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False)
        )
        return paint(
            adapted,
            num_inference_steps=4,
            callback_on_step_end=lambda pipe, step, *_: change(pipe) if step == 1 else None,
        )

    found = changed_at_the_second_step()
    with uncached():
        assert torch.equal(found, changed_at_the_second_step())


def test_callback_that_changes_nothing_projects_nothing_again(pipe, paint):
    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"]}
    with recorded(pipe) as (_, projected):
        paint(pipe, num_inference_steps=4, callback_on_step_end=lambda pipe, step, t, tensors: tensors, **inputs)
    assert projected == [0]


def test_embeddings_of_a_callback_may_have_a_row_a_picture(pipe, paint):
    def repeat(pipe, step, timestep, tensors):
        embeds = tensors["prompt_embeds"]
        return {"prompt_embeds": embeds if len(embeds) == 2 else embeds.repeat_interleave(2, dim=0)}

    inputs = {"num_images_per_prompt": 2, "num_inference_steps": 3}
    inputs["generator"] = [torch.Generator().manual_seed(seed) for seed in range(2)]
    expected = paint(pipe, **inputs)
    inputs["generator"] = [torch.Generator().manual_seed(seed) for seed in range(2)]
    with recorded(pipe) as (calls, _):
        found = paint(
            pipe, callback_on_step_end=repeat, callback_on_step_end_tensor_inputs=["prompt_embeds"], **inputs
        )
    assert calls == [(4, 2), (4, 4), (4, 4)]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_calls_under_inference_mode_are_the_same(pipe, paint):
    inputs = {"num_inference_steps": 3, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = paint(pipe, **inputs)
    with torch.inference_mode():
        assert torch.equal(paint(pipe, **inputs), expected)
        halved = paint(pipe, callback_on_step_end=halve_in_place, **inputs)
    assert torch.equal(paint(pipe, callback_on_step_end=halve_in_place, **inputs), halved)
    assert not torch.equal(halved, expected)


def halve_in_place(pipe, step, timestep, tensors):
    tensors["prompt_embeds"].mul_(0.5)


@pytest.mark.parametrize(
    ("interval", "rows"),
    [
        ((0.0, 1.0), [2, 2, 2, 2, 2]),
        ((0.2, 0.6), [1, 2, 2, 1, 1]),
        ((0.0, 0.5), [2, 2, 1, 1, 1]),
        ((0.0, 0.0), [1, 1, 1, 1, 1]),
        ((1.0, 1.0), [1, 1, 1, 1, 1]),
    ],
)
def test_steps_of_the_guidance_interval_are_guided(pipe, paint, interval, rows):
    with recorded(pipe) as (calls, _):
        paint(pipe, num_inference_steps=5, guidance_interval=interval)
    assert [row for row, _ in calls] == rows


def test_empty_guidance_interval_is_no_guidance(pipe, paint):
    unguided = paint(pipe, guidance_scale=1.0)
    torch.testing.assert_close(paint(pipe, guidance_interval=(0.0, 0.0)), unguided, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_guidance_interval_has_to_be_two_fractions(pipe, paint, interval):
    with pytest.raises(ValueError, match="`guidance_interval` has to be two fractions.*but is"):
        paint(pipe, guidance_interval=interval)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_mask_has_to_keep_a_token(pipe, paint, name):
    inputs = {"prompt_embeds": torch.zeros(1, 4, pipe.transformer.config.caption_channels)}
    inputs |= {"negative_prompt_embeds": inputs["prompt_embeds"], f"{name}_attention_mask": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match=f"`{name}_attention_mask` has to keep at least one token in each row"):
        paint(pipe, **inputs)


class ReadsOfTheHost(TorchDispatchMode):
    """Counts the operations for whose results a host waits."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in self.NAMES
        return func(*args, **(kwargs or {}))


def test_host_reads_nothing_from_the_device_in_the_loop(pipe, paint):
    def reads(steps):
        # The scheduler's sigmas lie on the host; what it reads there, nobody waits for.
        with ReadsOfTheHost() as mode:
            paint(pipe, num_inference_steps=steps)
        return mode.count

    assert reads(4) == reads(8) > 0  # those before the loop

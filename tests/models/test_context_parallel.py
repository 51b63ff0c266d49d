"""A picture's rows split over processes: real ones on a CPU, with gloo, against one process with the same weights."""

import copy
import datetime
import json
import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig
from PIL import Image

from diffusers_dim import DIMEditPipeline, DIMPipeline, DIMTransformer2DModel
from diffusers_dim.models.transformer_dim import DIMDenoisingCache


ROWS, COLUMNS = 12, 5
# How many processes, and how they are arranged; to a sum, ring and Ulysses are the same.
DEGREES = {2: {"ring_degree": 2}, 3: {"ulysses_degree": 3}, 4: {"ring_degree": 2, "ulysses_degree": 2}}


def make_inputs(model, rows=ROWS, pictures=2):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(pictures, model.config.in_channels, rows, COLUMNS, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 48, generator=generator),
        "timestep": torch.tensor([900, 300] * (pictures // 2)),
    }


@torch.no_grad()
def predict(model, **inputs):
    return model(**inputs).sample


def padded_condition(model):
    mask = torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3])
    return predict(model, **make_inputs(model), encoder_attention_mask=mask)


def pictures_that_share_conditions(model):
    return predict(model, **make_inputs(model, pictures=4))


def one_row_a_process(model):
    return predict(model, **make_inputs(model, rows=dist.get_world_size()))


def steps_with_a_denoising_cache(model):
    inputs, timesteps = make_inputs(model), torch.tensor([900, 300])
    cache = DIMDenoisingCache(timesteps)
    steps = [predict(model, **{**inputs, "timestep": step[None]}, denoising_cache=cache) for step in timesteps]
    return torch.stack(steps)


PREDICTIONS = [padded_condition, pictures_that_share_conditions, one_row_a_process, steps_with_a_denoising_cache]


def gradients(model):
    """Of a loss on the whole prediction, to the latents and all weights; the processes' shares are added up."""
    inputs = make_inputs(model)
    inputs["hidden_states"].requires_grad_()
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    result = {"latents": inputs["hidden_states"].grad}
    result.update((name, parameter.grad.clone()) for name, parameter in model.named_parameters())
    if model._parallel_config is not None:
        for tensor in result.values():
            dist.all_reduce(tensor)
    return result


def gradients_with_checkpointing(model):
    model.enable_gradient_checkpointing()
    result = gradients(model)
    model.disable_gradient_checkpointing()
    return result


GRADIENTS = [gradients, gradients_with_checkpointing]


def refused_calls(model):
    """Of calls that cannot be split: the message, and how often the model had begun to compute."""
    begun = []
    hook = model.patch_embed.register_forward_pre_hook(lambda *_: begun.append(True))
    inputs = make_inputs(model)

    def message(**inputs):
        begun.clear()
        with pytest.raises(ValueError) as error:
            predict(model, **inputs)
        return str(error.value), len(begun)

    refused = {
        "rows": message(**make_inputs(model, rows=13)),
        "controlnet": message(**inputs, controlnet_block_samples=(torch.zeros(2, ROWS * COLUMNS, 64),)),
    }
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    refused["first-block cache"] = message(**inputs)
    model.disable_cache()
    hook.remove()
    return refused


def call_pipeline(pipe, source):
    """Two prompts of unequal length, two pictures each, under guidance; the noise is the same in every process."""
    pipe.set_progress_bar_config(disable=True)
    image = {} if source is None else {"image": source}
    return pipe(
        **image,
        prompt=["Make the red circle blue.", "A cat."],
        height=ROWS * pipe.vae_scale_factor,
        width=COLUMNS * pipe.vae_scale_factor,
        num_inference_steps=3,
        guidance_scale=4.0,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def work(rank, world_size, folder, transformer_config, edit_folder, t2i_folder, source_path):
    """One process's share: every case, by the model as it is and by its copy under context parallelism."""
    torch.set_num_threads(1)
    # diffusers divides by the number of accelerators, and a CPU counts as none.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.accelerator.device_count = lambda: 1
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting_place",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.manual_seed(0)
    whole = DIMTransformer2DModel(**json.loads(transformer_config.read_text()))
    split = copy.deepcopy(whole)
    split.enable_parallelism(config=ContextParallelConfig(**DEGREES[world_size]))
    results = {case.__name__: (case(whole), case(split)) for case in PREDICTIONS + GRADIENTS}
    results["refused"] = refused_calls(split)

    with Image.open(source_path) as source:
        source = source.convert("RGB")
    pipelines = [(DIMEditPipeline, edit_folder, source), (DIMPipeline, t2i_folder, None)]
    for pipeline_class, model_folder, image in pipelines:
        pipe = pipeline_class.from_pretrained(model_folder)
        expected = call_pipeline(pipe, image)
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(**DEGREES[world_size]))
        results[pipeline_class.__name__] = (expected, call_pipeline(pipe, image))

    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=DEGREES)
def results(request, golden_edit, edit_folder, t2i_folder, tmp_path_factory):
    """What each process computed of each case."""
    folder = tmp_path_factory.mktemp("processes")
    # Forked from a server that has imported what takes long, once, and has no threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "diffusers_dim.pipelines.pipeline_dim_edit"])
    source = golden_edit.path / "source.png"
    inputs = (request.param, folder, golden_edit.path / "transformer_config.json", edit_folder, t2i_folder, source)
    processes = [context.Process(target=work, args=(rank, *inputs)) for rank in range(request.param)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck and [process.exitcode for process in processes] == [0] * request.param
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", [case.__name__ for case in PREDICTIONS])
def test_prediction_is_that_of_one_process(results, case):
    for result in results:
        expected, actual = result[case]
        torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("case", [case.__name__ for case in GRADIENTS])
def test_gradients_add_up_to_those_of_one_process(results, case):
    for result in results:
        expected, actual = result[case]
        for name, gradient in expected.items():
            tolerance = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(actual[name], gradient, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("pipeline", ["DIMEditPipeline", "DIMPipeline"])
def test_pictures_are_those_of_one_process(results, pipeline):
    for result in results:
        expected, actual = result[pipeline]
        assert expected.shape == (4, 3, 48, 20)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_every_process_holds_the_same_picture(results):
    for result in results[1:]:
        assert torch.equal(result["DIMEditPipeline"][1], results[0]["DIMEditPipeline"][1])


def test_rows_that_the_devices_cannot_share_evenly_are_refused_before_anything_is_computed(results):
    devices = len(results)
    message = (
        f"13 rows of tokens cannot be split evenly over {devices} devices: under context parallelism the latents'"
        f" height has to be a multiple of {devices}."
    )
    assert [result["refused"]["rows"] for result in results] == [(message, 0)] * devices


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("controlnet", "does not split `controlnet_block_samples`"),
        ("first-block cache", "A first-block cache decides by what one device sees"),
    ],
)
def test_what_cannot_be_split_is_refused(results, case, message):
    for result in results:
        assert message in result["refused"][case][0]
        assert result["refused"][case][1] == 0

import argparse

import pytest
import torch
from PIL import Image

from diffusers_dim import DIMConnector, DIMEditPipeline, DIMPipeline
from diffusers_dim.data import TrainingBatch
from diffusers_dim.training import DIMTrainingModel, complete_pipeline, make_inputs


ARGS = argparse.Namespace(
    precomputed_conditions=None,
    shard_text_encoder=False,
    max_sequence_length=64,
    seed=3,
    conditioning_dropout_prob=0.1,
)


@pytest.fixture(scope="module")
def pipe(edit_folder):
    return DIMEditPipeline.from_pretrained(edit_folder)


def sample(prompt, color):
    picture = Image.new("RGB", (64, 64), color)
    return {"id": prompt, "prompt": prompt, "source": picture, "target": picture.rotate(180)}


def batch(samples, positions):
    return TrainingBatch(samples, positions, height=64, width=64, epoch=0)


@torch.no_grad()
def losses(pipe, samples, positions):
    inputs, weights = make_inputs(batch(samples, positions), pipe, ARGS, torch.device("cpu"))
    return DIMTrainingModel(pipe.connector, pipe.transformer)(**inputs), weights


def test_losses_of_samples_do_not_depend_on_the_batch(pipe):
    samples = [sample("make it red", "blue"), sample("remove the large cat", "green")]
    together, weights = losses(pipe, samples, [6, 7])
    alone = [losses(pipe, [one], [position])[0] for one, position in zip(samples, (6, 7))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=0)
    assert weights.tolist() == [1, 1]


@pytest.mark.parametrize("sharded", [False, True])
def test_empty_share_keeps_up_without_weight(pipe, sharded):
    args = argparse.Namespace(**vars(ARGS) | {"shard_text_encoder": sharded})
    inputs, weights = make_inputs(batch([], []), pipe, args, torch.device("cpu"))
    assert weights.tolist() == [0]
    assert DIMTrainingModel(pipe.connector, pipe.transformer)(**inputs).isfinite().all()


def test_result_has_trained_components_and_reads_what_is_not_there(pipe, edit_folder):
    trained = DIMConnector.from_pretrained(edit_folder, subfolder="connector")
    whole = complete_pipeline(pipe, lambda components: pytest.fail("read"), connector=trained)
    assert whole.connector is trained and whole.vae is pipe.vae

    partial = DIMEditPipeline.from_pretrained(edit_folder, text_encoder=None, processor=None, vae=None)
    whole = complete_pipeline(
        partial, lambda components: DIMPipeline.from_pretrained(edit_folder, **components), connector=trained
    )
    assert whole.connector is trained and whole.vae is not None

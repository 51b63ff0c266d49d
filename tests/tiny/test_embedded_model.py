from pathlib import Path

import pytest
import torch

from diffusers_dim import TINY_SHAPES, DIMEditPipeline
from diffusers_dim.evaluation import evaluate_shapes
from diffusers_dim.tiny import EDIT_KINDS, sample_edits


@pytest.fixture(scope="module")
def pipe():
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_is_small_and_runs_in_float32(pipe):
    assert sum(path.stat().st_size for path in Path(TINY_SHAPES).rglob("*")) < 8_000_000
    models = (pipe.text_encoder, pipe.connector, pipe.transformer, pipe.vae)
    assert {model.dtype for model in models} == {torch.float32}


def test_carries_its_own_guidance(pipe):
    edit = sample_edits(1, seed=0)[0]
    pipe(edit.source, edit.instruction, num_inference_steps=1)
    assert pipe.guidance_scale == pipe.config.default_guidance_scale == 2.5


def test_really_edits_on_seeds_it_was_not_trained_on(pipe):
    report = evaluate_shapes(pipe, sample_edits(36, seed=3_000_000_019))
    assert set(report.scores) == set(EDIT_KINDS)
    assert report.overall >= 0.8, f"\n{report}"

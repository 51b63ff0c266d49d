import numpy as np
import pytest
from PIL import Image

from diffusers_dim import DIMEditPipeline
from diffusers_dim.evaluation.shapes import evaluate_shapes, score_edit
from diffusers_dim.tiny import sample_edits


@pytest.fixture(scope="module")
def samples():
    return sample_edits(12, seed=5)


def test_the_true_edit_succeeds_and_the_source_does_not(samples):
    for sample in samples:
        assert score_edit(sample, sample.target).success
        score = score_edit(sample, sample.source)
        assert score.error_ratio == 1.0 and score.psnr == float("inf") and not score.success


def test_a_spoilt_rest_fails(samples):
    for sample in samples:
        source, target = (np.asarray(image).astype(int) for image in (sample.source, sample.target))
        kept = (source == target).all(axis=-1)
        spoilt = target.copy()
        spoilt[kept] = np.where(spoilt[kept] > 127, spoilt[kept] - 30, spoilt[kept] + 30)  # 18.6 dB
        score = score_edit(sample, Image.fromarray(spoilt.astype(np.uint8)))
        assert score.psnr == pytest.approx(20 * np.log10(255 / 30))
        assert score.error_ratio == 0.0 and not score.success


def test_an_edit_half_made_is_at_the_bound(samples):
    sample = samples[0]
    half = Image.blend(sample.source, sample.target, 0.5)
    assert score_edit(sample, half).error_ratio == pytest.approx(0.5, abs=0.02)
    assert score_edit(sample, Image.blend(sample.source, sample.target, 0.7)).success


def test_another_size_is_refused(samples):
    with pytest.raises(ValueError, match=r"\(32, 32\).*\(64, 64\)"):
        score_edit(samples[0], samples[0].target.resize((32, 32)))


def test_report_counts_every_edit_once_and_does_not_depend_on_the_batch(edit_folder, samples):
    pipe = DIMEditPipeline.from_pretrained(edit_folder)
    pipe.set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=2)
    keep = []
    report = evaluate_shapes(pipe, samples, batch_size=5, keep=keep, **settings)
    alone = evaluate_shapes(pipe, samples, batch_size=1, **settings)
    assert len(keep) == 12 and report.to_dict()["edits"] == 12
    assert report.overall == 0.0  # a random model edits nothing
    for kind, scores in report.scores.items():
        assert [s.psnr for s in scores] == pytest.approx([s.psnr for s in alone.scores[kind]], abs=0.1)
    assert "recolor" in str(report) and "overall" in str(report)

import json
import math

import numpy as np
import pytest
from miniatures import write_clip, write_dino
from PIL import Image

from diffusers_dim.evaluation.preservation import MAX_PSNR, Pair, load_metrics, measure_preservation


SIDE = 64


def picture(noise=0, square=None):
    """Grey noise, its values moved by `noise` levels, perhaps with a square of a color in the top left."""
    values = np.random.default_rng(0).integers(60, 190, (SIDE, SIDE, 3))
    values += noise
    if square is not None:
        values[:24, :24] = square
    return Image.fromarray(values.astype(np.uint8))


def save(folder, **pictures):
    """The pair of a source, an edit and perhaps a target."""
    for name, image in pictures.items():
        image.save(folder / f"{name}.png")
    return Pair("one", "add", **{name: folder / f"{name}.png" for name in pictures})


def pixel_error(first, second, area):
    """A metric without libraries: the mean difference in levels."""
    differences = np.abs(np.asarray(first, int) - np.asarray(second, int))
    return float(differences[np.asarray(area) > 0].mean())


def measure(pair, metrics=None, **options):
    (found,) = measure_preservation([pair], metrics or {"psnr": pixel_error}, **options).pairs
    return found


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return str(write_dino(tmp_path_factory.mktemp("models") / "dino"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("models") / "clip"))


def test_area_is_between_source_and_target_where_there_is_one(tmp_path):
    pair = save(tmp_path, source=picture(), edit=picture(5, (255, 0, 0)), target=picture(0, (255, 0, 0)))
    found = measure(pair)
    assert found.area == "source and target"
    assert found.changed == pytest.approx((24 / SIDE) ** 2, rel=0.1)
    # Inside the edit is as the target; outside it is 5 levels off the source.
    assert found.inside["psnr"] < 1
    assert found.outside["psnr"] == pytest.approx(5)


def test_area_is_between_source_and_edit_without_a_target(tmp_path):
    found = measure(save(tmp_path, source=picture(), edit=picture(5, (255, 0, 0))))
    assert found.area == "source and edit"
    assert found.inside["psnr"] > 50  # how far it went from the source
    assert found.outside["psnr"] == pytest.approx(5)


def test_area_that_is_empty_is_not_measured(tmp_path):
    found = measure(save(tmp_path, source=picture(), edit=picture(2)))
    assert (found.changed, found.inside) == (0, {})
    assert found.outside == {"psnr": 2.0}


def test_source_is_compared_as_the_painter_saw_it(tmp_path):
    """Of a source that is twice as large and wider, the centre is."""
    wide = Image.new("RGB", (4 * SIDE, 2 * SIDE), "white")
    wide.paste(picture().resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST), (SIDE, 0))
    assert measure(save(tmp_path, source=wide, edit=picture())).changed < 0.02  # at the edges white was mixed in


def test_means_are_of_the_pairs_that_have_the_area(tmp_path):
    (tmp_path / "same").mkdir()
    pairs = [
        save(tmp_path, source=picture(), edit=picture(0, (255, 0, 0))),
        save(tmp_path / "same", source=picture(), edit=picture(4)),
    ]
    report = measure_preservation(pairs, {"psnr": pixel_error}, cases=10)
    inside, outside = (report.figure(area, "psnr") for area in ("inside", "outside"))
    assert (inside.scored, inside.cases) == (1, 10)
    assert (outside.value, outside.scored, outside.cases) == (pytest.approx(2, abs=0.1), 2, 10)
    assert "| 1 of 10 |" in str(report) and "| 2 of 10 |" in str(report)
    assert "2 of 2 changed areas are between source and edit; inside, the edit is compared with the source" in str(
        report
    )


def test_report_is_plain_json(tmp_path):
    pair = save(tmp_path, source=picture(), edit=picture(5, (255, 0, 0)), target=picture(0, (255, 0, 0)))
    report = measure_preservation([pair], {"psnr": pixel_error}, {"lpips": "no module."})
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["figures"]["add"]["outside"]["psnr"]["value"] == pytest.approx(5)
    assert found["areas"] == {"source and target": 1}
    assert found["unmeasured"] == {"lpips": "no module."}
    assert "LPIPS ↓: not measured, no module." in str(report)


def test_missing_pictures_are_listed(tmp_path):
    pair = save(tmp_path, source=picture(), edit=picture())
    lost = Pair("two", "add", tmp_path / "lost.png", tmp_path / "lost-edit.png")
    with pytest.raises(ValueError, match=r"Pictures are missing: 2 problems:\n.*lost\.png\n.*lost-edit\.png"):
        measure_preservation([pair, lost], {"psnr": pixel_error})


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="of psnr, ssim, lpips, dino, clip, but fid were asked for"):
        load_metrics(["psnr", "fid"])


def test_what_cannot_be_had_is_told_with_the_reason(tmp_path):
    metrics, unmeasured = load_metrics(["dino", "clip"], dino=str(tmp_path / "none"))
    assert metrics == {}
    assert "none" in unmeasured["dino"]
    assert unmeasured["clip"] == "no model is given by --clip."


def test_model_of_another_kind_is_refused(dino):
    with pytest.raises(ValueError, match="has to be a CLIP model, but is a dinov2"):
        load_metrics(["clip"], clip=dino)


def test_embeddings_are_compared_within_the_area_alone(tmp_path, dino, clip):
    metrics, unmeasured = load_metrics(["dino", "clip"], dino, clip)
    assert unmeasured == {}
    pair = save(tmp_path, source=picture(), edit=picture(0, (255, 0, 0)))
    found = measure(pair, metrics)
    for name in ("dino", "clip"):
        assert found.inside[name] > 10 * found.outside[name]
        assert found.outside[name] < 1e-3


def test_psnr_and_ssim_are_those_of_the_area(tmp_path):
    pytest.importorskip("torchmetrics")
    metrics, unmeasured = load_metrics(["psnr", "ssim"])
    assert unmeasured == {}
    pair = save(tmp_path, source=picture(), edit=picture(5, (255, 0, 0)), target=picture(0, (255, 0, 0)))
    found = measure(pair, metrics)
    assert found.outside["psnr"] == pytest.approx(20 * math.log10(255 / 5), abs=1e-3)
    assert 0.9 < found.outside["ssim"] < 1
    same = measure(save(tmp_path, source=picture(), edit=picture(0, (255, 0, 0))), metrics)
    assert same.outside["psnr"] > 40
    alike = measure(save(tmp_path, source=picture(), edit=picture()), metrics)
    assert alike.outside == {"psnr": MAX_PSNR, "ssim": pytest.approx(1)}

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_dim.evaluation.mjhq import MJHQ


CATEGORIES = ("animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people", "plants", "vehicles")


class Features(torch.nn.Module):
    """A small random network; it counts what it has seen."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(6, 3, 23, 23, generator=generator) / 40)
        self.seen = 0

    def forward(self, pictures):
        assert pictures.dtype == torch.uint8 and pictures.shape[1:] == (3, 299, 299)
        self.seen += len(pictures)
        return torch.nn.functional.conv2d(pictures / 255, self.weight, stride=23).relu().mean(dim=(2, 3))


def write_picture(path, generator):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (int(generator.integers(20, 60)), int(generator.integers(20, 60)), 3)
    Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)


def write_data(folder, categories=CATEGORIES, count=4):
    generator = np.random.default_rng(0)
    rows = {
        f"{place:02}{number}f": {"category": category, "prompt": f"{category} {number}", "score": 1.0}
        for place, category in enumerate(categories)
        for number in range(count)
    }
    for key, row in rows.items():
        write_picture(folder / "mjhq30k_imgs" / row["category"] / f"{key}.jpg", generator)
    (folder / "meta_data.json").write_text(json.dumps(rows))
    return folder


def paint(benchmark, pictures):
    generator = np.random.default_rng(1)
    for case in benchmark.cases:
        write_picture(pictures / case.files[0], generator)


def fid(real, made):
    """By the definition, with the root of a product of symmetric matrices by eigenvalues."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    covariances = [np.cov(features, rowvar=False) for features in (real, made)]
    half = root(covariances[0])
    mixed = np.trace(root(half @ covariances[1] @ half))
    return np.square(real.mean(0) - made.mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * mixed


@pytest.fixture
def torchmetrics():
    return pytest.importorskip("torchmetrics")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def test_pictures_lie_by_category(data):
    cases = MJHQ(data).cases
    assert len(cases) == 40 and cases[5].files == ("art/011f.png",) and cases[5].prompt == "art 1"
    assert MJHQ.groups == CATEGORIES and MJHQ(data).references == data / "mjhq30k_imgs"


def test_reference_pictures_may_lie_in_the_folder_itself(data):
    for category in CATEGORIES:
        shutil.move(data / "mjhq30k_imgs" / category, data / category)
    (data / "mjhq30k_imgs").rmdir()
    assert len(MJHQ(data).cases) == 40


def test_fid_is_that_of_the_definition_overall_and_by_category(torchmetrics, data, tmp_path):
    pictures = tmp_path / "run" / "pictures"
    benchmark = MJHQ(data, features=Features(), batch_size=3)
    paint(benchmark, pictures)
    scores = benchmark.score({"model": "m"}, pictures, None, "")
    with torch.no_grad():
        real, made = (
            Features()(
                torch.stack([benchmark._read(folder / f"{case.group}/{case.key}{ending}") for case in benchmark.cases])
            )
            .double()
            .numpy()
            for folder, ending in ((benchmark.references, ".jpg"), (pictures, ".png"))
        )
    assert scores.figures["overall"].value == pytest.approx(fid(real, made), rel=1e-5)
    for place, category in enumerate(CATEGORIES):
        rows = slice(4 * place, 4 * place + 4)
        figure = scores.figures[category]
        assert figure.value == pytest.approx(fid(real[rows], made[rows]), rel=1e-5)
        assert (figure.scored, figure.cases, figure.low) == (4, 4, None)
    assert scores.lower_is_better and list(scores.figures) == ["overall", *CATEGORIES]
    assert [(case.score, case.reason) for case in scores.cases] == [(None, "")] * 40


def test_the_references_themselves_are_at_no_distance(torchmetrics, data, tmp_path):
    benchmark = MJHQ(data, features=Features())
    for case in benchmark.cases:
        (tmp_path / "pictures" / case.group).mkdir(parents=True, exist_ok=True)
        reference = Image.open(benchmark.references / case.group / f"{case.key}.jpg")
        reference.save(tmp_path / "pictures" / case.files[0])
    assert benchmark.score({}, tmp_path / "pictures", None, "").figures["overall"].value == pytest.approx(0, abs=1e-9)


def test_a_second_run_makes_no_features_again(torchmetrics, data, tmp_path):
    pictures, network = tmp_path / "pictures", Features()
    benchmark = MJHQ(data, features=network)
    paint(benchmark, pictures)
    first = benchmark.score({}, pictures, None, "")
    assert network.seen == 80
    assert MJHQ(data, features=network).score({}, pictures, None, "") == first
    assert network.seen == 80


def test_other_pictures_networks_and_resizing_make_features_anew(torchmetrics, data, tmp_path):
    pictures, network = tmp_path / "pictures", Features()
    benchmark = MJHQ(data, features=network)
    paint(benchmark, pictures)
    first = benchmark.score({}, pictures, None, "")
    write_picture(pictures / "food" / "030f.png", np.random.default_rng(9))
    second = benchmark.score({}, pictures, None, "")
    assert network.seen == 84  # that category's pictures
    assert second.figures["food"] != first.figures["food"] and second.figures["art"] == first.figures["art"]
    legacy = MJHQ(data, resize="legacy_pytorch", features=network).score({}, pictures, None, "")
    assert network.seen == 164 and legacy.figures["overall"] != second.figures["overall"]
    with torch.no_grad():
        network.weight *= 2
    assert benchmark.score({}, pictures, None, "").run["fid"] != second.run["fid"] and network.seen == 244


def test_kept_features_that_are_broken_are_made_anew(torchmetrics, data, tmp_path):
    pictures, network = tmp_path / "pictures", Features()
    benchmark = MJHQ(data, features=network)
    paint(benchmark, pictures)
    first = benchmark.score({}, pictures, None, "")
    (tmp_path / "features" / "references-art.safetensors").write_bytes(b"no features")
    assert benchmark.score({}, pictures, None, "") == first and network.seen == 84


def test_the_protocol_is_said_with_the_run(torchmetrics, data, tmp_path):
    benchmark = MJHQ(data, features=Features())
    paint(benchmark, tmp_path / "pictures")
    run = benchmark.score({"model": "m"}, tmp_path / "pictures", None, "").run
    assert run["model"] == "m"
    assert run["fid"].startswith(f"torchmetrics {torchmetrics.__version__}, Features ")
    assert run["fid"].endswith(", clean resize to 299x299")


def test_clean_resizing_is_pils_bicubic(data, tmp_path):
    faint = np.random.default_rng(3).integers(100, 150, (40, 50, 3), dtype=np.uint8)  # nothing overshoots and is cut
    Image.fromarray(faint).save(tmp_path / "a.png")
    whole = Image.open(tmp_path / "a.png").resize((299, 299), Image.Resampling.BICUBIC)
    clean = MJHQ(data)._read(tmp_path / "a.png").permute(1, 2, 0).numpy().astype(int)
    assert np.abs(clean - np.asarray(whole)).max() <= 1  # which rounds between its two passes, too


def test_clean_resizing_averages_and_the_legacy_one_skips(data, tmp_path):
    stripes = np.zeros((1196, 1196, 3), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255  # half of the columns
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    clean = MJHQ(data)._read(tmp_path / "stripes.png")
    legacy = MJHQ(data, resize="legacy_pytorch")._read(tmp_path / "stripes.png")
    assert clean.shape == legacy.shape == (3, 299, 299)
    assert abs(clean[:, 5:-5, 5:-5].double().mean() - 127.5) < 1 and clean[:, 5:-5, 5:-5].double().std() < 1
    # Of four columns the inner two: one of them is white.
    assert set(legacy.unique().tolist()) <= {127, 128}
    stripes = np.roll(stripes, 1, axis=1)  # now both
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert set(MJHQ(data, resize="legacy_pytorch")._read(tmp_path / "stripes.png").unique().tolist()) == {255}


def test_missing_pictures_are_counted_and_too_few_have_no_figure(torchmetrics, tmp_path):
    benchmark = MJHQ(write_data(tmp_path / "data", CATEGORIES[:3]), features=Features())
    paint(benchmark, tmp_path / "pictures")
    for number in range(4):
        (tmp_path / "pictures" / "art" / f"01{number}f.png").unlink()
    (tmp_path / "pictures" / "fashion" / "020f.png").unlink()
    figures = benchmark.score({}, tmp_path / "pictures", None, "").figures
    told = {name: (figure.scored, figure.cases, figure.value is None) for name, figure in figures.items()}
    assert told == {
        "overall": (7, 12, False),
        "animals": (4, 4, False),
        "art": (0, 4, True),
        "fashion": (3, 4, False),
    }


def test_a_broken_picture_is_named(torchmetrics, data, tmp_path):
    benchmark = MJHQ(data, features=Features())
    paint(benchmark, tmp_path / "pictures")
    (data / "mjhq30k_imgs" / "plants" / "082f.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"plants/082f\.jpg cannot be read as a picture"):
        benchmark.score({}, tmp_path / "pictures", None, "")


def test_wrong_data_are_all_listed(data, tmp_path):
    rows = json.loads((data / "meta_data.json").read_text())
    rows["000f"]["category"] = "beasts"
    rows["001f"]["prompt"] = None
    rows["../up"] = {"category": "art", "prompt": "x"}
    rows["999f"] = {"category": "people", "prompt": "x"}
    (data / "meta_data.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError) as error:
        MJHQ(data)
    for told in (
        "5 problems",
        "000f: the category 'beasts'",
        "001f: there is no prompt",
        "'../up': an id",
        "people/999f.jpg",
    ):
        assert told in str(error.value)


def test_an_id_that_is_there_twice_is_refused(data):
    text = (data / "meta_data.json").read_text()
    (data / "meta_data.json").write_text(text[:-1] + ', "010f": {"category": "art", "prompt": "again"}}')
    with pytest.raises(ValueError, match=r"meta_data\.json cannot be read: the keys \['010f'\] come twice"):
        MJHQ(data)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"a": 1}', '[["a", [["category", "art"]]]]', "[" * 100_000])
def test_a_file_that_is_no_metadata_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "meta_data.json").write_text(text)
    with pytest.raises(ValueError, match=r"meta_data\.json"):
        MJHQ(tmp_path)


def test_settings_that_make_no_sense_are_refused(data):
    with pytest.raises(ValueError, match='"clean" or "legacy_pytorch", but is \'cubic\''):
        MJHQ(data, resize="cubic")
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        MJHQ(data, batch_size=0)


def test_without_the_libraries_it_is_said_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"pip install torchmetrics torch-fidelity torchvision"):
        MJHQ(data, features=Features()).score({}, tmp_path / "pictures", None, "")

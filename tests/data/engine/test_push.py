import json

import datasets
import pytest
from built_sets import make_rows, write_set
from hub_server import serve_hub
from huggingface_hub import DatasetCard
from PIL import Image

from diffusers_dim.data import load_training_data
from diffusers_dim.data.engine.push import build_card, push_to_hub, save_to_folder


DROPPED = [{"id": "x", "stage": "filter", "reason": "identical"}, {"id": "y", "stage": "assess", "reason": "misfit"}]


@pytest.fixture
def built(tmp_path):
    return write_set(tmp_path / "built", make_rows(7), DROPPED)


def test_card_tells_data_columns_and_drops(built):
    text = build_card(built, "me/edits", license="cc-by-4.0")
    card = DatasetCard(text)
    assert card.data.license == "cc-by-4.0"
    assert card.data.task_categories == ["image-to-image"]
    assert card.data.size_categories == ["n<1K"]
    dtypes = {feature["name"]: feature["dtype"] for feature in card.data.to_dict()["dataset_info"]["features"]}
    assert dtypes["source"] == dtypes["target"] == "image" and dtypes["prompt"] == "string"
    assert "# edits\n" in text and 'load_dataset("me/edits"' in text
    assert "https://huggingface.co/papers/2509.01986" in text
    assert "| samples | 7 |" in text and "| assess | 1 |" in text and "| filter | 1 |" in text
    for column in make_rows(1)[0]:
        assert f"| `{column}` | " in text


def test_folder_is_read_by_datasets_with_pictures(built, tmp_path):
    save_to_folder(built, tmp_path / "shared")
    rows = datasets.load_dataset(str(tmp_path / "shared"), split="train", cache_dir=str(tmp_path / "cache"))
    made = make_rows(7)
    assert rows.column_names == list(made[0])
    assert rows["prompt"] == [row["prompt"] for row in made]
    assert isinstance(rows[6]["source"], Image.Image) and rows[6]["target"].size == (64, 64)
    streamed = datasets.load_dataset(str(tmp_path / "shared"), split="train", streaming=True)
    assert isinstance(next(iter(streamed))["target"], Image.Image)


def test_folder_can_be_trained_from(built, tmp_path):
    save_to_folder(built, tmp_path / "shared")
    samples = load_training_data("edit", dataset_name=str(tmp_path / "shared"), cache_dir=tmp_path / "cache")
    assert samples[3]["prompt"] == make_rows(7)[3]["prompt"] and samples[3]["source"].size == (64, 64)


def test_captions_are_a_set_for_text_to_image(tmp_path):
    rows = [{"id": row["id"], "target": row["target"], "prompt": "Shapes."} for row in make_rows(2)]
    write_set(tmp_path / "captions", rows)
    card = DatasetCard(build_card(tmp_path / "captions", "captions"))
    assert card.data.task_categories == ["text-to-image"]
    assert "| `prompt` | its caption |" in card.text
    save_to_folder(tmp_path / "captions", tmp_path / "shared")
    assert datasets.load_dataset(str(tmp_path / "shared"), split="train", cache_dir=str(tmp_path))[0]["target"]


def test_folder_with_something_in_it_is_refused(built, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or an empty folder"):
        save_to_folder(built, tmp_path / "shared")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["note.txt"]


def test_nothing_is_left_of_a_copy_that_fails(tmp_path):
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "data-00000.parquet").write_bytes(b"none")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        save_to_folder(tmp_path / "built", tmp_path / "shared")
    assert [path.name for path in tmp_path.iterdir()] == ["built"]


@pytest.fixture
def hub(monkeypatch):
    with serve_hub(monkeypatch, "datasets", "me/edits") as received:
        yield received


@pytest.mark.parametrize("private", [False, True])
def test_upload_is_shards_and_card_alone(built, hub, private):
    url = push_to_hub(built, "edits", private=private, license="mit")
    assert url.endswith("/datasets/me/edits")
    (made,) = hub["created"]
    assert (made["name"], made["type"]) == ("edits", "dataset")
    assert ('"private"' in json.dumps(made)) == private
    assert sorted(hub["files"]) == ["README.md", "data-00000.parquet", "data-00001.parquet"]
    assert hub["files"]["data-00001.parquet"] == (built / "data-00001.parquet").read_bytes()
    card = DatasetCard(hub["files"]["README.md"].decode())
    assert card.data.license == "mit" and 'load_dataset("me/edits"' in card.text
    assert hub["tokens"] == {"Bearer hf_of_the_environment"}
    assert hub["deleted"] == []


def test_shards_of_an_earlier_upload_go_away(built, hub):
    hub["there"] = [
        ".gitattributes",
        "README.md",
        "data-00000.parquet",
        "data-00002.parquet",
        "more/data-00003.parquet",
    ]
    push_to_hub(built, "me/edits")
    assert hub["deleted"] == ["data-00002.parquet"]

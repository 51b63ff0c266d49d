"""Samples from every kind of source, of the same three edits."""

import io
import json
import re
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_dim.data import UnreadableSampleError, load_training_data, read_jsonl


def picture(index, size=(48, 32)):
    return Image.fromarray(np.full((size[1], size[0], 3), (40 * index, 200, 10), np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PROMPTS = ["make it red", "remove the cat please", "a hat"]
EDITS = [
    {"id": f"e{i}", "prompt": prompt, "source": picture(i), "target": picture(i + 3)}
    for i, prompt in enumerate(PROMPTS)
]


def write_jsonl(folder, edits=EDITS):
    rows = []
    for edit in edits:
        for name in ("source", "target"):
            edit[name].save(folder / f"{edit['id']}_{name}.png")
        paths = {"image_path": f"{edit['id']}_source.png", "image_path_target": f"{edit['id']}_target.png"}
        rows.append({"id": edit["id"], "prompt": edit["prompt"], "kind": "add", **paths})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder / "edits.jsonl"


def table(names):
    features = datasets.Features(
        {names[0]: datasets.Image(), names[1]: datasets.Image(), names[2]: datasets.Value("string")}
    )
    columns = {name: [edit[part] for edit in EDITS] for name, part in zip(names, ("source", "target", "prompt"))}
    return datasets.Dataset.from_dict(columns, features=features)


def from_jsonl(folder):
    return {"jsonl": write_jsonl(folder)}


def from_streamed_jsonl(folder):
    return {"jsonl": write_jsonl(folder), "streaming": True}


def from_parquet(folder):
    table(["source_image", "edited_image", "edit_prompt"]).to_parquet(folder / "train.parquet")
    return {"dataset_name": str(folder)}


def from_disk(folder):
    table(["input_image", "edited_image", "edit_prompt"]).save_to_disk(folder / "saved")
    return {"dataset_name": str(folder / "saved")}


def from_dict_on_disk(folder):
    datasets.DatasetDict(train=table(["a", "b", "c"])).save_to_disk(folder / "saved")
    return {"dataset_name": str(folder / "saved"), "columns": {"source": "a", "target": "b", "prompt": "c"}}


def from_streamed_parquet(folder):
    return {**from_parquet(folder), "streaming": True}


def from_tars(folder):
    with tarfile.open(folder / "edits-000.tar", "w") as tar:
        for edit in EDITS:
            for suffix, content in (
                ("source.png", png(edit["source"])),
                ("target.png", png(edit["target"])),
                ("txt", edit["prompt"].encode()),
            ):
                entry = tarfile.TarInfo(f"{edit['id']}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return {"train_data_dir": folder}


def from_streamed_tars(folder):
    return {**from_tars(folder), "streaming": True}


SOURCES = [from_jsonl, from_parquet, from_disk, from_dict_on_disk, from_tars]
STREAMS = [from_streamed_jsonl, from_streamed_parquet, from_streamed_tars]


@pytest.mark.parametrize("write", SOURCES + STREAMS)
def test_samples_are_the_same_from_every_source(tmp_path, write):
    data = load_training_data("edit", **write(tmp_path), cache_dir=tmp_path / "cache")
    if write in STREAMS:
        samples = [data.reader.sample(row, index) for index, row in enumerate(data.rows)]
    else:
        samples = [data[index] for index in range(len(data))]
        assert [data.length(index) for index in range(3)] == [len(prompt) for prompt in PROMPTS]
        assert [data.size(index) for index in range(3)] == [(32, 48)] * 3
    assert [sample["prompt"] for sample in samples] == PROMPTS
    for sample, edit in zip(samples, EDITS, strict=True):
        for name in ("source", "target"):
            assert sample[name].mode == "RGB"
            assert np.array_equal(np.asarray(sample[name]), np.asarray(edit[name]))


def test_picture_folder_gives_pictures_and_captions(tmp_path):
    with open(tmp_path / "metadata.jsonl", "w") as lines:
        for index, prompt in enumerate(PROMPTS):
            picture(index).save(tmp_path / f"{index}.png")
            lines.write(json.dumps({"file_name": f"{index}.png", "text": prompt}) + "\n")
    data = load_training_data("t2i", train_data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert [data[index]["prompt"] for index in range(3)] == PROMPTS
    assert np.array_equal(np.asarray(data[1]["target"]), np.asarray(picture(1)))
    assert "source" not in data[0]


def test_lines_keep_their_plain_fields_and_ids(tmp_path):
    data = load_training_data("edit", jsonl=write_jsonl(tmp_path))
    assert data[1]["kind"] == "add"
    assert [data.id(index) for index in range(3)] == ["e0", "e1", "e2"]


def test_pictures_are_read_as_people_see_them(tmp_path):
    edits = [{**EDITS[0], "source": Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "target": picture(1)}]
    path = write_jsonl(tmp_path, edits)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(1).save(tmp_path / "e0_target.png", exif=exif)
    data = load_training_data("edit", jsonl=path)
    assert np.asarray(data[0]["source"]).min() == 255  # transparent is white
    assert data[0]["target"].size == (32, 48)
    assert data.size(0) == (48, 32)


@pytest.mark.parametrize("broken", ["missing", "empty", "truncated", "text"])
def test_broken_pictures_are_unreadable_and_named(tmp_path, broken):
    path = write_jsonl(tmp_path)
    target = tmp_path / "e1_target.png"
    content = target.read_bytes()
    target.unlink()
    if broken != "missing":
        target.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"no picture"}[broken])
    data = load_training_data("edit", jsonl=path)
    with pytest.raises(UnreadableSampleError) as error:
        data[1]
    assert error.value.id == "e1"
    assert error.value.reason.startswith("target: ")
    assert data[0]["id"] == "e0"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("end <|im_end|> here", "special token <|im_end|>"), (" ", "not a text"), (None, "not a text")],
)
def test_prompts_that_cannot_be_read_are_unreadable(tmp_path, prompt, reason):
    data = load_training_data("edit", jsonl=write_jsonl(tmp_path, [{**EDITS[0], "prompt": prompt}]))
    with pytest.raises(UnreadableSampleError, match=re.escape(reason)):
        data[0]


def test_bombs_are_unreadable(tmp_path, monkeypatch):
    data = load_training_data("edit", jsonl=write_jsonl(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableSampleError, match="decompression bomb"):
        data[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give one of jsonl, dataset_name, train_data_dir, not none"),
        ({"jsonl": "a", "dataset_name": "b"}, "not jsonl and dataset_name"),
    ],
)
def test_one_source_is_needed(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_training_data("edit", **arguments)


@pytest.mark.parametrize("columns", [None, {"prompt": "words"}])
def test_wrong_columns_are_told_with_those_that_are_there(tmp_path, columns):
    table(["source_image", "edited_image", "said"]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"for the prompt, but have \['edited_image', 'said', 'source_image'\]"):
        load_training_data("edit", dataset_name=str(tmp_path), columns=columns, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no samples"),
        ("\n\n", "holds no samples"),
        ("{broken", "line 1 is not JSON"),
        ('{"id": 1}\n', r"line 1 lacks \['prompt'\]"),
        ('{"id": 1, "prompt": "a"}\n[1]\n', "line 2 lacks"),
    ],
)
def test_jsonl_faults_are_named_by_line(tmp_path, text, message):
    (tmp_path / "lines.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_jsonl(tmp_path / "lines.jsonl", ("id", "prompt"))


def test_first_samples_alone_may_be_used(tmp_path):
    assert len(load_training_data("edit", jsonl=write_jsonl(tmp_path), max_train_samples=2)) == 2

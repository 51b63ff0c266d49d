# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Samples to train on, from jsonl files, datasets of the Hub or of a folder, picture folders and WebDataset tars."""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from ..image_processor import DIMImageProcessor


EDIT_FIELDS = ("id", "image_path", "image_path_target", "prompt")
T2I_FIELDS = ("id", "image_path", "prompt")
# Columns by the names that data sets give them, the first that is there: jsonl files of DIM-Edit, InstructPix2Pix,
# UltraEdit and MagicBrush, picture folders, and WebDataset tars.
COLUMNS = {
    "edit": {
        "source": (
            "image_path",
            "source",
            "input_image",
            "source_image",
            "source_img",
            "original_image",
            "source.png",
        ),
        "target": ("image_path_target", "target", "edited_image", "target_image", "target_img", "target.png"),
        "prompt": ("prompt", "edit_prompt", "instruction", "edit_instruction", "text", "txt"),
    },
    "t2i": {
        "target": ("image_path", "image", "target", "jpg", "png", "webp", "jpeg"),
        "prompt": ("prompt", "caption", "text", "txt"),
    },
}
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")  # of the vision-language model, which a prompt must not hold
READ_ERRORS = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)

Kind = Literal["edit", "t2i"]


class UnreadableSampleError(Exception):
    """
    A sample whose picture is missing, broken or too large.

    Args:
        id (`str`): The sample's.
        reason (`str`): What is wrong.
    """

    def __init__(self, id: str, reason: str):
        super().__init__(id, reason)
        self.id = id
        self.reason = reason


def read_jsonl(path: str | Path, fields: Iterable[str]) -> dict[int, dict[str, Any]]:
    """
    The objects of a jsonl file by their lines' numbers, from 1; empty lines are passed over.

    Raises:
        ValueError: If the file holds no line, or a line is no JSON object or lacks one of `fields`; the line is named.
    """
    rows = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            missing = [name for name in fields if not isinstance(row, dict) or name not in row]
            if missing:
                raise ValueError(f"{path}, line {number} lacks {missing}: a line needs {list(fields)}.")
            rows[number] = row
    if not rows:
        raise ValueError(f"{path} holds no samples.")
    return rows


def open_picture(value: Any, root: Path | None = None) -> Image.Image:
    """A picture, not decoded yet, from a path, bytes, a dict of either as `datasets` has it, or a picture."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if not isinstance(value, (str, Path)):
        raise ValueError(f"a picture has to be a path, bytes or an image, but is {type(value).__name__}")
    return Image.open(value if root is None else root / value)


class Rows:
    r"""
    Turns rows into samples: `id`, `prompt`, `target` and for edits `source`, RGB pictures, and the row's other plain
    values.

    Args:
        kind (`str`): "edit" or "t2i".
        columns (`Mapping[str, str]`): The rows' names of source, target, prompt and perhaps id.
        root (`Path`, *optional*): What paths of pictures are relative to.
    """

    def __init__(self, kind: Kind, columns: Mapping[str, str], root: Path | None = None):
        self.kind = kind
        self.columns = columns
        self.root = root
        self.image_processor = DIMImageProcessor()

    def id(self, row: Mapping[str, Any], index: int) -> str:
        return str(row[self.columns["id"]]) if "id" in self.columns else str(row.get("__key__", index))

    def prompt(self, row: Mapping[str, Any]) -> str:
        prompt = row[self.columns["prompt"]]
        return prompt.decode() if isinstance(prompt, bytes) else prompt

    def size(self, row: Mapping[str, Any], index: int) -> tuple[int, int]:
        """Height and width of the target as a person sees it, from the file's header."""
        try:
            with open_picture(row[self.columns["target"]], self.root) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # orientations with sides exchanged
                return (image.width, image.height) if turned else (image.height, image.width)
        except READ_ERRORS as error:
            raise UnreadableSampleError(self.id(row, index), f"target: {error}") from error

    def sample(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        used = set(self.columns.values())
        plain = {k: v for k, v in row.items() if k not in used and isinstance(v, (str, int, float, bool))}
        sample: dict[str, Any] = {**plain, "id": self.id(row, index)}
        prompt = self.prompt(row)
        if not isinstance(prompt, str) or not prompt.strip():
            raise UnreadableSampleError(sample["id"], f"prompt: not a text, but {prompt!r}")
        if special := SPECIAL_TOKEN.search(prompt):
            raise UnreadableSampleError(sample["id"], f"prompt: holds the special token {special[0]}")
        sample["prompt"] = prompt
        for name in ("source", "target") if self.kind == "edit" else ("target",):
            try:
                with open_picture(row[self.columns[name]], self.root) as image:
                    sample[name] = self.image_processor.to_rgb(image)[0]
            except READ_ERRORS as error:
                raise UnreadableSampleError(sample["id"], f"{name}: {error}") from error
        return sample


class TrainingDataset(Dataset):
    r"""
    Samples of a list or table of rows.

    Args:
        rows: What gives a row by its index: a list of dicts, or a `datasets.Dataset` without decoding.
        reader ([`Rows`]): What makes samples of them.

    Raises:
        UnreadableSampleError: By an item or a size, where a picture cannot be read.
    """

    def __init__(self, rows: Any, reader: Rows):
        self.rows = rows
        self.reader = reader
        self.kind = reader.kind
        self._words = rows
        if not isinstance(rows, list):  # a table, of which pictures need not be read for words
            pictures = {reader.columns.get(name) for name in ("source", "target")}
            self._words = rows.select_columns([name for name in rows.column_names if name not in pictures])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.reader.sample(self.rows[index], index)

    def id(self, index: int) -> str:
        """The sample's id."""
        return self.reader.id(self._words[index], index)

    def length(self, index: int) -> int:
        """Characters of the prompt, 0 where it is no text."""
        prompt = self.reader.prompt(self._words[index])
        return len(prompt) if isinstance(prompt, str) else 0

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the target in pixels, without decoding it."""
        return self.reader.size(self.rows[index], index)


class StreamingDataset:
    r"""
    Samples in the order in which a `datasets.IterableDataset` gives its rows.

    Args:
        rows (`datasets.IterableDataset`): Without decoding.
        reader ([`Rows`]): What makes samples of them.
    """

    def __init__(self, rows: Any, reader: Rows):
        self.rows = rows
        self.reader = reader
        self.kind = reader.kind

    def shuffled(self, seed: int, epoch: int, buffer_size: int = 1000) -> Iterator[tuple[int, dict[str, Any]]]:
        """An epoch's rows with their numbers, shuffled within a buffer by seed and epoch alone."""
        rows = self.rows.shuffle(seed=seed, buffer_size=buffer_size)
        rows.set_epoch(epoch)
        yield from enumerate(rows)


def load_training_data(
    kind: Kind,
    *,
    jsonl: str | Path | None = None,
    image_root: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_revision: str | None = None,
    split: str = "train",
    train_data_dir: str | Path | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    max_train_samples: int | None = None,
    cache_dir: str | Path | None = None,
) -> TrainingDataset | StreamingDataset:
    r"""
    Opens data of any of three sources; no picture is decoded yet.

    Args:
        kind (`str`):
            "edit" for pairs of pictures with an instruction or a blueprint, "t2i" for pictures with a caption.
        jsonl (`str` or `Path`, *optional*):
            A file with `id`, `image_path`, for edits `image_path_target`, and `prompt` a line (DIM-Edit's form).
        image_root (`str` or `Path`, *optional*):
            What paths of pictures are relative to; the jsonl's own folder by default.
        dataset_name (`str`, *optional*):
            A dataset of the Hub, a folder that `datasets.load_dataset` reads (Parquet, ...) or that
            `Dataset.save_to_disk` wrote.
        dataset_config_name, dataset_revision (`str`, *optional*):
            Of the dataset.
        split (`str`, defaults to "train"):
            Of the dataset.
        train_data_dir (`str` or `Path`, *optional*):
            A folder of pictures with a `metadata.jsonl` or `metadata.csv` as `datasets`' imagefolder reads them, or
            one of WebDataset tars (`0001.source.png`, `0001.target.png` and `0001.txt`; `0001.png` and `0001.txt`).
        streaming (`bool`, defaults to `False`):
            Whether to read the dataset as it comes, without a copy on disk.
        columns (`Mapping[str, str]`, *optional*):
            The dataset's names of "source", "target", "prompt" and "id", where they are not those that are tried
            (`COLUMNS`).
        max_train_samples (`int`, *optional*):
            Use the first so many rows only.
        cache_dir (`str` or `Path`, *optional*):
            Where `datasets` keeps what it downloads.

    Raises:
        ValueError: If not exactly one source is given, it holds no samples, or a column is not there.
        ImportError: If the `datasets` package is needed and not installed.
    """
    sources = {"jsonl": jsonl, "dataset_name": dataset_name, "train_data_dir": train_data_dir}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"Give one of {', '.join(sources)}, not {' and '.join(given) or 'none'}.")

    if jsonl is not None and not streaming:
        fields = EDIT_FIELDS if kind == "edit" else T2I_FIELDS
        listed = list(read_jsonl(jsonl, fields).values())[:max_train_samples]
        own = {"id": "id", "source": "image_path", "target": "image_path_target", "prompt": "prompt"}
        if kind == "t2i":
            own = {"id": "id", "target": "image_path", "prompt": "prompt"}
        reader = Rows(kind, own, Path(image_root) if image_root is not None else Path(jsonl).parent)
        return TrainingDataset(listed, reader)

    rows = _load_rows(
        jsonl, dataset_name, dataset_config_name, dataset_revision, split, train_data_dir, streaming, cache_dir
    )
    names = _resolve_columns(kind, rows.column_names or [], columns or {})
    root = Path(image_root) if image_root is not None else Path(jsonl).parent if jsonl is not None else None
    reader = Rows(kind, names, root)
    if streaming:
        return StreamingDataset(rows if max_train_samples is None else rows.take(max_train_samples), reader)
    if max_train_samples is not None:
        rows = rows.select(range(min(max_train_samples, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{dataset_name or train_data_dir} holds no samples.")
    return TrainingDataset(rows, reader)


def _load_rows(
    jsonl: str | Path | None,
    dataset_name: str | None,
    dataset_config_name: str | None,
    dataset_revision: str | None,
    split: str,
    train_data_dir: str | Path | None,
    streaming: bool,
    cache_dir: str | Path | None,
) -> Any:
    """A `datasets` table or stream with pictures not decoded."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("This data is read by `datasets`: `pip install 'diffusers-dim[train]'`.") from error

    options: dict[str, Any] = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
    if jsonl is not None:
        rows = datasets.load_dataset("json", data_files=str(jsonl), **options | {"split": "train"})
    elif train_data_dir is not None:
        folder = Path(train_data_dir)
        tars = sorted(str(path) for path in folder.rglob("*.tar"))
        if tars:
            rows = datasets.load_dataset("webdataset", data_files={split: tars}, **options)
        else:
            rows = datasets.load_dataset("imagefolder", data_dir=str(folder), **options)
    elif (Path(dataset_name) / "state.json").is_file() or (Path(dataset_name) / "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(dataset_name)
        if isinstance(rows, datasets.DatasetDict):
            if split not in rows:
                raise ValueError(f"{dataset_name} has the splits {sorted(rows)}, but not {split!r}.")
            rows = rows[split]
        rows = rows.to_iterable_dataset(num_shards=min(len(rows), 64) or 1) if streaming else rows
    else:
        rows = datasets.load_dataset(dataset_name, dataset_config_name, revision=dataset_revision, **options)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _resolve_columns(kind: Kind, there: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """The column of each of a sample's parts."""
    columns = {}
    for part, names in COLUMNS[kind].items():
        column = given.get(part) or next((name for name in names if name in there), None)
        if column is None or column not in there:
            wanted = f"a column {column!r}" if column is not None else f"one of the columns {list(names)}"
            raise ValueError(f"The data need {wanted} for the {part}, but have {sorted(there)}: name the column.")
        columns[part] = column
    if given.get("id") or "id" in there:
        columns["id"] = given.get("id") or "id"
    return columns

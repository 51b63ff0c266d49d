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
"""The columns of data sets of edits, by their names on the Hub, and the same four fields of all of them."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records import import_datasets, read_column
from .rows import path_inside


@dataclass(frozen=True)
class ColumnMapping:
    """
    Which columns of a data set are an edit's parts.

    Args:
        source, target (`str`): Of the pictures, or of lists with the path of one.
        instruction (`str`): Of the instruction, or of a list that all tell the same, of which the first is taken.
        id (`tuple[str, ...]`, *optional*): Those that together name a sample; the row's number if none do.
        repo (`str`, *optional*): Of the data set on the Hub.
        paths (`bool`, defaults to `False`): Whether pictures are paths, relative to a folder that has to be given.
    """

    source: str
    target: str
    instruction: str
    id: tuple[str, ...] = ()
    repo: str | None = None
    paths: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """All that are needed."""
        return (self.source, self.target, self.instruction, *self.id)


MAPPINGS = {
    # https://huggingface.co/datasets/BleachNick/UltraEdit and UltraEdit_500k: `dataset_info` of their pages.
    "ultraedit": ColumnMapping("source_image", "edited_image", "edit_prompt", ("idx",), "BleachNick/UltraEdit"),
    # https://huggingface.co/datasets/osunlp/MagicBrush: `dataset_info` of its page.
    "magicbrush": ColumnMapping(
        "source_img", "target_img", "instruction", ("img_id", "turn_index"), "osunlp/MagicBrush"
    ),
    # Single turns of https://huggingface.co/datasets/AILab-CVC/SEED-Data-Edit: jsonl files with paths, whose fields
    # its authors tell in https://github.com/AILab-CVC/SEED-X/issues/13. Multi-turn files have others.
    "seed-data-edit": ColumnMapping(
        "source_image", "target_image", "instruction", (), "AILab-CVC/SEED-Data-Edit", paths=True
    ),
    # `text_and_image_to_image.json` of the Hub's set, by several programs that read it (its page was not to be had):
    # `input_image` is a list of paths.
    "sharegpt-4o-image": ColumnMapping(
        "input_image", "output_image", "input_prompt", (), "FreedomIntelligence/ShareGPT-4o-Image", paths=True
    ),
    # `Parquet/*.parquet` of the Hub's set, by a program that reads them (its page was not to be had): both are lists,
    # nested perhaps, of paths. Multi-turn files have a column `data` instead.
    "imgedit": ColumnMapping("input_images", "output_images", "prompt", (), "sysuyy/ImgEdit", paths=True),
    # The Hub's set, by several programs that read it (its page's `dataset_info` was not to be had).
    "omniedit": ColumnMapping(
        "src_img", "edited_img", "edited_prompt_list", ("omni_edit_id",), "TIGER-Lab/OmniEdit-Filtered-1.2M"
    ),
}


def find_mapping(columns: Iterable[str]) -> ColumnMapping | None:
    """The mapping all of whose columns are there."""
    columns = set(columns)
    return next((mapping for mapping in MAPPINGS.values() if columns.issuperset(mapping.columns)), None)


def get_mapping(name: str, columns: Iterable[str]) -> ColumnMapping:
    """
    The mapping of a data set.

    Raises:
        ValueError: If there is none by that name, or the data lack a column.
    """
    if name not in MAPPINGS:
        raise ValueError(f"There are mappings for {list(MAPPINGS)}, not for {name!r}.")
    there = sorted(columns)
    if lacking := [column for column in MAPPINGS[name].columns if column not in there]:
        raise ValueError(f"The data lack the columns {lacking} of {name}, and have {there}.")
    return MAPPINGS[name]


def map_columns(dataset: Any, name: str, image_root: str | Path | None = None) -> Any:
    r"""
    A data set of edits with the columns `id`, `source`, `target` and `instruction`, which training reads as well.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            As the Hub has it.
        name (`str`):
            Of its mapping in `MAPPINGS`.
        image_root (`str` or `Path`, *optional*):
            What paths of pictures are relative to; needed where the pictures are paths.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: As given; pictures are Image features, and not copied.

    Raises:
        ValueError: If there is no such mapping, the data lack a column, `image_root` is needed, or, by a row, if a
            path leads out of it or there is more or less than one picture.
    """
    datasets = import_datasets()
    known: Mapping[str, Any] = dataset.features or next(iter(dataset), {})
    mapping = get_mapping(name, known)
    if mapping.paths and image_root is None:
        raise ValueError(f"The pictures of {name} are paths: give `image_root`, the folder that they are relative to.")
    root = None if image_root is None else Path(os.path.abspath(image_root))
    for column in (mapping.source, mapping.target):
        if isinstance((dataset.features or {}).get(column), datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))  # the file goes through as it is
    options = {"with_indices": True, "remove_columns": list(known)}
    features = {"id": datasets.Value("string"), "source": datasets.Image(), "target": datasets.Image()}
    features = datasets.Features({**features, "instruction": datasets.Value("string")})
    arguments = {"mapping": mapping, "root": root}
    if mapping.paths or not isinstance(dataset, datasets.Dataset):
        return dataset.map(map_row, fn_kwargs=arguments, features=features, **options)
    # What `map` gives is written to disk: pictures, which may be many gigabytes, are only renamed.
    pictures = dataset.select_columns([mapping.source, mapping.target])
    pictures = pictures.rename_columns({mapping.source: "source", mapping.target: "target"})
    words = dataset.select_columns(list({mapping.instruction, *mapping.id}))
    options["remove_columns"] = words.column_names
    words = words.map(map_words, fn_kwargs={"mapping": mapping}, **options)
    both = datasets.concatenate_datasets([words, pictures], axis=1).select_columns(list(features))
    for column in ("source", "target"):
        both = both.cast_column(column, datasets.Image())
    return both


def map_words(row: Mapping[str, Any], number: int, mapping: ColumnMapping) -> dict[str, Any]:
    """A row's `id` and `instruction`."""
    id = "-".join(str(read_column(row, column)) for column in mapping.id) or str(number)
    return {"id": id, "instruction": first(read_column(row, mapping.instruction))}


def map_row(row: Mapping[str, Any], number: int, mapping: ColumnMapping, root: Path | None) -> dict[str, Any]:
    """A row's `id`, `source`, `target` and `instruction`."""
    pictures = {}
    for part in ("source", "target"):
        value = single(read_column(row, getattr(mapping, part)), f"Row {number}, {part}")
        if isinstance(value, str):
            path = value if root is None else str(path_inside(root, value, f"Row {number}, {part}"))
            value = {"bytes": None, "path": path}
        pictures[part] = value
    return {**map_words(row, number, mapping), **pictures}


def single(value: Any, where: str) -> Any:
    """What is in lists of one."""
    while isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{where}: has to be one picture, but there are {len(value)}.")
        value = value[0]
    return value


def first(value: Any) -> Any:
    """A text, or the first of a list of them."""
    return (value[0] if value else "") if isinstance(value, list) else value

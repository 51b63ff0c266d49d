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
"""A built set's card, and the set on the Hub or in a folder that `datasets` reads."""

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import count_rows, find_shards, open_shard, read_dropped, read_summary


PICTURES = ("source", "target")  # columns with a picture file's bytes
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
# What is told of a judge. All else, its address for one, may be nobody's business.
JUDGE_SETTINGS = ("designer", "model", "max_new_tokens", "temperature", "seed", "max_image_pixels")
COLUMNS = {
    "id": "the sample's name in the set that this one was made from",
    "image_path": "the source's path or key there",
    "image_path_target": "the target's",
    "source": "the picture before the edit",
    "target": "the picture after the edit",
    "prompt": "the blueprint: what a painter is to be trained with",
    "instruction": "the instruction as it was given",
    "better_instruction": "the instruction rewritten so that it says fully and only what changed",
    "assessment": 'how the given instruction fits what changed: "fits", "partly" or "misfits"',
    "assessment_reason": "why, in the judge's words",
    "edit_type": "the kind of edit, where it is known",
    "key": "sha256 over both pictures' files and the given instruction",
}
CAPTION_COLUMNS = {
    "target": "the picture",
    "prompt": "its caption",
    "image_path": "the picture's path or key there",
    "key": "sha256 over the picture's file",
}
USE = """from datasets import load_dataset

rows = load_dataset("{name}", split="train")"""
MADE = """Made by the data engine of diffusers-dim, after
[Draw-In-Mind](https://huggingface.co/papers/2509.01986) (DIM).

{how}"""
EDIT_STEPS = """For each pair of pictures a vision-language model judged how the instruction fits what
really changed (misfits were dropped), rewrote the instruction so that it says fully and only what changed, and
imagined the edit as a blueprint of five parts, the form in which DIM's painter is trained."""
CAPTION_STEPS = "A vision-language model described each picture over many aspects, in one long caption."


def build_card(folder: str | Path, name: str, license: str = "unknown") -> str:
    """
    The text of a set's card: front matter by which `datasets` reads the set, its columns, and how it was made by its
    `summary.json`. Of the judge it tells what words depend on; keys, addresses and local paths are not told.

    Args:
        folder (`str` or `Path`): The built set's.
        name (`str`): What the set will be called: `owner/name`, or a folder's name.
        license (`str`, defaults to `"unknown"`): By the Hub's names, such as "cc-by-4.0".

    Raises:
        ValueError: If there is no built set.
    """
    from huggingface_hub import DatasetCardData

    rows = count_rows(folder)
    features = _features(find_shards(folder)[0])
    edit = "source" in features
    dropped = _dropped(folder)
    data = DatasetCardData(
        license=license,
        pretty_name=name.rpartition("/")[2],
        task_categories=["image-to-image" if edit else "text-to-image"],
        size_categories=[next((size for most, size in SIZES if rows < most), "n>1M")],
        tags=["diffusers-dim", "draw-in-mind", *(["image-editing"] if edit else [])],
        configs=[{"config_name": "default", "data_files": "data-*.parquet"}],
        dataset_info={"features": [{"name": column, "dtype": dtype} for column, dtype in features.items()]},
    )
    told = COLUMNS if edit else COLUMNS | CAPTION_COLUMNS
    sections = [
        f"# {name.rpartition('/')[2]}",
        MADE.format(how=EDIT_STEPS if edit else CAPTION_STEPS),
        f"```python\n{USE.format(name=name)}\n```",
        "## Columns\n\n" + _table({f"`{column}`": told.get(column, features[column]) for column in features}),
        f"## How it was made\n\n{_table({'samples': rows, **_facts(Path(folder))})}",
        f"## Dropped\n\n{_table(dropped)}" if dropped else "",
        "The pictures are under the licences of the set that they are from, and the texts under the terms of the model"
        " that wrote them.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _features(shard: Path) -> dict[str, str]:
    """The columns' types by `datasets`' names."""
    dtypes = {"double": "float64", "float": "float32", "large_string": "string"}
    schema = open_shard(shard).schema_arrow
    return {
        field.name: "image" if field.name in PICTURES else dtypes.get(str(field.type), str(field.type))
        for field in schema
    }


def _facts(folder: Path) -> dict[str, Any]:
    """How a set was made, by readable names."""
    summary = read_summary(folder)
    settings = summary.get("settings", {})
    judge = {name: value for name, value in settings.get("judge", {}).items() if name in JUDGE_SETTINGS}
    if "model" in judge and (name := str(judge["model"])) and (Path(name).exists() or name.count("/") > 1):
        judge["model"] = Path(name).name  # a folder's path is nobody's business either
    steps = ", ".join(f"{step.get('step')} (version {step.get('version')})" for step in settings.get("steps", []))
    facts = {
        "steps": steps,
        **{f"judge: {name.replace('_', ' ')}": value for name, value in judge.items()},
        "filters": ", ".join(settings.get("filters", [])),
        "checks": ", ".join(settings.get("checks", [])),
        "samples gone through": summary.get("samples"),
        "calls of the judge": summary.get("calls"),
        "tokens asked": summary.get("prompt_tokens"),
        "tokens answered": summary.get("tokens"),
        "cost": summary.get("money") or None,
        "seconds": summary.get("seconds"),
        "stopped early by the budget of": summary.get("stopped"),
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _dropped(folder: str | Path) -> dict[str, int]:
    """How many samples were dropped, by stage."""
    return Counter(str(row.get("stage")) for row in read_dropped(folder))


def _table(rows: Mapping[str, Any]) -> str:
    lines = []
    for name, value in rows.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        told = f"{value:,.2f}".removesuffix(".00") if number else " ".join(str(value).split()).replace("|", "/")
        lines.append(f"| {name} | {told} |")
    return "\n".join(["| | |", "| --- | --- |", *lines])


def save_to_folder(folder: str | Path, to: str | Path, license: str = "unknown") -> Path:
    """
    Copies a built set with its card, so that `datasets.load_dataset(to)` reads it.

    Args:
        folder (`str` or `Path`): The built set's.
        to (`str` or `Path`): A new or empty folder.
        license (`str`, defaults to `"unknown"`): See [`build_card`].

    Raises:
        ValueError: If there is no built set, or something is in `to`.
    """
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} has to be a new or an empty folder.")
    card = build_card(folder, to.resolve().name, license)
    aside = to.absolute().with_name(f".{to.name}-{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        for shard in find_shards(folder):
            shutil.copyfile(shard, aside / shard.name)
        (aside / "README.md").write_text(card, encoding="utf-8")
        os.replace(aside, to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return to


def push_to_hub(folder: str | Path, repo_id: str, private: bool = False, license: str = "unknown") -> str:
    """
    Uploads a built set with its card, in one commit, in which shards of an earlier upload that are no more go away.
    The token is that of `hf auth login` or of `HF_TOKEN`.

    Args:
        folder (`str` or `Path`): The built set's.
        repo_id (`str`): The repository, made if it is not there; without a user's name it is the user's own.
        private (`bool`, defaults to `False`): Whether a new repository is private in any case.
        license (`str`, defaults to `"unknown"`): See [`build_card`].

    Returns:
        `str`: The repository's address.

    Raises:
        ValueError: If there is no built set.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    shards = find_shards(folder)
    api = HfApi()
    # Where it is not asked for, an organisation's own default holds.
    url = api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
    card = build_card(folder, url.repo_id, license)
    there = api.list_repo_files(url.repo_id, repo_type="dataset")
    stale = {name for name in there if Path(name).match("data-*.parquet") and "/" not in name}
    operations: list[Any] = [CommitOperationAdd("README.md", card.encode())]
    operations += [CommitOperationAdd(shard.name, shard) for shard in shards]
    operations += [CommitOperationDelete(name) for name in sorted(stale - {shard.name for shard in shards})]
    api.create_commit(
        url.repo_id, operations, repo_type="dataset", commit_message="A set built by diffusers-dim's data engine"
    )
    return str(url)

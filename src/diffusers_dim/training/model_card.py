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
"""The model card of a training's result, and its upload to the Hub."""

import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from ..files import UNFINISHED
from ..hub.card import PIPELINE_TAGS, describe_use, get_tags, render_card
from ..hub.facts import DIM_LICENCE, DIM_PARTS, INGREDIENTS
from ..hub.upload import forget_paths
from .monitor import read_losses


PACKAGES = ("diffusers-dim", "diffusers", "transformers", "accelerate", "peft", "torch")

TITLES = {
    "edit": "An image editor trained by diffusers-dim",
    "t2i": "A text-to-image model trained by diffusers-dim",
    "lora": "A LoRA for an image editor, trained by diffusers-dim",
}

# What is told of the options, by name; those that a run does not have are left out.
SETTINGS = {
    "base model": "pretrained_model_name_or_path",
    "its revision": "revision",
    "vision-language model": "text_encoder_name_or_path",
    "data: jsonl": "jsonl",
    "data set": "dataset_name",
    "its configuration": "dataset_config_name",
    "its split": "dataset_split",
    "data: folder": "train_data_dir",
    "data: precomputed": "precomputed_conditions",
    "samples at most": "max_train_samples",
    "resolution": "resolution",
    "aspect ratio bucketing": "aspect_ratio_bucketing",
    "condition tokens at most": "max_sequence_length",
    "batch size a device": "train_batch_size",
    "gradient accumulation steps": "gradient_accumulation_steps",
    "optimizer": "optimizer",
    "8-bit Adam": "use_8bit_adam",
    "learning rate": "learning_rate",
    "schedule": "lr_scheduler",
    "warmup steps": "lr_warmup_steps",
    "weight decay": "adam_weight_decay",
    "gradient norm at most": "max_grad_norm",
    "moving average": "use_ema",
    "condition dropout": "conditioning_dropout_prob",
    "loss weighting": "weighting_scheme",
    "LoRA rank": "rank",
    "LoRA alpha": "lora_alpha",
    "LoRA layers": "lora_layers",
    "LoRA of the connector": "train_connector",
    "DoRA": "use_dora",
    "mixed precision": "mixed_precision",
    "gradient checkpointing": "gradient_checkpointing",
    "compiled": "compile",
    "seed": "seed",
}

SUMMARY = "[Draw-In-Mind](https://huggingface.co/papers/2509.01986) as diffusers-dim trains it, from {base_model}."

LICENCES = """The code that trained this model is under Apache-2.0. Its weights are under the licences of all that they
were trained from, and the terms of the training data come on top. Of the models that DIM is made of:

{ingredients}
- a released Draw-In-Mind checkpoint: {dim}."""

LIMITS = """What it can do is what its base model could and what its data taught: it was measured as far as the results
above say, and no further. What they do not name is unmeasured."""

BIAS = """Its base model's biases and those of its training data are in it. They were not measured, and no filter is
part of the pipeline."""

SPEED = """What training cost is among the results above, where it was written down. What a picture costs was not
measured in this run."""

# Of a run's folder: what only a resumed run needs, what trackers wrote, what is not finished, and what holds paths of
# the machine that it ran on.
NOT_PUBLISHED = [
    "checkpoint-*",
    "saving-*",
    "removing-*",
    "logs/*",
    "runs/*",
    "wandb/*",
    "*tfevents*",
    "run.json",
    "skipped*",
    "*.aside",
    f"{UNFINISHED}*",
    "*.tmp",
]


def save_model_card(
    output_dir: str | Path,
    *,
    kind: str,
    args: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    sheet: str | Path | None = None,
    curve: str | Path | None = None,
    repo_id: str | None = None,
) -> Path:
    r"""
    Writes `README.md`, the model card, into a run's folder: how to use the result, how it was trained, what came of it
    by `losses.jsonl` and `validation.jsonl` of this folder, pictures, versions and licences. An older card is
    replaced; the Hub is not asked. Local files and folders are told by their names alone.

    Args:
        output_dir (`str` or `Path`):
            The run's folder.
        kind (`str`):
            "edit", "t2i" or "lora".
        args (`Mapping`):
            The training script's options by name; those worth telling are told.
        facts (`Mapping`, *optional*):
            What else is to be told, such as `{"skipped samples": 3}`; underscores become spaces.
        sheet (`str` or `Path`, *optional*):
            A picture of validation results; copied into `output_dir` if it is not there.
        curve (`str` or `Path`, *optional*):
            A picture of the curves, see [`draw_curves`]; as `sheet`.
        repo_id (`str`, *optional*):
            Where the model will be on the Hub; the name of `output_dir` by default.

    Returns:
        `Path` of the card.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind not in TITLES:
        raise ValueError(f"The kind has to be one of {list(TITLES)}, but is {kind!r}.")
    output_dir = Path(output_dir)
    base_models = [args.get(name) for name in ("pretrained_model_name_or_path", "text_encoder_name_or_path")]
    base_models = [name for name in base_models if name is not None]
    model = repo_id or output_dir.resolve().name
    base_model = _public(base_models[0]) if base_models else "the base model"

    settings = {label: args.get(name) for label, name in SETTINGS.items()}
    if args.get("dataset_name") is None:
        settings["its split"] = None
    if args.get("use_ema"):
        settings["moving average"] = f"decay {args.get('ema_decay')}"
    results = {
        **summarize_losses(output_dir / "losses.jsonl"),
        **summarize_validation(output_dir / "validation.jsonl"),
        **{name.replace("_", " "): value for name, value in (facts or {}).items()},
    }
    versions = {name: _version(name) for name in PACKAGES}
    pictures = {
        caption: _inside(Path(path), output_dir)
        for caption, path in (("validation", sheet), ("curves", curve))
        if path is not None
    }
    use, remote_use = describe_use(kind, model, base_model)
    tags = [*get_tags(kind), "diffusers", "diffusers-training", "diffusers-dim", "draw-in-mind", "sana"]
    ingredients = "\n".join(f"- {INGREDIENTS[key].what}: {INGREDIENTS[key].licence}." for key in DIM_PARTS)
    card = render_card(
        data=ModelCardData(
            license="other",
            license_name="of-the-base-models",
            library_name="diffusers",
            pipeline_tag=PIPELINE_TAGS[kind],
            base_model=[name for name in base_models if not _is_local(name)] or None,
            datasets=[name for name in [args.get("dataset_name")] if name is not None and not _is_local(name)] or None,
            tags=tags,
        ),
        title=TITLES[kind],
        summary=SUMMARY.format(base_model=base_model),
        use=use,
        remote_use=remote_use,
        training=_table(settings),
        results_title="Results",
        results=_table(results) if results else "",
        speed=SPEED,
        versions=_table(versions),
        pictures={caption: place for caption, place in pictures.items() if caption == "validation"},
        curves={caption: place for caption, place in pictures.items() if caption == "curves"},
        limits=LIMITS,
        bias=BIAS,
        licences=LICENCES.format(ingredients=ingredients, dim=DIM_LICENCE),
    )
    card.save(output_dir / "README.md")
    return output_dir / "README.md"


def summarize_losses(path: Path, last: int = 100) -> dict[str, Any]:
    """Steps and, over the `last` of a run's `losses.jsonl`, mean losses, throughput and memory, by readable names."""
    entries = read_losses(path)
    if not entries:
        return {}
    tail = entries[-last:]
    summary: dict[str, Any] = {"steps": entries[-1]["step"]}
    names = {
        "loss": f"loss, mean of the last {len(tail)} steps",
        "samples_per_second": "samples/s",
        "tflops": "TFLOP/s a device",
        "mfu": "MFU",
    }
    names |= {key: f"loss at {key.removeprefix('loss/')} of all timesteps" for key in _bucket_keys(tail)}
    for key, name in names.items():
        values = [entry[key] for entry in tail if key in entry]
        if values:
            summary[name] = sum(values) / len(values)
    memory = [entry["memory_gb"] for entry in entries if "memory_gb" in entry]
    if memory:
        summary["peak memory, GB"] = max(memory)
    return summary


def summarize_validation(path: Path) -> dict[str, Any]:
    """The last scores of a run's `validation.jsonl`, by readable names."""
    entries = read_losses(path)
    if not entries:
        return {}
    return {f"validation {name.replace('/', ', ')}": value for name, value in entries[-1].items() if name != "step"}


def push_to_hub(output_dir: str | Path, repo_id: str, private: bool = False) -> str:
    r"""
    Uploads a run's result to the Hub, without checkpoints, logs and unfinished folders, and without the files that
    tell paths of this machine. The token is that of `hf auth login` or of `HF_TOKEN`.

    Args:
        output_dir (`str` or `Path`): The run's folder.
        repo_id (`str`): The repository, made if it is not there; without a user's name it is the user's own.
        private (`bool`, defaults to `False`): Whether a new repository is private in any case.

    Returns:
        `str`: The repository's address.
    """
    if (Path(output_dir) / "model_index.json").is_file():
        forget_paths(output_dir)
    api = HfApi()
    # Where it is not asked for, an organisation's own default holds.
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    api.upload_folder(
        repo_id=url.repo_id,
        folder_path=output_dir,
        commit_message="End of training",
        ignore_patterns=NOT_PUBLISHED,
    )
    return str(url)


def _bucket_keys(entries: list[dict[str, float]]) -> list[str]:
    return sorted({key for entry in entries for key in entry if key.startswith("loss/")})


def _is_local(name: str) -> bool:
    """Whether a model or data set is a file or folder, and no repository of the Hub."""
    return name.count("/") > 1 or name.startswith((".", "~", "/")) or "\\" in name or Path(name).exists()


def _public(value: Any) -> str:
    """A value as it is told: numbers short, local paths by their last name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    if isinstance(value, (str, Path)) and ("/" in text or "\\" in text) and _is_local(text):
        return Path(text.replace("\\", "/")).name
    return text


def _table(rows: Mapping[str, Any]) -> str:
    lines = [
        f"| {name} | {_public(value)} |" for name, value in rows.items() if value is not None and value is not False
    ]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _inside(path: Path, output_dir: Path) -> str:
    """A picture's place relative to `output_dir`, where it is copied to if it lies elsewhere."""
    path, output_dir = path.resolve(), output_dir.resolve()
    if not path.is_relative_to(output_dir):
        shutil.copyfile(path, output_dir / path.name)
        path = output_dir / path.name
    return path.relative_to(output_dir).as_posix()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

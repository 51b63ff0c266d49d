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
"""Makes repositories of pipelines' folders: weights as safetensors, code, card, and nothing else."""

import json
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open

from .card import check_card, render_released_card, validate_model_card
from .code import COMPONENTS, PIPELINES, get_code_path, get_pipeline_class, read_index
from .facts import RELEASED, SANA_SHAPE


VARIANTS = {"bf16": "bfloat16", "fp16": "float16"}
# What a component's folder holds besides its code; whatever is pickled is none of it.
SUFFIXES = (".json", ".safetensors", ".txt", ".jinja", ".model")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_config.json")
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(?P<other>\w+))?\.json)?"
)
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def prepare_folder(
    model: str | Path,
    output: str | Path,
    *,
    repo_id: str | None = None,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    model_card: str | Path | None = None,
) -> list[Path]:
    r"""
    Writes a model as it goes to the Hub: weights anew as safetensors in the dtype that they are stored in or that of a
    variant, the code that loads them without this package, and a model card that is whole.

    Args:
        model (`str` or `Path`):
            A pipeline's folder or repository.
        output (`str` or `Path`):
            A new or empty folder.
        repo_id (`str`, *optional*):
            Where it will be, for the card; the name of `output` by default.
        variant (`str`, *optional*):
            "bf16" or "fp16": weights of that dtype, in files that bear its name.
        max_shard_size (`int` or `str`, *optional*):
            Most bytes in one file of weights, such as "5GB"; by default diffusers' and transformers' own limits.
        model_card (`str` or `Path`, *optional*):
            The card's file. By default `README.md` of `model`; of a released model that was converted, its card.

    Returns:
        `list[Path]`: what is to be sent, relative to `output`, see [`list_files`].

    Raises:
        ValueError: If `model` is a LoRA or no pipeline of this package, its weights are pickled, there is no card or
            it is not whole, `output` holds something, or `variant` is another.
    """
    output = Path(output)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"The variant has to be one of {list(VARIANTS)}, but is {variant!r}.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} has to be a new or an empty folder.")
    folder = _find_folder(model)
    index = read_index(folder)
    pipeline_class = get_pipeline_class(index)
    if pipeline_class not in PIPELINES:
        raise ValueError(f"{model} has to hold one of {list(PIPELINES)}, but holds a {pipeline_class}.")
    released = recognise(folder, [str(model), repo_id or "", output.name])
    repo_id = repo_id or output.resolve().name
    aside = output.absolute().with_name(f".{output.name}-{uuid.uuid4().hex}")
    aside.mkdir(parents=True)
    try:
        # A card that is refused is refused before gigabytes are read.
        complete_card(aside, model_card, folder, repo_id, released=released, ask_hub=False)
        _write_pipeline(folder, index, aside, variant, max_shard_size)
        forget_paths(aside)
        files = list_files(aside)
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return files


def _write_pipeline(
    folder: Path, index: dict[str, Any], output: Path, variant: str | None, max_shard_size: int | str | None
) -> None:
    import torch

    from .. import pipelines

    dtypes = _stored_dtypes(folder, index)
    if variant is not None:
        dtypes = dict.fromkeys(dtypes, VARIANTS[variant])
    pipe = getattr(pipelines, get_pipeline_class(index)).from_pretrained(
        folder,
        dtype={"default": torch.float32, **{name: getattr(torch, dtype) for name, dtype in dtypes.items()}},
        attn_implementation="sdpa" if "text_encoder" in _components(index) else None,  # nothing is computed here
        use_safetensors=True,
    )
    pipe.save_pretrained(output, variant=variant, max_shard_size=max_shard_size)


def complete_card(
    folder: str | Path,
    model_card: str | Path | None,
    source: str | Path | None,
    repo_id: str,
    *,
    released: str | None = None,
    ask_hub: bool = True,
) -> None:
    """
    Puts a whole model card into a folder as `README.md`: the given one, or the one that is there, that of the folder
    `source`, of the released model, or of the repository.

    Args:
        folder (`str` or `Path`): Where it goes.
        model_card (`str` or `Path`, *optional*): A card's file.
        source (`str` or `Path`, *optional*): The folder that the model was loaded from.
        repo_id (`str`): The repository.
        released (`str`, *optional*): Which released model it is.
        ask_hub (`bool`, defaults to `True`): Whether to look into the repository.

    Raises:
        ValueError: If there is none, or it is not whole.
    """
    path = Path(folder) / "README.md"
    if model_card is not None:
        validate_model_card(model_card)
        path.write_text(Path(model_card).read_text(encoding="utf-8"), encoding="utf-8")
        return
    if not path.exists():
        text = None
        if source is not None and (Path(source) / "README.md").is_file():
            text = (Path(source) / "README.md").read_text(encoding="utf-8")
            _copy_pictures(text, Path(source), path.parent)
        elif released is not None:
            text = str(render_released_card(released, repo_id))
        elif ask_hub:
            try:
                text = str(ModelCard.load(repo_id, ignore_metadata_errors=True))
            except (EntryNotFoundError, RepositoryNotFoundError):
                text = None
        if text is None:
            raise ValueError(
                f"There is no model card for {repo_id}: write one as README.md in the model's folder, or name its"
                " file. `diffusers-dim card` writes those of released models."
            )
        if wrong := check_card(text):
            raise ValueError(f"The model card for {repo_id} is not whole:\n  " + "\n  ".join(wrong))
        path.write_text(text, encoding="utf-8")
    validate_model_card(path)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    r"""
    Uploads a folder as [`prepare_folder`] or `save_pretrained` made it. Begun again after a break it goes on where it
    was, as far as `huggingface_hub` does. Of the repository's earlier weights those that this upload's take the place
    of go away, other variants stay.

    Args:
        folder (`str` or `Path`):
            What to upload; of it those files that [`list_files`] names.
        repo_id (`str`):
            The repository, made if it is not there; without a user's name it is the user's own.
        private (`bool`, *optional*):
            Whether a new repository is private; by default as its owner has set.
        token (`str`, *optional*):
            By default that of `HF_TOKEN` or of `hf auth login`.
        commit_message (`str`, *optional*):
            What the commit says.
        create_pr (`bool`, defaults to `False`):
            Whether to open a pull request instead.

    Returns:
        `str`: The repository's address.

    Raises:
        ValueError: If the folder's card is not whole, or it holds no pipeline.
    """
    folder = Path(folder)
    validate_model_card(folder / "README.md")
    forget_paths(folder)
    names = [path.as_posix() for path in list_files(folder)]
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=url.repo_id,
        folder_path=folder,
        commit_message=commit_message or f"Upload {get_pipeline_class(read_index(folder))}",
        create_pr=create_pr,
        allow_patterns=[_escape(name) for name in names],
        delete_patterns=[_escape(name) for name in find_stale(api.list_repo_files(url.repo_id), names)] or None,
    )
    return str(url)


def list_files(folder: str | Path) -> list[Path]:
    """
    What of a pipeline's folder goes to the Hub, relative to it: index, code, card with its pictures, licence, and of
    each component configuration, tokenizer and safetensors.

    Raises:
        ValueError: If it holds no pipeline, or a component's weights are there pickled alone.
    """
    folder = Path(folder)
    index = read_index(folder)
    files = [folder / "model_index.json", folder / "pipeline.py", folder / "README.md"]
    files += sorted(folder.glob("LICENSE*"))
    if (folder / "README.md").is_file():
        files += _pictures((folder / "README.md").read_text(encoding="utf-8"), folder)
    for name in _components(index):
        code = folder / get_code_path(name) if name in COMPONENTS else None
        found = sorted(path for path in (folder / name).glob("*") if path.suffix in SUFFIXES or path == code)
        pickled = [path.name for path in (folder / name).glob("*") if path.suffix in PICKLED]
        if pickled and not any(path.suffix == ".safetensors" for path in found):
            raise ValueError(f"{folder / name} holds {pickled} and no safetensors: pickled weights are not uploaded.")
        files += found
    return [path.relative_to(folder) for path in files if path.is_file()]


def find_stale(there: list[str], sent: list[str]) -> list[str]:
    """Of the files in a repository the weights whose place `sent` take: those of the same component and variant."""

    def places(names: list[str]) -> dict[str, tuple[str, str | None]]:
        found = {name: WEIGHTS.fullmatch(name.rpartition("/")[2]) for name in names}
        return {
            name: (name.rpartition("/")[0], match["variant"] or match["other"])
            for name, match in found.items()
            if match
        }

    taken = set(places(sent).values())
    return sorted(name for name, place in places(there).items() if place in taken and name not in sent)


def recognise(folder: str | Path, names: list[str]) -> str | None:
    """
    Which released model a folder holds: one of the kind and size of theirs, if one of `names` ends with its name.

    Args:
        folder (`str` or `Path`): A pipeline's.
        names (`list[str]`): What it is called, such as its folder's name and its repository's; the first match counts.
    """
    kind = {"DIMEditPipeline": "edit", "DIMPipeline": "t2i"}.get(get_pipeline_class(read_index(folder)) or "")
    config = Path(folder) / "transformer" / "config.json"
    if not config.is_file():
        return None
    shape = json.loads(config.read_text(encoding="utf-8"))
    if any(shape.get(name) != value for name, value in SANA_SHAPE.items()):
        return None
    last = [Path(name).name for name in names]
    return next((name for name in last if name in RELEASED and RELEASED[name].kind == kind), None)


def forget_paths(folder: str | Path) -> None:
    """Takes out of a pipeline's configurations where on this machine it was loaded from."""
    index = read_index(folder)
    for path in [
        Path(folder) / "model_index.json",
        *(Path(folder) / name / "config.json" for name in _components(index)),
    ]:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def prepared(model: str | Path, **options: Any) -> Iterator[tuple[Path, list[Path]]]:
    """A folder for a while, and what [`prepare_folder`] has put there."""
    with tempfile.TemporaryDirectory(prefix="diffusers-dim-") as parent:
        folder = Path(parent) / "model"
        yield folder, prepare_folder(model, folder, **options)


def _find_folder(model: str | Path) -> Path:
    folder = Path(model).expanduser()
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            if any((folder / name).is_file() for name in LORA_FILES):
                raise ValueError(
                    f"{model} is a LoRA, no whole model: train it with --push_to_hub, or upload it with `hf upload`."
                )
            raise ValueError(f"{model} holds no model_index.json. See `diffusers-dim convert --help`.")
        return folder
    from ..loaders.released import REPO_ID
    from ..pipelines import DIMPipeline

    if not REPO_ID.fullmatch(str(model)):
        raise ValueError(f"{model} is neither a folder here nor a Hub repository id (owner/name).")
    with suppress(EntryNotFoundError):
        hf_hub_download(str(model), "README.md")  # to where the rest goes, which the pipelines need alone
    return Path(DIMPipeline.download(str(model)))


def _components(index: dict[str, Any]) -> list[str]:
    return [
        name
        for name, entry in sorted(index.items())
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    ]


def _stored_dtypes(folder: Path, index: dict[str, Any]) -> dict[str, str]:
    """By component the dtype that most of its weights are stored in."""
    dtypes = {}
    for name in _components(index):
        counts: Counter[str] = Counter()
        for path in sorted((folder / name).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                counts.update(file.get_slice(tensor).get_dtype() for tensor in file.keys())
        counted = [(count, DTYPES[dtype]) for dtype, count in counts.items() if dtype in DTYPES]
        if counted:
            dtypes[name] = max(counted)[1]
    return dtypes


def _pictures(card: str, folder: Path) -> list[Path]:
    """The pictures of a card that lie in its folder."""
    paths = [folder / place for place in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card) if "://" not in place]
    root = folder.resolve()
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".gif")
    return [
        path
        for path in dict.fromkeys(paths)
        if path.suffix.lower() in kinds and path.is_file() and path.resolve().is_relative_to(root)
    ]


def _copy_pictures(card: str, source: Path, folder: Path) -> None:
    for path in _pictures(card, source):
        to = folder / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)

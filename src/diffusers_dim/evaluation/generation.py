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
"""Paints many pictures over all processes of a run, which can be stopped at any time and goes on where it was."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from PIL import Image
from tqdm.auto import tqdm

from ..batches import make_batches
from ..designers import SelfDesigner
from ..devices import resolve_dtype
from ..files import READ_ERRORS, read_picture, remove_leftovers, save_image, write_lines, written_aside
from ..pipelines import DIMPipeline
from .benchmark import GUIDANCE_SCALE, SEED, SIZE, STEPS, Case, refuse


Item = TypeVar("Item")
# What a picture is made with, as its PNG carries it; `seed` is among it.
Parameters = dict[str, Any]
# The files that an item becomes, with what each is made with.
Plan = dict[Path, Parameters]

# The last chunk of a PNG file: one that was cut short lacks it.
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def start_processes() -> PartialState:
    """This process among those of `accelerate launch`; on the CPU where there is no accelerator or none is wanted."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # At the end one may have to wait long for the others.
    return PartialState(cpu=on_cpu, timeout=timedelta(days=7))


def name_model(model: str | Path) -> str:
    """A model's name that is the same wherever its folder is mounted."""
    path = Path(model)
    return path.resolve().name if path.exists() else str(model)


def save_whole(image: Image.Image, path: Path, parameters: Parameters) -> None:
    """Saves a picture so that it is there as a whole or not at all."""
    with written_aside(path) as aside:
        save_image(image, aside, parameters)


def find_finished(pictures: Mapping[Path, Parameters], maker: str = "this run", option: str = "--output") -> set[Path]:
    """
    Which pictures an earlier run has made.

    Args:
        pictures (`Mapping[Path, dict]`): The files, each with what has to be among that which it was made with.
        maker (`str`): What errors call the run.
        option (`str`): By which another folder is chosen.

    Raises:
        ValueError: If a file is there that was made of something else or with other settings, or is cut short.
    """
    finished, problems = set(), []
    for path, parameters in pictures.items():
        if not path.exists():
            continue
        try:
            with Image.open(path) as image:
                found = json.loads(image.info["parameters"])
            changed = [name for name in parameters if found.get(name) != parameters[name]]
        except (*READ_ERRORS, KeyError, AttributeError):
            problems.append(f"{path} is no result of {maker}")
            continue
        if changed:
            told = "; ".join(f"{name} {found.get(name)!r}, now {parameters[name]!r}" for name in changed)
            problems.append(f"{path} is another run's ({told})")
        elif not _is_whole(path):
            problems.append(f"{path} is cut short: remove it")
        finished.add(path)
    refuse(f"Pictures are in the way, choose another {option}", problems)
    return finished


def _is_whole(path: Path) -> bool:
    """Whether a picture's file is there, to its end where it is a PNG; others' ends cannot be told so."""
    try:
        with open(path, "rb") as file:
            if file.read(8) != b"\x89PNG\r\n\x1a\n":
                return file.tell() > 0
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except FileNotFoundError:
        return False


def paint_planned(
    state: PartialState,
    planned: Sequence[tuple[Item, Plan]],
    load_pipeline: Callable[[], DIMPipeline],
    group_of: Callable[[DIMPipeline, Item], Any],
    paint: Callable[[DIMPipeline, Any, list[Item], list[Parameters]], Sequence[tuple[Image.Image, Parameters]]],
    batch_size: int,
    finished: set[Path],
    unit: str = "Pictures",
) -> None:
    """
    Paints what is not finished, this process its share of it. Batches are those of all items, so that a picture does
    not depend on where a run was stopped; the last batch is written while the next is computed.

    Args:
        state ([`~accelerate.PartialState`]): This process.
        planned (`Sequence[tuple]`): All items, and the files that each becomes.
        load_pipeline (`Callable`): Loads the pipeline onto the process's device; called only if something is left.
        group_of (`Callable`): Called as `group_of(pipe, item)`: what items of one batch have in common.
        paint (`Callable`):
            Called as `paint(pipe, group, items, parameters)` with the parameters of all pictures of a batch: the first
            item's, then the next one's. Gives these pictures, each with what it is to carry.
        batch_size (`int`): Items a process and call.
        finished (`set[Path]`): The files that are there.
        unit (`str`): What the progress bar calls items.
    """
    if all(finished.issuperset(plan) for _, plan in planned):
        return
    if not state.is_local_main_process:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    pipe = load_pipeline()
    batches = make_batches(planned, lambda entry: group_of(pipe, entry[0]), batch_size)
    batches = [batch for batch in batches if any(not finished.issuperset(plan) for _, plan in batch[1])]
    share = batches[state.process_index :: state.num_processes]
    bar = tqdm(
        total=sum(len(batch) for _, batch in share),
        desc=unit if state.num_processes == 1 else f"{unit} of 1 process in {state.num_processes}",
        disable=None if state.is_main_process else True,  # None: where stderr is no terminal
    )
    saves: list[Future] = []
    with bar, ThreadPoolExecutor(max_workers=1) as writer:
        for group, batch in share:
            paths, parameters = zip(*(picture for _, plan in batch for picture in plan.items()))
            images = paint(pipe, group, [item for item, _ in batch], list(parameters))
            for save in saves:
                save.result()
            saves = [
                writer.submit(save_whole, image, path, made_with)
                for path, (image, made_with) in zip(paths, images, strict=True)
                if path not in finished
            ]
            bar.update(len(batch))
        for save in saves:
            save.result()


@dataclass(frozen=True)
class RunSettings:
    """
    What all pictures of a benchmark's run are made with.

    Args:
        benchmark (`str`): Its name.
        model (`str`): The model's, see [`name_model`].
        dtype (`str`, defaults to "auto"): Of its weights; by default bfloat16 where the device has it, else float32.
        height, width (`int`, defaults to 1024): In pixels; of sources the centre of this shape is taken.
        steps (`int`, defaults to 30): Denoising steps.
        guidance_scale (`float`, *optional*, defaults to 7.5): Off at 1; `None` for the checkpoint's own.
        seed (`int`, defaults to 233): Of each case's first picture; its next one has the next seed.
        designer (`str`, defaults to `""`):
            Who designed: "self" for the pipeline's own model, which does while it paints; others did it before.

    Raises:
        ValueError: If a number is outside what is allowed.
    """

    benchmark: str
    model: str
    dtype: str = "auto"
    height: int = SIZE
    width: int = SIZE
    steps: int = STEPS
    guidance_scale: float | None = GUIDANCE_SCALE
    seed: int = SEED
    designer: str = ""

    def __post_init__(self) -> None:
        for name, least in (("height", 1), ("width", 1), ("steps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` has to be at least {least}, but is {getattr(self, name)}.")


def begin_run(output: Path, settings: RunSettings, cases: Sequence[Case]) -> dict[str, Any]:
    """
    Makes a folder the run's, or makes sure that it is, and writes `run.json` and `cases.jsonl`, of which designers
    read. Sources are read to their ends, since an hour's work may lie before the first that is broken.

    Args:
        output (`Path`): The folder; made if it is not there.
        settings ([`RunSettings`]): With a dtype that is not "auto".
        cases (`Sequence[Case]`): At least one.

    Returns:
        What `run.json` holds: the settings, the number of `cases`, and the `digest` of them and their sources.

    Raises:
        ValueError: If another run is in the folder, or sources cannot be read; all of that is named.
    """
    run = {**asdict(settings), "cases": len(cases), "digest": _digest(cases)}
    path = output / "run.json"
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in {**run, **found} if found.get(name) != run.get(name)]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no run's: choose another --output.") from error
        if changed:
            told = "; ".join(f"{name} {found.get(name)!r}, now {run.get(name)!r}" for name in changed)
            raise ValueError(f"{output} holds another run ({told}): choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    write_lines(path, [json.dumps(run, indent=1, ensure_ascii=False)])
    write_lines(output / "cases.jsonl", (json.dumps(row, ensure_ascii=False) for row in map(_describe, cases)))
    return run


def _describe(case: Case) -> dict[str, Any]:
    source = {} if case.image is None else {"image_path": str(case.image.absolute())}
    return {"id": case.key, **source, "prompt": case.prompt, "group": case.group, "files": list(case.files)}


def _digest(cases: Sequence[Case]) -> str:
    """sha256 over all that cases ask for, and over their sources' files wherever these lie."""

    def digest_source(case: Case) -> str | ValueError:
        if case.image is None:
            return ""
        try:
            data = case.image.read_bytes()
            read_picture(data)
        except (OSError, ValueError) as error:
            return ValueError(f"{case.key}: {case.image} cannot be read as a picture ({error})")
        return hashlib.sha256(data).hexdigest()

    with ThreadPoolExecutor() as readers:
        sources = list(readers.map(digest_source, cases))
    refuse("Sources", [str(source) for source in sources if isinstance(source, ValueError)])
    digest = hashlib.sha256()
    for case, source in zip(cases, sources, strict=True):
        told = [case.key, case.prompt, case.group, list(case.files), case.fields, source]
        digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()


def paint_cases(
    load_pipeline: Callable[[torch.device, torch.dtype], DIMPipeline],
    cases: Sequence[Case],
    output: str | Path,
    settings: RunSettings,
    blueprints: Mapping[str, str] | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """
    Paints a benchmark's pictures into the folder `pictures` of a run's folder, those that are not there. To be called
    by all processes; whoever launches more than one ends their group afterwards.

    A picture carries what it was made with, its case's `key` and `blueprint` too: the text that the painter read in
    the prompt's place, whoever wrote it, or `None`. Where the pipeline's own designer gives none, the prompt itself
    stands for it.

    Args:
        load_pipeline (`Callable`):
            Called as `load_pipeline(device, dtype)`, and only if something is left to do. A [`SelfDesigner`] that the
            pipeline has stays, where it is to design.
        cases (`Sequence[Case]`): What to paint: edits of their sources, or pictures of their prompts.
        output (`str` or `Path`): The run's folder.
        settings ([`RunSettings`]): What with.
        blueprints (`Mapping[str, str]`, *optional*): What to read in the prompts' place, by all cases' keys.
        batch_size (`int`, defaults to 1): Cases a process and call.

    Returns:
        What `run.json` holds.

    Raises:
        ValueError: If the folder holds another run's pictures or such as are cut short, sources cannot be read, or
            cases lack a blueprint; all of these are named.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` has to be at least 1, but is {batch_size}.")
    if blueprints is not None:
        refuse("Cases without a blueprint", [case.key for case in cases if not blueprints.get(case.key, "").strip()])
    elif settings.designer not in ("", SelfDesigner.name):
        raise ValueError(f"The designer {settings.designer!r} gave no `blueprints`: let it design before.")
    state = start_processes()
    dtype = resolve_dtype(settings.dtype, state.device)
    settings = replace(settings, dtype=str(dtype).removeprefix("torch."))
    folder = Path(output) / "pictures"
    planned = [(case, _plan(case, folder, settings, blueprints)) for case in cases]
    begun: list[Any] = [None, None]
    # One process looks for all: the others might already see what a fast one has made.
    if state.is_main_process:
        run = begin_run(Path(output), settings, cases)
        for parent in {path.parent for _, plan in planned for path in plan}:
            parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(parent)
        begun = [run, find_finished({path: made for _, plan in planned for path, made in plan.items()})]
    run, finished = broadcast_object_list(begun)

    def load() -> DIMPipeline:
        pipe = load_pipeline(state.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        designer = None
        if settings.designer == SelfDesigner.name:
            designer = pipe.designer if isinstance(pipe.designer, SelfDesigner) else SelfDesigner(pipe)
            designer.on_failure = "instruction"  # one case is not to end a run
        pipe.designer = designer
        return pipe

    def paint(
        pipe: DIMPipeline, count: int, batch: list[Case], parameters: list[Parameters]
    ) -> list[tuple[Image.Image, Parameters]]:
        given = None if blueprints is None else [blueprints[case.key] for case in batch]
        inputs: dict[str, Any] = {"prompt": [case.prompt for case in batch]}
        if batch[0].image is not None:
            inputs |= {"image": [read_picture(case.image) for case in batch], "blueprint": given}
        elif given is not None:
            inputs["prompt"], pipe.designer = given, None
        made: Any = pipe(
            **inputs,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            num_images_per_prompt=count,
            # On the CPU, so that a seed gives the same noise on every device.
            generator=[torch.Generator("cpu").manual_seed(made_with["seed"]) for made_with in parameters],
        )
        read = [text and str(text) for text in made.blueprints or given or [None] * len(batch) for _ in range(count)]
        return [
            (image, {**made_with, "blueprint": text})
            for image, made_with, text in zip(made.images, parameters, read, strict=True)
        ]

    paint_planned(state, planned, load, lambda _, case: len(case.files), paint, batch_size, finished)
    state.wait_for_everyone()
    return run


def _plan(case: Case, folder: Path, settings: RunSettings, blueprints: Mapping[str, str] | None) -> Plan:
    parameters = {**asdict(settings), "key": case.key, "prompt": case.prompt}
    if blueprints is not None:
        parameters["blueprint"] = blueprints[case.key]
    elif settings.designer != SelfDesigner.name:  # else it is not known before
        parameters["blueprint"] = None
    return {folder / file: {**parameters, "seed": settings.seed + index} for index, file in enumerate(case.files)}


def missing_pictures(cases: Iterable[Case], pictures: Path) -> dict[str, list[str]]:
    """Which files are not in a folder of pictures or are cut short there, by their cases' keys."""
    missing = {case.key: [file for file in case.files if not _is_whole(pictures / file)] for case in cases}
    return {key: files for key, files in missing.items() if files}


def check_pictures(cases: Sequence[Case], pictures: Path, only_present: bool = False) -> dict[str, list[str]]:
    """
    Makes sure that all pictures of some cases are there.

    Args:
        cases (`Sequence[Case]`): The cases.
        pictures (`Path`): The folder of pictures.
        only_present (`bool`, defaults to `False`): Whether it will do that one case has all of its pictures.

    Returns:
        `dict[str, list[str]]`: What is missing nevertheless, see [`missing_pictures`].

    Raises:
        ValueError: If they are not; the first ten that are missing or cut short are named.
    """
    missing = missing_pictures(cases, pictures)
    if missing and (not only_present or len(missing) == len(cases)):
        files = [file for names in missing.values() for file in names]
        refuse(f"{pictures} is unfinished, it lacks pictures or they are cut short", files)
    return missing

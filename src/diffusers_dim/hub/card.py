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
"""Model cards: rendered from one template for released models and for training runs, and checked before an upload."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..evaluation.paper import PAPER
from ..evaluation.report import ABOUT
from .facts import (
    CITATION,
    COMPONENTS,
    DIM_LICENCE,
    DIM_PARTS,
    INGREDIENTS,
    JUDGES,
    PAPER_URL,
    PARAMETERS,
    RELEASED,
    RELEASED_BIAS,
    RELEASED_LIMITS,
    SOFTWARE_CITATION,
    SPEED,
    SPEED_SETTING,
    ReleasedModel,
)


TEMPLATE = resources.files(__package__).joinpath("model_card.md")
PIPELINE_TAGS = {"edit": "image-to-image", "t2i": "text-to-image", "lora": "image-to-image"}
PIPELINE_CLASSES = {"edit": "DIMEditPipeline", "t2i": "DIMPipeline"}
CALLS = {
    "edit": """from diffusers.utils import load_image

{load}
edited = pipe(load_image("cat.jpg"), "Put a red scarf around the cat's neck.").images[0]""",
    "t2i": """{load}
picture = pipe("A bowl of fruit on a table near a window.").images[0]""",
}
REQUIRED = ("license", "library_name", "pipeline_tag", "base_model")
# The tag of a model that has no base model.
SCRATCH = "trained-from-scratch"
PLACEHOLDERS = (
    r"\[?more information needed\]?",
    r"\bTODO\b",
    r"\bTBD\b",
    r"\bFIXME\b",
    r"\{\{.*?\}\}",
    r"\{%.*?%\}",
    r"<[A-Za-z][^<>\n]*>",
)
# What in angle brackets is no placeholder: HTML that pages have, and addresses.
ANGLED = re.compile(
    r"</?(?:a|b|br|code|details|div|em|i|img|li|p|source|strong|sub|summary|sup|table|td|th|tr|ul|video)\b|<https?:",
    re.I,
)


def get_tags(kind: str) -> list[str]:
    """What a model of that kind ("edit", "t2i" or "lora") is tagged with, its task first."""
    return [PIPELINE_TAGS[kind], *{"edit": ["image-editing"], "t2i": [], "lora": ["image-editing", "lora"]}[kind]]


def describe_use(kind: str, model: str, base_model: str | None = None) -> tuple[str, str | None]:
    """
    How to use a model, as code: with this package, and without it (`None` for a LoRA).

    Args:
        kind (`str`): "edit", "t2i" or "lora".
        model (`str`): The repository or folder.
        base_model (`str`, *optional*): Of a LoRA.
    """
    of = "edit" if kind == "lora" else kind
    name = PIPELINE_CLASSES[of]
    placed = base_model if kind == "lora" else model
    load = f'pipe = {name}.from_pretrained("{placed}", dtype=torch.bfloat16).to("cuda")'
    if kind == "lora":
        load += f'\npipe.load_lora_weights("{model}")'
    call = CALLS[of]
    own = f"import torch\n{_imports(call, f'from diffusers_dim import {name}', load)}"
    if kind == "lora":
        return own, None
    load = (
        f'pipe = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True, dtype=torch.bfloat16).to("cuda")'
    )
    return own, f"import torch\nfrom diffusers import DiffusionPipeline\n{_imports(call, '', load)}"


def _imports(call: str, own: str, load: str) -> str:
    lines = call.format(load=load).split("\n\n", 1)
    if len(lines) == 2:
        return f"{lines[0]}\n\n{own}\n\n{lines[1]}" if own else f"{lines[0]}\n\n{lines[1]}"
    return f"\n{own}\n\n{lines[0]}" if own else f"\n{lines[0]}"


def render_card(
    *,
    data: ModelCardData,
    title: str,
    summary: str,
    use: str,
    training: str,
    limits: str,
    bias: str,
    licences: str,
    speed: str,
    remote_use: str | None = None,
    use_notes: str = "",
    components: Sequence[Sequence[str]] = (),
    results: str = "",
    results_title: str = "Evaluation",
    versions: str = "",
    pictures: Mapping[str, str] | None = None,
    curves: Mapping[str, str] | None = None,
    citation: str | None = None,
) -> ModelCard:
    """
    A model card by the template `model_card.md`. Texts are Markdown.

    Args:
        data (`ModelCardData`): The front matter.
        title (`str`): Its heading.
        summary (`str`): What the model is.
        use (`str`): Code that uses it with this package.
        training (`str`): How it was trained.
        limits (`str`): What it cannot do.
        bias (`str`): What it is biased to.
        licences (`str`): Its terms.
        speed (`str`): What it costs in time and memory, or that this is unmeasured.
        remote_use (`str`, *optional*): Code that uses it without this package.
        use_notes (`str`, *optional*): What else has to be known to use it.
        components (`Sequence`, *optional*): Rows of component, what it is, whether it was trained.
        results (`str`, *optional*): Tables of figures.
        results_title (`str`, *optional*): What they are called.
        versions (`str`, *optional*): A table of packages.
        pictures (`Mapping[str, str]`, *optional*): Captions and paths of pictures at the top.
        curves (`Mapping[str, str]`, *optional*): Of those at the section on speed.
        citation (`str`, *optional*): BibTeX; by default that of the paper and of this package.

    Returns:
        `ModelCard`.
    """
    card = ModelCard.from_template(
        card_data=data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=title,
        summary=summary,
        use=use,
        remote_use=remote_use,
        use_notes=use_notes,
        components=components,
        training=training,
        results=results,
        results_title=results_title,
        speed=speed,
        versions=versions,
        pictures=pictures or {},
        curves=curves or {},
        limits=limits,
        bias=bias,
        licences=licences,
        citation=citation or f"{CITATION}\n\n{SOFTWARE_CITATION.replace('VERSION', __version__)}",
    )
    card.content = re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"
    return card


def render_released_card(name: str, repo_id: str | None = None) -> ModelCard:
    """
    The model card of a released model, converted by this package.

    Args:
        name (`str`): One of `RELEASED`: "DIM-4.6B-T2I", "DIM-4.6B-Edit" or "DIM-4.6B-Edit-Stage1".
        repo_id (`str`, *optional*): Where the converted model will be; its own name by default.

    Raises:
        ValueError: If there is no such model.
    """
    model = RELEASED.get(name.removeprefix("stdKonjac/"))
    if model is None:
        raise ValueError(f"There is no released model {name!r}: it has to be one of {list(RELEASED)}.")
    use, remote_use = describe_use(model.kind, repo_id or model.name)
    notes = (
        "Without a designer of your own, the model's Qwen2.5-VL-3B writes the blueprint first"
        ' (`pipe.designer = "self"`); `pipe.designer = None` paints by the plain instruction.'
        if model.kind == "edit"
        else "30 steps and guidance 7.5 by default."
    )
    terms = [f"- {INGREDIENTS[key].what}: {INGREDIENTS[key].licence}." for key in [*DIM_PARTS, *model.datasets]]
    part, own, stock = SPEED[model.kind]
    data = ModelCardData(
        model_name=model.name,
        license="other",
        license_name="research-and-non-commercial",
        license_link=f"https://huggingface.co/{model.repo_id}",
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAGS[model.kind],
        language="en",
        base_model=[model.repo_id, *(INGREDIENTS[key].repo_id for key in DIM_PARTS)],
        datasets=[INGREDIENTS[key].repo_id for key in model.datasets],
        tags=[*get_tags(model.kind), "diffusers-dim", "draw-in-mind", "sana"],
        eval_results=_published_results(model),
    )
    return render_card(
        data=data,
        title=f"{model.name} for diffusers",
        summary=f"{model.summary} It is [{model.repo_id}](https://huggingface.co/{model.repo_id}) of"
        f" [Draw-In-Mind]({PAPER_URL}), in diffusers' layout by `diffusers-dim convert`: the same weights by other"
        " names.",
        use=use,
        remote_use=remote_use,
        use_notes=notes,
        components=COMPONENTS,
        training=f"{model.training}\n\n" + "\n".join(f"- {INGREDIENTS[key].what}" for key in model.datasets),
        results="Published by the authors, and not measured anew by this project:\n\n" + _published_table(model),
        speed=f"Time and memory of these weights were not measured by this project. {PARAMETERS / 1e9:.1f} billion"
        f" parameters take {2 * PARAMETERS / 1e9:.1f} GB in bfloat16, to which a picture's own numbers come. What was"
        f" measured is a part of the painter, on a CPU ({SPEED_SETTING}):\n\n"
        f"| | diffusers-dim | the same parts of stock diffusers |\n| --- | ---: | ---: |\n"
        f"| one picture ({part.replace('_', '-')}) | {own:.2f} s | {stock:.2f} s |",
        limits=RELEASED_LIMITS,
        bias=RELEASED_BIAS,
        licences=f"The converted weights stay under the terms of what they were made of, all of them at once:\n\n"
        f"- Draw-In-Mind's own weights: {DIM_LICENCE}.\n" + "\n".join(terms) + "\n\nThe code in this repository is"
        " generated from diffusers-dim, under Apache-2.0.",
    )


def _published(model: ReleasedModel) -> list[tuple[str, str, float, str, str]]:
    """Benchmark, designer ("" for none), overall figure, judge and source of each published row of a model."""
    return [
        (benchmark, row.designer or "", row.figures["overall"], JUDGES[benchmark], table.source)
        for benchmark, names in model.rows.items()
        for table in PAPER[benchmark]
        for row in table.rows
        if row.model in names
    ]


def _published_results(model: ReleasedModel) -> list[EvalResult]:
    results = []
    for benchmark, designer, value, judge, source in _published(model):
        about = ABOUT[benchmark]
        by = f" with {designer} as designer" if designer else ""
        results.append(
            EvalResult(
                task_type=PIPELINE_TAGS[model.kind],
                dataset_type=about.dataset,
                dataset_name=about.title,
                metric_type=about.metric,
                metric_name=f"{about.title} overall{by}, judged by {judge}",
                metric_value=value,
                source_name="Draw-In-Mind's authors",
                source_url=source,
            )
        )
    return results


def _published_table(model: ReleasedModel) -> str:
    lines = ["| benchmark | designer | overall | judge |", "| --- | --- | ---: | --- |"]
    stage1 = model.name == "DIM-4.6B-Edit-Stage1"
    for benchmark, designer, value, judge, _ in _published(model):
        who = designer or ("not published" if stage1 else "none" if model.kind == "edit" else "prompts rewritten")
        who = "none" if benchmark == "mjhq" else who
        better = ", lower is better" if benchmark == "mjhq" else ""
        lines.append(f"| {ABOUT[benchmark].title}{better} | {who} | {value:.2f} | {judge} |")
    return "\n".join(lines)


# Checking


def check_card(text: str) -> list[str]:
    """
    What is wrong with a model card, a line each; nothing if nothing is.

    Args:
        text (`str`): The card with its front matter.
    """
    front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if front is None:
        return ["front matter: missing; a card begins with its metadata between two lines of ---"]
    try:
        data = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return [f"front matter: no YAML that can be read ({' '.join(str(error).split())})"]
    if not isinstance(data, dict):
        return ["front matter: has to be names and values"]
    required = [name for name in REQUIRED if name != "base_model" or SCRATCH not in (data.get("tags") or [])]
    wrong = [f"{name}: missing or empty" for name in required if not _filled(data.get(name))]
    wrong += [f"{name}: empty" for name, value in data.items() if name not in REQUIRED and not _filled(value)]
    if _filled(data.get("library_name")) and data["library_name"] != "diffusers":
        wrong.append(f"library_name: has to be diffusers, but is {data['library_name']}")
    if _filled(data.get("pipeline_tag")) and data["pipeline_tag"] not in PIPELINE_TAGS.values():
        tags = sorted(set(PIPELINE_TAGS.values()))
        wrong.append(f"pipeline_tag: has to be one of {tags}, but is {data['pipeline_tag']}")
    if data.get("license") == "other" and not _filled(data.get("license_name")):
        wrong.append("license_name: missing; a license that is other has to be named")
    wrong += _check_values(data)
    wrong += _check_metrics(data.get("model-index"))
    return wrong + _check_body(text[front.end() :])


def validate_model_card(path: str | Path) -> None:
    """
    Makes sure that a model card is whole: license, library, pipeline tag and base model (or the tag
    "trained-from-scratch") are told, no field, section or table's judge is empty or a placeholder, and every metric
    names who judged it.

    Args:
        path (`str` or `Path`): The card's file.

    Raises:
        ValueError: If it is not; everything that is wrong is listed by name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The model card {path} cannot be read ({error}).") from error
    if wrong := check_card(text):
        raise ValueError(f"The model card {path} is not whole:\n  " + "\n  ".join(wrong))


def _filled(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_filled(item) for item in value)
    return value is not None and str(value).strip() != ""


def _placeholder(text: str) -> str | None:
    for pattern in PLACEHOLDERS:
        for found in re.finditer(pattern, text, re.IGNORECASE if "needed" in pattern else 0):
            if not ANGLED.match(found[0]):
                return found[0]
    return None


def _check_values(data: dict[str, Any]) -> list[str]:
    wrong = []
    for name, value in data.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and (found := _placeholder(item)):
                wrong.append(f"{name}: holds the placeholder {found}")
    return wrong


def _check_metrics(models: Any) -> list[str]:
    wrong = []
    for model in models if isinstance(models, list) else []:
        for result in model.get("results") or []:
            for metric in result.get("metrics") or []:
                name = str(metric.get("name") or metric.get("type") or "a metric")
                judged = re.search(r"\b(?:judged|measured|computed) by \S", name) or (metric.get("args") or {}).get(
                    "judge"
                )
                if not judged:
                    wrong.append(f'model-index, {name}: does not say who judged it (such as "..., judged by GPT-4.1")')
                if not _filled(metric.get("value")):
                    wrong.append(f"model-index, {name}: has no value")
    return wrong


def _check_body(body: str) -> list[str]:
    wrong = []
    prose = re.sub(r"^(`{3,}).*?^\1[ \t]*$", "code", body, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"`[^`\n]+`", "code", prose)
    if not re.search(r"^# \S", prose, re.MULTILINE):
        wrong.append("title: missing")
    headings = list(re.finditer(r"^(#+)[ \t]*(.*)$", prose, re.MULTILINE))
    for number, heading in enumerate(headings):
        end = headings[number + 1].start() if number + 1 < len(headings) else len(prose)
        text = re.sub(r"<!--.*?-->", "", prose[heading.end() : end], flags=re.DOTALL).strip()
        deeper = number + 1 < len(headings) and len(headings[number + 1][1]) > len(heading[1])
        name = heading[2].strip() or "a section without a name"
        if not text and not deeper:
            wrong.append(f"section {name}: empty")
        if found := _placeholder(f"{heading[2]}\n{text}"):
            wrong.append(f"section {name}: holds the placeholder {found}")
        wrong += [f"section {name}: {problem}" for problem in _check_tables(text)]
    return wrong


def _check_tables(text: str) -> list[str]:
    """Rows of tables with a column "judge" in which that is empty."""
    wrong, column = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.strip().startswith("|") else []
        if not cells:
            column = None
        elif "judge" in cells:
            column = cells.index("judge")
        elif column is not None and (len(cells) <= column or not cells[column]):
            wrong.append(f"{cells[0]} has no judge")
    return wrong

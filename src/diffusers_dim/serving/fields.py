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
"""What an OpenAI-like request asks for: its fields, checked, in the words of whoever sent it."""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .intake import UploadError, read_prompt


if TYPE_CHECKING:
    from ..pipelines import DIMPipeline
    from .app import ServingSettings


FORMATS = ("png", "jpeg", "webp")
# Ignored: they say who asks.
_IGNORED = ("user", "safety_identifier")
# Fields of OpenAI's that have one value here, and what else to do.
_FIXED = {
    "response_format": ("b64_json", "pictures are sent in the answer, not kept at addresses"),
    "background": (("opaque", "auto"), "pictures have no transparency"),
    "quality": ("auto", "use num_inference_steps"),
}
_REFUSED = {
    "mask": "edits are by words alone: say in the prompt what is to change",
    "markup": "edits are by words alone: say in the prompt what is to change",
    "input_fidelity": "what the prompt does not name is kept anyway",
    "moderation": "there is none",
    "style": "say it in the prompt",
    "complexity": "use num_inference_steps",
    "frame_count": "pictures do not move",
    "frame_duration_ms": "pictures do not move",
}
_KNOWN = (
    "model",
    "prompt",
    "n",
    "size",
    "output_format",
    "output_compression",
    "stream",
    "partial_images",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "designer",
)
_EDIT_ONLY = ("image", "image_url", "blueprint")
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 30.0
MAX_PREVIEWS = 3


class RequestError(ValueError):
    """
    A request that cannot be served, for the error's body.

    Args:
        message (`str`): Why, for a person.
        param (`str`, *optional*): The field.
        code (`str`, *optional*): A word for programs.
        status (`int`, defaults to 400): Of HTTP.
        headers (`Mapping[str, str]`, *optional*): Of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.param, self.code, self.status, self.headers = param, code, status, headers


@dataclass(frozen=True)
class PictureFields:
    """
    The checked fields of a request.

    Args:
        prompt (`str`): The instruction, or what to paint.
        seeds (`tuple[int, ...]`): One a picture.
        size (`tuple[int, int]`, *optional*): Height and width in pixels; `None` for the model's choice.
        num_inference_steps (`int`): Denoising steps.
        guidance_scale (`float`): Off at 1.
        blueprint (`str`, *optional*): Of an edit.
        use_designer (`bool`): Whether the pipeline's designer may write one.
        image_url (`str`, *optional*): Where an edit's source is.
        output_format (`str`): One of `FORMATS`.
        quality (`int`): Of JPEG and WebP, 0 to 100.
        stream (`bool`): Whether events are wanted.
        partial_images (`int`): Unfinished pictures among them.
    """

    prompt: str
    seeds: tuple[int, ...]
    size: tuple[int, int] | None
    num_inference_steps: int
    guidance_scale: float
    blueprint: str | None
    use_designer: bool
    image_url: str | None
    output_format: str
    quality: int
    stream: bool
    partial_images: int


def read_fields(
    fields: Mapping[str, Any], kind: Literal["edit", "generate"], pipe: "DIMPipeline", settings: "ServingSettings"
) -> PictureFields:
    """
    Checks the fields of a request; those of a form are texts, those of JSON have types. `None` counts as not given.

    Raises:
        RequestError: If a field is unknown, or its value nothing for this server.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    known = [*_KNOWN, *(_EDIT_ONLY if kind == "edit" else ())]
    for name, value in fields.items():
        if name in _REFUSED:
            raise RequestError(f"`{name}` is not supported: {_REFUSED[name]}.", name, "unsupported_parameter")
        if name in _FIXED:
            allowed, instead = _FIXED[name]
            allowed = (allowed,) if isinstance(allowed, str) else allowed
            if value not in allowed:
                raise RequestError(
                    f"`{name}` has to be {' or '.join(allowed)} here, but is {_show(value)}: {instead}.",
                    name,
                    "unsupported_value",
                )
        elif name not in known and name not in _IGNORED:
            raise RequestError(
                f"`{_cut(name)}` is no field that is known here: there are {', '.join(known)}.",
                _cut(name),
                "unknown_parameter",
            )
    if "model" in fields and fields["model"] != settings.model_name:
        raise RequestError(
            f"The model {_show(fields['model'])} is not here: there is {settings.model_name!r}.",
            "model",
            "model_not_found",
            404,
        )
    prompt = _read_text(fields, "prompt", settings)
    blueprint = _read_text(fields, "blueprint", settings) if "blueprint" in fields else None
    if prompt is None:
        raise RequestError("`prompt` is missing: say in words what is wanted.", "prompt", "missing_parameter")
    count = _read_int(fields, "n", 1, 1, settings.max_images)
    stream = _read_bool(fields, "stream")
    if stream and count > 1:
        raise RequestError("`n` has to be 1 with `stream`.", "n", "invalid_value")
    if not stream and "partial_images" in fields:
        raise RequestError("`partial_images` goes with `stream`.", "partial_images", "invalid_value")
    image_format = _read_choice(fields, "output_format", FORMATS)
    if image_format == "png" and "output_compression" in fields:
        raise RequestError(
            "`output_compression` is for the output formats jpeg and webp.", "output_compression", "invalid_value"
        )
    seed = _read_int(fields, "seed", None, 0, MAX_SEED - count)
    seed = secrets.randbelow(2**32) if seed is None else seed
    guidance_scale = _read_number(fields, "guidance_scale", pipe.config.default_guidance_scale, 0.0, MAX_GUIDANCE)
    image_url = fields.get("image_url")
    if image_url is not None and not isinstance(image_url, str):
        raise RequestError("`image_url` has to be a text.", "image_url", "invalid_type")
    return PictureFields(
        prompt=prompt,
        seeds=tuple(range(seed, seed + count)),
        size=_read_size(fields, pipe, settings),
        num_inference_steps=_read_int(
            fields, "num_inference_steps", settings.num_inference_steps, 1, settings.max_inference_steps
        ),
        guidance_scale=guidance_scale,
        blueprint=blueprint,
        use_designer=_read_choice(fields, "designer", ("default", "none")) == "default",
        image_url=image_url,
        output_format=image_format,
        quality=_read_int(fields, "output_compression", 95, 0, 100),
        stream=stream,
        partial_images=_read_int(fields, "partial_images", 0, 0, MAX_PREVIEWS),
    )


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


def _show(value: Any) -> str:
    return _cut(repr(value))


def _read_text(fields: Mapping[str, Any], name: str, settings: "ServingSettings") -> str | None:
    if name not in fields:
        return None
    try:
        return read_prompt(fields[name], settings.max_prompt_characters, name)
    except UploadError as error:
        raise RequestError(str(error), name, "invalid_value", error.status) from error


def _read_choice(fields: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    value = fields.get(name, allowed[0])
    if value not in allowed:
        raise RequestError(
            f"`{name}` has to be one of {', '.join(allowed)}, but is {_show(value)}.", name, "invalid_value"
        )
    return value


def _read_bool(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if not isinstance(value, bool):
        raise RequestError(f"`{name}` has to be true or false, but is {_show(value)}.", name, "invalid_type")
    return value


def _read_number(fields: Mapping[str, Any], name: str, default: Any, least: float, most: float) -> Any:
    if name not in fields:
        return default
    value, whole = fields[name], isinstance(least, int)
    if isinstance(value, str) and re.fullmatch(
        r"-?\d{1,20}" if whole else r"-?\d{1,20}(\.\d{0,20})?", value, re.ASCII
    ):
        value = int(value) if whole else float(value)
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise RequestError(
            f"`{name}` has to be {kind} from {least} to {most}, but is {_show(fields[name])}.", name, "invalid_value"
        )
    return value


def _read_int(fields: Mapping[str, Any], name: str, default: int | None, least: int, most: int) -> Any:
    return _read_number(fields, name, default, least, most)


def _read_size(fields: Mapping[str, Any], pipe: "DIMPipeline", settings: "ServingSettings") -> tuple[int, int] | None:
    value = fields.get("size", "auto")
    if value == "auto":
        return None
    factor, most = pipe.vae_scale_factor, settings.max_output_pixels
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value, re.ASCII) if isinstance(value, str) else None
    width, height = (int(side) for side in match.groups()) if match else (0, 0)
    if not width or not height or width % factor or height % factor or width * height > most:
        raise RequestError(
            f"`size` has to be auto or WIDTHxHEIGHT, both multiples of {factor} and together at most {most:,} pixels,"
            f" but is {_show(value)}.",
            "size",
            "invalid_value",
        )
    try:
        pipe.check_inputs(prompt="size", height=height, width=width)
    except ValueError as error:
        raise RequestError(f"`size` is nothing for this model: {error}", "size", "invalid_value") from error
    return height, width

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
"""From a released DIM checkpoint to a standard diffusers folder, a shard at a time."""

import inspect
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler
from diffusers import __version__ as diffusers_version
from diffusers.utils.logging import tqdm
from huggingface_hub import StateDictSplit, snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ..hub.code import save_code
from ..models import DIMConnector, DIMProcessor, DIMTransformer2DModel


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PIPELINES = {"edit": "DIMEditPipeline", "t2i": "DIMPipeline"}
TRANSFORMERS_WEIGHTS = "model.safetensors"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
X_EMBEDDER = "decoder.model.x_embedder.proj.weight"
FINAL_LAYER = "decoder.model.final_layer.linear.weight"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")

# Of no use here: SANA's own text encoder, which DIM replaces, and the position table, which SANA does not read.
DROPPED = re.compile(r"decoder\.text_encoder\.|decoder\.model\.pos_embed$")

# SANA1.5-1.6B (https://huggingface.co/papers/2501.18427).
SANA_CONFIG = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "qk_norm": "rms_norm_across_heads",
}

# Module in diffusers -> module in SANA, part, parts. SANA keeps queries, keys and values in one matrix, one above the
# other. The facts are those of diffusers' scripts/convert_sana_to_diffusers.py.
TRANSFORMER_MODULES = {
    "": ("final_layer", 0, 1),
    "patch_embed.proj": ("x_embedder.proj", 0, 1),
    "time_embed.emb.timestep_embedder.linear_1": ("t_embedder.mlp.0", 0, 1),
    "time_embed.emb.timestep_embedder.linear_2": ("t_embedder.mlp.2", 0, 1),
    "time_embed.linear": ("t_block.1", 0, 1),
    "caption_projection.linear_1": ("y_embedder.y_proj.fc1", 0, 1),
    "caption_projection.linear_2": ("y_embedder.y_proj.fc2", 0, 1),
    "caption_norm": ("attention_y_norm", 0, 1),
    "proj_out": ("final_layer.linear", 0, 1),
}
BLOCK_MODULES = {
    "attn1.to_q": ("attn.qkv", 0, 3),
    "attn1.to_k": ("attn.qkv", 1, 3),
    "attn1.to_v": ("attn.qkv", 2, 3),
    "attn1.norm_q": ("attn.q_norm", 0, 1),
    "attn1.norm_k": ("attn.k_norm", 0, 1),
    "attn1.to_out.0": ("attn.proj", 0, 1),
    "attn2.to_q": ("cross_attn.q_linear", 0, 1),
    "attn2.to_k": ("cross_attn.kv_linear", 0, 2),
    "attn2.to_v": ("cross_attn.kv_linear", 1, 2),
    "attn2.norm_q": ("cross_attn.q_norm", 0, 1),
    "attn2.norm_k": ("cross_attn.k_norm", 0, 1),
    "attn2.to_out.0": ("cross_attn.proj", 0, 1),
    "ff.conv_inverted": ("mlp.inverted_conv.conv", 0, 1),
    "ff.conv_depth": ("mlp.depth_conv.conv", 0, 1),
    "ff.conv_point": ("mlp.point_conv.conv", 0, 1),
}
CONNECTOR_NAMES = {
    "linear_1.weight": "projector.0.weight",
    "linear_1.bias": "projector.0.bias",
    "linear_2.weight": "projector.2.weight",
    "linear_2.bias": "projector.2.bias",
    "null_condition": "decoder.model.y_embedder.y_embedding",
}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """
    What [`convert_released_checkpoint`] made.

    Args:
        path (`Path`): The diffusers folder.
        kind (`str`): "edit" or "t2i".
        num_parameters (`int`): Parameters of all components together.
    """

    path: Path
    kind: Literal["edit", "t2i"]
    num_parameters: int

    @property
    def pipeline_class(self) -> str:
        """Name of the class in `diffusers_dim` that loads the folder."""
        return PIPELINES[self.kind]


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, by the file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Source(NamedTuple):
    """Where a parameter comes from: one of `parts` equal parts, along the first dimension, of a stored tensor."""

    stored: StoredTensor
    part: int
    parts: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stored.shape[0] // self.parts, *self.stored.shape[1:])

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The parameter's values; only this part of the file is read."""
        rows = self.shape[0]
        with safe_open(self.stored.file, framework="pt") as file:
            return file.get_slice(self.stored.name)[self.part * rows : (self.part + 1) * rows].to(dtype)


class Weights:
    """The tensors of one checkpoint, by its files' headers, and what was asked of them."""

    def __init__(self, place: Path, tensors: dict[str, StoredTensor]):
        self.place = place
        self.tensors = tensors
        self.asked: dict[str, tuple[int, ...]] = {}

    def holds(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)

    def plan(
        self, parameters: Mapping[str, torch.Tensor], rename: Callable[[str], tuple[str, int, int]]
    ) -> dict[str, Source]:
        """
        Finds each parameter's source; one that is not there as it should be is left out and told by `complaints`.

        Args:
            parameters (`Mapping[str, torch.Tensor]`): A model's state dict, which may lie on the meta device.
            rename (`Callable`): From a parameter's name to the stored tensor's, the part and the number of parts.
        """
        sources = {}
        for parameter, value in parameters.items():
            name, part, parts = rename(parameter)
            shape = (value.shape[0] * parts, *value.shape[1:])
            self.asked[name] = shape
            stored = self.tensors.get(name)
            if stored is not None and stored.shape == shape:
                sources[parameter] = Source(stored, part, parts)
        return sources

    def complaints(self) -> list[str]:
        """What was asked and is not there as asked, and what is there and was not asked, a line each."""
        lines = []
        for name, shape in sorted(self.asked.items()):
            stored = self.tensors.get(name)
            if stored is None:
                lines.append(f"missing: {name} {shape}")
            elif stored.shape != shape:
                lines.append(f"wrong shape: {name} is {stored.shape}, expected {shape}")
            elif stored.dtype not in FLOAT_TYPES:
                lines.append(f"wrong type: {name} is {stored.dtype}, expected one of {', '.join(FLOAT_TYPES)}")
        lines += [f"unknown: {name} {self.tensors[name].shape}" for name in sorted(self.tensors.keys() - self.asked)]
        return lines


def convert_released_checkpoint(
    checkpoint: str | os.PathLike,
    text_encoder: str | os.PathLike,
    vae: str | os.PathLike,
    output: str | os.PathLike,
    *,
    transformer_config: str | os.PathLike | Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = torch.float32,
    default_guidance_scale: float = 7.5,
    designer: str = "default",
    max_shard_size: int | str = "5GB",
) -> ConvertedCheckpoint:
    r"""
    Turns a released DIM checkpoint into a folder that `DIMEditPipeline.from_pretrained` or
    `DIMPipeline.from_pretrained` loads.

    All checks are made on the files' headers before a weight is read. The weights then pass through memory one shard
    at a time; none is held twice. The folder is written aside and renamed when whole, and what was written is removed
    on any failure.

    Args:
        checkpoint (`str` or `os.PathLike`):
            A safetensors file, a folder that holds `model.safetensors` or its shards and index (itself or in one
            sub-folder), or the id of such a Hub repository. It holds `projector.*` and `decoder.model.*`, perhaps
            `mllm.*` and `decoder.vae.*`; `decoder.text_encoder.*` and `decoder.model.pos_embed` are dropped.
        text_encoder (`str` or `os.PathLike`):
            Folder or Hub repository of the Qwen2.5-VL that the checkpoint was trained with. Its configuration,
            tokenizer and image processor are used; its weights only when the checkpoint has no `mllm.*`.
        vae (`str` or `os.PathLike`):
            Folder or Hub repository of the `AutoencoderDC`. Its configuration is used; its weights only when the
            checkpoint has no `decoder.vae.*`.
        output (`str` or `os.PathLike`):
            Folder to write. It must not exist, or be empty.
        transformer_config (`str`, `os.PathLike` or `Mapping`, *optional*):
            A JSON file or dict of [`DIMTransformer2DModel`]'s arguments, which win over what the checkpoint's shapes
            say, see [`infer_transformer_config`]. A released checkpoint needs none.
        dtype (`torch.dtype` or `str`, defaults to `torch.float32`):
            Of the written weights: float32 or bfloat16.
        default_guidance_scale (`float`, defaults to `7.5`):
            The guidance scale that the pipeline takes when a call names none.
        designer (`"default"`, `"self"` or `"none"`, defaults to `"default"`):
            Who words what the pipeline paints, see [`DIMPipeline.designer`]: by default "self" for an edit model and
            nobody for a text-to-image one.
        max_shard_size (`int` or `str`, defaults to `"5GB"`):
            Most bytes in one written file, and so in memory: a number, or digits with a unit. A larger tensor has a
            file of its own.

    Returns:
        [`ConvertedCheckpoint`]: the folder, and whether it is an edit or a text-to-image model. An edit model's
        patch embedding takes twice as many channels as its final layer gives, a text-to-image model's as many.

    Raises:
        ValueError: If tensors are unknown, missing or of another shape than the configurations ask for (all are
            listed in one error, by the names that they have in their checkpoint), a file is truncated or not
            safetensors, the output folder holds something, or an argument is not one of those above.
        FileNotFoundError: If a file, folder or repository is not there.
    """
    # 1. Arguments
    output = Path(output).expanduser().resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"`output` has to be a new or an empty folder, but {output} already holds something.")
    torch_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype not in DTYPES.values():
        raise ValueError(f"`dtype` has to be one of {list(DTYPES)}, but is {dtype}.")
    if not (math.isfinite(default_guidance_scale) and default_guidance_scale >= 0):
        raise ValueError(f"`default_guidance_scale` has to be at least 0, but is {default_guidance_scale}.")
    if designer not in ("default", "self", "none"):
        raise ValueError(f'`designer` has to be "default", "self" or "none", but is {designer!r}.')
    given_config = _read_transformer_config(transformer_config)

    # 2. What the base repositories always give: configurations and the processor
    text_encoder_folder = _resolve(text_encoder, "text_encoder", ["*.json", "*.txt", "*.jinja"])
    _check_config(text_encoder_folder, "text_encoder", "model_type", "qwen2_5_vl")
    _find_file(text_encoder_folder, "text_encoder", "preprocessor_config.json", "processor_config.json")
    _find_file(text_encoder_folder, "text_encoder", "tokenizer.json", "vocab.json")
    vae_folder = _resolve(vae, "vae", ["config.json"])
    _check_config(vae_folder, "vae", "_class_name", "AutoencoderDC")
    text_encoder_config = Qwen2_5_VLConfig.from_pretrained(text_encoder_folder)
    processor = DIMProcessor.from_pretrained(text_encoder_folder)

    # 3. Headers of the checkpoint, and of the base weights that it does not hold
    released = _read_headers(checkpoint, "checkpoint", TRANSFORMERS_WEIGHTS)
    shapes = {name: stored.shape for name, stored in released.tensors.items()}
    for name in shapes:
        if DROPPED.match(name):
            del released.tensors[name]
    text_encoder_weights, text_encoder_prefix = released, "mllm."
    if not released.holds("mllm."):
        text_encoder_weights = _read_headers(text_encoder, "text_encoder", TRANSFORMERS_WEIGHTS)
        text_encoder_prefix = ""
    vae_weights, vae_prefix = released, "decoder.vae."
    if not released.holds("decoder.vae."):
        vae_weights, vae_prefix = _read_headers(vae, "vae", DIFFUSERS_WEIGHTS), ""

    # 4. The models, without memory for their weights
    sana_config = infer_transformer_config(shapes, given_config)
    with torch.device("meta"):
        connector_model = DIMConnector(
            hidden_size=text_encoder_config.text_config.hidden_size,
            caption_channels=sana_config["caption_channels"],
            max_sequence_length=(shapes.get(CONNECTOR_NAMES["null_condition"]) or (8192,))[0],
        )
        transformer_model = DIMTransformer2DModel(**sana_config)
        vae_model = AutoencoderDC.from_config(AutoencoderDC.load_config(vae_folder))
        text_encoder_model = Qwen2_5_VLForConditionalGeneration._from_config(text_encoder_config, dtype=torch_dtype)
    text_encoder_model.config.architectures = [type(text_encoder_model).__name__]
    if (text_encoder_folder / "generation_config.json").is_file():
        text_encoder_model.generation_config = GenerationConfig.from_pretrained(text_encoder_folder)

    # 5. Where each parameter comes from, or one error of all that is wrong
    text_encoder_sources, twins = _plan_text_encoder(text_encoder_model, text_encoder_weights, text_encoder_prefix)
    sources = {
        "connector": released.plan(connector_model.state_dict(), lambda name: (CONNECTOR_NAMES[name], 0, 1)),
        "transformer": released.plan(transformer_model.state_dict(), _rename_transformer),
        "vae": vae_weights.plan(vae_model.state_dict(), lambda name: (vae_prefix + name, 0, 1)),
        "text_encoder": text_encoder_sources,
    }
    kind, channel_complaints = _get_kind(shapes, vae_model.config.latent_channels)
    complaints = {weights.place: weights.complaints() for weights in (released, text_encoder_weights, vae_weights)}
    complaints[released.place] += channel_complaints
    if any(complaints.values()):
        listed = [f"{place}:\n  " + "\n  ".join(lines) for place, lines in complaints.items() if lines]
        raise ValueError("These weights do not make a DIM model.\n" + "\n".join(listed))
    for first, second in twins:
        if not _is_same(first, second):
            raise ValueError(
                f"{second.name} differs from {first.name} in {second.file}, but the model of {text_encoder_folder} has"
                " only one of them (`tie_word_embeddings`)."
            )

    # 6. Write aside, then rename
    shards = {folder: _split(folder, planned, torch_dtype, max_shard_size) for folder, planned in sources.items()}
    num_parameters = sum(math.prod(source.shape) for planned in sources.values() for source in planned.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f"{output.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir()
        connector_model.save_config(aside / "connector")
        transformer_model.save_config(aside / "transformer")
        vae_model.save_config(aside / "vae")
        text_encoder_model.config.save_pretrained(aside / "text_encoder")
        text_encoder_model.generation_config.save_pretrained(aside / "text_encoder")
        processor.save_pretrained(aside / "processor")
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        )
        scheduler.save_config(aside / "scheduler")
        _write_json(
            aside / "model_index.json",
            {
                "_class_name": PIPELINES[kind],
                "_diffusers_version": diffusers_version,
                "default_guidance_scale": default_guidance_scale,
                "designer": "self" if designer == "self" or (designer == "default" and kind == "edit") else None,
                "text_encoder": ["transformers", type(text_encoder_model).__name__],
                "processor": [type(processor).__module__, type(processor).__name__],
                "connector": [type(connector_model).__module__, type(connector_model).__name__],
                "transformer": [type(transformer_model).__module__, type(transformer_model).__name__],
                "vae": ["diffusers", type(vae_model).__name__],
                "scheduler": ["diffusers", type(scheduler).__name__],
            },
        )
        save_code(aside)
        with tqdm(total=num_parameters * torch_dtype.itemsize, unit="B", unit_scale=True, desc="Converting") as bar:
            for folder, planned in sources.items():
                for filename, names in shards[folder].filename_to_tensors.items():
                    _write_shard(aside / folder / filename, {name: planned[name] for name in names}, torch_dtype, bar)
                if shards[folder].is_sharded:
                    _write_json(
                        aside / folder / f"{_get_weights_name(folder)}.index.json",
                        {"metadata": shards[folder].metadata, "weight_map": shards[folder].tensor_to_filename},
                    )
        if output.exists():
            output.rmdir()
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)

    converted = ConvertedCheckpoint(path=output, kind=kind, num_parameters=num_parameters)
    logger.info(
        "Converted %s to a %s of %.1fM parameters in %s", checkpoint, PIPELINES[kind], num_parameters / 1e6, output
    )
    return converted


def infer_transformer_config(
    shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    r"""
    The painter's configuration by the shapes of a released checkpoint's tensors: width, layers, channels, patch size,
    MLP ratio, caption channels and, by the size of `pos_embed`, `sample_size`. The rest is as in SANA1.5-1.6B. So are
    the heads, which shapes do not tell: 32 channels wide for self-attention and 112 for cross-attention.

    Of a size that several tensors tell the commonest value is taken, so that one misshapen tensor stands out.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`):
            The checkpoint's tensors by their names there, `decoder.model.*` and `projector.*`.
        given (`Mapping[str, Any]`, *optional*):
            Arguments of [`DIMTransformer2DModel`] that win over those found.

    Returns:
        `dict[str, Any]`: arguments of [`DIMTransformer2DModel`].

    Raises:
        ValueError: If the width cannot be divided into heads and `given` does not tell how.
    """
    given = dict(given or {})
    config: dict[str, Any] = dict(SANA_CONFIG)

    def get_size(pattern: str, axis: int) -> int | None:
        sizes = Counter(
            shape[axis]
            for name, shape in shapes.items()
            if re.fullmatch(pattern, name) and len(shape) > max(axis, 0) and shape[axis]
        )
        return sizes.most_common(1)[0][0] if sizes else None

    width = get_size(r"decoder\.model\.(blocks\.\d+|final_layer)\.scale_shift_table", -1)
    if width is not None:
        for heads, head_dim in (
            ("num_attention_heads", "attention_head_dim"),
            ("num_cross_attention_heads", "cross_attention_head_dim"),
        ):
            channels = given.get(head_dim) or config[head_dim]
            if given.get(heads):
                config[head_dim] = width // given[heads]
            elif width % channels:
                raise ValueError(
                    f"This checkpoint's width is {width}, which heads of {channels} channels do not divide: give"
                    f" `{heads}` in `transformer_config`."
                )
            else:
                config[heads] = width // channels
        config["cross_attention_dim"] = width
        if (hidden := get_size(r"decoder\.model\.blocks\.\d+\.mlp\.inverted_conv\.conv\.bias", 0)) is not None:
            config["mlp_ratio"] = hidden / 2 / width

    captions = r"projector\.\d+\.bias|decoder\.model\.y_embedder\.(y_embedding|y_proj\.fc1\.weight)"
    if (caption_channels := get_size(captions, -1)) is not None:
        config["caption_channels"] = caption_channels
    layers = [int(match[1]) for name in shapes if (match := re.match(r"decoder\.model\.blocks\.(\d+)\.", name))]
    if layers:
        config["num_layers"] = max(layers) + 1

    if (patch_size := get_size(re.escape(X_EMBEDDER), 3)) is not None:
        config["patch_size"] = patch_size
        config["in_channels"] = shapes[X_EMBEDDER][1]
    if (rows := get_size(r"decoder\.model\.final_layer\.linear\.(bias|weight)", 0)) is not None:
        config["out_channels"] = max(rows // config["patch_size"] ** 2, 1)
    positions = get_size(r"decoder\.model\.pos_embed", 1)
    if positions is not None and math.isqrt(positions) ** 2 == positions:
        config["sample_size"] = math.isqrt(positions) * config["patch_size"]
    return {**config, **given}


def _get_kind(
    shapes: Mapping[str, tuple[int, ...]], latent_channels: int
) -> tuple[Literal["edit", "t2i"] | None, list[str]]:
    """Tells editing from text-to-image by the channels in and out, with what is wrong with them, a line each."""
    patch_embedding, final_layer = shapes.get(X_EMBEDDER, ()), shapes.get(FINAL_LAYER, ())
    if len(patch_embedding) != 4 or len(final_layer) != 2 or 0 in patch_embedding:
        return None, []  # told as missing or of the wrong shape
    channels_in, channels_out = patch_embedding[1], final_layer[0] // patch_embedding[3] ** 2
    complaints = []
    if channels_out != latent_channels:
        complaints.append(
            f"wrong channels: {FINAL_LAYER} gives {channels_out}, but the VAE's latents have {latent_channels}"
        )
    kinds: dict[int, Literal["edit", "t2i"]] = {channels_out: "t2i", 2 * channels_out: "edit"}
    kind = kinds.get(channels_in)
    if kind is None:
        complaints.append(
            f"wrong channels: {X_EMBEDDER} takes {channels_in} and {FINAL_LAYER} gives {channels_out}; expected twice"
            " as many in as out (edit) or as many (text-to-image)"
        )
    return kind, complaints


def _rename_transformer(name: str) -> tuple[str, int, int]:
    """From diffusers' name of a parameter to SANA's in a released checkpoint, the part and the number of parts."""
    path, _, parameter = name.rpartition(".")
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.?(.*)", path):
        prefix = f"decoder.model.blocks.{match[1]}."
        module, part, parts = BLOCK_MODULES.get(match[2], (match[2], 0, 1))
    else:
        prefix = "decoder.model."
        module, part, parts = TRANSFORMER_MODULES.get(path, (path, 0, 1))
    return prefix + (f"{module}.{parameter}" if module else parameter), part, parts


def _plan_text_encoder(
    model: Qwen2_5_VLForConditionalGeneration, weights: Weights, prefix: str
) -> tuple[dict[str, Source], list[tuple[StoredTensor, StoredTensor]]]:
    """
    Plans the text encoder, from names of before transformers 4.52 (`model.layers`, `visual`) or of today. A head that
    the configuration ties to the embeddings is not written; stored, it stands in for them or has to be equal to them.
    The pairs that have to be are the second value.
    """
    old_names = not weights.holds(f"{prefix}model.language_model.")

    def rename(name: str) -> tuple[str, int, int]:
        if old_names:
            name = re.sub(r"^model\.language_model\.", "model.", re.sub(r"^model\.visual\.", "visual.", name))
        return prefix + name, 0, 1

    parameters = model.state_dict()
    if not model.config.tie_word_embeddings:
        return weights.plan(parameters, rename), []

    head = parameters.pop("lm_head.weight")
    embeddings_name, head_name = rename("model.language_model.embed_tokens.weight")[0], f"{prefix}lm_head.weight"
    if head_name not in weights.tensors:
        return weights.plan(parameters, rename), []
    if embeddings_name not in weights.tensors:
        return weights.plan(
            parameters, lambda name: (head_name, 0, 1) if rename(name)[0] == embeddings_name else rename(name)
        ), []
    weights.asked[head_name] = tuple(head.shape)
    return weights.plan(parameters, rename), [(weights.tensors[embeddings_name], weights.tensors[head_name])]


def _is_same(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored matrices hold the same numbers, a few rows at a time."""
    with safe_open(first.file, framework="pt") as file, safe_open(second.file, framework="pt") as other_file:
        rows, other_rows = file.get_slice(first.name), other_file.get_slice(second.name)
        return all(
            torch.equal(rows[start : start + 4096].float(), other_rows[start : start + 4096].float())
            for start in range(0, first.shape[0], 4096)
        )


def _resolve(source: str | os.PathLike, argument: str, patterns: list[str]) -> Path:
    """The local file or folder of that name, or the Hub repository's, with the files that match `patterns`."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not REPO_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"`{argument}`: there is no file or folder {source}.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except OSError as error:
        raise FileNotFoundError(
            f"`{argument}`: there is no file or folder {source}, and the Hub gives no repository of that name: {error}"
        ) from error


def _find_file(folder: Path, argument: str, *names: str) -> Path:
    """The first of the files of these names that is in the folder."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"`{argument}`: there is no {' or '.join(names)} in {folder}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold a JSON object, but holds a {type(content).__name__}.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_config(folder: Path, argument: str, key: str, expected: str) -> None:
    """Raises unless the folder's config.json is of the expected kind of model."""
    path = _find_file(folder, argument, "config.json")
    if (value := _read_json(path).get(key)) != expected:
        raise ValueError(f"`{argument}`: {path} has to be of a model with `{key}` {expected!r}, but has {value!r}.")


def _read_transformer_config(config: str | os.PathLike | Mapping[str, Any] | None) -> dict[str, Any]:
    """The given arguments of the transformer, from a JSON file or a mapping, without diffusers' own entries."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        path = Path(config).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`transformer_config`: there is no file {path}.")
        config = _read_json(path)
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    allowed = list(inspect.signature(DIMTransformer2DModel.__init__).parameters)[1:]
    if unknown := sorted(given.keys() - set(allowed)):
        raise ValueError(f"`transformer_config` holds {unknown}, but its keys have to be among {allowed}.")
    return given


def _read_headers(source: str | os.PathLike, argument: str, weights_name: str) -> Weights:
    """The tensors, by their headers, of a safetensors file or of a folder's or repository's file or shards."""
    stem = weights_name.removesuffix(".safetensors")
    place = _resolve(source, argument, [f"*{stem}{end}" for end in (".safetensors", "-*.safetensors", ".*.json")])
    files = [place]
    if place.is_dir():
        index_name = f"{weights_name}.index.json"
        folders = [place, *sorted(path for path in place.iterdir() if path.is_dir())]
        found = [
            folder / name for folder in folders for name in (weights_name, index_name) if (folder / name).is_file()
        ]
        # A folder's own file comes before its sub-folders', and a whole file before shards, as in transformers.
        found = [path for path in found if path.parent == place][:1] or found
        if not found:
            raise FileNotFoundError(f"`{argument}`: there is no {weights_name} or {index_name} in {place}.")
        if len(found) > 1:
            raise ValueError(f"`{argument}`: {place} holds several checkpoints, give one: {[str(p) for p in found]}.")
        files = found
        if found[0].name == index_name:
            weight_map = _read_json(found[0]).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{found[0]} has no `weight_map` of tensors to files.")
            files = [found[0].parent / name for name in sorted(set(weight_map.values()))]
            if absent := [path.name for path in files if not path.is_file()]:
                raise FileNotFoundError(f"`{argument}`: {found[0]} names files that are not there: {absent}.")

    tensors = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                for name in names:
                    header = file.get_slice(name)
                    tensors[name] = StoredTensor(path, name, tuple(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    return Weights(place, tensors)


def _get_weights_name(folder: str) -> str:
    return TRANSFORMERS_WEIGHTS if folder == "text_encoder" else DIFFUSERS_WEIGHTS


def _split(folder: str, sources: dict[str, Source], dtype: torch.dtype, max_shard_size: int | str) -> StateDictSplit:
    """Which parameters go into which file of the component's folder."""
    parameters = {name: torch.empty(source.shape, dtype=dtype, device="meta") for name, source in sources.items()}
    pattern = _get_weights_name(folder).replace(".safetensors", "{suffix}.safetensors")
    return split_torch_state_dict_into_shards(parameters, filename_pattern=pattern, max_shard_size=max_shard_size)


def _write_shard(path: Path, sources: dict[str, Source], dtype: torch.dtype, bar: tqdm) -> None:
    """Reads parameters and writes them to one file; all their memory is free again on return."""
    shard = {}
    for name, source in sources.items():
        shard[name] = source.read(dtype)
        bar.update(shard[name].nbytes)
    save_file(shard, path, metadata={"format": "pt"})

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
"""Writes the painter's weights, quantised, into the GGUF files that diffusers reads."""

import os

import torch
from torch import nn

from ..models import DIMTransformer2DModel


GGUF_QUANTIZATIONS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def save_gguf(transformer: DIMTransformer2DModel, path: str | os.PathLike[str], quantization: str = "Q8_0") -> None:
    r"""
    Writes a transformer into a GGUF file under diffusers' names, for `DIMTransformer2DModel.from_single_file`. Needs
    the package `gguf`.

    The weights of linear layers whose width is a multiple of 32 are quantised, in blocks of 32 numbers. Convolutions,
    which hold half of a released model's weights and which diffusers does not read quantised, become float16, and the
    rest float32. Kinds such as "Q4_K" are none of these: their blocks of 256 do not divide a width of 2240.

    Args:
        transformer ([`DIMTransformer2DModel`]):
            What to write, in any dtype, on any device.
        path (`str` or `os.PathLike`):
            The file, which is written over if it is there.
        quantization (`str`, defaults to `"Q8_0"`):
            "Q8_0", "Q5_1", "Q5_0", "Q4_1" or "Q4_0": the bits of a weight, and 1 where a block has an offset beside
            its scale.

    Raises:
        ValueError: If `quantization` is another, or if the transformer has adapters, fused projections or quantised
            weights.

    Examples:
        ```py
        >>> save_gguf(pipe.transformer, "DIM-4.6B-Edit-Q8_0.gguf")
        >>> transformer = DIMTransformer2DModel.from_single_file(
        ...     "DIM-4.6B-Edit-Q8_0.gguf",
        ...     config="DIM-4.6B-Edit",
        ...     subfolder="transformer",
        ...     quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        ...     dtype=torch.bfloat16,
        ... )
        >>> pipe = DIMEditPipeline.from_pretrained("DIM-4.6B-Edit", transformer=transformer, dtype=torch.bfloat16)
        ```
    """
    import gguf

    if quantization not in GGUF_QUANTIZATIONS:
        raise ValueError(f"`quantization` has to be one of {list(GGUF_QUANTIZATIONS)}, but is {quantization!r}.")
    kind = gguf.GGMLQuantizationType[quantization]
    block_size, _ = gguf.GGML_QUANT_SIZES[kind]
    with torch.device("meta"):
        plain = type(transformer).from_config(transformer.config)
    weights, modules = transformer.state_dict(), dict(transformer.named_modules())
    others = sorted(weights.keys() ^ plain.state_dict().keys())
    if others:
        raise ValueError(
            f"Only a plain transformer can be written, but this one differs in {others[:3]} and {len(others[3:])}"
            " more: unload adapters and unfuse projections first."
        )
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            raise ValueError(
                f"Only a plain transformer can be written, but `{name}` is quantised: its weight is a"
                f" {type(module.weight).__name__}."
            )

    writer = gguf.GGUFWriter(path, arch="sana")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, weight in weights.items():
        module = modules[name.rpartition(".")[0]]
        array = weight.float().cpu().numpy()
        is_weight = name.endswith(".weight")
        if is_weight and isinstance(module, nn.Linear) and module.in_features % block_size == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        elif is_weight and isinstance(module, nn.Conv2d):
            writer.add_tensor(name, array.astype("float16"))
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

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
"""Counted work: of SANA's transformer (https://huggingface.co/papers/2410.10629, section 2.2), and of training it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MatrixProduct:
    """A product of an input `(rows, inner)` and weights `(inner, outer)`."""

    rows: int
    inner: int
    outer: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class TransformerWork:
    """
    What one forward of a transformer has to compute; norms, activations and gates are left out.

    Args:
        embeddings (`list[MatrixProduct]`): Of what comes from outside, whose gradient nobody asks for.
        products (`list[MatrixProduct]`): All others that are in no block.
        blocks (`list[MatrixProduct]`): Those of the blocks; a depthwise convolution has an inner size of 9.
        attention (`int`): Multiplications and additions of the blocks' attention, where no weights are.
    """

    embeddings: list[MatrixProduct]
    products: list[MatrixProduct]
    blocks: list[MatrixProduct]
    attention: int

    @property
    def all_products(self) -> list[MatrixProduct]:
        """Every product of an input and weights."""
        return self.embeddings + self.products + self.blocks

    @property
    def block_flops(self) -> int:
        """Multiplications and additions in the blocks."""
        return sum(product.flops for product in self.blocks) + self.attention

    @property
    def flops(self) -> int:
        """Multiplications and additions in all."""
        return sum(product.flops for product in self.embeddings + self.products) + self.block_flops


def transformer_work(
    config: Mapping[str, Any],
    pictures: int,
    height: int,
    width: int,
    conditions: int,
    tokens: int,
    timesteps: int | None = None,
    guidance_branches: int = 1,
    condition_is_cached: bool = False,
) -> TransformerWork:
    r"""
    Counts one forward of a [`DIMTransformer2DModel`] from its configuration.

    Args:
        config (`Mapping`): The transformer's.
        pictures (`int`): Its batch, guidance branches counted.
        height, width (`int`): Of the latents.
        conditions (`int`): How many conditions are projected, or were.
        tokens (`int`): Of each condition.
        timesteps (`int`, *optional*): How many are embedded in this forward; one a picture by default.
        guidance_branches (`int`, defaults to 1): In how many each picture stands; they differ from the first
            cross-attention on.
        condition_is_cached (`bool`, defaults to `False`): Whether the condition's keys and values are there.
    """
    patch_area = config["patch_size"] ** 2
    positions = height * width // patch_area
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    cross_dim = config["num_cross_attention_heads"] * config["cross_attention_head_dim"]
    hidden = int(config["mlp_ratio"] * dim)
    rows, condition_rows = pictures * positions, conditions * tokens
    shared_rows = rows // guidance_branches
    timesteps = pictures if timesteps is None else timesteps

    embeddings = [MatrixProduct(shared_rows, config["in_channels"] * patch_area, dim)]
    products = [MatrixProduct(rows, dim, config["out_channels"] * patch_area)]
    if timesteps:
        embeddings += [MatrixProduct(timesteps, 256, dim)]
        products += [MatrixProduct(timesteps, dim, dim), MatrixProduct(timesteps, dim, 6 * dim)]
    if not condition_is_cached:
        products += [MatrixProduct(condition_rows, config["caption_channels"], dim)]
        products += [MatrixProduct(condition_rows, dim, dim)]

    block = [MatrixProduct(rows, dim, cross_dim), MatrixProduct(rows, cross_dim, dim)]
    block += [MatrixProduct(rows, dim, 2 * hidden), MatrixProduct(rows, 9, 2 * hidden)]
    block += [MatrixProduct(rows, hidden, dim)]
    if not condition_is_cached:
        block += [MatrixProduct(condition_rows, config["cross_attention_dim"], cross_dim)] * 2
    blocks = block * config["num_layers"]
    self_attention_rows = [shared_rows] + [rows] * (config["num_layers"] - 1)
    blocks += [MatrixProduct(rows, dim, dim) for rows in self_attention_rows for _ in range(4)]

    # To the state of linear attention and from it; and of queries to the condition's keys and values.
    attention = sum(2 * 2 * rows * dim * (config["attention_head_dim"] + 1) for rows in self_attention_rows)
    attention += config["num_layers"] * 2 * 2 * rows * tokens * cross_dim
    return TransformerWork(embeddings, products, blocks, attention)


def training_flops(
    transformer_config: Mapping[str, Any],
    connector_config: Mapping[str, Any],
    height: int,
    width: int,
    tokens: int,
    frozen_weights: bool = False,
    gradient_checkpointing: bool = False,
) -> int:
    r"""
    Multiplications and additions that training on one sample takes, forward and backward, of connector and
    transformer; not of the frozen models, norms and the optimizer. A product with weights counts three times: itself,
    its input's gradient and its weights'; attention three times, too, though fused kernels compute its scores once
    more.

    Args:
        transformer_config (`Mapping`):
            The transformer's configuration.
        connector_config (`Mapping`):
            The connector's.
        height, width (`int`):
            Of the latents.
        tokens (`int`):
            Of the sample's condition, padding counted.
        frozen_weights (`bool`, defaults to `False`):
            Whether only adapters are trained, as by LoRA: weights then have no gradients to be computed, and those of
            the adapters are too few to count.
        gradient_checkpointing (`bool`, defaults to `False`):
            Whether to count the blocks' second forward, which the device does but which is no part of the work: leave
            it out for MFU (https://huggingface.co/papers/2204.02311, appendix B).
    """
    work = transformer_work(transformer_config, 1, height, width, 1, tokens)
    hidden_size, channels = connector_config["hidden_size"], connector_config["caption_channels"]
    embeddings = [MatrixProduct(tokens, hidden_size, channels), *work.embeddings]
    products = [MatrixProduct(tokens, channels, channels), *work.products, *work.blocks]

    passes = 2 if frozen_weights else 3
    flops = sum((passes - 1) * product.flops for product in embeddings)
    flops += sum(passes * product.flops for product in products)
    flops += 3 * work.attention
    return flops + (work.block_flops if gradient_checkpointing else 0)

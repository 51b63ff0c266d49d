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
"""Optimizers by name."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch


OPTIMIZERS = ("adamw", "adamw8bit", "came", "prodigy")


def create_optimizer(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    name: str = "adamw",
    learning_rate: float = 2e-5,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    r"""
    An optimizer by name.

    Args:
        parameters (iterable of `torch.nn.Parameter` or of parameter groups):
            What to train.
        name (`str`, defaults to `"adamw"`):
            "adamw" is torch's, fused. "adamw8bit" is bitsandbytes', with moments in 8 bits. "came"
            is pytorch_optimizer's CAME (https://huggingface.co/papers/2307.02047), SANA's optimizer, with one moment
            in full and the second moments as a row and a column. "prodigy" is pytorch_optimizer's Prodigy
            (https://huggingface.co/papers/2306.06101), which finds its learning rate by itself, set as diffusers'
            DreamBooth scripts set it: bias correction and safeguarded warmup.
        learning_rate (`float`, defaults to 2e-5):
            Step size; Prodigy's is a factor, and wants 1.0.
        betas (`Sequence[float]`, defaults to `(0.9, 0.999)`):
            Decay of the first and of the second moment. CAME takes a third, that of its confidence; of two given, it
            adds SANA's 0.9999. Prodigy's third is the square root of the second.
        weight_decay (`float`, defaults to 0.0):
            Decoupled from the gradient.
        epsilon (`float`, defaults to 1e-8):
            Added to the root of the second moment. CAME does not use it: its own are 1e-30 and 1e-16, as in SANA.

    Raises:
        ValueError: If the name is unknown or a number makes no sense.
        ImportError: If the optimizer's package is not installed.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"The optimizer has to be one of {list(OPTIMIZERS)}, but is {name!r}.")
    if not learning_rate > 0:
        raise ValueError(f"The learning rate has to be above 0, but is {learning_rate}.")
    if not weight_decay >= 0 or not epsilon > 0:
        raise ValueError(
            f"Weight decay has to be 0 or more and epsilon above 0, but they are {weight_decay} and {epsilon}."
        )
    if len(betas) not in ((2, 3) if name == "came" else (2,)) or not all(0 <= beta < 1 for beta in betas):
        counts = "two or three" if name == "came" else "two"
        raise ValueError(f"The betas of {name} have to be {counts} numbers in [0, 1), but are {tuple(betas)}.")
    beta1, beta2, *rest = betas

    if name == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=(beta1, beta2),
            weight_decay=weight_decay,
            eps=epsilon,
            fused=True,
        )
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError("8-bit AdamW is bitsandbytes': `pip install bitsandbytes`.") from error
        return AdamW8bit(parameters, lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, eps=epsilon)
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ImportError(f"{name} is pytorch_optimizer's: `pip install pytorch-optimizer`.") from error
    if name == "came":
        from .came import PointwiseCAME

        beta3 = rest[0] if rest else 0.9999
        return PointwiseCAME(parameters, lr=learning_rate, betas=(beta1, beta2, beta3), weight_decay=weight_decay)
    return pytorch_optimizer.Prodigy(
        parameters,
        lr=learning_rate,
        betas=(beta1, beta2),
        weight_decay=weight_decay,
        eps=epsilon,
        bias_correction=True,
        safeguard_warmup=True,
    )

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
"""CAME for models whose weights are, for a good half, convolutions of 1x1."""

from typing import Any

import torch
from pytorch_optimizer import CAME


# How many weights are updated at once: few enough that what lies between does not add up to a second model.
WEIGHTS_AT_ONCE = 16


class PointwiseCAME(CAME):
    r"""
    CAME (https://huggingface.co/papers/2307.02047) of pytorch_optimizer, where a convolution of 1x1 is factored as the
    matrix that it is. CAME takes rows and columns from a weight's last two dimensions: of a 1x1 kernel they hold
    nothing, and its second moments would be kept four times in full, twice AdamW's memory, where one row and one
    column do.

    Args:
        params, **kwargs: As CAME's.
    """

    def init_group(self, group: dict[str, Any], **kwargs: Any) -> None:
        """Makes the state of weights that have a gradient and no state yet."""
        new = [p for p in group["params"] if p.grad is not None and len(self.state[p]) == 0]
        super().init_group(group, **kwargs)
        for p in new:
            if is_pointwise(p):
                state = self.state[p]
                for name in ("exp_avg_sq", "exp_avg_res"):
                    matrix = state["exp_avg"].flatten(1)
                    state[f"{name}_row"] = torch.zeros_like(matrix[:, 0])
                    state[f"{name}_col"] = torch.zeros_like(matrix[0])

    def _step_foreach(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        state: dict[str, list[torch.Tensor]],
    ) -> None:
        names = [name for name in state if name.startswith("exp_avg")]
        full = [params, grads, state["exp_avg"]]
        params, grads, moments = ([t.flatten(1) if is_pointwise(t) else t for t in tensors] for tensors in full)
        state = {**{name: state[name] for name in names}, "exp_avg": moments}
        for start in range(0, len(params), WEIGHTS_AT_ONCE):
            part = slice(start, start + WEIGHTS_AT_ONCE)
            super()._step_foreach(
                group, params[part], grads[part], {name: tensors[part] for name, tensors in state.items()}
            )


def is_pointwise(weight: torch.Tensor) -> bool:
    """Whether a weight is that of a convolution of 1x1."""
    return weight.ndim == 4 and weight.shape[2:] == (1, 1)

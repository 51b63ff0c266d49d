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

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import CAME


# How many weights are updated at once.
WEIGHTS_AT_ONCE = 16


class PointwiseCAME(CAME):
    r"""
    CAME (https://huggingface.co/papers/2307.02047) of pytorch_optimizer, where a convolution of 1x1 is factored as the
    matrix that it is, and weights may be sharded by FSDP2.

    CAME takes rows and columns from a weight's last two dimensions: of a 1x1 kernel they hold nothing, and its second
    moments would be kept four times in full, twice AdamW's memory, where one row and one column do.

    Args:
        params, **kwargs: As CAME's, without its `ams_bound`, `maximize` and `foreach`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. CAME's own keeps each weight's norm besides, which sharded weights cannot do and nothing reads."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            group["step"] = group.get("step", 0) + 1
            for factored in (False, True):
                params = [p for p in trained if self.get_options(p.shape) == factored]
                # Few at once, so that what lies between does not add up to a second model.
                for start in range(0, len(params), WEIGHTS_AT_ONCE):
                    self._step_part(group, params[start : start + WEIGHTS_AT_ONCE])
        return loss

    def _step_part(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        """A step of weights that are all factored or all not, as matrices where they are."""
        for p in params:
            if not self.state[p]:
                self.state[p] = self._new_state(p)
        states = [self.state[p] for p in params]
        state = {name: [each[name] for each in states] for name in states[0]}
        state["exp_avg"] = [as_matrix(moment) for moment in state["exp_avg"]]
        self._step_foreach(group, [as_matrix(p) for p in params], [as_matrix(p.grad) for p in params], state)

    def _new_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"exp_avg": torch.zeros_like(p)}
        if not self.get_options(p.shape):
            return {**state, "exp_avg_sq": torch.zeros_like(p)}
        matrix = as_matrix(state["exp_avg"])
        for name in ("exp_avg_sq", "exp_avg_res"):
            state[f"{name}_row"] = torch.zeros_like(matrix[..., 0])
            state[f"{name}_col"] = torch.zeros_like(matrix[..., 0, :])
        return state


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight, that of a convolution of 1x1 without its kernel's dimensions."""
    return weight.flatten(1) if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight

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
"""The painter's forwards of one call, for the pipelines' loop and for the modular blocks' one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..models import DIMTransformer2DModel
from ..models.transformer_dim import DIMDenoisingCache, is_compiled, tensor_version


Condition = tuple[torch.Tensor, torch.Tensor]


def pad_tokens(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Pads embeddings `(batch, tokens, ...)` or a mask `(batch, tokens)` with zeros to `length` tokens."""
    padding = length - tokens.shape[1]
    if padding == 0:
        return tokens
    return torch.cat([tokens, tokens.new_zeros(tokens.shape[0], padding, *tokens.shape[2:])], dim=1)


class _Branch(NamedTuple):
    """What the transformer is given for some conditions, and by what they are known again."""

    conditions: tuple[Condition, ...]
    state: tuple[list[Any], list[Any]]
    encoder_hidden_states: torch.Tensor
    encoder_attention_mask: torch.Tensor | None
    cache: DIMDenoisingCache | None

    def holds(self, conditions: tuple[Condition, ...], state: tuple[list[Any], list[Any]]) -> bool:
        """Whether it is, or ends with, that of these conditions in this state."""
        kept = self.conditions[-len(conditions) :]
        if len(kept) != len(conditions) or (self.state[0][-len(conditions) :], self.state[1]) != state:
            return False
        return all(given is held for new, old in zip(conditions, kept) for given, held in zip(new, old))


class DIMDenoiser:
    r"""
    Predicts the flow from latents to noise, step by step, under one condition or under the two of guidance side by
    side in one batch. What depends on the conditions and the timesteps alone is computed once.

    Args:
        transformer ([`DIMTransformer2DModel`]):
            The painter.
        timesteps (`torch.Tensor` of shape `(num_inference_steps,)`):
            All of the scheduler's timesteps.
        watch (`bool`, defaults to `False`):
            Whether conditions, weights or a LoRA's scale may be changed in place between steps. Conditions that are
            other tensors than before are seen without it.
    """

    def __init__(self, transformer: DIMTransformer2DModel, timesteps: torch.Tensor, watch: bool = False):
        self.transformer = transformer
        self.timesteps = timesteps * transformer.config.timestep_scale
        self.watch = watch
        # Rows of a product of another size round otherwise on a CPU, where embedding all at once gains nothing.
        self._embeds_at_once = timesteps.device.type != "cpu"
        self._is_compiled = is_compiled(transformer)
        # The first block treats both branches of guidance alike up to its cross-attention. diffusers' step caches need
        # the batch as it comes out, and compiled blocks would be compiled for the first one apart.
        self._repeats_input = self._is_compiled or transformer.is_cache_enabled
        self._num_predictions: int | None = None
        self._branches: dict[str, _Branch] = {}

    def start_step(self, num_predictions: int) -> None:
        """Says under how many conditions the next step predicts, before it does."""
        if num_predictions != self._num_predictions:
            # A step cache holds rows of both branches or of one, and perhaps those of a call that broke off.
            self.transformer._reset_stateful_cache()
            self._num_predictions = num_predictions

    def __call__(
        self,
        step: int,
        model_input: torch.Tensor,
        conditions: Sequence[Condition],
        attention_kwargs: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            step (`int`):
                Which of the timesteps.
            model_input (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                Noisy latents, an edit's source latents behind them along the channels.
            conditions (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
                One condition, or two, that to guide away from first: embeddings `(rows, tokens, caption_channels)` and
                their mask `(rows, tokens)`, a row for each picture or, which is faster, for each run of pictures of
                one prompt.
            attention_kwargs (`dict`, *optional*):
                Passed to the transformer.
            name (`str`, *optional*):
                Under which what is kept between steps is kept, "cond" and "cond_uncond" by default; one for each
                prediction of a step.

        Returns:
            `torch.Tensor` of shape `(conditions * batch_size, out_channels, height, width)`: the flow, float32.
        """
        conditions = tuple(conditions)
        guided = len(conditions) == 2
        name = name or ("cond_uncond" if guided else "cond")
        branch = self._get_branch(name, model_input.shape[0], conditions, attention_kwargs)
        cache = branch.cache
        fills_cache = cache is not None and not cache.is_filled

        timestep = self.timesteps[step : step + 1]
        if cache is None or not self._embeds_at_once:
            timestep = timestep.expand(model_input.shape[0] * len(conditions))
        if guided and self._repeats_input:
            model_input = torch.cat([model_input] * 2)
        with self.transformer.cache_context(name):
            flow = self.transformer(
                model_input.to(self.transformer.dtype),
                encoder_hidden_states=branch.encoder_hidden_states,
                timestep=timestep,
                encoder_attention_mask=branch.encoder_attention_mask,
                attention_kwargs=attention_kwargs,
                return_dict=False,
                denoising_cache=cache,
                guidance_branches=2 if guided and not self._repeats_input else 1,
            )[0].float()
        if fills_cache and self._is_compiled:
            cache.clone_tensors()
        return flow

    def _get_branch(
        self,
        name: str,
        batch_size: int,
        conditions: tuple[Condition, ...],
        attention_kwargs: dict[str, Any] | None,
    ) -> _Branch:
        """Condition, mask and cache for `batch_size` pictures: as kept, as a half of what is kept, or anew."""
        state: tuple[list[Any], list[Any]] = ([], [])
        if self.watch:
            versions = [tensor_version(embeds) for embeds, _ in conditions]
            state = (versions, self.transformer.condition_state(attention_kwargs))
        kept = self._branches.get(name)
        if kept is not None and len(kept.conditions) == len(conditions) and kept.holds(conditions, state):
            return kept

        pair = self._branches.get("cond_uncond")
        if name == "cond" and pair is not None and pair.cache is not None and pair.holds(conditions, state):
            mask = pair.encoder_attention_mask
            branch = _Branch(
                conditions,
                state,
                pair.encoder_hidden_states.chunk(2)[1],
                None if mask is None else mask.chunk(2)[1],
                pair.cache.second_half(),
            )
        else:
            branch = _Branch(conditions, state, *self._join(batch_size, conditions))
        self._branches[name] = branch
        return branch

    def _join(
        self, batch_size: int, conditions: tuple[Condition, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None, DIMDenoisingCache | None]:
        # As many rows and tokens on all sides: a callback may have put in others.
        rows = max(len(embeds) for embeds, _ in conditions)
        length = max(embeds.shape[1] for embeds, _ in conditions)
        encoder_hidden_states, encoder_attention_mask = (
            torch.cat([pad_tokens(part.repeat_interleave(rows // len(part), dim=0), length) for part in parts])
            for parts in zip(*conditions)
        )
        encoder_hidden_states = encoder_hidden_states.to(self.transformer.dtype)
        if self.transformer.splits_guidance:
            repeats = batch_size // rows
            encoder_hidden_states = encoder_hidden_states.repeat_interleave(repeats, dim=0)
            return encoder_hidden_states, encoder_attention_mask.repeat_interleave(repeats, dim=0), None
        if encoder_attention_mask.all():
            # Most fused attention takes no mask, and none is needed where nothing is padded.
            encoder_attention_mask = None
        cache = DIMDenoisingCache(self.timesteps if self._embeds_at_once else None)
        return encoder_hidden_states, encoder_attention_mask, cache

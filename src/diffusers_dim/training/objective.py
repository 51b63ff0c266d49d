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
"""The flow-matching objective of SANA and DIM (https://huggingface.co/papers/2410.10629, section 3.2)."""

import math

import numpy as np
import torch

from ..models import DIMConnector, DIMTransformer2DModel


def sample_timesteps(
    batch_size: int, generator: torch.Generator | None = None, num_train_timesteps: int = 1000
) -> torch.Tensor:
    """
    Logit-normal timesteps: `floor(num_train_timesteps * sigmoid(u))`, u from a standard normal distribution.

    Args:
        batch_size (`int`): How many.
        generator (`torch.Generator`, *optional*): Source of randomness; the result lies on its device.
        num_train_timesteps (`int`, defaults to 1000): Number of timesteps.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`, in [0, num_train_timesteps).
    """
    u = torch.randn(batch_size, generator=generator, device=generator.device if generator is not None else None)
    return (num_train_timesteps * torch.sigmoid(u)).long().clamp(max=num_train_timesteps - 1)


def sample_noise(
    positions: list[int],
    shape: tuple[int, ...],
    seed: int,
    conditioning_dropout_prob: float = 0.0,
    num_train_timesteps: int = 1000,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    All that is random in a training step, each sample's from a generator of its own: it does not depend on how a batch
    is split over processes and micro-batches, nor on what came before a resumed step.

    Args:
        positions (`list[int]`): Each sample's number in the run's order.
        shape (`tuple[int, ...]`): Of one sample's latents.
        seed (`int`): The run's seed.
        conditioning_dropout_prob (`float`, defaults to 0.0): How often a condition is to be dropped.
        num_train_timesteps (`int`, defaults to 1000): Number of timesteps.

    Returns:
        On the CPU: standard normal noise `(len(positions), *shape)`, timesteps as [`sample_timesteps`] gives them, and
        which conditions to drop.
    """
    noise, timesteps, dropped = [], [], []
    for position in positions:
        state = int(np.random.SeedSequence((seed, position)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(state >> 1)
        noise.append(torch.randn(shape, generator=generator))
        timesteps.append(sample_timesteps(1, generator, num_train_timesteps))
        dropped.append(torch.rand(1, generator=generator) < conditioning_dropout_prob)
    return torch.stack(noise), torch.cat(timesteps), torch.cat(dropped)


def get_sigmas(timesteps: torch.Tensor, flow_shift: float = 3.0, num_train_timesteps: int = 1000) -> torch.Tensor:
    """
    Shifted noise levels `sigma = shift * s / (1 + (shift - 1) * s)` with `s = t / num_train_timesteps`, in float64,
    whose rounding the integer timesteps that the model is given depend on.

    Args:
        timesteps (`torch.LongTensor` of shape `(batch_size,)`): Timesteps as sampled.
        flow_shift (`float`, defaults to 3.0): The scheduler's `flow_shift`.
        num_train_timesteps (`int`, defaults to 1000): Number of timesteps.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float64, in [0, 1).
    """
    s = timesteps.to(torch.float64) / num_train_timesteps
    return flow_shift * s / (1 + (flow_shift - 1) * s)


def loss_weights(
    timesteps: torch.Tensor,
    scheme: str = "none",
    flow_shift: float = 3.0,
    snr_gamma: float = 5.0,
    num_train_timesteps: int = 1000,
) -> torch.Tensor:
    r"""
    What a sample's loss counts at its noise level `sigma`, the shifted one of [`get_sigmas`]:

    - "none": 1, as SANA and DIM train;
    - "sigma_sqrt": `1 / sigma^2`, and "cosmap": `2 / (pi * (1 - 2 * sigma + 2 * sigma^2))`, as in Stable Diffusion 3
      (https://huggingface.co/papers/2403.03206, section 3.1; diffusers' `compute_loss_weighting_for_sd3`);
    - "min_snr": `min((1 - sigma)^2, snr_gamma * sigma^2)`. Min-SNR (https://huggingface.co/papers/2303.09556, section
      3.4) counts the error of a predicted picture `min(SNR, snr_gamma)`. Here `x_t = (1 - sigma) * x_0 + sigma *
      noise`, so `SNR = ((1 - sigma) / sigma)^2`; and of a predicted flow `v = noise - x_0` follows the picture `x_0 =
      x_t - sigma * v`, whose squared error is `sigma^2` times the flow's. Their product is the weight. It is at most
      `snr_gamma / (1 + sqrt(snr_gamma))^2`, about 0.48, at `sigma = 1 / (1 + sqrt(snr_gamma))`, so a learning rate
      that was found without it may be low.

    Args:
        timesteps (`torch.LongTensor` of shape `(batch_size,)`):
            As [`sample_timesteps`] gives them; 0 counts as 1, where "sigma_sqrt" would be infinite.
        scheme (`str`, defaults to `"none"`):
            One of the above.
        flow_shift (`float`, defaults to 3.0):
            The scheduler's `flow_shift`.
        snr_gamma (`float`, defaults to 5.0):
            The signal-to-noise ratio above which "min_snr" counts no higher.
        num_train_timesteps (`int`, defaults to 1000):
            Number of timesteps.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32.

    Raises:
        ValueError: If `scheme` is unknown or `snr_gamma` not positive.
    """
    if not snr_gamma > 0:
        raise ValueError(f"`snr_gamma` has to be above 0, but is {snr_gamma}.")
    sigmas = get_sigmas(timesteps.clamp(min=1), flow_shift, num_train_timesteps)
    if scheme == "none":
        weights = torch.ones_like(sigmas)
    elif scheme == "sigma_sqrt":
        weights = sigmas**-2
    elif scheme == "cosmap":
        weights = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    elif scheme == "min_snr":
        weights = torch.minimum((1 - sigmas) ** 2, snr_gamma * sigmas**2)
    else:
        schemes = ["none", "sigma_sqrt", "cosmap", "min_snr"]
        raise ValueError(f"The loss weighting has to be one of {schemes}, but is {scheme!r}.")
    return weights.float()


def flow_matching_loss(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    image_latents: torch.Tensor | None = None,
    flow_shift: float = 3.0,
    num_train_timesteps: int = 1000,
) -> torch.Tensor:
    r"""
    Mean squared error between the transformer's prediction and the flow `noise - latents`, at `x_t = (1 - sigma) *
    latents + sigma * noise`. The transformer is given `int(num_train_timesteps * sigma)` as its timestep.

    Args:
        transformer (`torch.nn.Module`):
            A [`DIMTransformer2DModel`], wrapped for distributed training or not.
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`):
            The target picture's scaled latents.
        noise (`torch.Tensor` of the shape of `latents`):
            Standard normal noise.
        timesteps (`torch.LongTensor` of shape `(batch_size,)`):
            As [`sample_timesteps`] gives them.
        encoder_hidden_states (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`):
            Connector outputs, or null rows where the condition is dropped.
        encoder_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
            1 where there is a token; all by default.
        image_latents (`torch.Tensor` of the shape of `latents`, *optional*):
            For an edit: the source picture's scaled latents.
        flow_shift (`float`, defaults to 3.0):
            The scheduler's `flow_shift`.
        num_train_timesteps (`int`, defaults to 1000):
            Number of timesteps.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32: one loss a sample.
    """
    sigmas = get_sigmas(timesteps, flow_shift, num_train_timesteps)
    model_timesteps = (num_train_timesteps * sigmas).long()
    sigmas = sigmas.to(device=latents.device, dtype=latents.dtype)[:, None, None, None]
    model_input = (1 - sigmas) * latents + sigmas * noise
    if image_latents is not None:
        model_input = torch.cat([model_input, image_latents], dim=1)
    prediction = transformer(
        model_input,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
        timestep=model_timesteps.to(latents.device),
        return_dict=False,
    )[0]
    return (prediction.float() - (noise - latents).float()).square().mean(dim=(1, 2, 3))


def drop_condition(prompt_embeds: torch.Tensor, null_embeds: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """
    Replaces whole conditions by the null condition's first rows, under the same mask (classifier-free guidance,
    https://huggingface.co/papers/2207.12598).

    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`): Connector outputs.
        null_embeds (`torch.Tensor` of shape `(tokens, caption_channels)`): The null condition's first rows.
        dropped (`torch.BoolTensor` of shape `(batch_size,)`): Which conditions to replace.
    """
    return torch.where(dropped[:, None, None], null_embeds.to(prompt_embeds.dtype), prompt_embeds)


class DIMTrainingModel(torch.nn.Module):
    r"""
    Connector and transformer as one module with the objective in its `forward`, so that whatever distributes or
    compiles a training wraps one thing.

    Args:
        connector ([`DIMConnector`]): With the learned null condition.
        transformer ([`DIMTransformer2DModel`]): The painter.
        flow_shift (`float`, defaults to 3.0): The scheduler's `flow_shift`.
    """

    def __init__(self, connector: DIMConnector, transformer: DIMTransformer2DModel, flow_shift: float = 3.0):
        super().__init__()
        self.connector = connector
        self.transformer = transformer
        self.flow_shift = flow_shift

    def forward(
        self,
        hidden_states: torch.Tensor,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        dropped: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Losses of shape `(batch_size,)` of a batch of vision-language hidden states `(batch_size, tokens, hidden_size)`
        with their mask `(batch_size, tokens)`, true where there is a token, all by default; `dropped` `(batch_size,)`
        marks the conditions to replace by the null condition; the rest as in [`flow_matching_loss`].
        """
        prompt_embeds, null_embeds = self.connector(hidden_states, hidden_states.shape[1], return_dict=False)
        return flow_matching_loss(
            self.transformer,
            latents,
            noise,
            timesteps,
            drop_condition(prompt_embeds, null_embeds, dropped),
            attention_mask,
            image_latents,
            self.flow_shift,
        )

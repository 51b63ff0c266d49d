import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from diffusers_dim.training import get_sigmas, loss_weights


TIMESTEPS = torch.tensor([1, 40, 250, 500, 750, 999])


def test_without_weighting_all_count_one():
    assert torch.equal(loss_weights(torch.arange(1000), "none"), torch.ones(1000))


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0])
def test_weights_of_stable_diffusion_3_are_diffusers(scheme, flow_shift):
    expected = compute_loss_weighting_for_sd3(scheme, get_sigmas(TIMESTEPS, flow_shift)).float()
    torch.testing.assert_close(loss_weights(TIMESTEPS, scheme, flow_shift), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("snr_gamma", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_the_picture_by_the_clamped_ratio(snr_gamma):
    generator = torch.Generator().manual_seed(0)
    latents, noise, error = torch.randn(3, len(TIMESTEPS), 20, generator=generator, dtype=torch.float64)
    sigmas = get_sigmas(TIMESTEPS, 3.0)[:, None]
    noisy = (1 - sigmas) * latents + sigmas * noise
    flow = noise - latents + error
    snr = ((1 - sigmas) / sigmas).square().squeeze(1)

    picture_loss = (noisy - sigmas * flow - latents).square().mean(1)
    flow_loss = error.square().mean(1)
    weights = loss_weights(TIMESTEPS, "min_snr", 3.0, snr_gamma)
    torch.testing.assert_close(weights * flow_loss, snr.clamp(max=snr_gamma) * picture_loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "min_snr"])
def test_weights_are_finite_positive_and_float32_at_every_timestep(scheme):
    weights = loss_weights(torch.arange(1000), scheme)
    assert weights.dtype == torch.float32 and weights.shape == (1000,)
    assert weights.isfinite().all() and (weights > 0).all()


def test_greatest_min_snr_weight_is_where_it_is_said_to_be():
    weights = loss_weights(torch.arange(1000), "min_snr", snr_gamma=5.0)
    assert weights.max() == pytest.approx(5 / (1 + 5**0.5) ** 2, rel=1e-2)
    assert get_sigmas(weights.argmax()) == pytest.approx(1 / (1 + 5**0.5), abs=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "snr"}, r"one of \['none', 'sigma_sqrt', 'cosmap', 'min_snr'\], but is 'snr'"),
        ({"scheme": "min_snr", "snr_gamma": 0.0}, "`snr_gamma` has to be above 0, but is 0.0"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        loss_weights(TIMESTEPS, **settings)

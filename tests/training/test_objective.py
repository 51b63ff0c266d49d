import pytest
import torch

from diffusers_dim import DIMConnector, DIMTransformer2DModel
from diffusers_dim.training import (
    DIMTrainingModel,
    drop_condition,
    flow_matching_loss,
    get_sigmas,
    sample_noise,
    sample_timesteps,
)


@pytest.fixture(scope="module")
def models(edit_folder):
    connector = DIMConnector.from_pretrained(edit_folder, subfolder="connector")
    return connector, DIMTransformer2DModel.from_pretrained(edit_folder, subfolder="transformer")


@torch.no_grad()
def test_losses_match_the_published_training_code(models, golden_edit):
    golden = golden_edit.tensors
    for timestep, expected in zip(golden["train_t"], golden["train_loss"]):
        loss = flow_matching_loss(
            models[1],
            golden["train_target"],
            golden["train_noise"],
            timestep[None],
            golden["cond"],
            image_latents=golden["z_src"],
        )
        torch.testing.assert_close(loss[0], expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_training_model_goes_from_hidden_states_to_the_same_losses(models, golden_edit):
    golden = golden_edit.tensors
    hidden_states = golden["hidden"][golden["user_mask"]][None]
    count = len(golden["train_t"])
    losses = DIMTrainingModel(*models)(
        hidden_states.expand(count, -1, -1),
        golden["train_target"].expand(count, -1, -1, -1),
        golden["train_noise"].expand(count, -1, -1, -1),
        golden["train_t"],
        torch.zeros(count, dtype=torch.bool),
        image_latents=golden["z_src"].expand(count, -1, -1, -1),
    )
    torch.testing.assert_close(losses, golden["train_loss"], rtol=1e-5, atol=0)


@torch.no_grad()
def test_padded_batch_has_the_losses_of_its_samples_alone(models, golden_edit):
    golden = golden_edit.tensors
    model = DIMTrainingModel(*models)
    short, long = golden["hidden"][0, :5], golden["hidden"][0, :17]
    rest = (golden["train_target"], golden["train_noise"], golden["train_t"][1:2], torch.zeros(1, dtype=torch.bool))
    alone = [model(row[None], *rest, image_latents=golden["z_src"]) for row in (short, long)]
    together = model(
        torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True),
        *(tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in rest),
        attention_mask=torch.arange(17) < torch.tensor([[5], [17]]),
        image_latents=golden["z_src"].repeat(2, 1, 1, 1),
    )
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=0)


def test_dropped_conditions_become_null_rows():
    prompt_embeds, null_embeds = torch.randn(3, 4, 8), torch.randn(4, 8)
    result = drop_condition(prompt_embeds, null_embeds, torch.tensor([False, True, False]))
    assert torch.equal(result[1], null_embeds)
    assert torch.equal(result[[0, 2]], prompt_embeds[[0, 2]])


def test_null_condition_learns_only_from_dropped_conditions(models, golden_edit):
    golden = golden_edit.tensors
    model = DIMTrainingModel(*models)
    batch = (golden["hidden"], golden["train_target"], golden["train_noise"], golden["train_t"][1:2])
    for dropped in (False, True):
        model.zero_grad()
        model(*batch, torch.tensor([dropped]), image_latents=golden["z_src"]).mean().backward()
        null_grad = model.connector.null_condition.grad
        length = golden["hidden"].shape[1]
        assert bool(null_grad[:length].abs().sum() > 0) is dropped
        assert bool(model.connector.linear_1.weight.grad.abs().sum() > 0) is not dropped
        assert null_grad[length:].abs().sum() == 0


def test_sigmas_are_shifted():
    timesteps = torch.tensor([0, 250, 500, 999])
    expected = 3 * (timesteps / 1000) / (1 + 2 * timesteps / 1000)
    torch.testing.assert_close(get_sigmas(timesteps).float(), expected)


def test_timesteps_are_logit_normal_and_follow_their_generator():
    timesteps = sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 0 and timesteps.max() < 1000
    # The median of sigmoid(N(0, 1)) is one half; its quartiles are sigmoid(+-0.6745).
    quartiles = timesteps.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)) / 1000
    torch.testing.assert_close(quartiles, torch.tensor([0.3375, 0.5, 0.6625], dtype=torch.float64), atol=0.01, rtol=0)
    assert torch.equal(timesteps, sample_timesteps(20_000, torch.Generator().manual_seed(0)))


def test_noise_of_a_sample_depends_on_its_position_and_the_seed_alone():
    together = sample_noise([3, 4, 900_000_000_000], (4, 2, 2), seed=5, conditioning_dropout_prob=0.5)
    for index, position in enumerate((3, 4, 900_000_000_000)):
        alone = sample_noise([position], (4, 2, 2), seed=5, conditioning_dropout_prob=0.5)
        for whole, part in zip(together, alone):
            assert torch.equal(whole[index : index + 1], part)
    others = sample_noise([3, 4, 900_000_000_000], (4, 2, 2), seed=6)
    assert not torch.equal(together[0], others[0])
    assert not torch.equal(together[0][0], together[0][1])


def test_noise_is_standard_normal_and_conditions_are_dropped_as_often_as_asked():
    noise, timesteps, dropped = sample_noise(list(range(4000)), (16,), seed=0, conditioning_dropout_prob=0.1)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert timesteps.shape == dropped.shape == (4000,)
    assert 0.08 < dropped.float().mean() < 0.12
    # Logit-normal: half of them below 500, and the middle half between sigmoid(-0.6745) and sigmoid(0.6745).
    assert 0.47 < (timesteps < 500).float().mean() < 0.53
    assert 0.47 < ((timesteps > 337) & (timesteps < 662)).float().mean() < 0.53

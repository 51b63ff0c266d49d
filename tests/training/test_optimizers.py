import multiprocessing
import sys

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffusers_dim import DIMConnector, DIMTransformer2DModel
from diffusers_dim.training import DIMTrainingModel, create_optimizer
from diffusers_dim.training.came import WEIGHTS_AT_ONCE


NAMES = ["adamw", "adamw8bit", "came", "prodigy"]
LEARNING_RATES = {"adamw": 1e-3, "adamw8bit": 1e-3, "came": 1e-3, "prodigy": 1.0}


@pytest.fixture(params=NAMES)
def name(request):
    if request.param == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return request.param


class Training:
    """The golden painter on one batch of two samples, the condition of the second dropped."""

    def __init__(self, edit_folder, golden, name):
        connector = DIMConnector.from_pretrained(edit_folder, subfolder="connector")
        transformer = DIMTransformer2DModel.from_pretrained(edit_folder, subfolder="transformer")
        model = DIMTrainingModel(connector, transformer).train()
        self.accelerator = Accelerator(cpu=True)
        optimizer = create_optimizer(model.parameters(), name, LEARNING_RATES[name])
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.batch = {
            "hidden_states": golden["hidden"].expand(2, -1, -1),
            "latents": golden["train_target"].expand(2, -1, -1, -1),
            "noise": golden["train_noise"].expand(2, -1, -1, -1),
            "image_latents": golden["z_src"].expand(2, -1, -1, -1),
            "timesteps": torch.tensor([300, 700]),
            "dropped": torch.tensor([False, True]),
        }

    def step(self) -> float:
        loss = self.model(**self.batch).mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def test_painter_learns(edit_folder, golden_edit, name):
    training = Training(edit_folder, golden_edit.tensors, name)
    before = {key: value.clone() for key, value in training.model.named_parameters()}
    # Prodigy begins with a step size of a millionth, and finds its own by and by.
    first, *_, last = [training.step() for _ in range(90 if name == "prodigy" else 30)]
    assert last < 0.7 * first
    # Of all kinds: vectors, matrices, convolutions of 1x1, depthwise convolutions, the null condition.
    assert [key for key, value in training.model.named_parameters() if torch.equal(value, before[key])] == []


def test_resumed_training_goes_on_as_the_unbroken_one(edit_folder, golden_edit, name, tmp_path):
    training = Training(edit_folder, golden_edit.tensors, name)
    for _ in range(3):
        training.step()
    training.accelerator.save_state(tmp_path)
    expected = [training.step() for _ in range(3)]

    resumed = Training(edit_folder, golden_edit.tensors, name)
    resumed.accelerator.load_state(tmp_path)
    assert [resumed.step() for _ in range(3)] == expected
    for ours, theirs in zip(resumed.model.parameters(), training.model.parameters()):
        assert torch.equal(ours, theirs)


def test_came_is_the_papers_algorithm():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))
    optimizer = create_optimizer([matrix, vector], "came", 1e-2, weight_decay=0.1)
    expected_matrix, expected_vector = matrix.detach().double(), vector.detach().double()
    beta1, beta2, beta3 = 0.9, 0.999, 0.9999
    moments = {key: 0.0 for key in ("row", "column", "m", "res_row", "res_column", "v", "vector_m")}

    def decay(key, beta, value):
        moments[key] = beta * moments[key] + (1 - beta) * value
        return moments[key]

    def clip(update):
        return update / max(1.0, update.square().mean().sqrt().item())

    for _ in range(3):
        matrix.grad, vector.grad = torch.randn_like(matrix), torch.randn_like(vector)
        optimizer.step()

        gradient = matrix.grad.double()
        row = decay("row", beta2, (gradient**2 + 1e-30).mean(1))
        column = decay("column", beta2, (gradient**2 + 1e-30).mean(0))
        update = clip(gradient / (row[:, None] * column / row.mean()).sqrt())
        moment = decay("m", beta1, update)
        instability = (update - moment) ** 2 + 1e-16
        row = decay("res_row", beta3, instability.mean(1))
        column = decay("res_column", beta3, instability.mean(0))
        expected_matrix *= 1 - 1e-2 * 0.1
        expected_matrix -= 1e-2 * moment / (row[:, None] * column / row.mean()).sqrt()

        gradient = vector.grad.double()
        update = clip(gradient / decay("v", beta2, gradient**2 + 1e-30).sqrt())
        expected_vector *= 1 - 1e-2 * 0.1
        expected_vector -= 1e-2 * decay("vector_m", beta1, update)
    torch.testing.assert_close(matrix.detach().double(), expected_matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vector.detach().double(), expected_vector, rtol=1e-5, atol=1e-6)


def test_came_treats_a_convolution_of_1x1_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(32, 48))
    kernel = nn.Parameter(matrix.detach().clone()[..., None, None])
    optimizers = [create_optimizer([weight], "came", 1e-2) for weight in (matrix, kernel)]
    for _ in range(3):
        matrix.grad = torch.randn_like(matrix)
        kernel.grad = matrix.grad[..., None, None]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.detach()[..., 0, 0], matrix.detach())
    numbers = [sum(t.numel() for t in optimizer.state_dict()["state"][0].values()) for optimizer in optimizers]
    assert numbers[0] == numbers[1] == 32 * 48 + 2 * (32 + 48)


def test_came_updates_many_weights_as_it_does_each_alone():
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (6, 4, 1, 1), (4, 1, 3, 3)] * WEIGHTS_AT_ONCE
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizers = [create_optimizer(weights, "came", 1e-2), *(create_optimizer([w], "came", 1e-2) for w in alone)]
    for weight, copy in zip(weights, alone):
        weight.grad = torch.randn_like(weight)
        copy.grad = weight.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, alone))


def train_sharded_and_whole(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting_place", rank=rank, world_size=2)
    weights = []
    for sharded in (False, True):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1)]
        model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(24, 5))
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = create_optimizer(model.parameters(), "came", 1e-2)
        for _ in range(5):
            model(torch.randn(4, 6, 4, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.full_tensor() if sharded else p for p in model.parameters()])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    torch.distributed.destroy_process_group()


def test_came_does_with_weights_sharded_by_fsdp2_what_it_does_with_whole_ones(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train_sharded_and_whole, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize(
    ("name", "betas", "expected"),
    [
        ("adamw", (0.8, 0.9), (0.8, 0.9)),
        ("prodigy", (0.8, 0.9), (0.8, 0.9)),
        ("came", (0.8, 0.9), (0.8, 0.9, 0.9999)),
        ("came", [0.8, 0.9, 0.95], (0.8, 0.9, 0.95)),
    ],
)
def test_settings_reach_the_optimizer(name, betas, expected):
    weight = nn.Parameter(torch.zeros(2))
    group = create_optimizer([weight], name, 0.5, betas=betas, weight_decay=0.25).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, expected, 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sgd"}, r"one of \['adamw', 'adamw8bit', 'came', 'prodigy'\], but is 'sgd'"),
        ({"learning_rate": 0.0}, "above 0, but is 0.0"),
        ({"weight_decay": -0.1}, "are -0.1 and"),
        ({"epsilon": 0.0}, "and 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas of adamw have to be two numbers in \[0, 1\), but are \(0.9, 1.0\)"),
        ({"betas": (0.9, 0.99, 0.999)}, "two numbers"),
        ({"name": "came", "betas": (0.9,)}, "two or three numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer([nn.Parameter(torch.zeros(2))], **settings)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("adamw8bit", "bitsandbytes.optim", "bitsandbytes"),
        ("came", "pytorch_optimizer", "pytorch-optimizer"),
        ("prodigy", "pytorch_optimizer", "pytorch-optimizer"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        create_optimizer([nn.Parameter(torch.zeros(2))], name)

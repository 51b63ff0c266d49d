import pytest
import torch
from accelerate import Accelerator

from diffusers_dim.training.checkpoints import (
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    save_checkpoint,
)


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))
    return accelerator


def test_latest_is_the_highest_step_not_the_last_name(accelerator, tmp_path):
    for step in (9, 100, 20):
        save_checkpoint(accelerator, tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def test_a_save_that_fails_leaves_no_checkpoint(accelerator, tmp_path, monkeypatch):
    def fail(path):
        (tmp_path / "saving-5").mkdir()
        (tmp_path / "saving-5" / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "save_state", fail)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(accelerator, tmp_path, 5)
    assert latest_checkpoint(tmp_path) is None

    save_checkpoint(accelerator, tmp_path, 5)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert not (tmp_path / "saving-5").exists()


@pytest.mark.parametrize(("limit", "left"), [(None, 3), (5, 3), (2, 2), (1, 1)])
def test_prune_keeps_the_newest(tmp_path, limit, left):
    for step in (1, 2, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune_checkpoints(tmp_path, limit)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-30"][
        -left:
    ]

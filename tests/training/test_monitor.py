import json
import logging
import multiprocessing
import os
import sys

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses import FakeTensorMode

from diffusers_dim.training import TrainingMonitor, draw_curves
from diffusers_dim.training.monitor import peak_tflops


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def read_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def parts(log) -> dict[str, float]:
    return {key: value for key, value in log.items() if key.startswith("loss/")}


def test_losses_are_means_over_samples_in_all_and_by_timestep(accelerator, tmp_path):
    monitor = TrainingMonitor(accelerator, tmp_path)
    monitor.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 99, 100]))
    monitor.add(torch.tensor([8.0]), torch.tensor([999]))
    log = monitor.log(1, 1e-3)
    assert log["loss"] == 17 / 4
    assert parts(log) == {"loss/0.0-0.1": 2.0, "loss/0.1-0.2": 5.0, "loss/0.9-1.0": 8.0}


def test_number_of_parts_can_be_chosen(accelerator, tmp_path):
    monitor = TrainingMonitor(accelerator, tmp_path, num_buckets=4)
    monitor.add(torch.tensor([1.0, 2.0]), torch.tensor([249, 250]))
    assert parts(monitor.log(1, 1e-3)) == {"loss/0.0-0.25": 1.0, "loss/0.25-0.5": 2.0}


def test_a_placeholder_counts_for_nothing(accelerator, tmp_path):
    monitor = TrainingMonitor(accelerator, tmp_path, flops_per_sample=lambda height, width, tokens: 10**12)
    losses, timesteps = torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([50, 450, 950])
    monitor.add(losses, timesteps, weights=torch.tensor([1.0, 0.0, 1.0]))
    log = monitor.log(1, 1e-3)
    assert log["loss"] == 1.5
    assert parts(log) == {"loss/0.0-0.1": 1.0, "loss/0.9-1.0": 2.0}
    assert log["tflops"] == pytest.approx(log["samples_per_second"])


def test_a_step_without_any_sample_has_no_loss(accelerator, tmp_path):
    monitor = TrainingMonitor(accelerator, tmp_path)
    monitor.add(torch.zeros(1), torch.tensor([50]), weights=torch.zeros(1))
    log = monitor.log(1, 1e-3)
    assert "loss" not in log and log["samples_per_second"] == 0


def test_every_step_begins_anew(accelerator, tmp_path):
    monitor = TrainingMonitor(accelerator, tmp_path)
    monitor.add(torch.tensor([1.0]), torch.tensor([50]))
    monitor.log(1, 1e-3)
    monitor.add(torch.tensor([3.0]), torch.tensor([550]))
    log = monitor.log(2, 1e-3)
    assert log["loss"] == 3.0 and parts(log) == {"loss/0.5-0.6": 3.0}


def test_rates_follow_from_counted_work_and_the_devices_peak(accelerator, tmp_path):
    def count(height, width, tokens):
        return height * width * tokens * 10**9

    monitor = TrainingMonitor(accelerator, tmp_path, flops_per_sample=count, device_tflops=50.0)
    monitor.add(torch.ones(3), torch.tensor([1, 2, 3]), height=2, width=3, tokens=5)
    monitor.add(torch.ones(1), torch.tensor([1]), height=1, width=1, tokens=7)
    log = monitor.log(1, 1e-3)
    assert log["tflops"] / log["samples_per_second"] == pytest.approx((3 * 30 + 7) / 4 / 1000)
    assert log["mfu"] == log["tflops"] / 50.0
    assert 0.05 < log["memory_gb"] < 100


def test_unknown_peak_or_work_is_not_guessed(accelerator, tmp_path):
    logs = []
    for flops_per_sample in (None, lambda height, width, tokens: 1):
        monitor = TrainingMonitor(accelerator, tmp_path, flops_per_sample=flops_per_sample)
        monitor.add(torch.ones(1), torch.tensor([1]))
        logs.append(set(monitor.log(1, 1e-3)))
    assert logs[1] - logs[0] == {"tflops"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_known_by_the_devices_name(name, expected):
    assert peak_tflops(name) == expected


def test_noting_a_batch_does_not_wait_for_the_device(accelerator, tmp_path):
    # Of a fake tensor no value can be read.
    with FakeTensorMode():
        monitor = TrainingMonitor(accelerator, tmp_path, flops_per_sample=lambda height, width, tokens: 1)
        monitor.add(torch.ones(3), torch.tensor([1, 2, 3]), torch.ones(3), 2, 3, 5)


def test_each_step_is_a_line_as_soon_as_it_is_logged(accelerator, tmp_path):
    monitor = TrainingMonitor(accelerator, tmp_path / "new")
    for step in (1, 2):
        monitor.add(torch.tensor([0.5]), torch.tensor([50]))
        log = monitor.log(step, 1e-3, torch.tensor(0.25), extra=7.0)
        assert read_lines(tmp_path / "new")[-1] == {"step": step, **log}
    assert (log["lr"], log["grad_norm"], log["extra"]) == (1e-3, 0.25, 7.0)
    assert len(read_lines(tmp_path / "new")) == 2


@pytest.mark.parametrize(("step", "left"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (10, [1, 2, 3, 4])])
def test_resumed_run_cuts_off_what_a_killed_one_wrote_behind_its_checkpoint(accelerator, tmp_path, step, left):
    path = tmp_path / "losses.jsonl"
    path.write_text("".join(f'{{"step": {number}, "loss": NaN}}\n' for number in (1, 2, 3, 4)) + '{"step": 5, "lo')
    monitor = TrainingMonitor(accelerator, tmp_path, step=step)
    assert [line["step"] for line in read_lines(tmp_path)] == left
    monitor.add(torch.ones(1), torch.tensor([1]))
    monitor.log(step + 1, 1e-3)
    assert [line["step"] for line in read_lines(tmp_path)] == [*left, step + 1]
    assert [file.name for file in tmp_path.iterdir()] == ["losses.jsonl"]


def test_trackers_receive_what_is_logged(tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    monitor = TrainingMonitor(accelerator, tmp_path)
    logs = {}
    for step in (1, 2):
        monitor.add(torch.tensor([1.0, step]), torch.tensor([50, 550]))
        logs[step] = monitor.log(step, step / 1000, 0.5)
    accelerator.end_training()

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(events.Tags()["scalars"]) == set(logs[1])
    for key in logs[1]:
        written = {event.step: event.value for event in events.Scalars(key)}
        assert written == pytest.approx({step: log[key] for step, log in logs.items()}, rel=1e-6)


def log_steps(monitor, share=slice(None)) -> list[dict]:
    """Three steps of eight samples, in the second of which the last is a placeholder."""
    generator = torch.Generator().manual_seed(0)
    logs = []
    for step in (1, 2, 3):
        losses, timesteps = torch.rand(8, generator=generator), torch.randint(0, 1000, (8,), generator=generator)
        weights = torch.ones(8)
        weights[7] = step != 2
        monitor.add(losses[share], timesteps[share], weights[share])
        logs.append(monitor.log(step, 1e-3))
    return logs


def run_process(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # accelerate wants them, and does not use them
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting_place", rank=rank, world_size=2)
    logs = log_steps(TrainingMonitor(Accelerator(cpu=True), folder), slice(rank, None, 2))
    (folder / f"{rank}.json").write_text(json.dumps(logs))
    torch.distributed.destroy_process_group()


def test_two_processes_log_what_one_does_of_all_their_samples(accelerator, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_process, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]

    logs = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    alone = log_steps(TrainingMonitor(accelerator, tmp_path / "alone"))
    for log in logs:
        for ours, theirs in zip(log, alone):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-15)
            assert parts(ours) == pytest.approx(parts(theirs), rel=1e-15)
    assert read_lines(tmp_path) == [{"step": step, **log} for step, log in enumerate(logs[0], start=1)]


@pytest.mark.parametrize("settings", [{"num_buckets": 0}, {"device_tflops": 0.0}])
def test_settings_that_make_no_sense_are_refused(accelerator, tmp_path, settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` has to be"):
        TrainingMonitor(accelerator, tmp_path, **settings)


def test_curves_are_drawn_of_a_run_that_diverged(accelerator, tmp_path):
    monitor = TrainingMonitor(accelerator, tmp_path)
    for step in range(1, 60):
        monitor.add(torch.tensor([1 / step, 2 / step if step < 50 else float("nan")]), torch.tensor([50, 550]))
        monitor.log(step, 1e-3, 0.1)
    assert draw_curves(tmp_path / "losses.jsonl", tmp_path / "losses.png") == tmp_path / "losses.png"
    picture = Image.open(tmp_path / "losses.png").convert("RGB")
    assert picture.width > 1000 and len(picture.getcolors(1 << 20)) > 100


def test_no_curves_without_steps_or_matplotlib_and_it_is_said_why(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    assert draw_curves(tmp_path / "losses.jsonl", tmp_path / "losses.png") is None
    assert "holds no steps" in caplog.text
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "loss": 0.5, "lr": 0.001}\n')
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_curves(tmp_path / "losses.jsonl", tmp_path / "losses.png") is None
    assert "pip install matplotlib" in caplog.text
    assert not (tmp_path / "losses.png").exists()

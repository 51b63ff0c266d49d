"""The edit training in two processes, by gloo, under each engine's configuration; and how it is launched."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from script_runs import EXAMPLES, read_losses, run_script

from diffusers_dim import DIMEditPipeline
from diffusers_dim.training import latest_checkpoint


SCRIPT = "train_dim_edit"
CONFIGS = EXAMPLES / "accelerate_configs"
SLURM = EXAMPLES / "slurm" / "train_multi_node.slurm"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")

# A run under each of these comes out as one process's does.
ENGINES = ["ddp", "fsdp2"]
DEEPSPEED_ENGINES = ["deepspeed_zero2", "deepspeed_zero3"]

# Of the 12 edits, by two a step.
ONE_EPOCH = ["--max_train_steps", 6, "--checkpointing_steps", 100]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch_environment(name: str) -> dict[str, str]:
    """What `accelerate launch` tells a process of a configuration, on two processes."""
    command = ["--config_file", CONFIGS / f"{name}.yaml", "--num_processes", 2, "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(list(map(str, command))))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


class Runs:
    """Runs of the script in two processes, one after the other, each with its own output folder."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model
        self.runs: list[dict] = []

    def add(self, name, config, data, *more, output=None, killed_at=None):
        options = run_options(self.model, data, self.folder / (output or name), *more)
        environment = {**launch_environment(config), "MASTER_PORT": str(free_port())}
        self.runs.append({"name": name, "options": options, "environment": environment, "killed_at": killed_at})

    def start(self) -> list[subprocess.Popen]:
        (self.folder / "runs.json").write_text(json.dumps(self.runs, default=str))
        command = [sys.executable, Path(__file__).parent / "distributed_runs.py", self.folder / "runs.json"]
        fixed = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        return [
            subprocess.Popen(
                command,
                env={**fixed, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=open(self.folder / f"stderr-{rank}.txt", "w"),
            )
            for rank in range(2)
        ]

    def finish(self) -> dict[str, str]:
        """What runs raised, by their names."""
        processes = self.start()
        try:
            for rank, process in enumerate(processes):
                assert process.wait(timeout=600) == 0, (self.folder / f"stderr-{rank}.txt").read_text()[-3000:]
        finally:
            for process in processes:
                process.kill()
        return json.loads((self.folder / "errors.json").read_text())


def run_options(model, data, output, *more):
    fixed = ["--pretrained_model_name_or_path", model, "--jsonl", data, "--output_dir", output, "--resolution", 64]
    fixed += ["--train_batch_size", 2, "--max_train_steps", 3, "--checkpointing_steps", 1, "--mixed_precision", "no"]
    # Where the gradient is nothing but rounding, as of a key's bias, Adam would make steps of it.
    fixed += ["--learning_rate", 1e-3, "--adam_epsilon", 1e-4, "--lr_warmup_steps", 0, "--use_ema"]
    fixed += ["--num_inference_steps", 2]
    return [*fixed, *more]


def weights(path):
    pipe = DIMEditPipeline.from_pretrained(path)
    return {
        f"{name}.{key}": value
        for name in ("connector", "transformer")
        for key, value in getattr(pipe, name).state_dict().items()
    }


def assert_same_weights(path, expected):
    actual, expected = weights(path), weights(expected)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.fixture(scope="module")
def some_missing(edits):
    """The same edits, but of the second and the third the source picture is missing."""
    lines = [json.loads(line) for line in edits.read_text().splitlines()]
    for index in (1, 2):
        lines[index]["image_path"] = "missing.png"
    path = edits.parent / "two_missing.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def one_process(edit_folder, edits, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    run_script(SCRIPT, *run_options(edit_folder, edits, output, "--train_batch_size", 4))
    return output


@pytest.fixture(scope="module")
def killed(edit_folder, edits, tmp_path_factory):
    """The folder of a run whose first process was killed at the second file of its third checkpoint."""
    runs = Runs(tmp_path_factory.mktemp("killed"), edit_folder)
    runs.add("run", "ddp", edits, "--resume_from_checkpoint", "latest", killed_at=10)
    processes = runs.start()
    assert processes[0].wait(timeout=300) == -signal.SIGKILL
    processes[1].kill()
    processes[1].wait()
    found = sorted(path.name for path in (runs.folder / "run").glob("*-*"))
    assert found == ["checkpoint-1", "checkpoint-2", "saving-3"]
    assert latest_checkpoint(runs.folder / "run").name == "checkpoint-2"
    return runs.folder / "run"


@pytest.fixture(scope="module")
def two_processes(edit_folder, edits, some_missing, killed, tmp_path_factory):
    """The folder of all runs, with what those raised that were refused in `errors.json`."""
    folder = tmp_path_factory.mktemp("two")
    resumed = {
        name: [f"{name}_resumed", name, edits, "--resume_from_checkpoint", folder / name / "checkpoint-1"]
        for name in ["fsdp2", *DEEPSPEED_ENGINES]
    }
    for name in DEEPSPEED_ENGINES if HAS_DEEPSPEED else []:
        for run in [name, name, edits], resumed[name]:
            runs = Runs(folder, edit_folder)  # DeepSpeed does not start a second time in a process
            runs.add(*run)
            assert runs.finish() == {}

    runs = Runs(folder, edit_folder)
    runs.add("ddp", "ddp", edits)
    runs.add("killed", "ddp", edits, "--resume_from_checkpoint", "latest", output=killed)
    sharded = ["--shard_text_encoder", "--gradient_checkpointing", "--validation_shapes", 2]
    runs.add("fsdp2", "fsdp2", edits, *sharded)
    runs.add(*resumed["fsdp2"])
    runs.add("missing", "ddp", some_missing, *ONE_EPOCH, "--train_batch_size", 1, "--shard_text_encoder")
    runs.add("came", "fsdp2", edits, "--optimizer", "came")
    assert runs.finish().keys() == {"came"}
    return folder


def engines():
    return [*ENGINES, *(pytest.param(name, marks=needs_deepspeed) for name in DEEPSPEED_ENGINES)]


@pytest.mark.parametrize("engine", engines())
def test_losses_and_averaged_weights_are_those_of_one_process(two_processes, one_process, engine):
    assert read_losses(two_processes / engine) == pytest.approx(read_losses(one_process), rel=1e-5)
    assert_same_weights(two_processes / engine, one_process)


@pytest.mark.parametrize("engine", engines()[1:])
def test_resumed_sharded_run_goes_on_as_the_unbroken_one(two_processes, engine):
    assert read_losses(two_processes / f"{engine}_resumed")[-2:] == read_losses(two_processes / engine)[-2:]
    assert_same_weights(two_processes / f"{engine}_resumed", two_processes / engine)


def test_run_killed_while_saving_goes_on_from_the_last_whole_checkpoint(two_processes, killed):
    assert read_losses(killed) == read_losses(two_processes / "ddp")
    assert_same_weights(killed, two_processes / "ddp")
    assert not list(killed.glob("saving-*"))


def test_process_without_readable_samples_takes_part(two_processes, some_missing, edit_folder, tmp_path):
    more = [*ONE_EPOCH, "--train_batch_size", 2]
    run_script(SCRIPT, *run_options(edit_folder, some_missing, tmp_path / "run", *more))
    assert read_losses(two_processes / "missing") == pytest.approx(read_losses(tmp_path / "run"), rel=1e-5)


def test_sharded_run_is_validated(two_processes):
    assert (two_processes / "fsdp2" / "validation" / "3.png").exists()


def test_optimizer_of_whole_weights_is_refused_where_they_are_sharded(two_processes):
    errors = json.loads((two_processes / "errors.json").read_text())
    assert "choose adamw, or launch with DDP" in errors["came"]
    assert not list((two_processes / "came").glob("checkpoint-*"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_is_one_that_accelerate_knows(path):
    engine = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "single_device": "NO"}.get(path.stem, "DEEPSPEED")
    assert load_config_from_file(str(path)).distributed_type == engine


@pytest.fixture
def slurm(tmp_path):
    """Starts the SLURM script where `srun` is the shell command given."""

    def start(srun, *arguments):
        tools = {"srun": srun, "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/asked'}
        for name, body in tools.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
        environment = {
            **os.environ,
            **job,
            "PROCESSES_PER_NODE": "1",
            "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            ["bash", SLURM, *map(str, arguments)],
            env=environment,
            cwd=EXAMPLES.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


# Seen to hang once in the rendezvous of two launchers on one machine, so not in every run.
@pytest.mark.skipif("MULTI_NODE" not in os.environ, reason="set MULTI_NODE to run two launchers on this machine")
def test_nodes_of_a_slurm_job_train_together(slurm, edit_folder, edits, one_process, tmp_path):
    each_node = 'shift; for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done; wait "${pids[@]}"'
    options = run_options(edit_folder, edits, tmp_path / "run", "--max_train_steps", 1)
    process = slurm(each_node, EXAMPLES / f"{SCRIPT}.py", *options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(one_process)[:1], rel=1e-5)


def test_slurm_job_goes_back_into_the_queue_before_its_time_is_up(slurm, tmp_path):
    process = slurm(f"touch {tmp_path}/started; sleep 1.5", "script.py")
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "asked").read_text().split()[0] == "requeue"


def test_slurm_job_fails_as_its_training_does(slurm):
    assert slurm("exit 3", "script.py").wait(timeout=60) == 3


def test_slurm_job_without_a_script_says_what_is_missing(slurm):
    process = slurm("true")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Give the training script" in errors

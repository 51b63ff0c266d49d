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
"""Files, and folders `checkpoint-N`, that are whole or not there."""

import shutil
from pathlib import Path

from accelerate import Accelerator


def checkpoint_step(path: Path) -> int:
    """The optimizer steps that a folder `checkpoint-N` was saved after: N."""
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = (
        path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()
    )
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest finished checkpoint of a run, or `None`."""
    return next(reversed(list_checkpoints(output_dir)), None)


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, checkpoints_total_limit: int | None = None
) -> Path:
    """
    Saves the accelerator's state (weights, optimizer, schedules, random states) as `checkpoint-{step}`: written aside
    first and then renamed, so that a run killed at any moment leaves no half of one. All processes call it.

    Args:
        accelerator (`Accelerator`): With everything that is to be resumed prepared or registered.
        output_dir (`str` or `Path`): The run's folder.
        step (`int`): Optimizer steps done.
        checkpoints_total_limit (`int`, *optional*): Afterwards the oldest are removed until so many are left.
    """
    target = Path(output_dir) / f"checkpoint-{step}"
    aside = Path(output_dir) / f"saving-{step}"
    if accelerator.is_main_process:
        for stale in (*Path(output_dir).glob("saving-*"), *Path(output_dir).glob("removing-*")):
            shutil.rmtree(stale)  # of a run that was killed
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        prune_checkpoints(output_dir, checkpoints_total_limit)
    return target


def prune_checkpoints(output_dir: str | Path, limit: int | None) -> None:
    """
    Removes the oldest checkpoints until at most `limit` are left; `None` keeps all. They are renamed first, so that a
    run killed meanwhile leaves no half of one.
    """
    if limit is not None:
        for path in list_checkpoints(output_dir)[: -limit or None]:
            aside = path.with_name(f"removing-{checkpoint_step(path)}")
            path.rename(aside)
            shutil.rmtree(aside)

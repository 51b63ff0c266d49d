"""
Runs examples one after the other in one process of a distributed run, so that what they import is read once. A run
that raises a `ValueError` does not end the others; one may be killed while it saves.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from script_runs import run_script


def kill_at_save(number: int) -> None:
    """Ends this process, without a word, as it is about to write its file `number` by `torch.save`."""
    save, numbers = torch.save, itertools.count(1)

    def save_or_die(*args: Any, **kwargs: Any) -> None:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args, **kwargs)

    torch.save = save_or_die


def main(runs: Path) -> None:
    """
    Args:
        runs (`Path`):
            Holds a list of `{"name", "options", "environment", "killed_at"}`. The first process writes what each run
            raised, by its name, to `errors.json` beside it.
    """
    is_main = os.environ["RANK"] == "0"
    errors = {}
    for run in json.loads(runs.read_text()):
        os.environ.update(run["environment"])
        if run["killed_at"] is not None and is_main:
            kill_at_save(run["killed_at"])
        try:
            run_script("train_dim_edit", *run["options"])
        except ValueError as error:
            errors[run["name"]] = str(error)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in run["environment"]:
            os.environ.pop(name, None)
    if is_main:
        (runs.parent / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

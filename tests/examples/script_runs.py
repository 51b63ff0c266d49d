"""Ways to run an example."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from accelerate.state import AcceleratorState, GradientState, PartialState


EXAMPLES = Path(__file__).parents[2] / "examples"


def load_script(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *options: object) -> None:
    """Runs a script's `main` in this process."""
    script = load_script(name)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        script.main(script.parse_args(list(map(str, options))))
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def spawn_script(name: str, *options: object) -> subprocess.Popen:
    """Starts a script as a user does."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def read_losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "losses.jsonl").read_text().splitlines()]

"""
The tests of a huggingface/diffusers checkout, as a package. A test module that imports this one is skipped without it.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


if "DIFFUSERS_REPO" not in os.environ:
    pytest.skip(
        "diffusers' own tester mixins are not part of its package: set DIFFUSERS_REPO to a checkout of"
        " huggingface/diffusers to run them, e.g. DIFFUSERS_REPO=/path/to/diffusers python -m pytest"
        " tests/diffusers_mixins",
        allow_module_level=True,
    )


def import_tests(name: str) -> ModuleType:
    """
    The checkout's `tests.<name>`, imported as `diffusers_tests.<name>`, which collides with no other `tests`.
    Its modules import each other relatively.
    """
    if "diffusers_tests" not in sys.modules:
        folder = Path(os.environ["DIFFUSERS_REPO"]) / "tests"
        spec = importlib.util.spec_from_file_location(
            "diffusers_tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        package = importlib.util.module_from_spec(spec)
        sys.modules["diffusers_tests"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"diffusers_tests.{name}")

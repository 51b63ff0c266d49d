import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import diffusers_dim
from diffusers_dim import TINY_SHAPES


ROOT = Path(__file__).parents[1]
MAX_WHEEL_BYTES = 8_000_000
HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "huggingface_hub", "typer")


@pytest.fixture(scope="module")
def setup_cfg():
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, made from a copy so that nothing is left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tree)], cwd=tree, check=True, capture_output=True)
    (path,) = tree.glob("*.whl")
    return path


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, diffusers_dim; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", diffusers_dim.__all__)
def test_public_name_resolves(name):
    assert getattr(diffusers_dim, name) is not None
    assert name in dir(diffusers_dim)


def test_type_checkers_see_every_public_name():
    source = Path(diffusers_dim.__file__).read_text()
    block = source[source.index("if TYPE_CHECKING:") : source.index("def __getattr__")]
    assert sorted(re.findall(r" as (\w+)$", block, flags=re.MULTILINE)) == sorted(diffusers_dim.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="DIMToaster"):
        diffusers_dim.DIMToaster  # noqa: B018


def test_every_package_folder_has_an_init():
    package = Path(diffusers_dim.__file__).parent
    folders = {path.parent for path in package.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_constraints_meet_the_requirements(setup_cfg):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert not any("+" in version for version in pins.values())  # a build tag fits one machine only
    extras = setup_cfg["options.extras_require"]
    wanted = "\n".join([setup_cfg["options"]["install_requires"], extras["dev"], extras["train"]])
    for requirement in map(Requirement, filter(None, wanted.splitlines())):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_nothing_asks_for_torchvision(setup_cfg):
    texts = [(ROOT / name).read_text() for name in ("setup.cfg", "constraints.txt", "Makefile", "pyproject.toml")]
    assert not any("torchvision" in text for text in texts)


def test_minimum_python_is_the_same_everywhere(setup_cfg):
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    minimum = setup_cfg["options"]["python_requires"].removeprefix(">=")
    assert pyproject["tool"]["mypy"]["python_version"] == minimum
    assert pyproject["tool"]["ruff"]["target-version"] == "py" + minimum.replace(".", "")


def test_citation_names_the_version():
    assert f"\nversion: {diffusers_dim.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_wheel_holds_every_module_and_the_type_marker(wheel):
    package = Path(diffusers_dim.__file__).parent
    expected = {f"diffusers_dim/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected | {"diffusers_dim/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "examples", "benchmarks"))]


def test_wheel_metadata(wheel, setup_cfg):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "Name: diffusers-dim\n" in text
    assert f"Version: {diffusers_dim.__version__}\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "diffusers-dim = diffusers_dim.cli:app" in entry_points
    assert metadata.replace("METADATA", "licenses/LICENSE") in archive.namelist()


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_wheel_holds_the_embedded_model(wheel):
    files = [path for path in Path(TINY_SHAPES).rglob("*") if path.is_file()]
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"diffusers_dim/tiny/shapes/{path.relative_to(TINY_SHAPES).as_posix()}" for path in files} <= names

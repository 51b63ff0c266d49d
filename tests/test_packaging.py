import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

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


def build(kind: str, tree: Path) -> Path:
    """Builds a "wheel" or an "sdist" of a source tree, without a network."""
    code = f"import setuptools.build_meta as backend, sys; backend.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tree / "dist")], cwd=tree, check=True, capture_output=True)
    (path,) = (tree / "dist").glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[kind])
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is packed, so that nothing is left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tree


@pytest.fixture(scope="module")
def wheel(tree):
    """The built wheel."""
    return build("wheel", tree)


@pytest.fixture(scope="module")
def sdist(tree):
    """The built sdist."""
    return build("sdist", tree)


def find_requirements(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that these requirements need, and what those need in turn."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(Requirement(name), "") for name in names]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), wanted)
            if key not in seen:
                seen.add(key)
                found[key[0]] = importlib.metadata.distribution(requirement.name)
                waiting += [(Requirement(text), wanted) for text in found[key[0]].requires or []]
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """
    The folder of programs of an environment that holds the installed wheel and what it needs, none of the extras.
    What it needs are links to what is installed here.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    for distribution in find_requirements(needs).values():
        tops = {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__"}
        for top in tops:
            link, target = packages / top, Path(distribution.locate_file(top))
            if not link.exists() and target.exists():
                link.symlink_to(target)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "bin"


def call(program: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs a program as if none of this environment were there."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=variables, cwd=cwd)


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


def test_wheel_and_sdist_are_fit_for_an_index(wheel, sdist):
    check = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sdist_makes_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for name in ("LICENSE", "CHANGELOG.md", "CITATION.cff"):
        assert (source / name).is_file()
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(build("wheel", source))
    assert sorted(first.namelist()) == sorted(second.namelist())
    assert all(first.read(name) == second.read(name) for name in first.namelist() if not name.endswith("/RECORD"))


def test_wheel_without_extras_imports_without_a_warning(environment):
    done = call(environment / "python", "-W", "error", "-c", "import diffusers_dim; print(diffusers_dim.__file__)")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert str(environment.parent) in done.stdout


def test_wheel_without_extras_has_every_public_name_without_a_warning(environment, setup_cfg):
    extras = setup_cfg["options.extras_require"]
    optional = {Requirement(line).name for text in extras.values() for line in text.splitlines() if line}
    needed = find_requirements(filter(None, setup_cfg["options"]["install_requires"].splitlines()))
    absent = sorted(name for name in optional if canonicalize_name(name) not in needed)
    code = (
        "import importlib.metadata as metadata, diffusers_dim\n"
        f"there = {{d.name.lower() for d in metadata.distributions()}} & {set(absent)!r}\n"
        "assert not there, there\n"
        "for name in diffusers_dim.__all__: getattr(diffusers_dim, name)\n"
    )
    done = call(environment / "python", "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


def test_wheel_without_extras_brings_the_command(environment):
    done = call(environment / "diffusers-dim", "--help")
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_wheel_without_extras_draws_the_demo(environment, tmp_path):
    done = call(environment / "diffusers-dim", "demo", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "demo.png") as picture:
        assert min(picture.size) > 100

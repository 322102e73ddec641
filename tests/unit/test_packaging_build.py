"""The source distribution builds the wheel without a network, and both have what the suite reads at run time."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from vllm_suite import __version__

ROOT = Path(__file__).resolve().parents[2]
INFO = f"vllm_suite-{__version__}.dist-info"
BUILD = "import hatchling.build as b, sys; print(b.build_{kind}(sys.argv[1]))"


def built(kind: str, tree: Path, out: Path) -> Path:
    """What the build backend makes of a tree, as pip calls it."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=kind), str(out)],
        cwd=tree, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    (found,) = [path for path in folder.iterdir() if path.is_dir()]
    return found


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from it."""
    return built("wheel", tree, tmp_path_factory.mktemp("wheel"))


def tracked(folder: str) -> Iterator[PurePosixPath]:
    """Files of the repository below a folder."""
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout of the repository")
    yield from (PurePosixPath(line) for line in listed.stdout.splitlines() if (ROOT / line).exists())


def test_the_sources_have_the_chart_and_the_recipe(tree: Path) -> None:
    wanted = [*tracked("charts"), *tracked("packaging"), *tracked("docs"), *tracked("tests"), *tracked("scripts")]
    assert len(wanted) > 300
    assert not [path for path in wanted if not (tree / path).is_file()]
    assert not (tree / "build").exists()


def test_the_wheel_has_every_file_of_its_packages(wheel: Path) -> None:
    """Pages, device sheets and tables as well as modules; no test, no chart."""
    with zipfile.ZipFile(wheel) as archive:
        names = {PurePosixPath(name) for name in archive.namelist()}
    packages = {"vllm_suite": "", "plugins": "plugins", "kernels": "kernels"}
    wanted = {path.relative_to(base or ".") for folder, base in packages.items() for path in tracked(folder)}
    assert len(wanted) > 500
    assert not wanted - names
    assert {path.parts[0] for path in names} == {path.parts[0] for path in wanted} | {INFO}
    kinds = {path.suffix for path in wanted}
    assert {".html", ".js", ".css", ".yaml", ".typed"} <= kinds


def test_the_wheel_has_its_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        points = configparser.ConfigParser()
        points.read_string(archive.read(f"{INFO}/entry_points.txt").decode())
    assert dict(points["vllm.general_plugins"]) == {"vllm_suite": "vllm_suite.bootstrap:load"}
    assert dict(points["vllm.endpoint_plugins"]) == {"vllm_suite_control": "vllm_suite.compat.endpoint:create"}
    assert dict(points["console_scripts"]) == {"vllm-suite": "vllm_suite.cli.main:main"}


def test_the_wheel_alone_runs_what_the_image_runs(wheel: Path, tmp_path: Path) -> None:
    """The commands of the container recipe and of the chart, with nothing of the checkout on the path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Ahead of an installation of the checkout itself.
    start = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = sys.argv[1:]; "
    module = "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=False)"
    for argv in (["vllm_suite.fleet.pod", "--help"], ["vllm_suite.cli.main", "--version"],
                 ["vllm_suite.cli.main", "up", "--help"], ["vllm_suite.cli.main", "roles", "control", "--help"],
                 ["vllm_suite.cli.main", "router", "--help"]):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", start + module, *argv],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    where = subprocess.run(
        [sys.executable, "-c", start + "import vllm_suite; print(vllm_suite.__file__)"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(tmp_path))


def test_the_recipe_names_what_there_is(wheel: Path) -> None:
    recipe = (ROOT / "packaging/container/Dockerfile").read_text()
    assert "/dist/vllm_suite-*.whl" in recipe
    assert PurePosixPath(wheel.name).match("vllm_suite-*.whl")
    assert "docker build -f packaging/container/Dockerfile" in recipe
    assert "python3 -m vllm_suite.fleet.pod --help" in recipe
    assert 'CMD ["vllm-suite", "--help"]' in recipe

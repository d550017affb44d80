"""requirements.txt, environment.yml and pyproject.toml describe one environment."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import kvrepro

ROOT = Path(__file__).resolve().parents[1]


def pinned(lines: list[str]) -> dict[str, str]:
    """Name and version of each requirement that holds on this platform."""
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(r.name): str(r.specifier).removeprefix("==")
        for r in requirements
        if r.marker is None or r.marker.evaluate()
    }


def pins() -> dict[str, str]:
    """Name and version of every line of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return pinned([line for line in lines if line.strip() and not line.startswith("#")])


def conda() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_conda_environment_has_the_same_pins() -> None:
    pip = next(item["pip"] for item in conda()["dependencies"] if isinstance(item, dict))
    assert pip[-1] == "-e ."
    assert pinned(pip[:-1]) == pins()


def test_conda_python_is_within_the_supported_range() -> None:
    line = next(item for item in conda()["dependencies"] if isinstance(item, str) and item.startswith("python"))
    allowed = SpecifierSet(line.removeprefix("python").strip())
    supported = SpecifierSet(project()["requires-python"])
    for version in ("3.11", "3.12"):
        assert version in allowed and version in supported
    assert "3.10" not in allowed and "3.10" not in supported


def test_every_requirement_of_the_package_is_pinned_within_its_range() -> None:
    extras = project()["optional-dependencies"]
    for line in [*project()["dependencies"], *(line for name in extras for line in extras[name])]:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} is not in requirements.txt"
        assert requirement.specifier.contains(pin), f"{line} against {pin}"


def test_every_pin_is_a_requirement_of_the_package() -> None:
    extras = project()["optional-dependencies"]
    known = map(Requirement, [*project()["dependencies"], *(line for name in extras for line in extras[name])])
    assert set(pins()) == {canonicalize_name(r.name) for r in known if r.marker is None or r.marker.evaluate()}


def test_the_lowest_versions_tested_are_the_lowest_that_are_allowed() -> None:
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    tested = pinned([line for line in lines if not line.startswith("#")])
    bounds = {}
    for requirement in map(Requirement, project()["dependencies"]):
        (lower,) = [bound for bound in requirement.specifier if bound.operator == ">="]
        bounds[canonicalize_name(requirement.name)] = Version(lower.version)
    assert {name: Version(version) for name, version in tested.items()} == bounds


@pytest.mark.parametrize("name", sorted(pins()))
def test_pins_are_what_is_installed(name: str) -> None:
    try:
        installed = metadata.version(name).split("+")[0]  # torch's CPU build is 2.13.0+cpu
    except metadata.PackageNotFoundError:
        pytest.fail(f"{name} is not installed: make env")
    assert installed == pins()[name], "this environment is not the pinned one: make env"


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert kvrepro.__version__ == project()["version"] == str(citation["version"])


def test_makefile_lists_its_targets() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", text, flags=re.MULTILINE))
    assert {"book", "test", "notebook", "clean", "help"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:.*## ", text, flags=re.MULTILINE), f"{target} has no line in make help"

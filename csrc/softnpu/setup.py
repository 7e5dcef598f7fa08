"""Builds the libraries beside the Python package. Everything declarative is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

sys.path.insert(0, str(Path(__file__).resolve().parent))
from softnpu_build import TARGET
from softnpu_build import build as build_libraries


class BuildLibraries(Command):
    """A step of `build`: into the wheel's tree, or beside the sources when they stay editable."""

    description = "build the shared libraries"
    user_options = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        target = TARGET if self.editable_mode else Path(self.build_lib) / "softnpu" / "lib"
        build_libraries(target)

    def get_source_files(self) -> list[str]:
        """For the source distribution; MANIFEST.in names them."""
        return []


class Build(build):
    sub_commands = [*build.sub_commands, ("build_libraries", None)]


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """One wheel for every Python: the libraries know torch, but no Python."""
        return "py3", "none", super().get_tag()[2]


class Binary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=Binary,
    cmdclass={"build": Build, "build_libraries": BuildLibraries, "bdist_wheel": Wheel},
)

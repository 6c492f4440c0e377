"""What pyproject.toml cannot say: the wheel takes along a file of the repository that lies outside of the package.

`eqknobs vram` needs it wherever it is installed; a checkout, editable installs included, has it at its place.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("config/config.yaml",)


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in SHIPPED:
                self.copy_file(path, str(Path(self.build_lib, "eqknobs", Path(path).name)))


setup(cmdclass={"build_py": BuildPy})

"""What pyproject.toml cannot say: the wheel takes along two files of the repository that lie outside of the package.

`eqknobs vram` needs them wherever it is installed; a checkout, editable installs included, has them at their place.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("config/config.yaml", "workflow/schemas/config.schema.json")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in SHIPPED:
                self.copy_file(path, str(Path(self.build_lib, "eqknobs", Path(path).name)))


setup(cmdclass={"build_py": BuildPy})

"""Compiles the C functions into the wheel where there is a compiler; else the first use does.

All else about the package is in pyproject.toml.
"""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = Path("tritonbnn")
SOURCES = (PACKAGE / "native" / "csrc", PACKAGE / "deploy" / "csrc")
"""The launchers' C functions, and the engine that runs packed networks."""


def load_build():
    """The package's own module, by its path: the package needs torch, which is not here."""
    spec = importlib.util.spec_from_file_location("build", PACKAGE / "compiled" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_all(root):
    """Compile for every instruction set of this architecture; whether it worked.

    Args:
        root: the folder that the package is built in. Libraries go beside the sources there.
    """
    build = load_build()
    folders = {sources: build.packaged_folder(root / sources) for sources in SOURCES}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier build left
    for compiler in build.compilers():
        try:
            for sources, folder in folders.items():
                probe = [build.PROBE] if (sources / "cpu.c").exists() else []
                for isa in (*probe, *build.ISAS):
                    build.compile_into(folder / isa, isa, compiler, sources)
            return True
        except (build.BuildError, OSError) as error:
            print(f"no C functions in the wheel: {error}")
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
    return False


class BuildWithLibraries(build_py):
    """Adds the libraries to what is built; an editable install compiles at first use."""

    compiled = False

    def run(self):
        super().run()
        if not self.editable_mode:
            BuildWithLibraries.compiled = compile_all(Path(self.build_lib).absolute())


class WheelOfPlatform(bdist_wheel):
    """Names the platform if there are libraries; they are called by ctypes, so by any Python."""

    def get_tag(self):
        if not BuildWithLibraries.compiled:
            return super().get_tag()
        self.root_is_pure = False  # what the wheel says of itself
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelOfPlatform})

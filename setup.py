"""Asks CMakeLists.txt, which knows how, to build mmfast._C. Everything else is in pyproject.toml.

Environment: CXX and CMAKE_ARGS as CMake reads them; MMFAST_NO_EXT=1 installs without the core.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        asked = os.environ.get("CXX")
        if not any(shutil.which(shlex.split(name)[0]) for name in [asked or "c++", asked or "g++"]):
            sys.exit(
                f"mmfast: no C++ compiler found ({asked or 'c++'}); install one (g++ 12, say), name"
                " it in CXX, or set MMFAST_NO_EXT=1 to install without the compiled core."
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        # fresh: an isolated build environment is gone by the next install, its paths with it
        configure = [
            *("cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMMFAST_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in configure, ["cmake", "--build", str(build), "--target", "_C"]:
            if subprocess.run(command, check=False).returncode:
                sys.exit(f"mmfast: building the compiled core failed at: {shlex.join(command)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)


extensions = [] if os.environ.get("MMFAST_NO_EXT") == "1" else [Extension("mmfast._C", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})

"""Builds the compiled CPU extension, and the CUDA kernels where nvcc is found, with CMake; everything else about the
package is in pyproject.toml.

``KSSM_REQUIRE_EXTENSION=1`` makes a failed build of the CPU extension an error, ``KSSM_REQUIRE_CUDA=1`` a failed or
missing one of the CUDA kernels; without them the package installs all the same and runs on what it has.
``KSSM_CUDA=0`` leaves the CUDA kernels out, ``KSSM_CUDA_ARCHS="80;90"`` chooses their architectures. ``KSSM_WERROR=1``
makes C++ warnings errors. ``KSSM_SANITIZE=1`` builds the CPU extension with AddressSanitizer and UBSan, and no CUDA
kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
EXTENSION = "_kssm_kernels_cpu"
CUDA_EXTENSION = "_kssm_kernels_cuda"


def env_flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def failure_reason(output: str) -> str:
    """The sentence of CMake's or the compiler's output that says what went wrong.

    >>> failure_reason("CMake Error at CMakeLists.txt:2 (project):\\n  No CMAKE_CXX_COMPILER could be found.\\n\\n  T")
    'No CMAKE_CXX_COMPILER could be found'
    >>> failure_reason("FAILED: a.o\\na.cpp:1:2: error: 'x' was not declared\\n")
    "a.cpp:1:2: error: 'x' was not declared"
    >>> failure_reason("FAILED: a.o\\nnvcc fatal   : Unsupported gpu architecture 'compute_1'\\n")
    "nvcc fatal   : Unsupported gpu architecture 'compute_1'"
    """
    compiler = re.search(r"^.*\b(?:error|nvcc fatal *): .*$", output, re.MULTILINE)
    cmake = re.search(r"^CMake Error(?: at [^\n]*)?:\s+(.*?)\.\s*$", output, re.MULTILINE | re.DOTALL)
    if compiler or not cmake:
        return compiler[0].strip() if compiler else "the build failed"
    return " ".join(cmake[1].split())


def run_cmake(*arguments: str) -> None:
    # An installer called by its path leaves the cmake and ninja beside it off PATH.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise CompileError("cmake was not found")
    done = subprocess.run(
        [cmake, *arguments],
        env={**os.environ, "PATH": path, "LC_ALL": "C"},  # failure_reason reads English
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise CompileError(failure_reason(done.stdout))


def build_extension(module: Path, folder: Path) -> str:
    """Compile to ``module`` through the build folder ``folder``; returns what was built, in words."""
    try:
        import pybind11
    except ImportError as error:
        raise CompileError("pybind11 is not installed") from error
    # CMake's cache holds absolute paths into the build environment it first ran in, which pip deletes afterwards.
    shutil.rmtree(folder, ignore_errors=True)
    run_cmake(
        *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent.resolve()}",
        f"-DKSSM_WERROR={'ON' if env_flag('KSSM_WERROR') else 'OFF'}",
        f"-DKSSM_SANITIZE={'ON' if env_flag('KSSM_SANITIZE') else 'OFF'}",
    )
    run_cmake("--build", str(folder))
    if not module.exists():
        raise CompileError(f"the build left no {module.name}")
    return (folder / "summary.txt").read_text(encoding="utf-8")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))


def build_cuda(module: Path, folder: Path) -> str:
    """Compile the CUDA kernels to ``module``, a library that is found like an extension but is not one."""
    if os.environ.get("KSSM_CUDA") == "0":
        raise CompileError("KSSM_CUDA=0")
    if env_flag("KSSM_SANITIZE"):
        raise CompileError("KSSM_SANITIZE=1")
    nvcc = find_nvcc()
    if nvcc is None:
        raise CompileError("nvcc was not found")
    shutil.rmtree(folder, ignore_errors=True)
    run_cmake(
        *("-S", str(ROOT / "csrc" / "cuda"), "-B", str(folder), "-G", "Ninja"),
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent.resolve()}",
        f"-DKSSM_SUFFIX={module.name.removeprefix(CUDA_EXTENSION)}",
        f"-DKSSM_CUDA_ARCHS={os.environ.get('KSSM_CUDA_ARCHS', '')}",
        f"-DKSSM_WERROR={'ON' if env_flag('KSSM_WERROR') else 'OFF'}",
    )
    run_cmake("--build", str(folder))
    if not module.exists():
        raise CompileError(f"the build left no {module.name}")
    return (folder / "summary.txt").read_text(encoding="utf-8")


class CleanBuild(build):
    """Starts from an empty ``build_lib``: it goes into the wheel whole, with what since-deleted modules left there."""

    def run(self) -> None:
        if Path(self.build_base).resolve() in Path(self.build_lib).resolve().parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtension(build_ext):
    """Leaves in place of an extension that could not be built a module that says why, to whoever imports it.

    Installers hide the output of a build that succeeds. Like the extension, that module lies outside the package,
    where it is found even if a source checkout shadows the installed package.
    """

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name))
        instead = module.with_name(f"{ext.name}.py")
        module.parent.mkdir(parents=True, exist_ok=True)
        module.unlink(missing_ok=True)
        instead.unlink(missing_ok=True)
        cuda = ext.name == CUDA_EXTENSION
        what, without = ("CUDA kernels", "other backends") if cuda else ("CPU extension", "its pure-torch path")
        try:
            if cuda:
                summary = build_cuda(module, Path(f"{self.build_temp}-cuda"))
            else:
                summary = build_extension(module, Path(self.build_temp))
        except CompileError as error:
            if not ext.optional:
                raise
            instead.write_text(f"raise ImportError({f'the installation skipped it: {error}'!r})\n", encoding="utf-8")
            print(f"kssm-kernels: skipped the {what} ({error}); the package will run on {without}")
        else:
            print(f"kssm-kernels: built the {what} ({summary})")

    def copy_extensions_to_source(self) -> None:
        """The last step of an editable installation."""
        for ext in self.extensions:
            for name in (f"{ext.name}.py", self.get_ext_filename(ext.name)):
                built, target = Path(self.build_lib, name), ROOT / name
                target.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy2(built, target)


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(EXTENSION, sources=[], optional=not env_flag("KSSM_REQUIRE_EXTENSION")),
            Extension(CUDA_EXTENSION, sources=[], optional=not env_flag("KSSM_REQUIRE_CUDA")),
        ],
        cmdclass={"build": CleanBuild, "build_ext": BuildExtension},
    )

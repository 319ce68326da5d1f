"""What an installation must and must not contain, as far as a source tree and a build without a compiler can tell."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kssm_kernels
from kssm_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [ROOT / "kssm_kernels", ROOT / "python" / "kssm"]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools", minversion="61")
    spec = importlib.util.spec_from_file_location("kssm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_setup_doctests(setup_py: ModuleType) -> None:
    result = doctest.testmod(setup_py)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(("value", "on"), [("1", True), ("ON", True), ("0", False), ("", False), (None, False)])
def test_a_flag_is_off_where_it_is_0_empty_or_missing(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str | None, on: bool
) -> None:
    if value is None:
        monkeypatch.delenv("KSSM_WERROR", raising=False)
    else:
        monkeypatch.setenv("KSSM_WERROR", value)
    assert setup_py.env_flag("KSSM_WERROR") == on


@pytest.mark.parametrize("below", [True, False], ids=["in the build folder", "elsewhere"])
def test_a_new_build_forgets_deleted_modules(setup_py: ModuleType, tmp_path: Path, below: bool) -> None:
    from setuptools import Distribution

    command = setup_py.CleanBuild(Distribution())
    command.build_base = str(tmp_path / "build")
    command.build_lib = str(tmp_path / ("build/lib" if below else "mine"))
    stale = Path(command.build_lib, "kssm_kernels", "deleted.py")
    stale.parent.mkdir(parents=True)
    stale.touch()
    command.ensure_finalized()
    command.run()
    assert stale.exists() != below


def build_in_vain(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, optional: bool) -> None:
    from setuptools import Distribution, Extension
    from setuptools.errors import CompileError

    def no_compiler(module: Path, folder: Path) -> str:
        raise CompileError("there's no compiler \\ here")

    monkeypatch.setattr(setup_py, "build_extension", no_compiler)
    command = setup_py.BuildExtension(
        Distribution({"ext_modules": [Extension(setup_py.EXTENSION, sources=[], optional=optional)]})
    )
    command.build_lib, command.build_temp = str(folder), str(folder / "temp")
    command.ensure_finalized()
    command.run()


@pytest.mark.parametrize("built", [True, False])
def test_a_build_leaves_nothing_of_the_one_before(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: bool
) -> None:
    """In the build folder, and in the source tree where an editable installation puts it."""
    from setuptools import Distribution, Extension
    from setuptools.errors import CompileError

    def compiled(module: Path, folder: Path) -> str:
        if not built:
            raise CompileError("no compiler")
        module.touch()
        return "summary"

    monkeypatch.setattr(setup_py, "build_extension", compiled)
    monkeypatch.setattr(setup_py, "ROOT", tmp_path / "source")
    command = setup_py.BuildExtension(Distribution({"ext_modules": [Extension(setup_py.EXTENSION, [], optional=True)]}))
    command.build_lib, command.build_temp = str(tmp_path / "built"), str(tmp_path / "temp")
    command.ensure_finalized()
    stand_in, module = f"{setup_py.EXTENSION}.py", command.get_ext_filename(setup_py.EXTENSION)
    for folder in ("source", "built"):
        (tmp_path / folder).mkdir()
        for name in (stand_in, module):
            (tmp_path / folder / name).write_text("before")
    command.run()
    command.copy_extensions_to_source()
    for folder in ("source", "built"):
        assert [file.name for file in (tmp_path / folder).iterdir()] == [module if built else stand_in]
        assert "before" not in next((tmp_path / folder).iterdir()).read_text()


@pytest.mark.parametrize("why", ["KSSM_CUDA=0", "KSSM_SANITIZE=1", "nvcc was not found", None])
def test_the_cuda_kernels_are_left_out_where(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str | None
) -> None:
    from setuptools.errors import CompileError

    for name in ("KSSM_CUDA", "KSSM_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    if why and "=" in why:
        monkeypatch.setenv(*why.split("="))
    monkeypatch.setattr(setup_py, "find_nvcc", lambda: None if why == "nvcc was not found" else "/nvcc")
    monkeypatch.setattr(setup_py, "run_cmake", lambda *arguments: (tmp_path / "summary.txt").write_text("built"))
    (tmp_path / "module.so").touch()
    monkeypatch.setattr(setup_py.shutil, "rmtree", lambda *arguments, **options: None)
    if why is None:
        assert setup_py.build_cuda(tmp_path / "module.so", tmp_path) == "built"
    else:
        with pytest.raises(CompileError, match=why):
            setup_py.build_cuda(tmp_path / "module.so", tmp_path)


def test_a_failed_build_is_an_error_on_request(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from setuptools.errors import CompileError

    with pytest.raises(CompileError, match="no compiler"):
        build_in_vain(setup_py, monkeypatch, tmp_path, optional=False)


def test_without_the_extension_the_package_runs_and_says_why_once(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_in_vain(setup_py, monkeypatch, tmp_path, optional=True)
    assert re.search(r"skipped.*there's no compiler.*pure-torch", capsys.readouterr().out)
    code = """
import warnings, torch, kssm_kernels
assert kssm_kernels.available_backends() == ("torch",), kssm_kernels.build_info()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        kssm_kernels.order_parameters(torch.zeros(3), 1)
print(*(w.message for w in seen), sep="\\n")
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {k: v for k, v in os.environ.items() if k not in ("KSSM_BACKEND", "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert "there's no compiler \\ here" in done.stdout


@pytest.mark.skipif(backends.cpu_extension is None, reason="no compiled extension here")
@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("readelf"), reason="needs ELF and readelf")
def test_the_extension_links_no_openmp_runtime_and_exports_its_entry_only() -> None:
    assert backends.cpu_extension is not None
    file = str(backends.cpu_extension.__file__)

    def readelf(option: str) -> str:
        return subprocess.run(["readelf", option, "--wide", file], capture_output=True, text=True, check=True).stdout

    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic"))
    assert needed
    assert not [name for name in needed if re.search("omp|torch|python", name)], needed
    symbols = [line.split()[4:] for line in readelf("--dyn-syms").splitlines() if re.match(r"\s*\d+:", line)]
    exported = {s[3] for s in symbols if s[0] == "GLOBAL" and s[2] != "UND"}
    assert exported == {"PyInit__kssm_kernels_cpu"}


@pytest.mark.skipif(backends.cpu_extension is None, reason="no compiled extension here")
def test_an_instruction_set_is_used_when_named_and_missed_loudly() -> None:
    assert backends.cpu_extension is not None

    def run(name: str) -> subprocess.CompletedProcess[str]:
        code = "import kssm_kernels; print(kssm_kernels.build_info())"
        environment = {**os.environ, "KSSM_ISA": name}
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)

    for name in backends.cpu_extension.INSTRUCTION_SETS:
        assert f"running {name} (" in run(name).stdout
    missed = run("mmx")
    assert missed.returncode != 0
    assert "KSSM_ISA: got mmx, want " in missed.stderr.splitlines()[-1]


def imported(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"_kssm_kernels_cpu", "kssm_kernels", "kssm", "tests", "bench"}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("kssm_kernels", []),
        ("python/kssm", ["train"]),
        ("tests", ["train", "test"]),
        ("bench", ["train", "test", "bench", "proof"]),
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: list[str]) -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    declared = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}
    declared = {{"scikit_learn": "sklearn"}.get(name, name) for name in declared}
    # setuptools serves this file alone, which skips without it; triton comes with the torch builds that can use it; jax
    # is a baseline of one bench, which skips without it.
    assert imported(ROOT / folder) - declared - {"setuptools", "triton", "jax"} == set()


# The first argument names what is not to be found, the others are pytest's.
COLLECT = """
import sys, pytest
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
hidden = sys.argv[1].split(",")
sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        ("", ["train", "test"]),
        ("bench --benchmark-only -p pytest_benchmark.plugin", ["train", "bench"]),
        ("tests bench -m gpu -p pytest_benchmark.plugin", ["test", "bench"]),
    ],
)
def test_collecting_needs_no_more_than_these_extras(arguments: str, extras: list[str]) -> None:
    """Whatever the other extras bring is hidden from the process that collects."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if "bench" in extras:
        pytest.importorskip("pytest_benchmark", reason="the bench needs its extra")
    optional = project["optional-dependencies"]
    declared = {extra: {re.split(r"[^\w-]", r)[0].replace("-", "_") for r in optional[extra]} for extra in optional}
    hidden = set().union(*declared.values()).difference(*(declared[extra] for extra in extras))
    modules = ["sklearn" if name == "scikit_learn" else name for name in sorted(hidden)]
    # Plugins are not loaded by themselves, for that of a hidden package would end the process.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in ("TRITON_INTERPRET", "KSSM_CUDA_ON_HOST", "LD_PRELOAD"):
        environment.pop(name, None)
    command = [sys.executable, "-c", COLLECT, ",".join(modules), *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_packages_are_typed_and_whole(package: Path) -> None:
    assert (package / "py.typed").exists()
    # A folder without this file is left out of the wheel in silence.
    folders = {file.parent for file in package.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(a|b|rc|dev|post)\d+)?", kssm_kernels.__version__)


def test_the_readme_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})

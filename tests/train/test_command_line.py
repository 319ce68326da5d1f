"""The command line: what it refuses, what it prints, and that it works as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kssm import data
from kssm.cli import WAITING, WAITING_VARIABLES

from tests.train.runs import TINY, kssm, train

pytest.importorskip("tyro", reason="the command line needs the train extra")
pytestmark = pytest.mark.usefixtures("one_thread")


class TestErrors:
    """One line on stderr, exit code 2, nothing written."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--data missing.txt", "--data: missing.txt does not exist"),
            ("--data empty.txt", "--data: empty.txt is empty"),
            ("--data text.txt empty.txt", "--data: empty.txt is empty"),
            ("--data folder", "--data: folder folder holds no non-empty .txt"),
            ("--data latin.txt", "latin.txt is not UTF-8 text (byte 0xe9 at 1)"),
            ("--data short.txt", "the text has 20 tokens, and 2 of them"),
            ("--context 5000 --eval-tokens 5000", "must be more than --context 5000"),
            ("--batch-size 0", "--batch-size must be at least 1, got 0"),
            ("--max-steps -5", "--max-steps must be at least 1, got -5"),
            ("--dim 0", "--dim must be at least 1, got 0"),
            ("--dim 100000000", "GiB of memory"),
            ("--dim 10000000000000000000000", "GiB of memory"),
            ("--layers 1000000000000", "GiB of memory"),
            ("--batch-size 1000000000000", "GiB of memory"),
            ("--harmonics 257", "--harmonics must be from 1 to 256, got 257"),
            ("--eval-tokens 3", "--eval-tokens must be at least --context 16, got 3"),
            ("--lr 0", "--lr must be a positive number, got 0.0"),
            ("--lr nan", "--lr must be a positive number, got nan"),
            ("--dropout 1", "--dropout must be at least 0 and below 1, got 1.0"),
            ("--lr-floor 2", "--lr-floor must be from 0 to 1, got 2.0"),
            ("--lambda-reg -1", "--lambda-reg must be a number of at least 0, got -1.0"),
            ("--seed -1", "--seed must be from 0"),
            ("--device nonsense", "--device nonsense cannot be used"),
            ("--out text.txt", "--out: text.txt is not a folder"),
            ("--out text.txt/run", "--out: text.txt/run"),
            ("--out folder", "--out: folder is not empty"),
            ("--resume", "run holds no run: there is no config.json"),
            ("--dim many", "--dim"),
            ("--preset v9", "'v9'"),
            ("--arch v9", "'v9'"),
            ("--arch v4 --heads 3", "--oscillators must be a multiple of the --heads 3, got 8"),
            ("--arch v4 --harmonics 33", "--harmonics must be at most 32 with --arch v4, got 33"),
            ("--arch gpt --heads 3", "--dim must be a multiple of twice the --heads 3, got 16"),
            ("--arch gpt --layers 1000000000000", "GiB of memory"),
            ("--arch mamba --dim 100000000", "GiB of memory"),
            ("--no-such-option 3", "--no-such-option"),
            ("--out", "argument --out: expected one argument"),
        ],
    )
    def test_train(
        self,
        options: str,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ):
        monkeypatch.chdir(tmp_path)
        Path("text.txt").write_text("the order of the phases " * 50)
        Path("empty.txt").touch()
        Path("short.txt").write_text("too short for this. ")
        Path("latin.txt").write_bytes("né".encode("latin-1") * 200)
        Path("folder").mkdir()
        Path("folder/picture.png").write_text("not text")
        before = sorted(Path().rglob("*"))
        args = ["--data", "text.txt", "--out", "run", *TINY.split(), "--max-steps", "2", *options.split()]
        assert kssm("train", *args) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("kssm train: ")
        assert message in err
        assert sorted(Path().rglob("*")) == before

    def test_other_commands(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        for args, message in (
            (["trian"], "kssm: unknown command 'trian'"),
            (["sample", tmp_path / "none"], "none holds no run"),
            (["sample", tmp_path, "--top-k", 0], "--top-k 0 is empty or out of range"),
            (["sample", tmp_path, "--temperature", "nan"], "--temperature nan is empty or out of range"),
            (["sample"], "kssm sample: the following arguments are required: run"),
        ):
            assert kssm(*args) == 2
            err = capfd.readouterr().err
            assert err.count("\n") == 1
            assert message in err

    @pytest.mark.parametrize("module", ["tyro", "tqdm"])
    def test_a_missing_extra_is_named(
        self, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, "kssm.train.trainer")
        monkeypatch.delattr(sys.modules["kssm.train"], "trainer")  # an import would leave another module there
        assert kssm("train", "--out", tmp_path / "run") == 2
        assert capfd.readouterr().err == f'kssm train: {module} is missing: pip install ".[train]" brings it\n'

    def test_interrupted_before_the_first_step(
        self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ):
        def interrupted(*args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(data, "read_corpus", interrupted)
        assert train(text, tmp_path / "run") == 130
        assert capfd.readouterr().err == "kssm train: interrupted\n"


class TestProcess:
    def run(self, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        command = [sys.executable, "-m", "kssm", *args]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    def test_works_at_once_without_data(self, tmp_path: Path):
        done = self.run(tmp_path, "train", *TINY.split(), "--max-steps", "2")
        assert done.returncode == 0, done.stderr
        assert "unigram entropy" in done.stdout.splitlines()[-1]
        assert (tmp_path / "runs" / "demo" / "checkpoint.pt").exists()

    def test_error(self, tmp_path: Path):
        done = self.run(tmp_path, "train", "--data", "missing")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "kssm train: --data: missing does not exist\n"
        assert not list(tmp_path.iterdir())


def test_help_and_version(capfd: pytest.CaptureFixture[str]):
    for args, words in (
        (["--help"], ["kssm train", "kssm sample"]),
        ([], ["usage: kssm"]),
        (["--version"], ["."]),
    ):
        assert kssm(*args) == 0
        out = capfd.readouterr().out
        assert all(word in out for word in words)
    for command, option in (("train", "--max-steps"), ("sample", "--prompt")):
        with pytest.raises(SystemExit) as stop:
            kssm(command, "--help")
        assert stop.value.code == 0
        assert option in capfd.readouterr().out


def test_help_shows_the_preset(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        kssm("train", "--preset", "v3", "--help")
    assert "(default: 384)" in " ".join(capfd.readouterr().out.replace("│", " ").split())  # wherever lines are broken


def test_sample_is_a_function_of_its_seed(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert train(text, run, "--max-steps", 1) == 0
    outputs = []
    for seed in (1, 1, 2):
        capfd.readouterr()
        assert kssm("sample", run, "--prompt", "lock", "--tokens", 40, "--seed", seed) == 0
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith("lock")
    assert len(outputs[0]) == 4 + 40 + 1
    assert kssm("sample", run, "--prompt", "Q") == 2
    assert "'Q' is not in the vocabulary" in capfd.readouterr().err


class TestWaiting:
    """How OpenMP's threads wait: settled before torch is loaded, by the user first."""

    # main itself, or the module as a program: each notes the variables when torch is first looked for.
    CODE = """
import os, runpy, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(*(f"{v}={os.environ[v]}" for v in names if v in os.environ), flush=True)
            os._exit(0)
start, *names = sys.argv[1:]
sys.meta_path.insert(0, Torch())
sys.argv = ["kssm", "sample", "nowhere"]
exec(start)
"""
    ENTRY = "from kssm.__main__ import main; main()"
    MODULE = "runpy.run_module('kssm', run_name='__main__', alter_sys=True)"

    def seen(self, start: str, **user: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in WAITING_VARIABLES} | user
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
        command = [sys.executable, "-c", self.CODE, start, *WAITING_VARIABLES]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @pytest.mark.parametrize("start", [ENTRY, MODULE], ids=["entry point", "module"])
    def test_is_settled_before_torch_is_loaded(self, start: str):
        assert self.seen(start) == "=".join(WAITING)

    @pytest.mark.parametrize("user", ["OMP_WAIT_POLICY=active", "GOMP_SPINCOUNT=7", "KMP_BLOCKTIME=1"])
    def test_the_users_own_wins(self, user: str):
        assert self.seen(self.ENTRY, **dict([user.split("=")])) == user

    @pytest.mark.parametrize("start", ["import kssm_kernels", "from kssm import KSSMv3"])
    def test_the_libraries_set_nothing(self, start: str):
        assert self.seen(start) == ""

    @pytest.mark.parametrize("file", ["README.md", "docs/waiting.md"])
    def test_what_is_written_is_what_is_set(self, file: str):
        text = (Path(__file__).parents[2] / file).read_text(encoding="utf-8")
        assert "=".join(WAITING) in text

    def test_the_gate_never_spins_unless_it_is_told_to(self):
        text = (Path(__file__).parents[2] / ".ci" / "run").read_text(encoding="utf-8")
        users = "".join("${" + name + ":-}" for name in WAITING_VARIABLES)
        assert f'if [ -z "{users}" ]; then export OMP_WAIT_POLICY=passive; fi' in text

    def test_nothing_is_set_once_torch_is_loaded(self, monkeypatch: pytest.MonkeyPatch):
        for name in WAITING_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        assert kssm("--help") == 0
        assert not os.environ.keys() & set(WAITING_VARIABLES)

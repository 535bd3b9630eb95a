"""The C++ of the operator without Python: under valgrind, and the proof that the sanitizer builds can fail."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATOR = [
    "system/pages",
    "system/scratch",
    "kernels/portable",
    *(f"layer/{file.stem}" for file in (ROOT / "csrc/layer").glob("*.cpp")),
]
CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def build(name, sources, folder, *flags):
    """Compile tests/native/``name``.cpp with some of csrc/; threads are std::thread, which the tools understand."""
    program = folder / name
    files = [ROOT / "tests" / "native" / f"{name}.cpp", *(ROOT / "csrc" / f"{source}.cpp" for source in sources)]
    options = ["-std=c++20", "-g", "-pthread", "-DKTLIB_STD_THREADS", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([CXX, *options, *files, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return build("tasks", [], tmp_path_factory.mktemp("native"), "-O1", "-fsanitize=thread")


@pytest.mark.parametrize(("kind", "races"), [("apart", False), ("shared", True)])
def test_thread_sanitizer_reports_a_race_and_nothing_else(tasks, kind, races):
    done = subprocess.run([tasks, kind], capture_output=True, text=True)
    assert ("data race" in done.stderr) == races and (done.returncode != 0) == races, done.stderr


@pytest.fixture(scope="module")
def operator(tmp_path_factory):
    return build("operator", OPERATOR, tmp_path_factory.mktemp("native"), "-O1")


def test_the_operator_runs_without_python(operator):
    done = subprocess.run([operator, "good"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 not finite\n")


@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed: apt install valgrind")
@pytest.mark.parametrize(("kind", "errors"), [("good", False), ("undefined", True)])
def test_valgrind_on_the_portable_kernels(operator, kind, errors):
    """Nothing undefined is used, no access is out of bounds, nothing leaks; and an unset weight would be seen."""
    command = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", operator, kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert ("uninitialised value" in done.stderr) == errors, done.stderr
    assert done.returncode == (9 if errors else 0), done.stderr

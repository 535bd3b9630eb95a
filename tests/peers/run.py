"""``make test-peers``: PEFT's and transformers' own tests, for the installed versions, with ktlib in place.

What they need is downloaded once into build/peers: the source distributions of both, and packages that only their tests
import, which stay out of .venv. The tests of each model family are in no distribution: they run from a git checkout of
transformers, TRANSFORMERS=folder, or from one that is cloned into build/peers where GitHub can be reached.

Exit code 0: all tests passed but those of differences.json, which all failed; 1: they did not; 2: something to fetch
was not to be had, or TRANSFORMERS is not what is installed.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "peers"
URL = "https://github.com/huggingface/transformers"
PACKAGES = ("diffusers", "parameterized")  # PEFT's tests import the first, transformers' the second
FAMILIES = (
    *("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "gpt_oss"),
    *("granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"),
)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", metavar="DIR", help="a git checkout of the installed transformers")
    options = parser.parse_args(arguments)
    transformers = importlib.metadata.version("transformers")
    try:
        checkout = find_checkout(options.transformers, transformers)
        packages(BUILD / "packages")
        peft = source("peft", importlib.metadata.version("peft"))
        common = source("transformers", transformers)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    runs = {
        "PEFT's tests of expert parameters": (peft, ["tests/test_target_parameters.py"]),
        "transformers' common tests of models, on ours": (common, [str(HERE / "transformers_common.py")]),
    }
    if checkout is not None:
        families = [f"tests/models/{family}/test_modeling_{family}.py" for family in FAMILIES]
        runs["transformers' tests of families"] = (checkout, families)
    failed = [name for name, (folder, tests) in runs.items() if not passes(name, folder, tests)]
    if checkout is None:
        print(f"\ntransformers' tests of families were not run: they are in no distribution. {how_to(transformers)}")
    print(f"\n{len(runs) - len(failed)} of {len(runs)} as expected" + "".join(f"; not {name}" for name in failed))
    return 1 if failed else 0


def how_to(version):
    command = f"git clone --depth 1 --branch v{version} {URL}"
    return f"To get them: `{command}`, then `make test-peers TRANSFORMERS=transformers`."


def passes(name, folder, tests):
    """Run tests from their own folder, without a network, and with the plugin; True if all came out as expected."""
    print(f"\n>>> {name}", flush=True)
    paths = [HERE, HERE.parent, BUILD / "packages", os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # models are tiny
        "TRANSFORMERS_VERBOSITY": "warning",  # some tests look for what it logs
    }
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", str(HERE / "pytest.ini"), "--rootdir", str(folder)]
    command += ["--differences", str(HERE / "differences.json"), "-q", "-rfEx", "--tb=short", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *tests], cwd=folder, env=environment).returncode == 0


def packages(folder):
    """Install what only the tests import into a folder of its own, if it is not there."""
    if all((folder / name).is_dir() for name in PACKAGES):
        return
    pip("install", "--no-deps", "--target", str(folder), *PACKAGES)


def source(name, version):
    """The unpacked source distribution of this version; downloaded unless it is there.

    Raises:
        RuntimeError: it cannot be downloaded, or is another version's.
    """
    archive, folder = BUILD / f"{name}-{version}.tar.gz", BUILD / f"{name}-{version}"
    if not archive.is_file():
        # pip asks a source distribution for its metadata, for which the installed setuptools will do
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(BUILD)]
        pip("download", *options, f"{name}=={version}")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=BUILD) as unfinished, tarfile.open(archive) as file:
            file.extractall(unfinished, filter="data")
            (Path(unfinished) / folder.name).rename(folder)
    found = re.search(r"^Version: (.*)$", (folder / "PKG-INFO").read_text(), re.MULTILINE).group(1)
    if found != version:
        raise RuntimeError(f"{folder}: got version {found} of {name}, needs {version}: remove it")
    return folder


def pip(*arguments):
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        raise RuntimeError(f"pip failed, whose message is above: {' '.join(arguments)}")


def find_checkout(folder, version):
    """The git checkout of transformers to take tests from: the one given, or one cloned here; None without.

    Raises:
        RuntimeError: the given folder is no checkout of transformers, or not of the installed version.
    """
    if folder is None:
        folder = BUILD / f"transformers-git-{version}"
        if not folder.is_dir() and not clone(version, folder):
            return None
    folder = Path(folder).resolve()
    init = folder / "src" / "transformers" / "__init__.py"
    if not init.is_file() or not (folder / "tests" / "models").is_dir():
        raise RuntimeError(f"TRANSFORMERS: {folder} is no git checkout of transformers. {how_to(version)}")
    found = re.search(r'^__version__ = "(.*)"', init.read_text(), re.MULTILINE)
    if found is None or found.group(1) != version:
        got = found.group(1) if found else "no version"
        raise RuntimeError(
            f"TRANSFORMERS: got {got} in {folder}, needs {version}, the installed one. {how_to(version)}"
        )
    return folder


def clone(version, folder):
    """Whether transformers of this version could be cloned into the folder; git says why not."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as unfinished:
        command = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{version}", URL, f"{unfinished}/clone"]
        try:
            cloned = subprocess.run(command, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}, timeout=900)
        except (FileNotFoundError, subprocess.TimeoutExpired):  # no git; no answer
            return False
        if cloned.returncode == 0:
            Path(unfinished, "clone").rename(folder)
        return cloned.returncode == 0


if __name__ == "__main__":
    sys.exit(main())

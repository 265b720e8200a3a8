"""What others install: the wheel with its kernels, the wheel of a machine without a compiler, the sdist."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "signbit/libsignbit_kernels.so"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the source tree is not there"),
    pytest.mark.skipif(sys.platform != "linux", reason="compilers are hidden by PATH, which is Linux's way"),
]
# A compiler of before 2020; and gcc 11, which knows the instructions but not the vectors.
OLD_COMPILERS = {
    "too old": """#!/bin/sh
case "$*" in *-mavxvnni*) echo "error: unrecognized command-line option '-mavxvnni'" >&2; exit 1;; esac
exec {compiler} "$@"
""",
    "gcc 11": """#!/bin/sh
for word in "$@"; do
  case "$word" in *.cpp|*.cxx) if grep -q __builtin_shufflevector "$word"; then
    echo "error: '__builtin_shufflevector' was not declared in this scope" >&2; exit 1; fi;;
  esac
done
exec {compiler} "$@"
""",
}


def built(out, path):
    """The wheel that pip builds from this tree where PATH is `path`, and what was said."""
    left_out = {"CC", "CXX", "CMAKE_ARGS", "SKBUILD_CMAKE_ARGS"}
    if str(path) != os.environ["PATH"]:
        left_out.add("CMAKE_CXX_COMPILER_LAUNCHER")  # ccache, which would not be found
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, ROOT]
    done = subprocess.run(command, env={**environment, "PATH": str(path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel, " ".join((done.stdout + done.stderr).split())


def check_installed(wheel, target, backend):
    """Runs tests/installed.py where `wheel` is installed and this environment's signbit is not."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Without `site` no .pth file is read: an editable signbit does not come before the path.
    folders = dict.fromkeys([str(target), *(sysconfig.get_path(name) for name in ("purelib", "platlib")), str(ROOT)])
    environment = {k: v for k, v in os.environ.items() if k != "SIGNBIT_CPU"}
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    command = [sys.executable, "-S", "-m", "tests.installed", backend, str(target)]
    done = subprocess.run(command, env=environment, cwd=target.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def sources():
    """The package's files as the wheel must name them."""
    package = ROOT / "src"
    return {str(p.relative_to(package)) for p in package.rglob("*") if p.suffix in (".py", ".typed", ".cu", ".cuh")}


# Nor is ninja on these paths (its Python package is found), nor the compiler that CXX of Python's own build names.
@pytest.mark.parametrize(
    ("compiler", "warning"),
    [
        ("none", "no C++ compiler was found"),
        ("too old", "c++ is too old for the kernels"),
        ("gcc 11", "c++ is too old for the kernels"),
    ],
)
def test_without_a_compiler_the_wheel_is_the_reference_and_says_so(compiler, warning, tmp_path):
    path, out = tmp_path / "bin", tmp_path / "out"
    path.mkdir()
    if compiler != "none":
        if "x86_64" not in sysconfig.get_platform() or (found := shutil.which("c++")) is None:
            pytest.skip("no C++ compiler for x86-64")
        (path / "c++").write_text(OLD_COMPILERS[compiler].format(compiler=found))
        (path / "c++").chmod(0o755)
        for tool in ("sh", "grep", "as", "ld", "ar", "ranlib"):
            (path / tool).symlink_to(shutil.which(tool))
    wheel, said = built(out, path)
    assert warning in said
    assert LIBRARY not in names(wheel) and sources() <= names(wheel)
    check_installed(wheel, tmp_path / "target", "reference")


def test_the_wheel_holds_the_kernels_and_serves_every_python(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    wheel, _ = built(tmp_path / "out", os.environ["PATH"])
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert {LIBRARY} | sources() <= names(wheel)
    assert not [name for name in names(wheel) if not name.startswith(("signbit/", "signbit-"))]
    check_installed(wheel, tmp_path / "target", "kernels")


def test_the_sdist_holds_what_a_build_needs(tmp_path):
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()}
    assert csrc | {f"src/{name}" for name in sources()} | {"LICENSE", "README.md", "pyproject.toml"} <= held
    assert not [name for name in held if name.startswith((".ci", ".cache", ".git/", ".github", "demo-out"))]

"""The CUDA module fused_align._cuda, where it can be built. All else of the package is in pyproject.toml.

FUSED_ALIGN_CUDA        auto (default): build it if nvcc is found. 1: fail if it can't be built. 0: don't
FUSED_ALIGN_CUDA_ARCHS  the GPUs to compile for, such as "90a" or "80;90+PTX". By default 80, 90a and 100, as
                        far as this nvcc knows them, and PTX of the newest for those that come later
CUDA_HOME, CUDA_PATH    the toolkit with bin/nvcc; else nvcc is taken from PATH, then /usr/local/cuda
CXX                     the host compiler, c++ by default
MAX_JOBS                how many compilers run at once; ninja decides by default
NVCC_PREPEND_FLAGS, NVCC_APPEND_FLAGS    nvcc reads these itself; ninja does not see that they change

torch is not imported: the module reads raw pointers and a stream, so that one build serves every torch, and
`pip install` works in an isolated build environment that has no torch. Objects stay in build/, where ninja
compiles what has changed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = "csrc"
OLDEST_NVCC = (12, 0)
OLDEST_ARCH = 80
ARCHS = ("80", "90a", "100")
REQUIRES = ["pybind11>=2.13", "ninja>=1.11"]  # where the module is built, and only there
HINT = "FUSED_ALIGN_CUDA=0 installs the package without it."

NINJA = """\
builddir = {folder}
rule cu
  command = {nvcc} {archs} -O3 -std=c++17 --expt-relaxed-constexpr -lineinfo --threads=4 $
    -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden -MMD -MF $out.d -c $in -o $out
  description = nvcc $in
  depfile = $out.d
  deps = gcc
rule cpp
  command = {cxx} {defines} {includes} -O3 -std=c++17 -fPIC -fvisibility=hidden -MMD -MF $out.d -c $in -o $out
  description = {cxx} $in
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} {archs} -shared -cudart static -Xlinker --version-script={folder}/exports $in -o $out
  description = nvcc -o $out
"""


class Toolkit(NamedTuple):
    nvcc: str
    release: tuple[int, int]
    known: list[str]  # what it compiles for: "80", "90", "90a", ...


def find_nvcc(environment: Mapping[str, str], usual: str = "/usr/local/cuda") -> str | None:
    """A toolkit that the environment names is the only one that counts."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    path = f"{home}/bin" if home else f"{environment.get('PATH', '')}{os.pathsep}{usual}/bin"
    return shutil.which("nvcc", path=path)


def find_toolkit(environment: Mapping[str, str]) -> Toolkit | str:
    """The toolkit to build with, or a sentence that says why there is none."""
    if sys.platform != "linux":
        return f"it is for Linux, and this is {sys.platform}."
    nvcc = find_nvcc(environment)
    if nvcc is None:
        home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
        where = (
            f"in {home}/bin, which CUDA_HOME or CUDA_PATH names"
            if home
            else "on PATH or in /usr/local/cuda/bin"
        )
        return f"there is no nvcc {where}. Set CUDA_HOME to a CUDA toolkit."
    try:
        version, options = (
            subprocess.check_output([nvcc, ask], text=True) for ask in ("--version", "--help")
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} does not run: {error}."
    found = re.search(r"release (\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    if release < OLDEST_NVCC:
        return "it needs nvcc {}.{} or newer, and {} is {}.{}.".format(*OLDEST_NVCC, nvcc, *release)
    # not --list-gpu-code, which leaves out the variants with a letter
    return Toolkit(nvcc, release, sorted(set(re.findall(r"\bsm_(\d+[af]?)\b", options)), key=number))


def number(arch: str) -> int:
    return int(arch.rstrip("af"))


def parse_archs(asked: str | None, known: list[str]) -> list[str]:
    """What to compile for, as in "80", "90a", "100+PTX"; None is the default.

    Raises:
        SystemExit: it is no list of architectures, or nvcc or the kernels can't serve one of them.
    """
    if asked is None:
        archs = [arch for arch in ARCHS if arch in known]
        if missing := ", ".join(arch for arch in ARCHS if arch not in known):
            print(f"fused_align._cuda: this nvcc does not know {missing}; left out")
        newest = [arch for arch in archs if arch.isdigit()][-1]  # PTX of 90a would serve no later GPU
        return [f"{arch}+PTX" if arch == newest else arch for arch in archs]
    archs = list(dict.fromkeys(re.split(r"[;,\s]+", asked.strip("; ,"))))
    for arch in archs:
        problem = None
        if not re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", arch):
            problem = 'must list compute capabilities without the dot, such as "90a" or "80;90+PTX"'
        elif number(arch.removesuffix("+PTX")) < OLDEST_ARCH:
            problem = f"must be {OLDEST_ARCH} or newer, which the kernels need"
        elif arch.removesuffix("+PTX") not in known:
            problem = f"must be what this nvcc knows, {', '.join(known)}"
        if problem:
            raise SystemExit(f"FUSED_ALIGN_CUDA_ARCHS {problem}; got {arch!r} in {asked!r}.")
    return archs


def sources() -> list[str]:
    return [f"{CSRC}/bindings.cpp", *sorted(f"{CSRC}/{file.name}" for file in (ROOT / CSRC).glob("*.cu"))]


def ninja_file(nvcc: str, archs: list[str], cxx: str, includes: list[str], folder: str) -> str:
    """build.ninja: an object of each source, and the module of them. Paths are relative to ROOT."""
    names = list(dict.fromkeys(arch.removesuffix("+PTX") for arch in archs))
    ptx = [arch.removesuffix("+PTX") for arch in archs if arch.endswith("+PTX")]
    gencode = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    gencode += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in ptx]
    words = {
        "nvcc": [nvcc, "-ccbin", cxx],
        "archs": gencode,
        "cxx": [cxx],
        "defines": ['-DFUSED_ALIGN_DEVICE="cuda"', f'-DFUSED_ALIGN_ARCHS="{" ".join(archs)}"'],
        "includes": [f"-I{path}" for path in includes],
    }
    text = NINJA.format(
        folder=folder, **{key: shlex.join(word).replace("$", "$$") for key, word in words.items()}
    )
    objects = []
    for source in map(Path, sources()):
        objects.append(f"{folder}/{source.name}.o")
        text += f"build {objects[-1]}: {source.suffix[1:]} {source}\n"
    return f"{text}build {folder}/_cuda.so: link {' '.join(objects)}\n"


class NinjaBuild(build_ext):
    """Has ninja run nvcc, the host compiler and the linker."""

    toolkit: Toolkit
    archs: list[str]

    def build_extension(self, ext: Extension) -> None:
        cxx = os.environ.get("CXX") or "c++"
        scripts = sysconfig.get_path("scripts")  # of an environment that need not be active
        ninja = shutil.which("ninja", path=f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}")
        if shutil.which(cxx) is None:
            raise SystemExit(
                f"fused_align._cuda: there is no C++ compiler {cxx!r}; CXX names another. {HINT}"
            )
        missing = "ninja" if ninja is None else "pybind11" if find_spec("pybind11") is None else None
        if ninja is None or missing:
            raise SystemExit(
                f"fused_align._cuda: {missing} is needed to build it. pip brings it under build isolation; "
                f"without: pip install {shlex.join(REQUIRES)}. {HINT}"
            )
        # a folder for each compiler and Python: ninja does not see when those change
        folder = "build/cuda-{}.{}-{}".format(*self.toolkit.release, sys.implementation.cache_tag)
        includes = [sysconfig.get_path("include"), import_module("pybind11").get_include()]
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        (ROOT / folder / "exports").write_text("{ global: PyInit__cuda; local: *; };\n")
        text = ninja_file(self.toolkit.nvcc, self.archs, cxx, includes, folder)
        (ROOT / folder / "build.ninja").write_text(text)
        print(f"fused_align._cuda: {self.toolkit.nvcc} for {' '.join(self.archs)}", flush=True)
        jobs = os.environ.get("MAX_JOBS")
        command = [ninja, "-f", f"{folder}/build.ninja", *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SystemExit(f"fused_align._cuda could not be built; the reason is above. {HINT}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / folder / "_cuda.so", target)


def arguments(environment: Mapping[str, str]) -> dict[str, Any]:
    """Those of setup(); none for the pure Python package."""
    choice = environment.get("FUSED_ALIGN_CUDA") or "auto"
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FUSED_ALIGN_CUDA must be one of auto, 0, 1; got {choice!r}.")
    if choice == "0":
        return {}
    toolkit = find_toolkit(environment)
    if isinstance(toolkit, str):
        if choice == "1":
            raise SystemExit(f"FUSED_ALIGN_CUDA=1 asks for the CUDA module, which can't be built: {toolkit}")
        print(f"fused_align._cuda is not built: {toolkit}")
        return {}
    archs = parse_archs(environment.get("FUSED_ALIGN_CUDA_ARCHS") or None, toolkit.known)
    command = type("NinjaBuild", (NinjaBuild,), {"toolkit": toolkit, "archs": archs})
    module = Extension("fused_align._cuda", sources())
    return {"ext_modules": [module], "cmdclass": {"build_ext": command}, "setup_requires": REQUIRES}


if __name__ == "__main__":
    setup(**arguments(os.environ))

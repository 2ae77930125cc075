"""csrc/ for a CPU: its sources, compiled by g++ with the headers of tests/emulation/, which run blocks.

`load()` gives the module _cuda as nvcc would build it, for tensors on the CPU. `ordered` sets the order in
which blocks and threads run: a result that depends on it is a race. Accesses that a GPU would refuse
(misaligned, null pointers), indices outside of arrays, integers that overflow, and threads that wait for each
other forever are errors of the launch.

A read or write outside of a tensor is found in a process with the environment `sanitized()`, where load()
builds with AddressSanitizer, which ends the process with a report. Its runtime has to be there before Python,
hence LD_PRELOAD. Leaks are not looked for, as Python keeps what it has until it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import getpass
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).parent.parent / "csrc"
EMULATION = Path(__file__).parent / "emulation"
SCRIPT = EMULATION / "shared.ld"
COMPILER = os.environ.get("CXX", "g++")
KEPT_SECONDS = 7 * 24 * 3600  # of what nobody used in the meantime

# device code has no aliasing by types: 16-byte loads are casts of pointers
LANGUAGE = [
    "-std=c++17",
    "-fno-strict-aliasing",
    "-fPIC",
    "-fvisibility=hidden",
    "-fdata-sections",
    "-Wall",
    "-Wextra",
    "-Werror",
]
LANGUAGE += [
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
]  # unroll; what the checks below make it imagine
# What emulation.cpp has handlers for; they make it an error of the launch.
CHECKS = ["-fsanitize=alignment,null,bounds,shift,signed-integer-overflow,integer-divide-by-zero"]
CHECKS += ["-fno-sanitize-recover=all"]
# It leaves gaps between arrays in shared memory, too. Variables that were never written hold a pattern.
ADDRESS = [
    "-fsanitize=address",
    "-fsanitize-sections=emulated_shared_*",
    "-ftrivial-auto-var-init=pattern",
    "-g1",
]


def why_not() -> str | None:
    if shutil.which(COMPILER) is None:
        return f"the emulation of CUDA is compiled by g++, and {COMPILER} is not installed."
    if importlib.util.find_spec("pybind11") is None:
        return "csrc/bindings.cpp is written with pybind11, which is not installed."
    return None


def build(
    sources: Sequence[Path],
    name: str,
    *,
    sanitize: bool = False,
    include: Sequence[Path] = (),
    define: Sequence[str] = (),
) -> Path:
    """A library of these .cu and .cpp files, made unless there is one of the same sources, headers and flags.

    Processes that want the same one at the same time wait for the first.
    """
    level = ["-O1", *ADDRESS] if sanitize else ["-O2"]
    flags = [*LANGUAGE, *level, *(f"-D{one}" for one in define)]
    commands = dict(_compilation(source, [*flags, *CHECKS], [EMULATION, *include]) for source in sources)
    commands.update([_compilation(EMULATION / "emulation.cpp", flags, [EMULATION])])
    names = "".join(path.name for path in commands) + SCRIPT.read_text()
    key = hashlib.sha256(names.encode()).hexdigest()[:24]
    library = _cache() / f"{name}-{key}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            missing = [path for path in commands if not path.exists()]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_make, missing, [commands[path] for path in missing]))
            shared = ["-shared", f"-Wl,-T,{SCRIPT}", *(["-fsanitize=address"] if sanitize else [])]
            _make(library, [COMPILER, *shared, *map(str, commands), "-lpthread"])
            _forget_old()
        for path in (library, *commands):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
    return library


def _compilation(source: Path, flags: list[str], folders: list[Path]) -> tuple[Path, list[str]]:
    """Where the object of a source goes, and the command that makes it."""
    command = [COMPILER, *flags, *(f"-I{folder}" for folder in folders), "-x", "c++", "-c", str(source)]
    key = hashlib.sha256((_version() + shlex.join(command)).encode() + source.read_bytes())
    for folder in folders:
        for path in sorted(folder.rglob("*.*")):
            if path.suffix in (".h", ".cuh", ".hpp"):
                key.update(str(path).encode() + path.read_bytes())
    # shared.ld goes by the end of the name
    end = ".cu.o" if source.suffix == ".cu" else ".o"
    return _cache() / f"{source.stem}-{key.hexdigest()[:24]}{end}", command


@functools.cache
def load() -> ModuleType:
    """The module _cuda of csrc/, for tensors on the CPU; with AddressSanitizer where `sanitized()` is set."""
    import pybind11

    path = build(
        [*sorted(CSRC.glob("*.cu")), CSRC / "bindings.cpp"],
        "_cuda",
        sanitize=_sanitizes(),
        include=[CSRC, Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])],
        define=['FUSED_ALIGN_DEVICE="cpu"', 'FUSED_ALIGN_ARCHS=""'],
    )
    loader = importlib.machinery.ExtensionFileLoader("emulated._cuda", str(path))
    spec = importlib.util.spec_from_loader("emulated._cuda", loader)  # pybind11 keeps modules by name
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def ordered(library: ModuleType | ctypes.CDLL, order: int) -> Iterator[None]:
    """Blocks and threads by their numbers (0), backwards (1), or shuffled (from 2 on, each differently)."""
    functions = library if isinstance(library, ctypes.CDLL) else ctypes.CDLL(str(library.__file__))
    functions.emulation_set_order(order)
    try:
        yield
    finally:
        functions.emulation_set_order(0)


def sanitized() -> dict[str, str]:
    """The environment of a process whose load() builds with AddressSanitizer."""
    # libstdc++ as well: the runtime looks for its __cxa_throw when it starts, and python has none
    libraries = [
        _run([COMPILER, f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1"
    preload = ":".join(str(Path(path).resolve()) for path in libraries)
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options}


def _sanitizes() -> bool:
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
    if done.returncode != 0:
        raise RuntimeError(f"This command failed:\n{shlex.join(command)}\n{done.stderr}{done.stdout}")
    return done.stdout


@functools.cache
def _version() -> str:
    return _run([COMPILER, "--version"])


def _make(path: Path, command: list[str]) -> None:
    """Under another name first: what carries this one is complete."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="making-", suffix=path.suffix) as part:
        _run([*command, "-o", part.name])
        os.replace(part.name, path)
        Path(part.name).touch()  # for NamedTemporaryFile to remove


@functools.cache
def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (
        Path(base) / "fused_align"
        if base
        else Path(tempfile.gettempdir()) / f"fused_align-{getpass.getuser()}"
    )
    folder = folder / "emulation"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for one in (folder, folder.parent):
        if one.stat().st_uid != os.getuid():
            raise RuntimeError(
                f"{one} belongs to somebody else, and libraries are loaded from it. Set XDG_CACHE_HOME."
            )
    return folder


def _forget_old() -> None:
    for path in _cache().iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.suffix != ".lock" and time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.unlink()

"""setup.py with and without nvcc, what the archives hold, and what nvcc made of the kernels."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KNOWN = ["75", "80", "86", "89", "90", "90a", "100", "100a", "100f", "120"]

#: the most registers of a thread on any architecture, in the eights that a GPU gives out: in variants for
#: float32 and 16-bit tensors, and with float64. A multiprocessor has 65536: four blocks of 256 threads at 64.
REGISTERS = {
    "add_products": (48, 72), "add_rows": (64, 72), "close_product": (40, 40), "coefficients": (56, 56),
    "compact": (32, 0), "exp_tile": (112, 112), "finish_rows": (40, 40), "grad_tile": (96, 96),
    "gradient": (80, 72), "judged_loss": (80, 0), "kept_tile": (64, 80), "open_rows": (64, 80),
    "policy_loss": (128, 0), "preference_loss": (96, 0), "scaled_rows": (48, 56), "stats": (80, 80),
    "store_hidden": (64, 80),
}  # fmt: skip
#: kernels whose rows are long and adjacent: threads load 16 bytes at a time
STREAMS = {
    "add_products", "add_rows", "close_product", "exp_tile", "grad_tile", "gradient", "kept_tile",
    "open_rows", "scaled_rows", "stats", "store_hidden",
}  # fmt: skip


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fused_align_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


def fake_nvcc(folder: Path, release: str = "12.8") -> Path:
    """A toolkit whose nvcc says what it is, and compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    known = ",".join(f"'sm_{arch}'" for arch in KNOWN)
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release {release}, V{release}.93";;
    --help) echo "{known}";;
    *) echo "this nvcc compiles nothing"; exit 3;;
esac
""")
    nvcc.chmod(0o755)
    return nvcc


# ---- which nvcc, and for what --------------------------------------------------------------------------


def test_where_nvcc_is_looked_for(tmp_path: Path) -> None:
    one, other = fake_nvcc(tmp_path / "one"), fake_nvcc(tmp_path / "other")
    usual = str(tmp_path / "one")
    on_path = {"PATH": str(other.parent)}
    assert setup.find_nvcc({"PATH": ""}, str(tmp_path)) is None
    assert setup.find_nvcc({"PATH": ""}, usual) == str(one)
    assert setup.find_nvcc(on_path, usual) == str(other)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        assert setup.find_nvcc({**on_path, name: usual}, "") == str(one)
        assert setup.find_nvcc({**on_path, name: str(tmp_path)}, usual) is None


@pytest.mark.parametrize(
    ("asked", "known", "expected"),
    [
        (None, KNOWN, ["80", "90a", "100+PTX"]),
        (None, ["80", "90", "90a"], ["80+PTX", "90a"]),  # before CUDA 12.8
        ("90a", KNOWN, ["90a"]),
        ("80;90+PTX", KNOWN, ["80", "90+PTX"]),
        (" 80, 120+PTX 80", KNOWN, ["80", "120+PTX"]),
    ],
)
def test_architectures(asked: str | None, known: list[str], expected: list[str]) -> None:
    assert setup.parse_archs(asked, known) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("9.0", "without the dot, such as \"90a\" or \"80;90+PTX\"; got '9.0' in '9.0'"),
        ("80;Hopper", "got 'Hopper' in '80;Hopper'"),
        ("75", "must be 80 or newer, which the kernels need; got '75'"),
        ("80;110", "must be what this nvcc knows, 75, 80, 86"),
    ],
)
def test_wrong_architectures_are_errors(asked: str, said: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(said)):
        setup.parse_archs(asked, KNOWN)


@pytest.mark.skipif(sys.platform != "linux", reason="the module is for Linux")
def test_the_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = {"CUDA_HOME": str(tmp_path)}
    assert setup.arguments(none) == {}
    assert f"fused_align._cuda is not built: there is no nvcc in {tmp_path}/bin" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="FUSED_ALIGN_CUDA=1 asks .* there is no nvcc in .* Set CUDA_HOME"):
        setup.arguments({**none, "FUSED_ALIGN_CUDA": "1"})
    with pytest.raises(SystemExit, match="must be one of auto, 0, 1; got 'yes'"):
        setup.arguments({**none, "FUSED_ALIGN_CUDA": "yes"})

    fake_nvcc(tmp_path / "new")
    new = {"CUDA_HOME": str(tmp_path / "new")}
    assert setup.arguments({**new, "FUSED_ALIGN_CUDA": "0"}) == {}
    for choice in ("", "auto", "1"):
        given = setup.arguments({**new, "FUSED_ALIGN_CUDA": choice})
        assert given["setup_requires"] == setup.REQUIRES
        assert [module.name for module in given["ext_modules"]] == ["fused_align._cuda"]
        assert given["ext_modules"][0].sources == setup.sources()

    fake_nvcc(tmp_path / "old", "11.8")
    old = {"CUDA_HOME": str(tmp_path / "old")}
    assert setup.arguments(old) == {}
    with pytest.raises(SystemExit, match=r"needs nvcc 12\.0 or newer, and .*/nvcc is 11\.8\."):
        setup.arguments({**old, "FUSED_ALIGN_CUDA": "1"})


def test_the_ninja_file() -> None:
    text = setup.ninja_file("/a $b/nvcc", ["80", "90a", "100+PTX"], "c++", ["/with space"], "build/x")
    for expected in (
        "'/a $$b/nvcc' -ccbin c++",
        "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a "
        "-gencode=arch=compute_100,code=sm_100 -gencode=arch=compute_100,code=compute_100 -O3",
        "'-DFUSED_ALIGN_ARCHS=\"80 90a 100+PTX\"' '-I/with space'",
        "build build/x/bindings.cpp.o: cpp csrc/bindings.cpp\n",
    ):
        assert expected in text
    kernels = sorted((ROOT / "csrc").glob("*.cu"))
    for file in kernels:
        assert f"build build/x/{file.name}.o: cu csrc/{file.name}\n" in text
    assert text.splitlines()[-1].count(".o") == len(kernels) + 1


# ---- archives ------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a build reads of the project, and an old module, in a folder of their own."""
    folder = tmp_path / "project"
    folder.mkdir()
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    for part in ("csrc", "fused_align", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (folder / "fused_align" / "_cuda.so").touch()
    return folder


def hook(project: Path, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A hook of PEP 517, as pip calls it, and no torch; its result is the last line as JSON."""
    code = (
        "import json, sys\n"
        "sys.modules['torch'] = None\n"
        "from setuptools import build_meta\n"
        "print(json.dumps(getattr(build_meta, sys.argv[1])(*sys.argv[2:])))\n"
    )
    environment = {**os.environ, "FUSED_ALIGN_CUDA": "auto", "FUSED_ALIGN_CUDA_ARCHS": "", **environment}
    command = [sys.executable, "-c", code, name, *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


def result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_nvcc_the_wheel_is_pure(project: Path, tmp_path: Path) -> None:
    hidden = {"CUDA_HOME": str(tmp_path)}
    assert result(hook(project, "get_requires_for_build_wheel", **hidden)) == []
    wheel = result(hook(project, "build_wheel", str(tmp_path), **hidden))
    assert re.fullmatch(r"fused_align-[\d.]+-py3-none-any\.whl", wheel)
    names = zipfile.ZipFile(tmp_path / wheel).namelist()
    assert "fused_align/api.py" in names and "fused_align/py.typed" in names
    assert all(name.startswith("fused_align") and not name.endswith(".so") for name in names)


def test_the_sdist_has_what_a_build_needs(project: Path, tmp_path: Path) -> None:
    archive = result(hook(project, "build_sdist", str(tmp_path), CUDA_HOME=str(tmp_path)))
    with tarfile.open(tmp_path / archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()} <= names
    assert {"setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "fused_align/api.py"} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith("tests")]


@pytest.mark.skipif(sys.platform != "linux", reason="the module is for Linux")
def test_a_failed_compilation_is_an_error(project: Path, tmp_path: Path) -> None:
    environment = {"CUDA_HOME": str(tmp_path / "cuda"), "CXX": "true"}
    fake_nvcc(tmp_path / "cuda")
    assert result(hook(project, "get_requires_for_build_wheel", **environment)) == setup.REQUIRES
    pytest.importorskip("pybind11")
    if shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
        pytest.skip("ninja is not installed")
    done = hook(project, "build_wheel", str(tmp_path), **environment)
    assert done.returncode == 1
    assert "this nvcc compiles nothing" in done.stdout
    assert "could not be built; the reason is above. FUSED_ALIGN_CUDA=0 installs" in done.stderr
    done = hook(project, "build_wheel", str(tmp_path), **{**environment, "CXX": "no-such-compiler"})
    assert "there is no C++ compiler 'no-such-compiler'; CXX names another." in done.stderr


# ---- the module ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> Path:
    """The module that is installed. It must be, where nvcc is at hand."""
    spec = importlib.util.find_spec("fused_align._cuda")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin)
    toolkit = setup.find_toolkit(os.environ)
    if isinstance(toolkit, str):
        pytest.skip(f"fused_align._cuda is not built: {toolkit}")
    if os.environ.get("FUSED_ALIGN_CUDA") == "0":
        pytest.skip("fused_align._cuda is not built: FUSED_ALIGN_CUDA=0")
    pytest.fail(f"{toolkit.nvcc} is there, and fused_align._cuda is not built: pip install -e . does it.")


def test_it_imports_without_a_gpu(built: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('fused_align._cuda', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.device, module.unserved(), 'torch' in sys.modules)\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["cuda", "None", "False"], done.stderr


def test_it_links_the_runtime_statically(built: Path) -> None:
    needed = subprocess.run(["ldd", str(built)], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in needed
    assert not re.search("libcud|torch|c10|not found", needed), needed


def cuobjdump(*arguments: object) -> str:
    tools = Path(pytest.importorskip("triton", reason="cuobjdump comes with triton").__file__)
    command = [str(tools.parent / "backends/nvidia/bin/cuobjdump"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def archs(built: Path) -> list[str]:
    listed = cuobjdump("--list-elf", built)
    return sorted(set(re.findall(r"\.sm_(\w+)\.cubin", listed)))


def kernel(mangled: str) -> tuple[str, bool]:
    """exp_tile of _ZN11fused_align3one15exp_tile_kernelI..., and whether double is among what follows."""
    name, rest = "", re.sub(r"^_ZN?", "", mangled)
    while length := re.match(r"L?(\d+)", rest):
        end = length.end() + int(length[1])
        name, rest = rest[length.end() : end], rest[end:]
    types = re.sub(r"L[a-z]\d+E", "", rest).partition("Ev")[0]  # values and the function's arguments apart
    while length := re.search(r"\d+", types):
        types = types[: length.start()] + types[length.end() + int(length[0]) :]
    return name.removesuffix("_kernel"), "d" in types


def test_it_has_code_for_each_architecture(built: Path) -> None:
    told = importlib.import_module("fused_align._cuda").archs.split()
    # by number: cuobjdump before CUDA 13 lists 90a as 90
    numbers = [sorted(re.match(r"\d+", arch)[0] for arch in names) for names in (archs(built), told)]  # type: ignore[index]
    assert numbers[0] == numbers[1]
    ptx = [arch.removesuffix("+PTX") for arch in told if arch.endswith("+PTX")]
    assert set(re.findall(r"\.sm_(\w+)\.ptx", cuobjdump("--list-ptx", built))) == set(ptx)


def test_no_kernel_spills(built: Path) -> None:
    usage = cuobjdump("-res-usage", built)
    faults: list[str] = []
    most: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for code in usage.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", code)
        assert arch is not None
        for name, used in re.findall(r"Function (\w+):\s*(REG:.*)", code):
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", used)}
            short, doubles = kernel(name)
            most[short][doubles] = max(most[short][doubles], numbers["REG"])
            if numbers["STACK"] or numbers["LOCAL"]:
                faults.append(
                    f"{arch[1]} {name}: {numbers['STACK']} bytes of stack, {numbers['REG']} registers"
                )
    assert not faults, "\n".join(faults)
    assert set(most) == set(REGISTERS)
    assert not {
        name: found
        for name, found in most.items()
        if any(one > bound for one, bound in zip(found, REGISTERS[name], strict=True))
    }


def test_rows_are_loaded_16_bytes_at_a_time(built: Path) -> None:
    lacking, streams = [], set()
    for arch in archs(built):
        for function in cuobjdump("-sass", "-arch", f"sm_{arch}", built).split("Function : ")[1:]:
            name = function.split(maxsplit=1)[0]
            if kernel(name)[0] in STREAMS:
                streams.add(kernel(name)[0])
                if not re.search(r"LDG\.E\.(\w+\.)*(128|256)", function):
                    lacking.append(f"sm_{arch} {name}")
    assert not lacking, "\n".join(lacking)
    assert streams == STREAMS

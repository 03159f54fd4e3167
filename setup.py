"""Builds the C++ extension densreg/_C.so, with CUDA kernels where there is nvcc; the rest is in pyproject.toml.

One binary for torch 2.11 and later and for every Python: torch's stable ABI, and no Python API (wheel tag py3-none).
With CUDA kernels it still loads on a torch without CUDA: the CUDA runtime is linked statically, and what only a CUDA
torch has is a weak symbol. Only the headers and libraries are needed of the torch that is installed where the build was
started, and no GPU.

The extension is optional: DENSREG_EXTENSION=require makes a failure an error with the compiler's words, =skip leaves it
out, and by default ("auto") a failure is written to densreg/_build_info.json, which densreg repeats when it has to do
without. DENSREG_CUDA=auto, require or skip says the same of the CUDA kernels alone. By default they are built for the
GPUs of this machine, where it has nvcc and the installed torch is a CUDA build; without a GPU they are left out.
DENSREG_CUDA=require builds them for Ampere, Hopper and Blackwell, and TORCH_CUDA_ARCH_LIST for the GPUs it names.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The oldest torch whose stable ABI is used: 2.11.
MACROS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]

SOURCES = ["csrc/register.cpp", "csrc/cpu/softmax.cpp", "csrc/cpu/pnorm.cpp"]
CUDA_SOURCES = ["csrc/cuda/register.cpp", "csrc/cuda/softmax.cu", "csrc/cuda/pnorm.cu"]

# Ampere, Hopper, Blackwell; the code of the last one as PTX too, which the drivers of later GPUs compile.
ALL_CUDA_TARGETS = "8.0 9.0 10.0+PTX"

COMPILE = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",  # nothing reads errno or floating-point flags: lets loops vectorise
    "-fno-trapping-math",
    *MACROS,
]
# No -use_fast_math: the numbers are right to the last digits, subnormals included.
CUDA_COMPILE = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "--threads=3",  # the targets side by side
    "--compress-mode=size",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-g0",
    *MACROS,
]


def mode_of(variable: str) -> str:
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "require", "skip"):
        raise SystemExit(f"{variable} must be auto, require or skip, got {mode!r}")
    return mode


def torch_folder() -> Path:
    """The folder of the installed torch; not imported, which would cost seconds."""
    # pip's isolated build runs the target's interpreter: what is installed there is not on sys.path, but known.
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    # A .pth file there may name others.
    for place in (*places, *(line for p in places for f in sorted(Path(p).glob("*.pth")) for line in _lines(f))):
        if (Path(place) / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return Path(place) / "torch"
    raise RuntimeError("torch 2.11 or later was not installed when densreg was built: install torch first")


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(errors="replace").splitlines() if line.startswith("/")]


def cuda_toolkit() -> tuple[str, Path, str]:
    """nvcc, the folder of its toolkit, and its version."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None) or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc was not found when densreg was built")
    # Not the folder above nvcc, which may be a script elsewhere.
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    if top is None:
        raise RuntimeError(f"{nvcc} --dryrun does not name its toolkit")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release \S+, V(\S+)", said)
    return nvcc, Path(top[1].strip()).resolve(), version[1] if version else "unknown"


def cuda_targets(cuda: str) -> str:
    """The compute capabilities to build for; raises where nothing asks for one."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named or cuda == "require":
        return named or ALL_CUDA_TARGETS
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        listed = ""
    found = {(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", listed, re.MULTILINE)}
    supported = sorted(each for each in found if each >= (8, 0))
    if not supported:
        raise RuntimeError(
            "no GPU of compute capability 8.0 or later was found when densreg was built; "
            "DENSREG_CUDA=require builds the CUDA kernels all the same"
        )
    return " ".join(f"{major}.{minor}" for major, minor in supported)


def find_in(toolkit: Path, name: str) -> Path:
    """The folder of a header or library in a toolkit, of a system or of NVIDIA's wheels."""
    kind = "include" if name.endswith(".h") else "lib"
    machine = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    for folder in (toolkit / "targets" / f"{machine}-linux" / kind, toolkit / kind, toolkit / f"{kind}64"):
        if (folder / name).is_file():
            return folder
    raise RuntimeError(f"{name} was not found in the CUDA toolkit {toolkit}")


def gencode(targets: str) -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST: "8.0 9.0a 10.0+PTX", separated by blanks or semicolons."""
    options = []
    for target in targets.replace(";", " ").split():
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", target)
        if found is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST must hold targets like 8.0, 9.0a or 10.0+PTX, got {target!r}")
        name = f"{found[1]}{found[2]}{found[3]}"
        options.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if found[4]:
            options.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    if not options:
        raise RuntimeError("TORCH_CUDA_ARCH_LIST is set, and names no target")
    return options


def compiler_command() -> list[str]:
    for named in (os.environ.get("CXX"), sysconfig.get_config_var("CXX")):
        if named and (named == os.environ.get("CXX") or shutil.which(shlex.split(named)[0])):
            return _found(shlex.split(named))
    return _found(["c++"])


def _found(command: list[str]) -> list[str]:
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"the C++ compiler {command[0]} was not found")
    return command


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} could not be run: {error}") from error
    sys.stderr.write(done.stdout)
    if done.returncode:
        # The compiler's own words first: the last lines of a long output seldom say what was wrong.
        lines = done.stdout.splitlines()
        errors = [line for line in lines if re.search(r"\berror\b|not found|cannot ", line)] or lines[-1:]
        raise RuntimeError(f"{Path(command[0]).name} failed: " + "; ".join(errors[:3]))


class BuildExtension(build_ext):
    """Compiles with the flags above, and writes _build_info.json beside the result."""

    def run(self):
        mode, cuda = mode_of("DENSREG_EXTENSION"), mode_of("DENSREG_CUDA")
        info = {"built": False, "platform": platform.platform(), "sources": SOURCES}
        output = Path(self.get_ext_fullpath("densreg._C"))
        output.unlink(missing_ok=True)
        if mode == "skip":
            info["reason"] = "DENSREG_EXTENSION=skip when densreg was built"
        else:
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
                info |= self.build(output, cuda)
            except Exception as error:
                if mode == "require" or cuda == "require":
                    raise
                info["reason"] = f"{type(error).__name__}: {error}"
                print(f"densreg: the C++ extension was not built, plain torch will be used: {error}", file=sys.stderr)
        path = output.with_name("_build_info.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(info, indent=2) + "\n")

    def build(self, output: Path, cuda: str) -> dict:
        """Compiles and links; what was built, for _build_info.json. CUDA kernels are left out rather than a failure."""
        torch = torch_folder()
        started = time.time()
        toolkit = None
        try:
            if cuda == "skip":
                raise RuntimeError("DENSREG_CUDA=skip when densreg was built")
            if not (torch / "lib" / "libtorch_cuda.so").is_file():
                raise RuntimeError("the torch that was installed when densreg was built has no CUDA")
            targets = cuda_targets(cuda)
            toolkit = cuda_toolkit()
            info = self.compile_and_link(output, torch, toolkit, targets)
            info["cuda"] = {
                "nvcc": toolkit[2],
                "targets": targets,
                "seconds": round(time.time() - started, 1),
                "size": output.stat().st_size,
            }
            info["sources"] = SOURCES + CUDA_SOURCES
        except Exception as error:
            if cuda == "require":
                raise
            print(f"densreg: CPU kernels alone, without CUDA kernels: {error}", file=sys.stderr)
            info = self.compile_and_link(output, torch)
            info["cuda_reason"] = str(error)
        else:
            print(f"densreg: CPU kernels, and CUDA kernels for {targets}", file=sys.stderr)
        return info

    def compile_and_link(
        self, output: Path, torch: Path, toolkit: tuple[str, Path, str] | None = None, targets: str = ""
    ) -> dict:
        folder = Path(self.build_temp).absolute()
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier build left may be of other flags or another torch
        folder.mkdir(parents=True)
        compiler = compiler_command()
        root = Path(__file__).parent.absolute()
        include = ["-isystem", str(torch / "include")]
        commands = {}
        for source in SOURCES + (CUDA_SOURCES if toolkit else []):
            target = str(folder / (source.replace("/", "_") + ".o"))
            if source.endswith(".cu"):
                nvcc, home, _ = toolkit
                options = [*CUDA_COMPILE, *gencode(targets)]
                if os.environ.get("CXX"):
                    options += ["-ccbin", compiler[0]]
                first = [nvcc, *options, *include, "-I", str(find_in(home, "cuda_runtime.h"))]
            else:
                flags = shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
                first = [*compiler, *COMPILE, *include, *flags]
            commands[target] = [*first, "-c", str(root / source), "-o", target]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(run, commands.values()))  # raises what one of them does
        link = [*compiler, "-shared", "-s", *commands, "-o", str(output), *shlex.split(os.environ.get("LDFLAGS", ""))]
        link += [f"-L{torch / 'lib'}", "-Wl,--allow-shlib-undefined", "-Wl,--no-as-needed", "-ltorch_cpu"]
        if toolkit:
            # libtorch names libtorch_cuda, where the stream comes from; a torch without CUDA has a libtorch too.
            link += ["-ltorch", f"-L{find_in(toolkit[1], 'libcudart_static.a')}", "-lcudart_static"]
            link += ["-lrt", "-lpthread", "-ldl"]
        run(link)
        said = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        return {"built": True, "compiler": (said.splitlines() or ["unknown"])[0]}

    def get_ext_filename(self, name):
        return str(Path(*name.split("."))) + ".so"  # no Python version in it

    def get_outputs(self):
        outputs = [self.get_ext_fullpath("densreg._C")]
        outputs.append(str(Path(outputs[0]).with_name("_build_info.json")))
        return [path for path in outputs if Path(path).exists()]


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("densreg._C", SOURCES, language="c++")],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)

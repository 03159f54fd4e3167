"""Builds the C++ extension densreg/_C.so; everything else is in pyproject.toml.

One binary for torch 2.11 and later and for every Python: torch's stable ABI, and no Python API (wheel tag py3-none).
Only the headers and libraries are needed of the torch that is installed where the build was started. The extension is
optional: DENSREG_EXTENSION=require makes a failure an error with the compiler's words, =skip leaves it out, and by
default ("auto") a failure is written to densreg/_build_info.json, which densreg repeats when it has to do without.
"""

import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The oldest torch whose stable ABI is used: 2.11.
TORCH_TARGET_VERSION = "0x020b000000000000"

SOURCES = ["csrc/register.cpp", "csrc/cpu/softmax.cpp", "csrc/cpu/pnorm.cpp"]


def torch_folder() -> Path:
    """The folder of the installed torch; not imported, which would cost seconds."""
    # pip's isolated build runs the target's interpreter: what is installed there is not on sys.path, but known.
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for place in places:
        if (Path(place) / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return Path(place) / "torch"
    raise RuntimeError("torch 2.11 or later was not installed when densreg was built: install torch first")


class BuildExtension(build_ext):
    """Compiles with the flags below, and writes _build_info.json beside the result."""

    def run(self):
        mode = os.environ.get("DENSREG_EXTENSION", "auto")
        if mode not in ("auto", "require", "skip"):
            raise SystemExit(f"DENSREG_EXTENSION must be auto, require or skip, got {mode!r}")
        info = {"built": False, "platform": platform.platform(), "sources": SOURCES}
        output = Path(self.get_ext_fullpath("densreg._C"))
        output.unlink(missing_ok=True)
        if mode == "skip":
            info["reason"] = "DENSREG_EXTENSION=skip when densreg was built"
        else:
            try:
                torch = torch_folder()
                extension = self.extensions[0]
                extension.include_dirs = [str(torch / "include")]
                extension.library_dirs = [str(torch / "lib")]
                self.force = True  # what an earlier build left may be of other flags or another torch
                super().run()
                info |= {"built": True, "compiler": self.compiler_name()}
            except Exception as error:
                if mode == "require":
                    raise
                info["reason"] = f"{type(error).__name__}: {error}"
                print(f"densreg: the C++ extension was not built, plain torch will be used: {error}", file=sys.stderr)
        path = output.with_name("_build_info.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(info, indent=2) + "\n")

    def compiler_name(self) -> str:
        try:
            said = subprocess.run([*self.compiler.compiler_so_cxx[:1], "--version"], capture_output=True, text=True)
            return said.stdout.splitlines()[0]
        except (OSError, IndexError, AttributeError):
            return "unknown"

    def get_ext_filename(self, name):
        return str(Path(*name.split("."))) + ".so"  # no Python version in it

    def get_export_symbols(self, extension):
        return []  # no PyInit: it is loaded by torch.ops.load_library

    def get_outputs(self):
        outputs = [self.get_ext_fullpath("densreg._C")]
        outputs.append(str(Path(outputs[0]).with_name("_build_info.json")))
        return [path for path in outputs if Path(path).exists()]


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


extension = Extension(
    "densreg._C",
    SOURCES,
    language="c++",
    libraries=["torch_cpu"],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("TORCH_STABLE_ONLY", None)],
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-fno-math-errno",  # nothing reads errno or floating-point flags: lets loops vectorise
        "-fno-trapping-math",
    ],
    extra_link_args=["-Wl,--allow-shlib-undefined"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel})

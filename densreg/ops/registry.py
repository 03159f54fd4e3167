"""The backends, which of them serves a call of an operator, and the proof of which one did.

A backend is a set of kernels, for any of the operators. :data:`BACKENDS` is the one list of them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from densreg import _torch
from densreg.ops import extension

OPERATORS: list[str] = []
"""The names of all operators: :func:`define` adds to them."""

_library = torch.library.Library("densreg", "DEF")
_python_calls: collections.Counter[str] = collections.Counter()


class Backend:
    """A set of kernels.

    Attributes:
        name: as :func:`backend` takes it.
        description: what ``densreg info`` says where it serves all operators.
        devices: the types of device whose tensors it serves unless another is asked for.
        counted_as: its name in :func:`calls`.
        overload: of each operator, that which this backend serves: "" is the operator itself.
    """

    def __init__(
        self, name: str, description: str, devices: tuple[str, ...], overload: str = "", counted_as: str | None = None
    ) -> None:
        self.name, self.description, self.devices, self.overload = name, description, devices, overload
        self.counted_as = counted_as or name

    def unavailable_reason(self) -> str | None:
        """Why it cannot be used here; None where it can."""
        raise NotImplementedError

    def implementation(self, operator: str, device: str) -> Callable[..., Any] | None:
        """What computes an operator on tensors of a type of device; None where it has no kernel for them."""
        raise NotImplementedError


class CompiledKernels(Backend):
    """Kernels of the C++ extension. What they implement is what they have registered with torch's dispatcher."""

    def unavailable_reason(self) -> str | None:
        there = [device for device in ("cpu", "cuda") if any(self._implements(name, device) for name in OPERATORS)]
        if "cpu" in there or ("cuda" in there and torch.cuda.is_available()):
            return None
        if there:
            return "there is no GPU"
        not_built = extension.build_info().get(f"{self.name}_reason", f"built without {self.description}")
        return extension.UNAVAILABLE or not_built

    def implementation(self, operator: str, device: str) -> Callable[..., Any] | None:
        if not self._implements(operator, device):
            return None
        return getattr(getattr(torch.ops.densreg, operator), self.overload or "default")

    def _implements(self, operator: str, device: str) -> bool:
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)  # on the CPU, too, are the tests' emulated CUDA kernels
        if key is None or (key == "CUDA" and not self.overload):  # there the operator itself leads to another backend
            return False
        overload = f".{self.overload}" if self.overload else ""
        return _torch.has_kernel(f"densreg::{operator}{overload}", key)


class PythonKernels(Backend):
    """Kernels of a Python module: functions with the names and arguments of the operators.

    The module says in ``DEVICES`` what types of device they can run on, and in ``unavailable_reason()`` why they
    cannot run here. It is imported when it is first asked for.
    """

    def __init__(self, name: str, description: str, devices: tuple[str, ...], module: str) -> None:
        super().__init__(name, description, devices, overload=name)
        self.module = module

    @functools.cached_property
    def _kernels(self) -> tuple[ModuleType | None, str | None]:
        """The module where it can be used, else why it cannot."""
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            return None, f"{self.description} cannot be imported: {error}"
        reason = module.unavailable_reason()
        return (module, None) if reason is None else (None, reason)

    def unavailable_reason(self) -> str | None:
        return self._kernels[1]

    def implementation(self, operator: str, device: str) -> Callable[..., Any] | None:
        module, _ = self._kernels
        if module is None or device not in module.DEVICES or not callable(getattr(module, operator, None)):
            return None
        return getattr(getattr(torch.ops.densreg, operator), self.overload)

    def run(self, operator: str, *args: Any) -> Any:
        """What the operator's overload does."""
        module, reason = self._kernels
        function = getattr(module, operator, None)
        if function is None:
            raise RuntimeError(f"the backend {self.name!r} is not available: {reason or f'it has no {operator}'}")
        _python_calls[f"{operator}/{self.name}"] += 1
        return function(*args)


class PlainTorch(Backend):
    """The fallback of every operator, on every device."""

    def unavailable_reason(self) -> str | None:
        return None

    def implementation(self, operator: str, device: str) -> Callable[..., Any] | None:
        # Not the function: a compiler would look into it, and cannot look at a target's classes.
        return getattr(getattr(torch.ops.densreg, operator), self.overload)


_isa = extension.instruction_set()

BACKENDS: dict[str, Backend] = {
    one.name: one
    for one in (
        CompiledKernels("cpu", f"C++ kernels ({_isa})", ("cpu",), counted_as=f"cpu-{_isa}"),  # csrc/cpu
        # Before Triton for every operator, dtype and shape: its launch is C++ where Triton's is Python, and took half
        # the time in small calls on an H200. Large ones Triton served faster there at most sizes, before the CUDA
        # kernels took its tiles; they were not measured again. `python -m benchmarks gpu` times both.
        CompiledKernels("cuda", "CUDA kernels", ("cuda",), overload="cuda"),  # csrc/cuda
        PythonKernels("triton", "Triton kernels", ("cuda",), "densreg.kernels"),
        PlainTorch("torch", "plain torch", (), overload="torch"),
    )
}
"""By name, in order of preference: a call goes to the first that serves its device, is available, and implements the
operator. Plain torch is the last, and implements all."""


# --------------------------------------------------------------------------------------------------------------------
# which one serves a call

_forced: tuple[str, bool] | None = None  # a backend's name, and whether others serve what it does not implement


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot be used here; None where it can."""
    return BACKENDS[name].unavailable_reason()


@contextlib.contextmanager
def backend(name: str, *, fall_through: bool = False) -> Iterator[None]:
    """Force a backend for the calls inside: ``with densreg.backend("torch"): ...``.

    What is compiled inside keeps it; what was compiled before keeps its own. Inside of a compiled function it has no
    effect: put it around the function's first call.

    Args:
        name: "cpu" (the C++ kernels, for CPU tensors), "cuda" or "triton" (for CUDA tensors), or "torch" (plain torch,
            for tensors of any device).
        fall_through: whether what the backend does not implement is served as without it, in place of an error.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is not available (why is said); or, later, it does not implement an operator for the
            device of a tensor.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"the backend {name!r} is not available: {reason}")
    before, _forced = _forced, (name, fall_through)
    try:
        yield
    finally:
        _forced = before


@functools.cache
def preferred(operator: str, device: str) -> Backend:
    """The backend that serves an operator on tensors of a type of device, where none is forced."""
    for one in BACKENDS.values():
        if device in one.devices and one.unavailable_reason() is None and one.implementation(operator, device):
            return one
    return BACKENDS["torch"]


@functools.cache
def _route(operator: str, device: str, forced: tuple[str, bool] | None) -> Callable[..., Any]:
    """What computes an operator on tensors of a type of device."""
    function = None
    if forced is not None:
        name, fall_through = forced
        function = BACKENDS[name].implementation(operator, device)
        if function is None and not fall_through:
            raise RuntimeError(
                f"the backend {name!r} is forced, and does not implement {operator} for tensors on {device}"
            )
    return function or preferred(operator, device).implementation(operator, device)  # type: ignore[return-value]


def call(operator: str, *args: Any) -> Any:
    """Run an operator by the backend that serves the device of its first argument."""
    try:
        return _route(operator, args[0].device.type, _forced)(*args)
    except RuntimeError as error:
        # The stable ABI knows no other error: what the kernels find wrong in a target is a bad value.
        _, found, message = str(error).partition(f"densreg::{operator}: ")
        if found:
            raise ValueError(message.splitlines()[0]) from None
        raise


def calls() -> dict[str, int]:
    """How often each operator was served by what, since the start: {"softmax/cpu-avx512": 3, "pnorm/torch": 1}."""
    counts = collections.Counter(_python_calls)
    for name, count in extension.counted_calls():
        counts[name] += count
    return {name: count for name, count in counts.items() if count}


def describe(device: str) -> str:
    """What serves tensors of a type of device, in words; and why backends for it do not."""
    serving = {operator: preferred(operator, device).description for operator in OPERATORS}
    said = dict.fromkeys(serving.values())
    if len(said) > 1:
        said = dict.fromkeys(f"{operator}: {description}" for operator, description in serving.items())
    reasons = _reasons(device)
    return ", ".join(said) + (f" ({reasons})" if reasons else "")


def routes(device: str) -> str:
    """What serves tensors of a type of device now: the backend that is forced, if any, and :func:`describe`."""
    return f"{_forced} {describe(device)}"


def _reasons(device: str, operator: str | None = None) -> str:
    """Why the backends for a type of device are not available, or do not serve an operator."""
    reasons = []
    for one in BACKENDS.values():
        if device in one.devices:
            reason = one.unavailable_reason()
            if reason is None and operator is not None:
                reason = f"does not implement {operator}"
            if reason is not None:
                reasons.append(f"{one.name}: {reason}")
    return "; ".join(reasons)


# --------------------------------------------------------------------------------------------------------------------
# defining an operator


def define(schema: str) -> None:
    """Define an operator: ``softmax`` by whatever serves its device, ``softmax.cuda`` and ``softmax.triton`` by those.

    A compiled graph holds the overload that was chosen when it was traced, so that no Python runs before the kernel.
    """
    name, arguments = schema.split("(", 1)
    OPERATORS.append(name)
    for one in BACKENDS.values():
        if one.overload:
            _library.define(f"{name}.{one.overload}({arguments}")
        if isinstance(one, PythonKernels):
            run = functools.partial(one.run, name)
            _library.impl(f"{name}.{one.overload}", torch.no_grad()(run), "CompositeExplicitAutograd")
    _library.define(schema)

    def on_gpu(*args: Any) -> Any:  # a caller that names the operator itself
        return _route(name, "cuda", None)(*args)

    _library.impl(name, on_gpu, "CUDA")


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the fake implementation of an operator, whatever serves it."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for overload in dict.fromkeys(one.overload for one in BACKENDS.values()):
            name_and_overload = f"{name}.{overload}" if overload else name
            torch.library.register_fake(f"densreg::{name_and_overload}", function, lib=_library)
        return function

    return register


def fallback(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the plain-torch implementation of an operator, on every device; its calls are counted."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def counted(*args: Any) -> Any:
            device = args[0].device.type
            if _forced is None and preferred(name, device).name == "torch":
                _warn_of_plain_torch(name, device)
            _python_calls[f"{name}/torch"] += 1
            return function(*args)

        for overload in (name, f"{name}.{BACKENDS['torch'].overload}"):
            _library.impl(overload, counted, "CompositeExplicitAutograd")
        return function

    return register


@functools.cache  # once each
def _warn_of_plain_torch(operator: str, device: str) -> None:
    reasons = _reasons(device, operator)
    if reasons:
        _warn_once(f"densreg runs in plain torch, several times slower ({reasons})")


@functools.cache  # not once an operator, where the reasons are the same
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def require_no_grad(name: str, *tensors: Tensor | None) -> None:
    """Raise where an operator, which has no derivative of its own, would lose one."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"densreg::{name} is a raw operator without a derivative; "
            "use the functions of densreg.functional, which have one to every order"
        )

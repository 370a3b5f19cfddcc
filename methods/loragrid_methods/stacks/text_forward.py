"""Follows one forward and backward pass of text through a base, to see what each of its modules does in it.

The pass runs on a copy of the base whose tensors have shapes but no data (torch's fake tensors), so it needs neither
the base's weights nor its device, and it gives the same answer for a base on the meta device. This is the only module
of the package that uses a private part of torch: `torch._subclasses.fake_tensor` (tried with 2.13). torch has no public
name for tensors that report a device and a shape and hold no data.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

NUM_ROWS, LENGTH = 3, 5
"""The rows and tokens of the pass: two different odd numbers, which tell the axes of a layer's input apart."""

_ABOUT_A_TENSOR = {
    *("device", "dtype", "element_size", "grad", "grad_fn", "is_complex", "is_contiguous", "is_cpu", "is_cuda"),
    *("is_floating_point", "is_leaf", "is_meta", "is_quantized", "is_sparse", "itemsize", "layout", "nbytes", "ndim"),
    *("dim", "numel", "requires_grad", "shape", "size", "stride", "type", "type_as"),
}
"""Names of a tensor's attributes and methods that say something about it and do not compute with it."""

_VALUE_NEEDED = {"DataDependentOutputException", "DynamicOutputShapeException"}
"""Names of the errors by which torch's fake tensors refuse an operation that needs a value."""

_PRODUCTS = {
    *("addbmm", "addmm", "addmv", "baddbmm", "bilinear", "bmm", "chain_matmul", "einsum", "linear", "matmul", "mm"),
    *("mv", "tensordot", "__matmul__", "__rmatmul__", "_grouped_mm", "grouped_mm"),
}
"""Names of torch's functions that multiply matrices."""


@dataclass(kw_only=True)
class TextForward:
    """What one pass of text has shown about the modules of a base, by name.

    entered: the modules whose forward ran. moved: the parameters that got a gradient. multiplied: the parameters that
    a module without a layer for them multiplied as matrices. read, read_in_training: the linear layers whose weight
    the model used without calling the layer, in evaluation mode and in training mode. irregular: linear layer -> what
    is wrong with the way it is called, as the end of a sentence. obstacle: why the pass ended early; "" if it is
    complete. chose_by_value_in: the module in which it ended because a decision needed a value; "" otherwise.
    """

    entered: set[str] = field(default_factory=set)
    moved: set[str] = field(default_factory=set)
    multiplied: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    read_in_training: set[str] = field(default_factory=set)
    irregular: dict[str, str] = field(default_factory=dict)
    obstacle: str = ""
    chose_by_value_in: str = ""


def follow_text(base: nn.Module, is_linear: Callable[[nn.Module], bool]) -> TextForward:
    """Run a pass of text through a copy of `base`; `is_linear` tells which modules are linear layers.

    A base that makes decisions from values (a mixture of experts that loops over the experts that were hit) cannot run
    without data. Then the pass is tried in the form that transformers offers for compilers; if that fails, too, the
    result tells how far the first pass got.

    A second pass in training mode shows which layers the model bypasses then (Mamba's fused kernels), because the
    exported adapter must work there too.
    """
    found = None
    for prepare in (_as_it_is, _for_compilers):
        attempt = _Pass(base, is_linear, prepare).run(training=False)
        if found is None or not attempt.obstacle:
            found = attempt
        if not attempt.obstacle:
            found.read_in_training = _Pass(base, is_linear, prepare).run(training=True, backward=False).read
            break
    assert found is not None
    return found


def _as_it_is(copied: nn.Module) -> None:
    """Leave the copy as it is."""


def _for_compilers(copied: nn.Module) -> None:
    """Choose the implementations of transformers that run on tensors without data."""
    for module in copied.modules():
        config: Any = getattr(module, "config", None)
        for key, value in (("_experts_implementation", "batched_mm"), ("_attn_implementation", "eager")):
            if getattr(config, key, None) is not None:
                setattr(config, key, value)


class _Pass:
    """One pass through a copy of the base with fake tensors."""

    def __init__(
        self, base: nn.Module, is_linear: Callable[[nn.Module], bool], prepare: Callable[[nn.Module], None]
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode  # takes a quarter of a second

        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._found = TextForward()
        self._base, self._is_linear, self._prepare = base, is_linear, prepare
        self._inside: list[str] = []

    def run(self, *, training: bool, backward: bool = True) -> TextForward:
        """Run it; an error ends the pass and is reported in the result."""
        with _no_log():
            try:
                copied = self._copy()
                # The device is named because the caller may have chosen another one for new tensors.
                with self._fakes, torch.device("cpu"), torch.enable_grad():
                    self._prepare(copied)
                    copied.train(training)
                    watch = _Watch(self._found, copied, self._is_linear, self._inside)
                    with watch:
                        outputs = copied(**self._inputs(copied))
                    watch.close()
                    if backward:
                        self._backward(copied, outputs)
            except Exception as error:  # a model can fail on tensors without data in any way, and the caller is told
                self._found.obstacle = f"{type(error).__name__}: {error}".partition("\n")[0]
                if type(error).__name__ in _VALUE_NEEDED and self._inside:
                    self._found.chose_by_value_in = self._inside[-1]
        return self._found

    def _copy(self) -> nn.Module:
        """The base with fake tensors on the CPU in place of its own, which the copy's modules may write."""
        memo: dict[int, Any] = {}
        with self._fakes:
            for module in self._base.modules():
                for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                    if isinstance(tensor, Tensor) and id(tensor) not in memo:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_trained = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
                        memo[id(tensor)] = nn.Parameter(fake, is_trained) if isinstance(tensor, nn.Parameter) else fake
        return copy.deepcopy(self._base, memo)

    def _inputs(self, copied: nn.Module) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": torch.zeros(NUM_ROWS, LENGTH, dtype=torch.long)}
        if "use_cache" in inspect.signature(copied.forward).parameters:
            inputs["use_cache"] = False
        return inputs

    def _backward(self, copied: nn.Module, outputs: Any) -> None:
        named = dict(copied.named_parameters(remove_duplicate=False))
        trained = {id(tensor): tensor for tensor in named.values() if tensor.requires_grad}
        gradients = torch.autograd.grad(_sum_of(outputs), [*trained.values()], allow_unused=True)
        moved = {key for key, gradient in zip(trained, gradients, strict=True) if gradient is not None}
        self._found.moved = {name for name, tensor in named.items() if id(tensor) in moved}


class _Watch(TorchFunctionMode):
    """Sees every function of torch that the copy calls, every forward of its modules, and every read of a weight.

    A read of a layer's weight from outside its forward is *pending* until the next event shows its purpose: asking for
    the weight's type or shape is harmless, everything else is a use.
    """

    def __init__(
        self, found: TextForward, copied: nn.Module, is_linear: Callable[[nn.Module], bool], inside: list[str]
    ) -> None:
        super().__init__()
        self._found, self._inside, self._pending = found, inside, ""
        self._held: dict[int, str] = {}
        """Storage -> the bare matrix in it, which belongs to no layer."""
        for name, module in [*copied.named_modules()]:
            module.register_forward_pre_hook(self._enter(name, is_linear(module)), with_kwargs=True)
            module.register_forward_hook(self._leave(name, is_linear(module)))
            if is_linear(module):
                _report_reads(module, partial(self._read, name))
            elif not is_torchs_own(module):
                for own, parameter in module.named_parameters(recurse=False):
                    if num_axes(parameter) > 1:
                        self._held[_storage(parameter)] = f"{name}.{own}"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if self._pending:
            if name not in _ABOUT_A_TENSOR:
                self._found.read.add(self._pending)
            self._pending = ""
        if name in _PRODUCTS:
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, list | tuple) else (value,):
                    if isinstance(tensor, Tensor) and (held := self._held.get(_storage(tensor))):
                        self._found.multiplied.add(held)
        return func(*args, **(kwargs or {}))

    def close(self) -> None:
        """The last read has no event after it; it counts as a use."""
        if self._pending:
            self._found.read.add(self._pending)
            self._pending = ""

    def _read(self, layer: str) -> None:
        self.close()
        if layer not in self._inside:
            self._pending = layer

    def _enter(self, name: str, is_layer: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside.append(name)
            self._found.entered.add(name)
            if is_layer and (wrong := _irregular_input(args, kwargs)):
                self._found.irregular.setdefault(name, wrong)

        return enter

    def _leave(self, name: str, is_layer: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._inside.pop()
            if is_layer and not isinstance(output, Tensor):
                self._found.irregular.setdefault(name, "it returns more than its output")

        return leave


def is_torchs_own(module: nn.Module) -> bool:
    """Whether the module is a layer of torch (an embedding, a convolution, a norm), or derived from one."""
    own = (kind for kind in type(module).__mro__ if kind is not nn.Module)
    return any(kind.__module__.startswith("torch.nn.modules.") for kind in own)


def num_axes(tensor: Tensor) -> int:
    """The number of axes longer than 1: 2 for a matrix, 3 for a stack of matrices."""
    return sum(size > 1 for size in tensor.shape)


def _sum_of(outputs: Any) -> Tensor:
    """A number that depends on the logits, or on every output of a base without a head."""
    logits = getattr(outputs, "logits", None)
    if logits is None:
        found = outputs if isinstance(outputs, Tensor) else (*outputs.values(),)
        logits = torch.cat([value.flatten() for value in found if isinstance(value, Tensor)])
    return logits.float().sum()


def _irregular_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What is wrong with a linear layer's input as the end of a sentence; "" if it holds the rows in their order."""
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return "it is called with more than its input"
    x = args[0]
    rows = NUM_ROWS if x.dim() > 2 else NUM_ROWS * LENGTH
    in_order = x.dim() > 1 and x.shape[0] in (NUM_ROWS, rows)
    return "" if in_order else "its input is not every token of every row, in order"


def _report_reads(layer: nn.Module, report: Callable[[], None]) -> None:
    """Call `report` whenever somebody reads the layer's weight; changes the class of this one layer."""
    own: Any = type(layer)

    def read(self: nn.Module, name: str) -> Any:
        if name == "weight":
            report()
        return own.__getattr__(self, name)

    watched = type(own.__name__, (own,), {"__getattr__": read})
    layer.__class__ = watched


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _no_log() -> Iterator[None]:
    """Silence the loggers: a pass that fails without data is expected, and the base itself does not run here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)

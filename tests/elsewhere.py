"""A device that is not there: its tensors say that they lie on "meta" and compute on the CPU, with the CPU's random numbers.

What a GPU refuses is refused: an operation on tensors of two devices, a generator of the wrong one. And what makes the host wait
for a GPU is counted, by the place in the library that asked: a number read (`item`, `bool`, `tolist`), a blocking copy from one
device to the other, a result whose size depends on values (`nonzero`, a mask as an index), and `torch.normal`, which looks whether
its deviations are negative. Not seen: how fast anything is, kernels that a GPU lacks, and what CUDA libraries do inside."""
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")
waits = Counter()        # "module.function" of the library -> how often it made the host wait

COPIES = {"aten::copy_", "aten::_to_copy"}                                        # the only ones that may cross
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}        # take CPU indices
NUMBERS = {"aten::where", "aten::fill_", "aten::masked_fill", "aten::masked_fill_"}       # take CPU tensors of no dimension
SIZED_BY_VALUES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount", "aten::repeat_interleave"}


class Elsewhere(torch.Tensor):
    "A tensor on the device that is not there; `host` holds its numbers."
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(cls, host.shape, strides=host.stride(), dtype=host.dtype, device=THERE,
                                                   storage_offset=host.storage_offset())

    def __init__(self, host):
        self.host = host

    def __reduce_ex__(self, protocol):
        return self.host.__reduce_ex__(protocol)

    def tolist(self):
        waits[asking()] += 1
        return self.host.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor of another device cannot become an array")

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class EveryOperation(TorchDispatchMode):
    "Operations that make a tensor out of nothing are met here, all others too."
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def is_there(x):
    return isinstance(x, Elsewhere)


def asking():
    "The function of the library that is nearest on the stack, as module.function."
    frame = sys._getframe()
    while frame and (frame.f_code.co_name[0] == "<" or not frame.f_globals.get("__name__", "").startswith("ncp_vae.")):
        frame = frame.f_back
    return f"{frame.f_globals['__name__'].removeprefix('ncp_vae.')}.{frame.f_code.co_name}" if frame else "a test"


def tensors_in(*arguments):
    return [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]


def misplaced(operation, args, kwargs):
    "The CPU tensors that a GPU would refuse beside its own."
    name, here = operation._schema.name, [x for x in tensors_in(args, kwargs) if not is_there(x)]
    if name in COPIES:
        return []
    if name in INDEXED and is_there(args[0]):
        return [x for x in tensors_in(args[2:3]) if not is_there(x) and x.dim()]
    if name in NUMBERS or torch.Tag.pointwise in operation.tags:
        return [x for x in here if x.dim()]
    return here


def makes_wait(operation, args, kwargs, result_there):
    "Whether the host must wait for the device."
    name = operation._schema.name
    if name in COPIES:
        source = args[1] if name == "aten::copy_" else args[0]
        return is_there(source) != result_there and not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if name in INDEXED:
        return any(not is_there(x) or x.dtype in (torch.bool, torch.uint8) for x in tensors_in(args[1]))
    std_of_normal = name == "aten::normal" and isinstance(args[1], torch.Tensor)
    return name == "aten::_local_scalar_dense" or name in SIZED_BY_VALUES or std_of_normal


def compute(operation, args, kwargs):
    "The operation on the CPU, as of a tensor elsewhere where it would be one; RuntimeError where two devices meet."
    name, asked = operation._schema.name, kwargs.get("device")
    given = tensors_in(args, kwargs)
    some_there = any(map(is_there, given))
    there = some_there if asked is None else torch.device(asked) == THERE
    if name in INDEXED | {"aten::copy_"}:
        there = is_there(args[0])
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU, for a tensor elsewhere")
    if some_there and misplaced(operation, args, kwargs):
        raise RuntimeError(f"{name}: tensors on two devices, {[(type(x).__name__, tuple(x.shape)) for x in given]}")
    if (some_there or there) and makes_wait(operation, args, kwargs, there):
        waits[asking()] += 1
    on_cpu = {} if asked is None else {"device": torch.device("cpu")}
    host_args, host_kwargs = tree_map(lambda x: x.host if is_there(x) else x, (args, {**kwargs, **on_cpu}))
    with _disable_current_modes():
        found = operation(*host_args, **host_kwargs)
    if not there:
        return found
    found = tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, found)
    return return_and_correct_aliasing(operation, args, kwargs, found)


def made_here_first(make):
    "torch.tensor, torch.as_tensor: their C++ leaves a tensor of \"meta\" empty."
    def made(data, *args, device=None, **kwargs):
        found = make(data, *args, **kwargs)
        return found if device is None else found.to(device)
    return made


def as_on_the_cpu(autocast):
    return lambda kind, *args, **kwargs: autocast("cpu" if kind == THERE.type else kind, *args, **kwargs)


@contextmanager
def elsewhere():
    "Inside, THERE is a device, the one that trainings choose."
    waits.clear()
    Accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", as_on_the_cpu(torch.autocast))
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, made_here_first(getattr(torch, name)))
        for state in (PartialState, AcceleratorState):
            patch.setitem(state._shared_state, "device", THERE)
        torch.__future__.set_swap_module_params_on_conversion(True)      # Module.to keeps what an optimizer holds
        try:
            with EveryOperation():
                yield THERE
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

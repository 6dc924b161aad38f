"""CUDA graphs emulated on a CPU, to test `Recorded` where there is no GPU.

While a program is recorded, every ATen call is noted with the tensors that it reads and writes; a replay makes the same
calls and puts their results into the same memory. What Python computes meanwhile (numbers, shapes, which tensor is
used) is frozen, as on a GPU. A real graph computes nothing while it is recorded: here the memory and the random
generator are put back afterwards.
"""

import contextlib

import common
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Graph(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`; `reads` names the calls that would make a host wait for the device."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.reads: list[str] = []
        self.kept: list = []  # nothing is freed, so that addresses last
        self.own: set[int] = set()  # memory that the program allocated itself
        self.before: dict[int, tuple] = {}  # what it overwrote elsewhere, and a copy

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema, name = func._schema, func._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.reads.append(name)
        if schema.is_mutable:
            given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tensors_in(given.get(argument.name)):
                        if memory_of(tensor) not in self.own | self.before.keys():
                            whole = tensor.detach()
                            self.before[memory_of(tensor)] = (whole, whole.clone())
        made = func(*args, **kwargs)
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(made)
        known = {memory_of(tensor) for tensor in inputs}
        new = [tensor for tensor in outputs if memory_of(tensor) not in known]
        self.own |= {memory_of(tensor) for tensor in new}
        self.kept.append((inputs, outputs))
        if schema.is_mutable or (new and name not in ALLOCATIONS):
            # An LSTM on a CPU takes another algorithm where gradients are on.
            grad, written = torch.is_grad_enabled(), [] if schema.is_mutable else outputs
            self.calls.append((func, args, kwargs, written, grad))
        return made

    @contextlib.contextmanager
    def recording(self):
        generator = torch.get_rng_state()
        with self:
            yield
        torch.set_rng_state(generator)
        with torch.no_grad():
            for tensor, old in self.before.values():
                tensor.copy_(old)

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, outputs, grad in self.calls:
                with torch.set_grad_enabled(grad):
                    made = tensors_in(func(*args, **kwargs))
                for old, new in zip(outputs, made, strict=bool(outputs)):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def emulated():
    """`torch.cuda` records and replays graphs on the CPU, within."""
    return common.replaced(
        torch.cuda,
        CUDAGraph=Graph,
        graph=lambda graph, stream: graph.recording(),
        current_stream=lambda: None,
    )

"""`strict` makes Triton's interpreter find faults that otherwise show only on a GPU, for the launches of a test.

- Programs run in a random order, because a GPU promises none.
- An integer of 1 that a launch would specialise is a plain number in the kernel, because compiling makes it a constant:
  ``n.to(tl.int64)`` of it is an error.
- An access outside the memory of the kernel's arguments is an error. A GPU would read or overwrite something else.

`poison` fills memory before a kernel writes it.
"""

import itertools
import random

import numpy as np
import torch


class Bounds:
    """The memory of a launch's arguments, sorted by address."""

    def __init__(self):
        self.begins, self.ends = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def set(self, tensors) -> None:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        begins = sorted(storages)
        self.begins = np.array(begins, dtype=np.uint64)
        self.ends = np.array([begin + storages[begin] for begin in begins], dtype=np.uint64)

    def check(self, at, mask) -> None:
        """Raise IndexError if an address of a handle (where ``mask`` is True, if given) is in no argument."""
        size = at.dtype.scalar.element_ty.primitive_bitwidth // 8
        addresses = at.data if mask is None else at.data[np.broadcast_to(mask.data, at.data.shape).astype(bool)]
        if not addresses.size:
            return
        lowest, highest = addresses.min(), addresses.max()
        owner = np.searchsorted(self.begins, lowest, side="right") - 1
        if owner >= 0 and highest + np.uint64(size) <= self.ends[owner]:
            return
        owner = np.searchsorted(self.begins, addresses, side="right") - 1
        outside = (owner < 0) | (addresses + np.uint64(size) > self.ends[owner])
        if outside.any():
            away = int(addresses[outside][0]) - int(self.begins[max(0, int(owner[outside][0]))])
            raise IndexError(
                f"{outside.sum()} of {addresses.size} addresses are outside the arguments' memory; the first is {away} "
                f"bytes from the beginning of one"
            )


def _tensors(values):
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif hasattr(value, "untyped_storage"):
            yield value


def strict(monkeypatch, seed) -> None:
    """Make the interpreter strict until ``monkeypatch`` is undone. ``seed`` decides the orders."""
    from triton.runtime import interpreter

    builder, function, executor = (
        getattr(interpreter, name) for name in ("InterpreterBuilder", "InterpretedFunction", "GridExecutor")
    )
    rng, bounds, order, unspecialised = random.Random(seed), Bounds(), iter(()), {}
    set_dim, set_idx, rewrite = builder.set_grid_dim, builder.set_grid_idx, function.rewrite
    arguments = executor._init_args_hst

    def set_grid_dim(self, *sizes):
        nonlocal order
        set_dim(self, *sizes)
        programs = list(itertools.product(*map(range, sizes)))
        rng.shuffle(programs)
        order = iter(programs)

    def set_grid_idx(self, *_):
        set_idx(self, *next(order))

    def rewritten(self):
        fn = rewrite(self)
        options = self.kwargs if hasattr(self, "kwargs") else self.rewriter.kwargs  # the second in Triton 3.4
        unspecialised[fn] = options.get("do_not_specialize") or ()
        return fn

    def on_host(self, args, options):
        given = dict(zip(self.arg_names, args)) | options
        kept = unspecialised[self.fn]
        ones = [name for name, x in given.items() if type(x) is int and x == 1 and name not in kept]
        self.constexprs = [*self.constexprs, *ones]
        found = arguments(self, args, options)
        bounds.set(_tensors([*found[0], *found[1].values()]))
        return found

    def within(name, masked):
        access = getattr(builder, name)

        def checked(self, at, *rest):
            bounds.check(at, rest[masked] if masked is not None else None)
            return access(self, at, *rest)

        monkeypatch.setattr(builder, name, checked)

    # Loads and stores without a mask call those with one; the mask's index is counted from the pointer.
    accesses = {"create_masked_load": 0, "create_masked_store": 1, "create_atomic_cas": None}
    for name, masked in accesses.items():
        within(name, masked)
    rmw = builder.create_atomic_rmw

    def create_atomic_rmw(self, op, at, value, mask, *rest):
        bounds.check(at, mask)
        return rmw(self, op, at, value, mask, *rest)

    monkeypatch.setattr(builder, "create_atomic_rmw", create_atomic_rmw)
    monkeypatch.setattr(builder, "set_grid_dim", set_grid_dim)
    monkeypatch.setattr(builder, "set_grid_idx", set_grid_idx)
    monkeypatch.setattr(function, "rewrite", rewritten)
    monkeypatch.setattr(executor, "_init_args_hst", on_host)


def poison(x: torch.Tensor) -> torch.Tensor:
    """Fill alternately with NaN and the largest number, or the largest and -1: one alone could hide in a max or min.

    Booleans become True. Tensors without memory, made by tracing, are left alone.
    """
    if type(x) is not torch.Tensor or x.is_meta:
        return x
    limits = (torch.finfo if x.is_floating_point() else torch.iinfo)(x.dtype) if x.dtype != torch.bool else None
    x.fill_(True if limits is None else limits.max)
    if limits is not None and x.numel():
        x.view(-1)[::2] = float("nan") if x.is_floating_point() else -1
    return x

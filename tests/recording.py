"""A stand-in for recording CUDA graphs, on the CPU and for a whole engine.

A recording keeps a step's operations with their tensors and numbers. A replay repeats them without running the step's
Python. As with CUDA, it therefore misses anything that the host would have to read and anything that Python has changed
since. While recording, these raise: reads of a tensor's values, tensors made from the host's numbers, shapes that
depend on values, kernels not compiled before, and memory of the recording that is kept elsewhere. Garbage collections
are noted.
"""

import contextlib
import functools
import gc
import inspect
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dllm_fast import launchers
from dllm_fast.decoding import graphs
from dllm_fast.kernels import reference, reference_states

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "unique")
# Operations with shapes that depend on values, reads of values, and numbers from the host.
FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "lift_fresh",
    "_unique2",
    "bincount",
)


class Eager(graphs.Graphs):
    """Takes the steps that a GPU would record."""

    def __init__(self, enabled, device):
        super().__init__(True, device)

    def run(self, key, step):
        step()


class Forbidden(RuntimeError):
    pass


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


class Reads(TorchFunctionMode):
    """Raises if Python reads a tensor. `Operations` would not see `.cpu()`, which does nothing on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name in READS:
            raise Forbidden(f"{name} while recording")
        if name == "to" and any(isinstance(x, str | torch.device) for x in tree_leaves((args[1:], kwargs))):
            raise Forbidden("a copy between devices while recording")
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Records operations with their arguments."""

    def __init__(self):
        super().__init__()
        self.entries = []  # function, arguments, options, results
        self.fresh = {}  # storages that the step allocated, kept alive

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        truths = [x for x in _tensors(args[1:2]) if x.dtype == torch.bool] if name.startswith("index") else []
        if name in FORBIDDEN or (truths and name in ("index", "index_put", "index_put_")):
            raise Forbidden(f"{function} while recording")
        return self.take(function, args, kwargs or {})

    def take(self, function, args, kwargs):
        """Call ``function`` outside of this mode and `Reads`, and record it."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            out = function(*args, **kwargs)
        given = {_storage(x) for x in _tensors((args, kwargs))}
        for x in _tensors(out):
            if _storage(x) not in given:
                self.fresh[_storage(x)] = x.untyped_storage()
        self.entries.append((function, args, kwargs, out))
        return out

    def again(self) -> None:
        for function, args, kwargs, out in self.entries:
            given = {_storage(x) for x in _tensors((args, kwargs))}
            made = [x for x in _tensors(out) if _storage(x) not in given]
            schema = getattr(function, "_schema", None)
            if not made and schema is not None and not schema.is_mutable:
                continue  # a view of existing memory
            results = function(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(results), strict=True):
                if _storage(old) not in given:
                    old.copy_(new)

    def kept_elsewhere(self) -> list[torch.Tensor]:
        """Tensors in the recording's memory that something else keeps alive."""
        aliases = {}  # from now on only the recording keeps these alive

        def alias(x):
            if not isinstance(x, torch.Tensor) or _storage(x) not in self.fresh:
                return x
            return aliases.setdefault(id(x), x.detach())

        self.entries = [tree_map(alias, entry) for entry in self.entries]
        own = {id(x) for x in aliases.values()}
        every = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in own)
        return [x for x in every if _storage(x) in self.fresh]


class Recorder:
    """Stands in for `torch.cuda`'s graphs in `graphs.Graphs`, which then uses graphs on any device."""

    def __init__(self, monkeypatch):
        self.now: Operations | None = None
        self.recorded, self.replays, self.collections = 0, 0, 0
        self.compiled: set = set()
        init = graphs.Graphs.__init__

        def enabled(graphs, _, device):
            init(graphs, True, device)

        monkeypatch.setattr(graphs.Graphs, "__init__", enabled)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)

    def opaque(self, function):
        """A launcher as one operation, like a kernel."""

        @functools.wraps(function)
        def launch(*args, **kwargs):
            return function(*args, **kwargs) if self.now is None else self.now.take(function, args, kwargs)

        return launch

    def compiles(self, key) -> None:
        if self.now is not None and key not in self.compiled:
            raise Forbidden(f"{key[0]} is compiled while recording: {key[1:]}")
        self.compiled.add(key)

    def collected(self, phase: str, _) -> None:
        self.collections += self.now is not None


class Graph:
    def __init__(self, recorder: Recorder):
        self.recorder, self.operations, self.reads, self.begun = recorder, Operations(), Reads(), False

    def __enter__(self):
        self.recorder.now = self.operations
        gc.callbacks.append(self.recorder.collected)
        self.operations.__enter__()
        self.reads.__enter__()

    def __exit__(self, *error):
        self.reads.__exit__(*error)
        self.operations.__exit__(*error)
        gc.callbacks.remove(self.recorder.collected)
        self.recorder.now = None
        self.recorder.recorded += 1
        if error[0] is None and (kept := self.operations.kept_elsewhere()):
            raise Forbidden(f"memory of a recording is kept elsewhere: {[tuple(x.shape) for x in kept]}")

    def pool(self):
        return None

    def replay(self):
        # On the CPU, recording has run the step, which counts as the first replay.
        if self.begun:
            self.operations.again()
        self.begun = True
        self.recorder.replays += 1


def watch_compilations(monkeypatch, recorder: Recorder) -> None:
    """Record what each launch compiles, by its constants, dtypes, alignments, integers of 1 and multiples of 16."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def launch(self, *args, grid, warmup, **options):
        given = inspect.signature(self.fn).bind_partial(
            *args, **{name: x for name, x in options.items() if name in self.arg_names}
        )
        kept = self.kwargs.get("do_not_specialize") or ()
        key = [(name, _kind(name, x, self.fn, kept)) for name, x in given.arguments.items()]
        recorder.compiles((self.fn.__name__, *key))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", launch)


def _kind(name: str, value, function, kept):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if "constexpr" in str(function.__annotations__.get(name)):
        return value
    if isinstance(value, int) and name not in kept:
        return value == 1, value % 16 == 0, value >= 1 << 31
    return type(value).__name__


def launchers_of_pytorch(monkeypatch, recorder: Recorder) -> None:
    """``impl="triton"`` with definitions instead of kernels, so that the engine's code runs at a CPU's speed."""

    def attention(q, keys, values, start, end, slot, window, scale=None, first=None, most=0, *states):
        if states:
            return reference_states.attention(q, keys, values, start, end, slot, window, first, *states)
        return reference.attention(q, keys, values, start, end, slot, window, scale, first)

    names = ("rms_norm", "layer_norm", "swiglu", "geglu", "rope", "predict", "commit")
    definitions = {name: recorder.opaque(getattr(reference, name)) for name in names}
    definitions["attention"] = recorder.opaque(attention)
    stand_in = SimpleNamespace(**definitions, fits=lambda *_: False, counters=lambda _: contextlib.nullcontext())
    monkeypatch.setattr(launchers, "triton", lambda: stand_in)
    monkeypatch.setattr(launchers, "no_e4m3", lambda device: None)

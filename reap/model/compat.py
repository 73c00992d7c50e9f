"""Every private name of transformers, accelerate and torch that this package uses, in one place.

Nobody promised these names: a release may change any of them. Each use is a function here, and each
group of uses a row of SEAMS with a check. `require` runs the checks once, before work, and says
which of them a release changed. What a check needs in memory beyond transformers is what the work
itself needs: the classes of one model, for seams that build models.
"""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reap.errors import ReapError, first_line
from reap.model.quiet import quiet
from reap.versions import releases

# Of the experts implementation's name in a configuration.
EXPERTS_KEY = "_experts_implementation_internal"
# Of the folder or hub id that a configuration came from; older releases saved it in config.json.
NAME_KEY = "_name_or_path"


class Layout(NamedTuple):
    """How an experts module on the interface keeps its weights."""

    gated: bool  # gate_up_proj, else up_proj alone
    biased: bool
    transposed: bool
    interleaved: bool  # gate and up alternate
    post_norm: bool  # a norm after each expert


class Loaded(NamedTuple):
    """What transformers' loader says of a checkpoint: names of parameters."""

    missing: set[str]
    unexpected: set[str]
    mismatched: set[str]
    unconverted: set[str]


def experts_functions() -> Any:
    """The registry in which an experts module looks up its forward."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS


def dispatches(module: nn.Module) -> bool:
    """Whether the module's class looks its forward up in `experts_functions()`."""
    return _dispatches(type(module).forward)


@lru_cache(maxsize=1024)  # a model has thousands of modules of a few classes
def _dispatches(forward: Callable[..., Any]) -> bool:
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(forward, "__closure__", None) or (), strict=False))
    registry = cells.get("experts_interface")
    return registry is not None and registry.cell_contents is experts_functions()


def experts_forward(module: nn.Module, implementation: str | None) -> Callable[..., Tensor]:
    """The forward of a module on the interface under this implementation, bound."""
    original = type(module).forward.__wrapped__
    if implementation in (None, "eager"):
        return partial(original, module)
    return partial(experts_functions().get_interface(implementation, original), module)


def layout(module: nn.Module) -> Layout:
    """Of a module on the interface."""
    return Layout(
        gated=module.has_gate,
        biased=module.has_bias,
        transposed=module.is_transposed,
        interleaved=bool(module.has_gate and not module.is_concatenated),
        post_norm=getattr(module, "has_post_expert_norm", False),  # not in every release
    )


def activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a module on the interface applies between its projections.

    [n, 2I] -> [n, I] where it is gated, else [n, I] -> [n, I].
    """
    return module._apply_gate if module.has_gate else module.act_fn


def is_split(module: nn.Module) -> bool:
    """Whether this process holds a part of the module, by expert or tensor parallelism.

    Parameters are DTensors, and there is a flag. Older releases (5.7) have plain parameters of
    other shapes and counts, and the plan on the module.
    """
    distributed = any(type(p).__name__ == "DTensor" for p in module.parameters())
    marks = getattr(module, "_is_expert_parallel", False), getattr(module, "_hf_tp_plan", None)
    return distributed or any(marks)


def source(config: Any) -> str:
    """The folder or hub id that a model's configuration came from, empty if unknown."""
    return str(getattr(config, NAME_KEY, "") or "")


def set_source(config: Any, folder: Path) -> None:
    setattr(config, NAME_KEY, str(folder))


def auto_classes() -> tuple[Any, ...]:
    """transformers' classes that load models of text, the more special one first."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM, AutoModelForImageTextToText


def mapped_class(auto: Any, config: Any) -> Any:
    """The class that one of `auto_classes()` loads for this configuration, or None."""
    return auto._model_mapping.get(type(config), None)


def load_on_meta(model: nn.Module, state: Mapping[str, Tensor]) -> Loaded:
    """Ask transformers' own loader to load `state`, both on the meta device: no data is moved.

    Whatever it raises for weights that it cannot convert is passed on.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model as load
    from transformers.modeling_utils import LoadStateDictConfig

    mapping = [_quick_to_copy(step) for step in get_model_conversion_mapping(model)]
    how = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=mapping)
    plans = {"tp_plan": None} if "tp_plan" in inspect.signature(load).parameters else {}
    with _in_one_thread():
        info, *_ = load(model, dict(state), how, **plans)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return Loaded(
        missing=set(info.missing_keys) - tied,
        unexpected=set(info.unexpected_keys),
        mismatched={name for name, *_ in info.mismatched_keys},
        unconverted=set(info.conversion_errors),
    )


@contextmanager
def _in_one_thread() -> Iterator[None]:
    """The loader starts no threads: there is nothing to wait for on the meta device, and a promise
    per key of 200,000 takes as much memory as all else."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _quick_to_copy(step: Any) -> Any:
    """`step` of a conversion. The loader makes a deep copy of it for every key, which of 200,000
    takes most of its time, and uses one per parameter: one that was not used is given again."""
    kind, spare = type(step), None

    def copied(self: Any, memo: Any) -> Any:
        nonlocal spare
        if spare is None or spare.collected_tensors:
            self.__class__ = kind
            spare = copy.deepcopy(self, memo)
            self.__class__ = quick
        return spare

    quick = type(kind.__name__, (kind,), {"__slots__": (), "__deepcopy__": copied})
    step.__class__ = quick
    return step


class Part(NamedTuple):
    """Of a checkpoint, what `from_pretrained` shall load."""

    tensors: Mapping[str, Any]  # in place of the files' own; on the meta device: loaded later
    places: Mapping[str, str]  # modules and weights -> cpu, or meta for those that wait


@contextmanager
def _loaded_by(load: Callable[..., Any]) -> Iterator[None]:
    """Inside, what this thread's `from_pretrained` loads goes through `load`, which is given the
    function that does it, then that one's arguments. Not for two threads at a time."""
    from transformers import modeling_utils

    own, thread = modeling_utils.convert_and_load_state_dict_in_model, threading.get_ident()

    def replaced(model: nn.Module, state_dict: Any, load_config: Any, **rest: Any) -> Any:
        if threading.get_ident() != thread:
            return own(model, state_dict, load_config, **rest)
        return load(own, model, state_dict, load_config, rest)

    modeling_utils.convert_and_load_state_dict_in_model = replaced
    try:
        yield
    finally:
        modeling_utils.convert_and_load_state_dict_in_model = own


def loading(
    state: Mapping[str, Any], settle: Callable[[torch.dtype | None], None]
) -> AbstractContextManager[None]:
    """Inside, this thread's `from_pretrained` loads these tensors in place of those of the files:
    objects that give a tensor for `[...]`. `settle` is told before the data type to which it
    rounds all that are no vectors; None where that is not one. Not for two threads at a time."""

    def load(own: Any, model: nn.Module, _: Any, how: Any, rest: dict[str, Any]) -> Any:
        dtypes = {weight.dtype for weight in model.parameters() if weight.dim() > 1}
        settle(dtypes.pop() if len(dtypes) == 1 and not getattr(how, "dtype_plan", None) else None)
        return own(model, dict(state), how, **rest)

    return _loaded_by(load)


class PartLoader:
    """Loads a checkpoint in parts, each as `from_pretrained` loads it whole: its conversions, data
    types, dequantisation and checks.

        with loader.installed():
            model = cls.from_pretrained(folder)  # `choose(model, names)` says what this loads
        loader.load(tensors)                     # the rest, in any portions

    `names` maps keys of the checkpoint to the weights of the model that they become (of several
    weights made of one key, the first).
    """

    def __init__(self, choose: Callable[[nn.Module, dict[str, str]], Part]) -> None:
        self._choose = choose
        self._load: Callable[[dict[str, Any]], Any] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, what this thread loads is loaded in parts. Not for two threads at a time."""

        def load(own: Any, model: nn.Module, state: Any, how: Any, rest: dict[str, Any]) -> Any:
            part = self._choose(model, _names_in_model(model, state, how))
            self._load = lambda tensors: own(model, tensors, how, **rest)
            now = replace(how, device_map={"": "cpu", **part.places})
            return own(model, {**state, **part.tensors}, now, **rest)

        with _loaded_by(load):
            yield

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Put these into the model: keys of the checkpoint. ReapError when they do not convert."""
        assert self._load is not None, "nothing was loaded yet"
        with quiet(), torch.inference_mode(False), torch.no_grad():
            info, *_ = self._load(dict(tensors))
        for name, why in info.conversion_errors.items():
            raise ReapError(f"{name} cannot be made of what is stored: {' '.join(why.split())}")


def _names_in_model(model: nn.Module, keys: Mapping[str, Any], how: Any) -> dict[str, str]:
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known = model.state_dict()
    mapping = how.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = {}
    for key in sorted(keys, key=dot_natural_key):  # in the loader's order: some renamings count
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, known)
        names[key] = name
    return names


def ties(model: nn.Module) -> dict[str, str]:
    """Weights that a transformers model says are others by another name -> those others."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def is_quantised(model: nn.Module) -> bool:
    """Whether a loaded model computes with weights that a quantiser packed."""
    return getattr(model, "hf_quantizer", None) is not None


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile(model)` or `model.compile()` was applied to it or a part of it."""
    from torch._dynamo import OptimizedModule

    return any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def in_backward() -> bool:
    """Whether this thread runs a backward pass: gradient checkpointing computes layers again."""
    return torch._C._current_graph_task_id() != -1


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches the module's weights when it is called.

    It has no check: by another name, such a model is refused as one without weights.
    """
    return hasattr(module, "_hf_hook")


@dataclass(frozen=True)
class Seam:
    """Names that are used together. `check` raises anything when they are not as needed."""

    name: str
    package: str  # which a change is blamed on
    works: tuple[str, ...]  # what needs them
    check: Callable[[], None]


OBSERVING, PRUNING = "observing a model", "pruning a checkpoint"
LOADING = "loading a model from a folder"
STREAMING = "running a model layer by layer"
UNPACKING = "loading a quantised model"
WORKS = (LOADING, OBSERVING, STREAMING, UNPACKING, PRUNING)
FREE = "scores and plans of existing statistics"  # of these names


def _check(fact: bool, what: str) -> None:
    if not fact:
        raise AssertionError(what)


def _check_experts() -> None:
    """A module of our own on the interface is recognised, and runs what the registry holds."""
    from transformers import PreTrainedConfig
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation
    class Probe(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()

        def forward(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
            return hidden

    config = PreTrainedConfig()
    module = Probe(config)
    _check(dispatches(module), "a module on it is not recognised")
    _check(EXPERTS_KEY in vars(config), f"a configuration has no {EXPERTS_KEY}")
    _check(layout(module) == Layout(True, False, False, False, False), "a module has other flags")
    x = torch.ones(1, 2)
    functions, name, before = experts_functions(), "reap_probe", vars(config)[EXPERTS_KEY]
    functions[name] = lambda module, hidden, ids, gates: 2 * hidden
    try:
        vars(config)[EXPERTS_KEY] = name
        _check(bool((module(x, x, x) == 2 * x).all()), "a registered function is not called")
        own, ours = experts_forward(module, before), experts_forward(module, name)
        _check(bool((own(x, x, x) == x).all()), "the module's own forward is not found")
        _check(bool((ours(x, x, x) == 2 * x).all()), "a registered function is not found")
    finally:
        functions.pop(name, None)
    module.act_fn = nn.ReLU()
    gate = float(activation(module)(torch.tensor([[1.0, -2.0]])))
    _check(gate == -2.0, f"_apply_gate computes {gate:g} in place of relu(1) * -2")


def _check_configurations() -> None:
    from transformers import PreTrainedConfig

    config = PreTrainedConfig()
    _check(source(config) == "" and NAME_KEY in dir(config), f"a new one has no empty {NAME_KEY}")
    set_source(config, Path("folder"))
    _check(config.name_or_path == "folder", f"{NAME_KEY} is not the name_or_path")


def _check_classes() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("mixtral")
    names = [getattr(mapped_class(auto, config), "__name__", None) for auto in auto_classes()]
    _check(names == ["MixtralForCausalLM", None], f"a Mixtral configuration maps to {names}")


def _tiny_checkpoint() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model on the meta device and what its checkpoint holds, there as well."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model("mixtral", num_local_experts=2, **sizes, **heads)
    with torch.device("meta"):
        model = mapped_class(auto_classes()[0], config)(config)
        experts = "model.layers.0.block_sparse_moe.experts"
        state = {
            f"{experts}.{expert}.{name}.weight": torch.empty(8, 8)
            for expert in range(2)
            for name in ("w1", "w2", "w3")
        }
    rest = {name: x for name, x in model.state_dict().items() if ".experts." not in name}
    return model, state | {
        name.replace(".mlp.", ".block_sparse_moe."): x for name, x in rest.items()
    }


def _check_loader() -> None:
    """The loader accepts the checkpoint of a tiny model and finds what is wrong with another."""
    model, state = _tiny_checkpoint()
    with torch.device("meta"):
        whole = load_on_meta(model, state)
        _check(not any(whole), f"of a whole checkpoint it says {tuple(whole)}")
        del state["model.norm.weight"]
        state |= {"odd": torch.empty(1), "lm_head.weight": torch.empty(7, 8)}
        found = load_on_meta(model, state)
    wrong = {"model.norm.weight"}, {"odd"}, {"lm_head.weight"}, set[str]()
    _check(found == Loaded(*wrong), f"of a damaged checkpoint it says {tuple(found)}")


def _check_parts() -> None:
    """A tiny model is loaded without its layer, and then with it."""
    model, on_meta = _tiny_checkpoint()
    layer = "model.layers.0"
    stored = {name: torch.ones_like(x, device="cpu") for name, x in on_meta.items()}
    inside = {name for name in stored if name.startswith(f"{layer}.")}

    def choose(_: nn.Module, names: dict[str, str]) -> Part:
        found = {key for key, name in names.items() if name.startswith(f"{layer}.")}
        _check(found == inside, f"of {layer} it finds {sorted(found)}")
        return Part({name: on_meta[name] for name in inside}, {layer: "meta"})

    loader = PartLoader(choose)
    with loader.installed():
        model = type(model).from_pretrained(None, config=model.config, state_dict=stored)
    away = {name for name, x in model.named_parameters() if x.is_meta}
    wanted = {name for name in model.state_dict() if name.startswith(f"{layer}.")}
    _check(away == wanted, f"without {layer} it leaves out {sorted(away)}")
    loader.load({name: stored[name] for name in inside})
    _check(all(bool((x == 1).all()) for x in model.parameters()), f"{layer} is not loaded later")


def _check_torch() -> None:
    """The names exist. Neither a backward pass nor a compiler is started to see them at work: the
    first starts threads that forbid to fork, the second changes settings of torch for good."""
    _check(not is_compiled(nn.Identity()), "a module is taken for compiled")
    _check(not in_backward(), "a backward pass is seen where there is none")


SEAMS = (
    Seam("transformers' experts interface", "transformers", (OBSERVING,), _check_experts),
    Seam("transformers' configurations", "transformers", WORKS, _check_configurations),
    Seam("transformers' model classes", "transformers", (LOADING, PRUNING), _check_classes),
    Seam("transformers' loader", "transformers", (PRUNING,), _check_loader),
    Seam("transformers' loader of parts", "transformers", (STREAMING, UNPACKING), _check_parts),
    Seam("torch's compiled modules and backward passes", "torch", (OBSERVING,), _check_torch),
)
_checking = threading.Lock()  # checks of two threads would remove each other's function


@cache
def _fault(check: Callable[[], None]) -> str | None:
    try:
        # Whatever the caller's modes are, tensors of a check are plain ones; models draw weights.
        with quiet(), torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng([]):
            check()
    except Exception as error:  # whatever a changed name leads to
        return f"{type(error).__name__}: {first_line(error)}"
    return None


@torch.compiler.disable  # a caller may be compiled
def changed(*works: str) -> dict[Seam, str]:
    """The seams that any of these works (or, without, any at all) needs and that the installed
    releases changed -> in which way."""
    needed = [seam for seam in SEAMS if set(seam.works) & set(works or WORKS)]
    with _checking:
        faults = {seam: _fault(seam.check) for seam in needed}
    return {seam: fault for seam, fault in faults.items() if fault is not None}


def require(work: str) -> None:
    """ReapError, which says what still works, when `work` cannot be done with these releases."""
    faults = changed(work)
    if not faults:
        return
    packages = dict.fromkeys(seam.package for seam in faults)
    found = " and ".join(f"{package} {version(package)}" for package in packages)
    what = ", ".join(f"{seam.name} changed ({fault})" for seam, fault in faults.items())
    remedy = " and ".join(f"{package} {releases(package)}" for package in packages)
    rest = ", ".join([*(other for other in WORKS if not changed(other)), FREE])
    raise ReapError(
        f"{work} does not work with {found}: {what}: install {remedy}; what still works: {rest}"
    )

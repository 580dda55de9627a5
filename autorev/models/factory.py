"""`package.module:factory`: a model that the user's own code builds, with example inputs for it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from autorev.capture.fake import DATA_DEPENDENT, new_fake_mode
from autorev.capture.source import raised_line
from autorev.errors import AutorevError, ModelBuildError, ModelNotFoundError, message_of
from autorev.integrations.building import Build, building, count_modules, in_one_dtype, settle
from autorev.integrations.transformers import is_transformers
from autorev.models.from_config import transformers_workload
from autorev.workload import Call, Workload

_REMEDY = "let it return model, (model, args) or (model, args, kwargs), with the arguments of one forward call"


def factory_workload(spec: str) -> Workload:
    """The workload of `package.module:factory`, a function without arguments.

    It is called on fake tensors, so nothing is allocated: here for its example inputs, then by every `build`.

    Raises:
        ModelNotFoundError: there is no such module, or nothing of that name in it.
        ModelBuildError: it raises, or does not return a model and what to call it with.
    """
    factory = _imported(spec)

    def build(dtype: torch.dtype) -> nn.Module:
        model, _ = _made(factory, spec, dtype)
        return model

    with new_fake_mode():
        model, call = _made(factory, spec, torch.get_default_dtype())
    name = spec.partition(":")[2]
    if call is None and is_transformers(model):
        return transformers_workload(model.config, type(model), build, name, spec)
    return _resizable_workload(call or _no_arguments(model, spec), build, name, spec)


def made_for_real(spec: str) -> tuple[nn.Module, Call | None]:
    """What the factory returns when it is called on real tensors: the model with its weights, and the call if any.

    Raises:
        ModelNotFoundError: there is no such function.
        ModelBuildError: it raises, or does not return a model.
    """
    factory = _imported(spec)
    try:
        with count_modules():
            model, rest = _split(factory(), spec)
            _prepare(model)
    except (KeyboardInterrupt, AutorevError):
        raise
    except BaseException as error:  # SystemExit and the like, too: a model that is not there is no result
        raise ModelBuildError(f"{spec} raised {_described(error)}") from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelBuildError(
            f"{spec} builds its model on the meta device, where weights have no values; build it on cpu"
        )
    return model, _call(rest, spec)


def _imported(spec: str) -> Callable[[], Any]:
    """The function that `package.module:factory` names."""
    module_name, _, attributes = spec.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        dotted = ".".join(Path(module_name).with_suffix("").parts)
        raise ModelNotFoundError(f"{spec} names a file; give the module instead: {dotted}:{attributes}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as for `python -m`
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ModelNotFoundError(
                f"{spec}: there is no module {error.name} in {Path.cwd()} or on the Python path; "
                "run autorev in the folder that holds it, or install it"
            ) from None
        raise ModelBuildError(
            f"{spec}: importing {module_name} failed, for it needs {error.name}; install that package"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ModelBuildError(
            f"{spec}: importing {module_name} raised {_described(error)}; correct it, and keep what is not "
            'meant for importing under `if __name__ == "__main__":`'
        ) from error
    for attribute in attributes.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError:
            what = getattr(found, "__name__", type(found).__name__)
            raise ModelNotFoundError(f"{spec}: {what} has no {attribute}{_functions_of(found)}") from None
        except Exception as error:  # an attribute that is computed
            raise ModelBuildError(f"{spec} raised {_described(error)}") from error
    return _checked(found, spec)


def _functions_of(module: Any) -> str:
    if not inspect.ismodule(module):
        return ""
    own = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    return f"; its functions are {', '.join(own)}" if own else "; it defines no function"


def _checked(factory: Any, spec: str) -> Callable[[], Any]:
    """`factory`, if it can be called as it stands."""
    name = spec.partition(":")[2]
    if isinstance(factory, type) and issubclass(factory, nn.Module):
        raise ModelBuildError(
            f"{spec} is a class, not a model; write a function in that module and give its name: "
            f"def make(): return {name}(...), (example_input,)"
        )
    if isinstance(factory, nn.Module):
        raise ModelBuildError(
            f"{spec} is a model that already holds its weights; write a function that builds one: "
            f"def make(): return {type(factory).__name__}(...), (example_input,)"
        )
    if not callable(factory):
        raise ModelBuildError(f"{spec} is a {type(factory).__name__}, not a function; {_REMEDY}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelBuildError(f"{spec} is called without arguments, and it is {error}; give them defaults") from None
    except ValueError:  # written in C: no signature to look at
        pass
    function: Callable[[], Any] = factory
    return function


def _made(factory: Callable[[], Any], spec: str, dtype: torch.dtype) -> tuple[nn.Module, Call | None]:
    """What the factory returns: the model in `dtype`, and the call if it gives one."""
    try:
        with building(dtype):
            model, rest = _split(factory(), spec)
            settle(model, dtype)
            _prepare(model)
    except DATA_DEPENDENT as error:
        raise ModelBuildError(
            f"{spec} looks at the values of a tensor at {raised_line(error)}, "
            "and autorev builds models without values; use plain Python numbers there, or numpy"
        ) from error
    except (KeyboardInterrupt, AutorevError):
        raise
    except BaseException as error:  # SystemExit and the like, too: a model that is not there is no result
        raise ModelBuildError(
            f"{spec} raised {_described(error)}; it is called without weights (fake tensors on the CPU): "
            "build the model from its config and load nothing"
        ) from error
    return model, _call(rest, spec)


def _split(returned: Any, spec: str) -> tuple[nn.Module, list[Any]]:
    """The model, and what stands behind it."""
    model, *rest = returned if isinstance(returned, tuple | list) and returned else (returned,)
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ModelBuildError(f"{spec} returned the class {model.__name__}, not a model; return {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise ModelBuildError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module; {_REMEDY}")
    return model, rest


def _prepare(model: nn.Module) -> None:
    """Ask of it what every model can do: some override it, and raise."""
    model.train()
    for _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers()):
        pass


def _call(rest: list[Any], spec: str) -> Call | None:
    """What stands behind the model in the returned tuple."""
    call: Call
    match rest:
        case []:
            return None
        case [torch.Tensor() as only]:
            call = (only,), {}
        case [dict() as kwargs]:
            call = (), kwargs
        case [tuple() | list() as args]:
            call = tuple(args), {}
        case [tuple() | list() as args, dict() as kwargs]:
            call = tuple(args), kwargs
        case _:
            given = ", ".join(type(item).__name__ for item in rest)
            raise ModelBuildError(f"{spec} returned a model followed by ({given}); {_REMEDY}")
    if not all(isinstance(name, str) for name in call[1]):
        raise ModelBuildError(f"{spec} returned keyword arguments whose names are no text; {_REMEDY}")
    for tensor in tree_leaves(call):
        if isinstance(tensor, torch.Tensor) and tensor.numel() == 0:
            raise ModelBuildError(
                f"{spec} returned an empty example input of shape {list(tensor.shape)}; give a batch of one or more"
            )
    return call


def _no_arguments(model: nn.Module, spec: str) -> Call:
    """The empty call, for a forward that needs nothing."""
    try:
        inspect.signature(model.forward).bind()
    except ValueError:  # written in C: no signature to look at
        pass
    except TypeError as error:
        raise ModelBuildError(
            f"{spec} returned a {type(model).__name__} without example inputs, and its forward is {error}; "
            "return (model, args) or (model, args, kwargs)"
        ) from None
    return (), {}


def resized(call: Call, batch: int, sequence: int | None) -> Call:
    """`call` at another size: its own values, repeated or cut, along the axes that `_resizable_workload` finds."""
    own_batch, own_length = _sizes(call)

    def fitted(tensor: torch.Tensor) -> torch.Tensor:
        if own_batch and tensor.dim():
            tensor = tensor[torch.arange(batch) % own_batch]
        if own_length and sequence and tensor.dim() == 2:
            tensor = tensor[:, torch.arange(sequence) % own_length]
        return tensor

    fitted_call: Call = tree_map_only(torch.Tensor, fitted, call)
    return fitted_call


def _sizes(call: Call) -> tuple[int | None, int | None]:
    """(batch, sequence) of a call; None where its tensors share no such axis."""
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    batches = {tensor.shape[0] for tensor in tensors}
    wide = [tensor for tensor in tensors if tensor.dim() > 1]
    lengths = {tensor.shape[1] for tensor in wide}
    are_ids = all(t.dim() == 2 and not t.is_floating_point() and not t.is_complex() for t in wide)
    if len(batches) != 1:
        return None, None
    return batches.pop(), lengths.pop() if are_ids and len(lengths) == 1 else None


def _resizable_workload(call: Call, build: Build, name: str, source: str) -> Workload:
    """The first axis is the batch if all tensors share it, the second the sequence if all are rows of ids."""
    own_batch, own_length = _sizes(call)
    resizable, has_sequence = own_batch is not None, own_length is not None
    default = torch.get_default_dtype()

    def example(batch: int, sequence: int | None) -> Call:
        def resized(tensor: torch.Tensor) -> torch.Tensor:
            shape = list(tensor.shape)
            if resizable and shape:
                shape[0] = batch
            if has_sequence and sequence and len(shape) == 2:
                shape[1] = sequence
            # What was made in the default dtype follows it, as the model's weights do.
            dtype = torch.get_default_dtype() if tensor.dtype == default else tensor.dtype
            return torch.zeros(shape, dtype=dtype)

        resized_call: Call = tree_map_only(torch.Tensor, resized, call)
        return resized_call

    matched_build, matched_example = in_one_dtype(build, example)
    return Workload(
        name=name,
        source=source,
        build=matched_build,
        example=matched_example,
        default_batch=own_batch or 1,
        default_sequence=own_length,
        longest_sequence=None,
        resizable=resizable,
    )


def _described(error: BaseException) -> str:
    return f"{type(error).__name__} at {raised_line(error)}: {message_of(error) or 'no message'}"

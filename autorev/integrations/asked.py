"""What the config of a `transformers` model does not say: a copy without values, one layer deep, is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autorev.integrations.inputs import text_config


def shallow(config: Any, model_cls: type[Any]) -> Any:
    """A model of `config` whose language model has one layer; on whatever device, in whatever mode there is."""
    import torch

    small = copy.deepcopy(config)
    text_config(small).num_hidden_layers = 1
    return model_cls._from_config(small, dtype=torch.get_default_dtype()).train()


def takes(config: Any, model_cls: type[Any], call: Callable[[], dict[str, Any]], live: bool) -> bool:
    """Does a model of `config` run on `call()`? One that looks at values does where it is `live`, and has some."""
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    from autorev.integrations.building import building

    try:
        with _without_values():
            with building(torch.get_default_dtype()):
                model = shallow(config, model_cls)
            model(**call())
    except (DataDependentOutputException, DynamicOutputShapeException):
        return live
    except Exception:  # the model's own word
        return False
    return True


@contextmanager
def _without_values() -> Iterator[None]:
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from autorev.integrations.quirks import quirks
    from autorev.own_mode import OwnFakeMode

    with unset_fake_temporarily(), OwnFakeMode(allow_non_fake_inputs=True), torch.no_grad(), quirks():
        yield

"""What a first program mixes up is an `InputError` that says what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from eplb_core import Rearranger, create_eplb_communicator
from eplb_core.errors import InputError
from eplb_core.testing import in_process

WEIGHTS = [[torch.zeros(2, 4)], [torch.zeros(2, 4)]]


def created(group: Any, backend: Any = "in_process", weights: Any = WEIGHTS[0]) -> Any:
    return create_eplb_communicator(group, backend, weights, registry=in_process.registry())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda group: created(group, weights=WEIGHTS), "give weights[0]"),
        (lambda group: created("in_process", group), "the group of ranks is a str"),
        (lambda group: created(None), "the group of ranks is None"),
        (lambda group: created(group, backend=WEIGHTS[0]), "the backend is a list"),
        (lambda group: created(group, weights=[np.zeros((2, 4))]), "torch.from_numpy"),
        (lambda group: created(group, weights={0: torch.zeros(2, 4)}), "one of the expert weights is a int"),
        (lambda group: Rearranger(WEIGHTS, created(group)), "the communicator of a Rearranger is a list"),  # type: ignore[arg-type]
    ],
    ids=["all layers", "swapped", "no group", "no backend", "numpy", "dict", "swapped for the rearranger"],
)
def test_it_is_refused_by_name(call: Callable[[Any], object], said: str) -> None:
    def work(group: Any) -> str:
        with pytest.raises(InputError) as raised:
            call(group)
        return str(raised.value)

    (text,) = in_process.run_ranks(1, work)
    assert said in text

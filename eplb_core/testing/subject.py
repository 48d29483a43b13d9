"""What is checked: a config string, and what its backend can do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from eplb_core.errors import InputError
from eplb_core.registry.config import parse_config
from eplb_core.registry.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A backend with its options, on one kind of device, and what it claims to be able to do.

    Attributes:
        config: the config string.
        device: torch device type of the tensors.
        dtypes: names of the dtypes that it moves, such as `("bfloat16", "uint8")`; empty means every dtype of torch.
        max_ranks: the most ranks that it connects, or None.
        stateless: it works in a group that has no process group.
        background: it works on a thread of its own, beside other work.
        must_register: it moves nothing that was not registered before.
    """

    config: str
    device: str = "cpu"
    dtypes: tuple[str, ...] = ()
    max_ranks: int | None = None
    stateless: bool = False
    background: bool = False
    must_register: bool = False

    @classmethod
    def declared(cls, config: str, device: str = "cpu", *, must_register: bool = False) -> Subject:
        """Return the subject that the backend's own capabilities describe.

        Raises:
            ConfigError, BackendError: the config string is wrong, or its backend cannot be selected.
            InputError: the backend does not move tensors on this device.
        """
        spec = Registry().select(parse_config(config)).spec
        if spec is None or device not in spec.capabilities.device_types:
            devices = ", ".join(spec.capabilities.device_types) if spec else "none"
            raise InputError(f"{config} does not move tensors on {device}", why=f"it declares {devices}")
        return cls(
            config=config,
            device=device,
            dtypes=spec.capabilities.dtypes,
            stateless=spec.capabilities.stateless_groups,
            background=spec.capabilities.background,
            must_register=must_register,
        )

    def on(self, device: str) -> Subject:
        """Return the same on another kind of device."""
        return dataclasses.replace(self, device=device)

"""The options of the `mooncake` backend, as written in a config string."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eplb_core import ByteSize, CommonOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeOptions(CommonOptions):
    """Options of the `mooncake` backend. They must be the same on every rank.

    Attributes:
        window: bytes of staging memory of a rank, send and receive window together, for any number of ranks.
        protocol: the protocol that carries the bytes.
        device_name: the RDMA devices to use, such as `mlx5_0`, separated by commas; all by default.
        interface: the network interface whose IPv4 address the peers connect to, such as `eth0`; by default
            loopback if all ranks are on one host, and the interface of the default route otherwise.

    Raises:
        ValueError: `device_name` is given, and the protocol is not `rdma`.
    """

    window: ByteSize = field(
        default=ByteSize(64 << 20),
        metadata={"help": "staging memory of a rank, send and receive window together", "min": 8192},
    )
    protocol: Literal["tcp", "rdma"] = field(default="tcp", metadata={"help": "protocol that carries the bytes"})
    device_name: str | None = field(
        default=None, metadata={"help": "RDMA devices to use, separated by commas; all by default"}
    )
    interface: str | None = field(
        default=None, metadata={"help": "network interface that the peers connect to; found by default"}
    )

    def __post_init__(self) -> None:
        """Check combinations of options."""
        if self.device_name and self.protocol != "rdma":
            raise ValueError("device_name selects RDMA devices, so it needs protocol=rdma")

#!/usr/bin/env python3
"""Run vLLM's own EPLB weight transfer on a workload file and print one JSON line.

    python benchmarks/make_workload.py w.npz --ranks 2
    python benchmarks/vllm_peer.py w.npz --vllm FOLDER --backend nixl --device cpu

FOLDER is the unzipped wheel of vllm 0.33.0, or only its `vllm/distributed/eplb`; `compare.py` fetches it. Three files
of it are loaded (eplb_communicator, migration_scheduler, rebalance_execute); what they import from the rest of vLLM is
stubbed below. On a CPU its NIXL communicator is told that the memory is DRAM; nothing else is changed.

With --device cuda rank r uses GPU r modulo their number, as with `eplb bench`; nccl needs a GPU for each rank.

All bytes are compared after the last step; `correct` says whether the weights came out right. On a GPU without visible
NVLink set UCX_CUDA_IPC_ENABLE_GET_ZCOPY=on, or its READ runs over tcp.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import socket
import statistics
import sys
import time
import types

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _module(name: str, **names: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)
    return module


def _load(name: str, root: str) -> types.ModuleType:
    path = os.path.join(root, *name.split(".")) + ".py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    parent, _, leaf = name.rpartition(".")
    setattr(sys.modules[parent], leaf, module)
    spec.loader.exec_module(module)
    return module


def load_vllm(root: str) -> tuple[types.ModuleType, types.ModuleType]:
    """Return vLLM's (eplb_communicator, rebalance_execute) modules from an unzipped wheel at `root`."""
    packages = (
        "vllm",
        "vllm.distributed",
        "vllm.distributed.eplb",
        "vllm.distributed.device_communicators",
        "vllm.utils",
    )
    for name in packages:
        _module(name).__path__ = []
    _module("vllm.logger", init_logger=logging.getLogger)
    import nixl._api as nixl_api

    _module(
        "vllm.distributed.nixl_utils", NixlWrapper=nixl_api.nixl_agent, nixl_agent_config=nixl_api.nixl_agent_config
    )
    _module("vllm.distributed.device_communicators.pynccl", PyNcclCommunicator=object)
    dtypes = type("ncclDataTypeEnum", (), {"supports_torch_dtype": staticmethod(lambda dtype: True)})
    _module("vllm.distributed.device_communicators.pynccl_wrapper", ncclDataTypeEnum=dtypes)

    @contextlib.contextmanager
    def device_stream(stream):
        if stream is None:
            yield
            return
        previous = torch.accelerator.current_stream()
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(previous)

    _module("vllm.distributed.eplb.eplb_utils", device_stream=device_stream, CpuGpuEvent=object)
    one_stage = types.SimpleNamespace(world_size=1, rank_in_group=0)
    _module(
        "vllm.distributed.parallel_state",
        GroupCoordinator=object,
        get_pp_group=lambda: one_stage,
        is_local_first_rank=lambda: False,
    )
    stateless = type("StatelessGroupCoordinator", (), {})
    _module("vllm.distributed.stateless_coordinator", StatelessGroupCoordinator=stateless)
    _module("vllm.distributed.utils", is_weak_contiguous=lambda tensor: tensor.is_contiguous())
    platform = types.SimpleNamespace(is_rocm=lambda: False, is_cuda_alike=lambda: True)
    _module("vllm.platforms", current_platform=platform)
    _module("vllm.utils.gpu_sync_debug", gpu_sync_allowed=contextlib.nullcontext)
    _module("vllm.utils.torch_utils", PIN_MEMORY=torch.cuda.is_available())
    communicator = _load("vllm.distributed.eplb.eplb_communicator", root)
    _load("vllm.distributed.eplb.migration_scheduler", root)
    return communicator, _load("vllm.distributed.eplb.rebalance_execute", root)


def pattern(expert: int, layer: int, tensor: int) -> int:
    """Return the byte that fills a tensor of an expert."""
    return (int(expert) * 7 + layer * 3 + tensor) % 251


def run(rank: int, args: argparse.Namespace, port: int) -> None:
    """Do one rank's part; rank 0 prints the document."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    work = np.load(args.workload)
    placements, sizes, world = work["placements"], work["tensor_bytes"].tolist(), int(work["ranks"])
    dist.init_process_group("gloo", rank=rank, world_size=world)
    group = dist.group.WORLD
    vllm, execute = load_vllm(args.vllm)
    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", rank % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    _, layers, total = placements.shape
    slots = total // world
    mine = slice(rank * slots, (rank + 1) * slots)
    weights = [[torch.empty(slots, size, dtype=torch.uint8, device=device) for size in sizes] for _ in range(layers)]
    for layer in range(layers):
        for t, tensor in enumerate(weights[layer]):
            for slot, expert in enumerate(placements[0][layer][mine]):
                tensor[slot].fill_(pattern(expert, layer, t))
    buffer = [torch.empty_like(tensor) for tensor in weights[0]]
    if args.backend == "nixl":
        communicator = vllm.NixlEplbCommunicator(group, weights, buffer)
        if device.type == "cpu":
            communicator._nixl_memory_type = "DRAM"
    elif args.backend == "gloo_staged":
        communicator = vllm.TorchDistGlooStagedEplbCommunicator(group)
    elif args.backend == "nccl":  # takes a GPU for each rank
        communicator = vllm.TorchDistNcclEplbCommunicator(dist.new_group(backend="nccl"))
    else:
        communicator = vllm.TorchDistNcclEplbCommunicator(group)
    seconds, moved = [], 0
    for old, new in itertools.pairwise(placements):
        sync()
        dist.barrier()
        start = time.perf_counter()
        execute.rearrange_expert_weights_inplace(
            torch.from_numpy(old), torch.from_numpy(new), weights, buffer, group, communicator
        )
        sync()
        seconds.append(time.perf_counter() - start)
        moved += sum(len(set(n[mine]) - set(o[mine])) for o, n in zip(old, new, strict=True)) * sum(sizes)
    wrong = sum(
        not bool((weights[layer][t][slot] == pattern(expert, layer, t)).all())
        for layer in range(layers)
        for t in range(len(sizes))
        for slot, expert in enumerate(placements[-1][layer][mine])
    )
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # a step ends with its last rank
    seconds = slowest.tolist()
    counts = torch.tensor([moved, wrong])
    dist.all_reduce(counts)
    if rank == 0:
        steps = len(seconds)
        median = statistics.median(seconds[1:] or seconds)
        bytes_per_step = counts[0].item() / steps
        print(
            json.dumps(
                {
                    "peer": "vllm-0.33",
                    "backend": args.backend,
                    "device": args.device,
                    "ranks": world,
                    "layers": layers,
                    "seconds_median": median,
                    "seconds_min": min(seconds),
                    "seconds_first": seconds[0],
                    "bytes_moved": bytes_per_step,
                    "gb_per_s": bytes_per_step / median / 1e9,
                    "correct": counts[1].item() == 0,
                    "wrong_tensors": counts[1].item(),
                }
            ),
            flush=True,
        )
    dist.barrier()
    os._exit(0)  # its communicator has no close(); freed in interpreter order, UCX segfaults at exit


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("workload")
    p.add_argument("--vllm", required=True, help="folder that holds the unzipped wheel's vllm/distributed/eplb")
    p.add_argument("--backend", choices=["nixl", "gloo", "gloo_staged", "nccl"], default="nixl")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    a = p.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free_port = s.getsockname()[1]
    mp.spawn(run, args=(a, free_port), nprocs=int(np.load(a.workload)["ranks"]))

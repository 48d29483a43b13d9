"""Starts one SGLang on CPU ranks and runs cases on it, each a list of steps; writes one JSON document at the end.

    python -m cpu_engine.run SETTINGS.json RESULT.json

SGLang starts its processes anew, and each imports all of it for seconds. Here they are forked from this one, which has
imported it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from cpu_engine import absent


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    result: dict[str, Any] = {"cases": {}, "refused": {}, "error": ""}
    try:
        began = time.perf_counter()
        import_all()
        result["import_s"] = time.perf_counter() - began
        for name, variables in settings["refused"].items():
            result["refused"][name] = starts(settings, variables)
        began = time.perf_counter()
        engine = Engine(settings)
        result["start_s"] = time.perf_counter() - began
        for case in settings["cases"]:
            began = time.perf_counter()
            steps = [engine.step(step) for step in case["steps"]]
            result["cases"][case["name"]] = {"steps": steps, "seconds": time.perf_counter() - began}
    except BaseException:  # noqa: BLE001 - the test shows it
        result["error"] = traceback.format_exc()
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0 if not result["error"] else 1)  # whoever started this ends the processes that are left


def import_all() -> None:
    """Import SGLang, and let it fork."""
    absent.stand_in()
    import sglang.srt.entrypoints.engine
    import sglang.srt.managers.scheduler
    import sglang.srt.managers.tp_worker
    import sglang.srt.model_executor.model_runner

    multiprocessing.set_start_method("fork")
    sglang.srt.entrypoints.engine.mp.set_start_method = lambda *_, **__: None


def starts(settings: dict[str, Any], variables: dict[str, str]) -> bool:
    """Return whether SGLang starts with these environment variables, in a process of its own."""
    process = multiprocessing.Process(target=_start, args=(settings, variables))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"SGLang neither starts nor refuses to with {variables}")
    return process.exitcode == 0


def _start(settings: dict[str, Any], variables: dict[str, str]) -> None:
    os.environ |= variables
    engine = Engine(settings)
    engine.engine.shutdown()
    os._exit(0)


class Engine:
    """SGLang, offline."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from sglang import Engine as SglangEngine

        self.ranks = settings["ranks"]
        self.sampling = {"temperature": 0, "max_new_tokens": settings["tokens"], "ignore_eos": True}
        self.prompts = settings["prompts"]
        self.engine = SglangEngine(
            model_path=settings["model"],
            skip_tokenizer_init=True,
            device="cpu",
            dtype="float32",
            attention_backend="torch_native",
            sampling_backend="pytorch",
            grammar_backend="none",
            disable_cuda_graph=True,
            disable_radix_cache=True,
            mem_fraction_static=0.1,
            max_total_tokens=4096,
            tp_size=self.ranks,
            ep_size=self.ranks,
            enable_eplb=True,
            ep_num_redundant_experts=self.ranks,
            eplb_rebalance_num_iterations=10**9,
            expert_distribution_recorder_buffer_size=8,
            log_level="info",
        )

    def step(self, step: list[Any]) -> Any:
        """Do one step: `["tokens"]`, `["sleep", tags]`, `["reload", folder]`, or one of the shim's.

        Those are answered by each rank.
        """
        name, *arguments = step
        if name == "tokens":
            # One after the other: which prompts share a batch is a matter of timing, and changes roundings.
            outputs = [self.engine.generate(input_ids=ids, sampling_params=self.sampling) for ids in self.prompts]
            return [output["output_ids"] for output in outputs]
        if name == "sleep":
            self.engine.release_memory_occupation(*arguments)
            self.engine.resume_memory_occupation(*arguments)
            return True
        if name == "reload":
            return bool(self.engine.update_weights_from_disk(*arguments)[0])
        self.engine.collective_rpc("eplb_step", path="answer", name=name, arguments=arguments)
        answers = [json.loads(Path(f"answer.{rank}").read_text()) for rank in range(self.ranks)]
        for rank in range(self.ranks):
            Path(f"answer.{rank}").unlink()
        return answers


if __name__ == "__main__":
    main()

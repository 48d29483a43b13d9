"""Starts one vLLM on CPU ranks and runs cases on it, each a list of steps; prints one JSON document at the end.

python -m cpu_engine.run SETTINGS.json RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    result: dict[str, Any] = {"cases": {}, "error": ""}
    began = time.perf_counter()
    try:
        engine = Engine(settings)
        result["start_s"] = time.perf_counter() - began
        for case in settings["cases"]:
            began = time.perf_counter()
            steps = [engine.step(step) for step in case["steps"]]
            result["cases"][case["name"]] = {"steps": steps, "seconds": time.perf_counter() - began}
    except BaseException:  # noqa: BLE001 - the test shows it
        result["error"] = traceback.format_exc()
    Path(sys.argv[2]).write_text(json.dumps(result))
    os._exit(0 if not result["error"] else 1)  # worker processes end when this one does


class Engine:
    """vLLM, offline."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        self.sampling = SamplingParams(
            temperature=0.0, max_tokens=settings["tokens"], ignore_eos=True, detokenize=False
        )
        self.prompts = [{"prompt_token_ids": ids} for ids in settings["prompts"]]
        self.llm = LLM(
            model=settings["model"],
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=8,
            tensor_parallel_size=settings["ranks"],
            enable_expert_parallel=True,
            enable_eplb=True,
            eplb_config={
                "num_redundant_experts": settings["ranks"],
                "step_interval": 10**9,
                "window_size": 4,
                "use_async": settings["use_async"],
                **settings["eplb_config"],
            },
            weight_transfer_config={"backend": "disk"},
            worker_cls="cpu_engine.worker.EplbTestWorker",
            enable_prefix_caching=False,
            disable_log_stats=True,
            **settings.get("more", {}),
        )

    def step(self, step: list[Any]) -> Any:
        """Do one step: `["tokens"]`, or `["rpc", method, *arguments]` with an answer of each rank."""
        if step[0] == "tokens":
            outputs = self.llm.generate(self.prompts, self.sampling, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]
        return self.llm.collective_rpc(step[1], args=tuple(step[2:]))


if __name__ == "__main__":
    main()

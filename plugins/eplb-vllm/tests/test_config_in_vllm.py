"""vLLM reads its configuration: names of eplb's backends are taken, typos refused while it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_process import run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(200)]

_PROGRAM = """
import json, pickle, sys
from vllm.config.parallel import EPLBConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

answers = {}

def tried(name, make):
    try:
        answers[name] = str(make())
    except (Exception, SystemExit) as error:
        answers[name] = f"{type(error).__name__}: {error}"

tried("before plugins", lambda: EPLBConfig(communicator="shm").communicator)
load_general_plugins()
import vllm.plugins
vllm.plugins.plugins_loaded = False
load_general_plugins()  # other processes of vLLM load plugins several times
for text, use_async in json.loads(sys.argv[1]):
    tried(f"{text} {use_async}", lambda: EPLBConfig(communicator=text, use_async=use_async).communicator)
tried("pickled", lambda: pickle.loads(pickle.dumps(EPLBConfig(communicator="eplb:shm"))).communicator)
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
flag = ["--model", "x", "--eplb-config.communicator"]
tried("flag", lambda: parser.parse_args([*flag, "eplb:nixl?window=512MiB"]).eplb_config.communicator)
tried("json", lambda: parser.parse_args(["--eplb-config", '{"communicator": "auto"}']).eplb_config.communicator)

def parallel(**more):
    return ParallelConfig(tensor_parallel_size=2, enable_expert_parallel=True, enable_eplb=True, **more)

import os
os.environ["EPLB_BACKEND"] = "nixl?windw=1MiB"
tried("variable with a typo", lambda: parallel().eplb_config)
tried("variable with a typo, no EPLB", lambda: ParallelConfig().enable_eplb)
tried("variable with a typo, another choice", lambda: parallel(eplb_config=EPLBConfig(communicator="shm")).enable_eplb)
os.environ["EPLB_BACKEND"] = "shm"
tried("variable", lambda: parallel().enable_eplb)
print("ANSWERS" + json.dumps(answers))
"""

TRIED = [
    ("eplb:nixl?window=512MiB", True),
    ("eplb:auto", True),
    ("auto", True),
    ("shm", True),
    ("nixl", True),
    ("torch_nccl", True),
    ("torch_nccl", False),
    ("eplb:torch_nccl", True),
    ("eplb:torch_nccl", False),
    ("nixll", True),
    ("eplb:nixll", True),
    ("nixl?window=1MiB", True),
    ("eplb:nixl?windw=1MiB", True),
    ("eplb:", True),
]


@pytest.fixture(scope="module")
def answers(python: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of each text."""
    ran = run([str(python), "-c", _PROGRAM, json.dumps(TRIED)], environment, 150, tmp_path_factory.mktemp("config"))
    assert "ANSWERS" in ran.stdout, ran.stdout[-4000:]
    answered: dict[str, Any] = json.loads(ran.stdout.partition("ANSWERS")[2].splitlines()[0])
    return answered


@pytest.mark.parametrize("text", ["eplb:nixl?window=512MiB", "eplb:auto", "auto", "shm", "nixl"])
def test_backends_of_eplb_and_vllm_s_own_names_are_taken(answers: dict[str, Any], text: str) -> None:
    assert answers[f"{text} True"] == text


def test_command_line_and_json_take_them_too(answers: dict[str, Any]) -> None:
    assert answers["flag"] == "eplb:nixl?window=512MiB"
    assert answers["json"] == "auto"
    assert answers["pickled"] == "eplb:shm"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nixll", "there is no communicator 'nixll', did you mean 'nixl'?"),
        ("eplb:nixll", "there is no backend 'nixll', did you mean 'nixl'?"),
        ("nixl?window=1MiB", "write eplb:nixl?window=1MiB for the backend of eplb, or nixl for vLLM's own"),
        ("eplb:nixl?windw=1MiB", "backend 'nixl' has no option 'windw', did you mean 'window'?"),
        ("eplb:", "the name of the backend is missing"),
    ],
)
def test_a_typo_is_refused_while_the_configuration_is_read(answers: dict[str, Any], text: str, said: str) -> None:
    assert answers[f"{text} True"].startswith("ValidationError")
    assert said in answers[f"{text} True"]


def test_a_backend_that_cannot_move_beside_inference_is_refused_with_use_async(answers: dict[str, Any]) -> None:
    assert "cannot move experts beside inference" in answers["eplb:torch_nccl True"]
    assert answers["eplb:torch_nccl False"] == "eplb:torch_nccl"
    assert "incompatible with" in answers["torch_nccl True"]  # vLLM's own word about its own
    assert answers["torch_nccl False"] == "torch_nccl"


def test_before_plugins_are_loaded_vllm_knows_its_own_names_only(answers: dict[str, Any]) -> None:
    assert answers["before plugins"].startswith("ValidationError")


def test_the_variable_is_checked_where_it_counts(answers: dict[str, Any]) -> None:
    assert "has no option 'windw'" in answers["variable with a typo"]
    assert "environment variable EPLB_BACKEND" in answers["variable with a typo"]
    assert answers["variable with a typo, no EPLB"] == "False"
    assert answers["variable with a typo, another choice"] == "True"
    assert answers["variable"] == "True"

"""Two processes with two devices each evaluate as one process does: every sample once, each result on both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
import jax
index, port = int(sys.argv[1]), sys.argv[2]
if port != "0":
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
from rankclip_jax import config, evaluation, optim, step
from rankclip_jax.run import Run
from rankclip_jax.tokenizer import Tokenizer

settings = config.load("configs/shapes.py", [
    "batch_size=32", "model.image_size=16", "model.vision={'layers':(1,1),'width':8,'stem':'small'}",
    "model.text={'layers':1,'width':32,'heads':2}", "eval.geometry={}",
    "eval.zero_shot={'held_out':{'format':'shapes','path':'held_out'}}",
    "eval.retrieval={'scenes':{'format':'shapes','path':41}}",
])
run = Run(settings, "none", Tokenizer.train(["a red circle", "a blue square"], 300))
state = step.init_state(run.model, optim.make_optimizer(settings.optim, 100), 0, run.mesh, settings.sharding)
print("RESULTS", json.dumps(evaluation.evaluate(settings.eval, run.encoder(state))))
"""


def start(index, port):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(index), str(port)]
    repo = Path(__file__).parents[1]
    return subprocess.Popen(command, cwd=repo, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results_of(process):
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    return json.loads(next(line for line in output.splitlines() if line.startswith("RESULTS")).removeprefix("RESULTS"))


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [start(0, port), start(1, port)]
    first, second = (results_of(process) for process in pair)
    assert first == second == results_of(start(0, 0))
    assert first["zero_shot"]["held_out"]["n"] == 128 and first["retrieval"]["scenes"]["images"] == 41

"""Every program of a run is lowered for CUDA and TPU, and compiled where their compilers are installed."""

import json
import os
import subprocess
import sys

import jax
import pytest
from jax._src import xla_bridge

from rankclip_jax import config as configs
from rankclip_jax.inference import model as inference
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import loop, targets
from rankclip_jax.weights import pretrained
from tests.support import backends, made_models
from tests.support.backends import AXES, H100, PROGRAMS, V5E

RECORDS = {"cuda": H100, "tpu": V5E}
# What attends in bfloat16, and what has no ranking term.
BY_CUDNN = {name for name in PROGRAMS if name.startswith(("step", "validation", "embed", "study"))}
BY_CUDNN -= {"step: float32", "step: float32 ResNet", "step: XLA's attention"}
BY_CUDNN -= {"step: ResNet, packed, clip"}  # neither packed captions nor a ResNet's pool attend by it
WITHOUT_RANKING = {"step: clip", "step: cyclip", "step: SigLIP", "step: ResNet, packed, clip", "restoring"}
WITHOUT_RANKING |= {"embed images", "embed texts"}
QUICK = {"step: base", "step: packed", "step: ResNet", "step: SigLIP", *(set(backends.OTHERS) - {"the doctor's step"})}
QUICK = {(name, platform) for name in QUICK for platform in RECORDS}
QUICK -= {(name, "tpu") for name in ("step: packed", "step: ResNet", "step: SigLIP", "study")}


@pytest.fixture
def as_an_accelerator(monkeypatch):
    """jax answers as it does on every GPU and TPU, whose backends come through PJRT's C API."""
    monkeypatch.setattr(xla_bridge, "using_pjrt_c_api", lambda backend=None: True)


def lowered(function, arguments, platform) -> str:
    with targets.cudnn_assumed():
        return function.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def has_cudnn(text: str) -> bool:
    return "__cudnn$fmha" in text or "CustomSPMDPartitioning" in text  # the latter is jax's wrapper of it on a mesh


@pytest.mark.parametrize(
    "name, platform",
    [
        pytest.param(name, platform, marks=() if (name, platform) in QUICK else pytest.mark.slow)
        for name in PROGRAMS
        for platform in RECORDS
    ],
)
def test_lowered(name, platform, as_an_accelerator):
    mesh = make_mesh(AXES.get(name, {"data": -1}))
    with targets.cudnn_assumed():
        function, arguments = PROGRAMS[name](mesh, RECORDS[platform])
    text = lowered(function, arguments, platform)
    assert "rankclip_host_order" not in text and "python" not in text.lower()  # nothing calls the host back
    assert has_cudnn(text) == (platform == "cuda" and name in BY_CUDNN)
    assert ("stablehlo.sort" in text or "top_k" in text) == (name not in WITHOUT_RANKING)


@pytest.mark.parametrize("platform", RECORDS)
def test_an_encoder_as_load_makes_it(platform, tmp_path, monkeypatch, as_an_accelerator):
    monkeypatch.setattr(inference, "devices_of", lambda mesh: RECORDS[platform])
    read = pretrained.read(made_models.make_workdir(tmp_path / "run", made_models.VIT))
    model = inference.Model(read, "bfloat16")
    config = model.source.config
    side, length = config.vision.image_size, config.text.context_length
    for batch in (jax.ShapeDtypeStruct((8, side, side, 3), "uint8"), jax.ShapeDtypeStruct((8, length), "int32")):
        text = lowered(model._embed, (model._variables, batch), platform)
        assert has_cudnn(text) == (platform == "cuda")


CC3M = ["data.format=shapes", "model.name=ViT-tiny", "model.vision={'layers':1,'width':64,'heads':1}"]
CC3M += ["model.image_size=32", "model.text={'layers':1,'width':64,'heads':1}"]
CC3M += ["model.context_length=None", "tokenizer.path=None", "eval.suite=None", "optim.warmup_steps=1"]
SHAPES = ["model.image_size=16", "model.vision={'layers':(1,1),'width':8,'stem':'small'}", "model.text={'layers':1}"]
FEW = ["steps=3", "batch_size=16", "data.train=48", "data.val=16", "eval.zero_shot={}", "log_every=1"]


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [("shapes", [*SHAPES, "optim.warmup_steps=1"]), ("cc3m", CC3M)])
def test_three_steps_as_on_an_accelerator(name, changes, tmp_path, as_an_accelerator, one_device):
    config = configs.load(f"configs/{name}.py", [*FEW, *changes])
    assert config.model.dtype == ("bfloat16" if name == "cc3m" else "float32")
    loop.train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


# Each kind of tower, packed captions and the losses of the step once, for one GPU or for eight, which differ in the
# collectives alone. tests/losses/test_platforms.py compiles the loss alone, with its loop over chunks.
COMPILED = {
    "gpu": {"1xH100": ("step: ResNet, packed, clip", "embed texts"), "8xH100": ("step: base", "step: SigLIP")},
    "tpu": {"v5e:2x2": ("step: base", "step: ResNet, packed, clip", "step: SigLIP", "embed texts")},
}
SCRIPT = """
import json, sys
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import targets
from rankclip_jax.common.devices import devices_of
from tests.support.backends import PROGRAMS
with targets.cudnn_assumed():
    for target, names in json.loads(sys.argv[1]).items():
        mesh = make_mesh({"data": -1}, targets.devices(targets.parse_target(target)))
        for name in names:
            function, arguments = PROGRAMS[name](mesh, devices_of(mesh))
            compiled = function.lower(*arguments).compile()
            cudnn = "__cudnn$fmha" in compiled.as_text()
            print(json.dumps([name, cudnn, compiled.memory_analysis().temp_size_in_bytes]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("platform", COMPILED)
def test_compiled(platform):
    if not targets.has_compiler(platform):
        pytest.skip(f"needs the compiler: {targets.HOW_TO_INSTALL[platform]}")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(COMPILED[platform])],
        env=targets.environment(platform) | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == [name for names in COMPILED[platform].values() for name in names]
    for name, cudnn, peak in found:
        assert cudnn == (platform == "gpu" and name in BY_CUDNN) and peak > 0, name

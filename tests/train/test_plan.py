"""The plan of a run: what it reads from compiled programs is what the formulas say."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import complete, load
from rankclip_jax.parallel.mesh import make_mesh
from rankclip_jax.train import hlo, plan, targets
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.train.flops import ACCELERATORS
from rankclip_jax.train.targets import parse_target

SMALL = dict(
    batch_size=64,
    model=dict(name="ViT-tiny", image_size=32, context_length=16, scan_layers=True),
    tokenizer=dict(vocab_size=512),
    data=dict(format="shapes"),
    plan=dict(target="8xH100", samples=6400, utilisation=0.5),
    epochs=10,
    optim=dict(warmup_steps=10),
)
CLIP = {"loss": {"objective": "clip"}}  # sooner compiled than what ranks


@pytest.mark.parametrize(
    ("text", "kind", "count"), [("v5e:4x4", "v5e", 16), ("v5p:4x4x8", "v5p", 128), ("8xH100", "H100", 8)]
)
def test_targets(text, kind, count):
    target = parse_target(text)
    assert (target.kind, target.count) == (kind, count)
    assert (target.topology == text) == (target.platform == "tpu") == kind.startswith("v")


@pytest.mark.parametrize("text", ["v5e", "H100", "8xH99", "v9:4x4", "0.5xH100", "0xH100", ""])
def test_a_wrong_target_says_what_is_known(text):
    with pytest.raises(InputError, match=r"config.plan.target=.*such as v5e:4x4.*H100"):
        parse_target(text)


def test_collectives_are_counted_by_kind_and_as_often_as_they_run():
    text = """HloModule jit_step

%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %c = bf16[4]{0} all-reduce-start(bf16[4]{0} %w), to_apply=%add
}

%layers (p: f32[8]) -> f32[8] {
  %g = f32[64,32]{1,0} all-gather(f32[8,32]{1,0} %x), dimensions={0}
  ROOT %v = f32[8]{0} while(%t), condition=%c2, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %b = (f32[10]{0}, f32[20,2]{1,0}) all-reduce(%y, %z), to_apply=%add
  %v = f32[8]{0} while(%t), condition=%c1, body=%layers, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %d = f32[8]{0} add(%p, %q)
}
"""
    assert hlo.collectives(text) == {"all-gather": (3, 3 * 64 * 32 * 4), "all-reduce": (1 + 15, 200 + 15 * 8)}


def test_joined_arrays_and_loops_as_the_tpu_compiler_writes_them():
    many = ", ".join(["f32[10]{0:T(8,128)}"] * 5) + ", /*index=5*/bf16[4,2]{1,0:T(8,128)}"
    text = f"""HloModule jit_step

%counter (p: (s32[], f32[8])) -> pred[] {{
  %twelve = s32[]{{:T(128)}} constant(12)
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %twelve), direction=LT
}}

%until (p: (s32[], f32[8])) -> pred[] {{
  ROOT %any = pred[]{{:T(512)}} reduce(%pending), to_apply=%or
}}

%layer (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %all-reduce.1 = ({many}) all-reduce(%x, %y), to_apply=%add
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %w = (s32[], f32[8]) while(%t), condition=%counter, body=%layer, metadata={{op_name="while"}}
  %v = (s32[], f32[8]) while(%t), condition=%until, body=%layer2, metadata={{op_name="while"}}
  %g = (f32[8]{{0}}, f32[64]{{0}}) all-gather-start(%a), dimensions={{0}}
}}
"""
    assert hlo.collectives(text) == {"all-reduce": (12, 12 * (5 * 40 + 16)), "all-gather": (1, 256)}


def test_a_program_with_sorts_has_no_time():
    """As libtpu writes them: an operation with an estimate, one with none, and one of -1 s."""
    fusion = '%f = f32[8]{0} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"1825"}'
    sort = "%s = (s32[8,9]{1,0}, s32[8,9]{1,0}) sort(%k, %i), dimensions={1}, to_apply=%less"
    moved = '%r = f32[8]{0} all-reduce-start(%a), to_apply=%add, backend_config={"estimated_cycles":"-1"}'
    priced = '%t = (s32[8]{0}) sort(%k), dimensions={0}, backend_config={"estimated_cycles":"700"}'
    assert hlo.unpriced(f"  {fusion}\n  {priced}\n") == set()
    assert hlo.unpriced(f"  {fusion}\n  {sort}\n") == {"sort"}
    assert hlo.unpriced(f"  {sort}\n  {moved}\n") == {"sort", "all-reduce"}


def test_sorts_gathers_and_scatters_of_a_tpu_are_priced_as_often_as_they_run():
    text = """HloModule jit_step

%fused (p: f32[8,1024], i: s32[8192]) -> f32[8192] {
  %i = s32[8,1024,2]{2,1,0:T(8,128)} custom-call(%p1), custom_call_target="GatherScatterIndicesBitpacked"
  ROOT %g = f32[8,1024]{1,0} gather(%p, %i), offset_dims={}, collapsed_slice_dims={0,1}, index_vector_dim=2
}

%timed (p: f32[8,1024], i: s32[8192]) -> f32[8192] {
  ROOT %g = f32[8,1024]{1,0} gather(%p, %i), offset_dims={}, index_vector_dim=1
}

%spread (p: f32[8192]) -> f32[8192] {
  %t = s32[4096,1]{1,0} transpose(%i2), dimensions={0,1}
  ROOT %s = f32[8192]{0} scatter(%p, %t, %u), update_window_dims={}, index_vector_dim=1, to_apply=%set
}

%body (p: f32[8]) -> f32[8] {
  %s = (s32[8,1024]{0,1:T(8,128)}, s32[8,1024]{0,1}, f32[8,1024]{0,1}) sort(%k, %i, %x), dimensions={1}, to_apply=%less
  ROOT %v = f32[8]{0} fusion(%q), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"100"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %a = f32[8192]{0} fusion(%p, %i), kind=kCustom, calls=%fused, backend_config={"integer_config":{"integer":"64"}}
  %b = f32[8192]{0} fusion(%p, %i), kind=kCustom, calls=%timed, backend_config={"estimated_cycles":"50"}
  ROOT %d = f32[8192]{0} fusion(%p), kind=kCustom, calls=%spread
}
"""
    found = hlo.cycles(text)
    assert found.compiler == 3 * 100 + 50
    assert found.gather == 14 * 8 * 1024 and found.scatter == 7 * 4096
    assert found.sort == pytest.approx(3 * 8 * 1024 * 0.57 * 55 / 120)  # 1,024 = 2^10: 55 stages of the 120 of 2^15
    assert hlo.sort_cycles((128, 32768), 2) == pytest.approx(0.44 * 128 * 32768)


def test_the_plan_of_a_tpu_counts_them():
    facts = dict(real=True, attention="xla", sort="XLA's", bfloat16=True, parameters=1, trained=1, flops=1e12)
    facts |= dict(states=2**30, of_states={}, temporary=2**30, collectives={}, text_rows=16, patches=None)
    config, target = complete(SMALL), parse_target("v5e:4x4")
    with_cycles = facts | {"cycles": dict(compiler=9e9, sort=1.5e9, gather=3e9, scatter=0.0)}
    without, priced = (plan.summary(config, target, x, x) for x in (facts, with_cycles))
    assert priced["seconds_per_step"] - without["seconds_per_step"] == pytest.approx(3.0)
    said = "\n".join(plan.lines(config, target, priced))
    assert re.search(r"sorts, gathers, scatters +3 s", said) and re.search(r"not priced +collectives", said)


def test_the_counts_are_those_of_a_real_program():
    mesh = make_mesh({"data": 8})
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def layers(x, w):
        def layer(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return jax.lax.scan(layer, x, w)[0]

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "data")))
    compiled = jax.jit(layers, out_shardings=whole).lower(x, w).compile()
    count, size = hlo.collectives(compiled.as_text())["all-gather"]
    # Five gathers of a weight, in the loop or before it, or its rows' share of products; and the result.
    assert size >= 5 * 64 * 64 * 4 + 16 * 64 * 4 and count in (2, 6)


def test_a_line_through_two_batches_and_days():
    config = complete(SMALL | {"batch_size": 128})
    facts = dict(real=True, attention="cudnn", sort="XLA's", bfloat16=True, text_rows=16, patches=None, of_states={})
    half = facts | dict(parameters=1, trained=1, flops=1e12, states=2**30, temporary=3 * 2**30, collectives={})
    numbers = plan.summary(config, parse_target("8xH100"), half | dict(temporary=5 * 2**30), half)
    assert numbers["peak_gib"] == 6
    # Half of the batch took 2 GiB more, so a row takes 1/32 GiB, and what the batch does not change takes 2 GiB.
    assert numbers["largest_batch"] == (80 - 2) * 32 // 8 * 8
    assert numbers["seconds_per_step"] == pytest.approx(1e12 / (8 * 989e12 * 0.5))
    assert numbers["days"] == pytest.approx(10 * (6400 // 128) * numbers["seconds_per_step"] / 86400)


@pytest.mark.slow
def test_the_plan_of_a_small_run(capsys):
    # Activations, if they moved, would be far more than the parameters.
    many = {"batch_size": 1024} | CLIP
    numbers = plan.plan(complete(SMALL | many | {"mesh": {"data": 2, "fsdp": 4}, "sharding": "fsdp"}))
    said = capsys.readouterr().out
    model = models.build("ViT-tiny", image_size=32, context_length=16, vocab_size=512, eot_id=511, scan_layers=True)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    count = sum(p.size for p in jax.tree.leaves(params))
    assert numbers["parameters"] == count and f"{count:,}, {count:,} trained" in said
    # Parameters and two moments, nearly all split in four, and inputs: uint8 pictures and int32 tokens.
    states = 3 * 4 * count / 4 / 2**30
    held = numbers["of_states_gib"]
    assert held["moments"] == pytest.approx(2 * held["weights"], rel=1e-3) and held["averages"] == 0
    assert sum(held.values()) == pytest.approx(states, rel=0.5) and re.search(r"moments +[0-9.e-]+ GiB", said)
    assert states < numbers["states_gib"] < 1.5 * states + 2**-10
    kinds = numbers["collectives"]
    assert "all-gather" in kinds and kinds["all-gather"][1] > 4 * count * 0.5  # parameters are gathered to be used
    # They, their gradients, and what the loss needs: both embeddings there and back. No activations.
    assert sum(size for _, size in kinds.values()) < 1.2 * (2 * 4 * count + 4 * 4 * 1024 * model.config.embed_dim)
    assert "largest batch that fits" in said and "days" in said
    real = targets.has_compiler("gpu")
    assert numbers["real"] == real and ("pip install --no-deps jax-cuda13-plugin" in said) != real
    if real:
        assert numbers["attention"] == "xla" and "self-attention" in said


@pytest.mark.slow
def test_a_batch_that_cannot_be_halved_has_a_plan(capsys):
    small = {"model": SMALL["model"] | {"scan_layers": False, "vision": {"layers": 1}, "text": {"layers": 1}}} | CLIP
    numbers = plan.plan(complete(SMALL | small | {"batch_size": 8, "plan": {"target": "8xH100"}}))
    assert numbers["peak_gib"] > numbers["states_gib"] > 0 and "largest_batch" not in numbers
    said = capsys.readouterr().out
    assert "memory a device" in said and ("sort of the rankings" in said) == numbers["real"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which compiles for TPUs")
@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_a_step_compiles_for_a_tpu_slice_and_fits(sharding):
    mesh = {"data": 1, "fsdp": -1} if sharding else {"data": -1}
    target = parse_target("v5e:2x2")
    loss = CLIP if sharding else {}  # sorts, which the plan prices, once
    found = plan.compile_step(complete(SMALL | loss | {"mesh": mesh, "sharding": sharding}), target)
    used = (found["states"] + found["temporary"]) / 2**30
    assert 12 * found["parameters"] / 2**30 / (target.count if sharding else 1) < used < 1 < 16
    size = 4 * found["parameters"]  # gradients in float32: all-reduced, or gathered and scattered
    assert sum(moved for _, moved in found["collectives"].values()) > size / 2
    assert "all-gather" in found["collectives"]  # of the embeddings at the least


@pytest.mark.slow
def test_the_command_line_refuses_in_one_line():
    """What the process that compiles refuses; test_a_wrong_target_says_what_is_known has what is refused before."""
    command = [sys.executable, "-m", "rankclip_jax.train", "--config", "configs/shapes.py", "--mode=plan"]
    flags = ["--config.plan.target=8xH100", "--config.batch_size=100"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "batch_size=100 does not divide over 8 devices" in done.stderr


def test_a_schedule_that_training_refuses_is_refused():
    for optim, message in (
        (dict(warmup_steps=1000), "warmup_steps = 1000 must be fewer than the run's 1000 steps"),
        (dict(warmup_steps=500, schedule="wsd", decay_steps=501), "decay_steps = 501 leaves no room for 500 steps"),
    ):
        with pytest.raises(InputError, match=message):
            plan._describe(complete(SMALL | {"optim": optim}), None)


def test_every_gpu_of_the_table_is_described():
    """One that XLA does not understand is refused by its compiler: .ci/run compiles for H100."""
    for kind, (memory, _) in ACCELERATORS.items():
        if kind.startswith("v"):
            continue
        text = targets.gpu_description(kind)
        size = int(re.search(r"device_memory_size: (\d+)", text)[1]) / 2**30
        assert 0.88 * memory < size <= 1.01 * memory and kind.partition("-")[0] in text


def test_a_users_flags_do_not_reach_libtpu(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")  # of which it would say that they are unknown
    assert not targets.environment("tpu")["XLA_FLAGS"]


@pytest.mark.slow
def test_every_gpus_compiler_runs():
    if not targets.has_compiler("gpu"):
        pytest.skip(f"needs the compiler: {targets.HOW_TO_INSTALL['gpu']}")
    kinds = [kind for kind in ACCELERATORS if not kind.startswith("v")]
    script = """
import sys
import jax
from rankclip_jax.parallel.mesh import batch_sharding, make_mesh
from rankclip_jax.train import targets
from rankclip_jax.common.devices import devices_of
for kind in sys.argv[1:]:
    mesh = make_mesh({"data": -1}, targets.devices(targets.parse_target(f"1x{kind}")))
    x = jax.ShapeDtypeStruct((256, 256), "float32", sharding=batch_sharding(mesh))
    jax.jit(lambda x: jax.lax.sort(x @ x)).lower(x).compile()
    print(kind, devices_of(mesh).platform)
"""
    environment = targets.environment("gpu")
    done = subprocess.run([sys.executable, "-c", script, *kinds], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == [f"{kind} gpu" for kind in kinds], done.stderr[-2000:]


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(targets, "has_compiler", lambda platform: False)
    for text, package in (("v5e:2x2", "libtpu"), ("8xH100", "jax-cuda13-plugin")):
        with pytest.raises(InputError, match=f"{text}: its compiler is not installed. Run: pip install .*{package}"):
            targets.devices(parse_target(text))
    with pytest.raises(InputError, match="v5e:2x2: its compiler is not installed. Run: pip install libtpu"):
        plan.plan(complete(SMALL | {"plan": {"target": "v5e:2x2"}}))
    assert "GPU" not in capsys.readouterr().out  # nothing of a compiler that would not help


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lists_that_do_not_divide_the_batch_are_refused(accumulate):
    config = complete(SMALL | {"loss": {"list_size": 24}, "accumulate": accumulate})
    with pytest.raises(InputError, match="config.loss.list_size=24 does not divide config.batch_size=64. Expected a"):
        plan._describe(config, None)


def test_what_training_refuses_a_plan_refuses():
    config = load("configs/cc3m.py:model=RN50", ["accumulate=2", "plan.target=8xH100"])
    with pytest.raises(InputError, match="config.accumulate=2: a ResNet's batch norm needs"):
        plan.plan(config)


def test_a_plan_of_data_of_ones_own_counts_a_tables_rows_and_names_all_that_it_needs(tmp_path):
    (tmp_path / "mine.csv").write_text("picture,caption\na.png,a\nb.png,b\n")
    own = load("own", [f"data.train={tmp_path}/mine.csv", "data.image_key=picture"])
    settled = plan._with_samples(own)
    assert (settled.plan.samples, settled.optim.lr, settled.optim.warmup_steps) == (2, 1e-3, 0)
    assert own.plan.samples is None and own.optim.lr is None
    with pytest.raises(InputError, match="a plan needs config.batch_size, config.epochs, config.model.name, which it"):
        plan.plan(own)
    assert plan._with_samples(load("own", ["data.train=gone.csv"])).plan.samples is None
    assert plan._with_samples(load("own", [f"data.train={tmp_path}/mine.csv", "plan.samples=7"])).plan.samples == 7


def test_a_plan_of_a_run_knows_its_vocabulary_and_samples(tmp_path):
    words = Tokenizer.train(["a red circle"], 300)
    words.save(tmp_path / "tokenizer.json")
    (tmp_path / "data.json").write_text('{"train": {"samples": 48, "fingerprint": "x"}, "val": null}')
    config = workdirs.with_known(load("shapes", ["tokenizer.path=openai/clip-vit-base-patch32"]), tmp_path)
    assert (config.tokenizer.vocab_size, config.tokenizer.path, config.plan.samples) == (words.vocab_size, None, 48)
    (tmp_path / "data.json").write_text("3")
    with pytest.raises(InputError, match="data.json is damaged"):
        workdirs.with_known(load("shapes"), tmp_path)
    plain = load("shapes")
    assert workdirs.with_known(plain, tmp_path / "none").to_dict() == plain.to_dict()


def test_a_plan_packs_by_the_rows_that_it_is_given():
    def settled(**model):
        return plan._with_packing(complete(SMALL | {"model": SMALL["model"] | model})).model.pack_text

    assert settled() == settled(pack_text="off", pack_rows=(2, 8)) == settled(pack_rows=(8, 8)) == "off"
    assert settled(pack_rows=(2, 8)) == settled(pack_text="on", pack_rows=(8, 8)) == "on"
    with pytest.raises(InputError, match=r"config\.model\.pack_rows=None\. Expected \(rows, captions\)"):
        settled(pack_text="on")


@pytest.mark.slow
def test_a_packed_plan_counts_its_rows():
    frozen = {"warmup_steps": 10, "freeze": "vision"}  # which has nothing to do with captions
    config = complete(SMALL | {"model": SMALL["model"] | {"pack_rows": (2, 8)}, "optim": frozen} | CLIP)
    target = parse_target("8xH100")
    padded, packed = (plan.compile_step(c, target) for c in (config, plan._with_packing(config)))
    assert (padded["text_rows"], packed["text_rows"]) == (8, 2)
    text = models.configure("ViT-tiny").text
    a_row = text.layers * (12 * text.width**2 * 16 + 2 * 16**2 * text.width)
    assert padded["flops"] - packed["flops"] == pytest.approx(6 * 8 * 6 * a_row)
    assert packed["temporary"] < padded["temporary"] and packed["collectives"] == padded["collectives"]

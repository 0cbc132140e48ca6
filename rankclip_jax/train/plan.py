"""What a run will need, before any launch: python -m rankclip_jax.train --config FILE --mode=plan.

The training step of the configuration is compiled for the devices of config.plan.target, which this machine need not
have, and read: what each device holds and what moves between devices. The compiler is the target's own (targets.py).
Where a GPU's is not installed, the step is compiled for as many fake CPU devices, and the plan says so: states are
those of the GPU, the rest is an estimate, since XLA fuses and sums otherwise there.
"""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys

from ml_collections import ConfigDict

from rankclip_jax import config as configs
from rankclip_jax.common import packing
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.train import targets
from rankclip_jax.train.flops import ACCELERATORS
from rankclip_jax.train.hlo import CLOCKS, collectives, cycles, unpriced
from rankclip_jax.train.targets import Target, parse_target

_ROWS = "a run's config.json has config.model.pack_rows, and input_pipeline.prepare --inspect --tokenizer prints it"


def plan(config: ConfigDict) -> dict:
    """Prints and returns what the training step of `config` needs on config.plan.target.

    Raises:
      InputError: an unknown target, libtpu missing, or a configuration that does not fit the devices.
    """
    from rankclip_jax.train import resolve  # brings tokenizers, which benchmarks.gpu can do without

    config = _with_samples(config)
    resolve.require(config, "a plan")
    config = _with_packing(config)
    target = parse_target(config.plan.target)
    print(f"compiling the step of {config.model.name} for {config.plan.target}; minutes for a large model", flush=True)
    if target.platform == "gpu" and not targets.has_compiler("gpu"):
        print(f"estimated by the CPU's compiler; for the GPU's own: {targets.HOW_TO_INSTALL['gpu']}", flush=True)
    whole = compile_step(config, target)
    half = whole
    if "error" not in whole:
        with contextlib.suppress(InputError):  # half a batch may not divide over the devices: no largest batch is said
            half = compile_step(_with_batch(config, config.batch_size // 2), target)
    numbers = summary(config, target, whole, half)
    print("\n".join(lines(config, target, numbers)))
    return numbers


def compile_step(config: ConfigDict, target: Target) -> dict:
    """What `_describe` reads from the program, made in a process of its own: JAX fixes its devices when it starts."""
    real = targets.has_compiler(target.platform)
    if not real and target.platform == "tpu":
        raise InputError(f"{target.topology}: its compiler is not installed. Run: {targets.HOW_TO_INSTALL['tpu']}")
    environment = targets.environment(target.platform)
    if not real:
        # Nobody runs the program, so LLVM need not optimise it; what XLA makes of it stays the same.
        environment["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={target.count} --xla_backend_optimization_level=0"
        )
    done = subprocess.run(
        [sys.executable, "-m", "rankclip_jax.train.plan"],
        env=environment,
        input=json.dumps({"config": config.to_dict(), "target": dataclasses.astuple(target) if real else None}),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise InputError(f"the step could not be compiled: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "refused" in found:
        raise InputError(found["refused"])
    return found | {"real": real}


def summary(config: ConfigDict, target: Target, whole: dict, half: dict) -> dict:
    """The numbers of a plan, from what the compiler said of the batch and of half of it."""
    memory, tflops = ACCELERATORS[target.kind]
    flops = whole["flops"]
    numbers = {key: whole[key] for key in ("real", "attention", "sort", "bfloat16", "trained")} | {
        "text": _text(config, whole["text_rows"]),
        "image": _image(config, whole["patches"]),
        "parameters": whole["parameters"],
        "tflop_per_step": flops / 1e12,
        "limit_gib": memory,
        "seconds_per_step": flops / (target.count * tflops * 1e12 * config.plan.utilisation),
    }
    if whole.get("cycles"):
        numbers["sort_seconds"] = sort_seconds(target, whole)
        numbers["seconds_per_step"] += numbers["sort_seconds"]
    numbers["images_per_second"] = config.batch_size / numbers["seconds_per_step"]
    if steps := _total_steps(config):
        numbers["days"] = steps * numbers["seconds_per_step"] / 86400
    if "error" in whole:
        return numbers | {"error": whole["error"]}
    numbers |= {f"{key}_gib": whole[key] / 2**30 for key in ("states", "temporary")}
    numbers["of_states_gib"] = {name: size / 2**30 for name, size in whole["of_states"].items()}
    numbers["peak_gib"] = numbers["states_gib"] + numbers["temporary_gib"]
    numbers["collectives"] = whole["collectives"]
    a_row = (whole["temporary"] - half["temporary"]) / 2**30 / (config.batch_size - config.batch_size // 2)
    if a_row > 0:
        fixed = numbers["peak_gib"] - a_row * config.batch_size
        unit = target.count * config.accumulate
        numbers["largest_batch"] = max(0, int((memory - fixed) / a_row) // unit * unit)
    return numbers


def sort_seconds(target: Target, found: dict) -> float:
    """What sorts, gathers and scatters of a TPU's program take, which neither its operations nor its compiler count."""
    return sum(found["cycles"][kind] for kind in ("sort", "gather", "scatter")) / (CLOCKS[target.kind] * 1e9)


def lines(config: ConfigDict, target: Target, numbers: dict) -> list[str]:
    """The plan as text."""
    rows = [
        ("compiler", target.kind if numbers["real"] else f"the CPU's: what {target.kind} needs is estimated"),
        ("parameters", f"{numbers['parameters']:,}, {numbers['trained']:,} trained"),
        ("batch", f"{config.batch_size:,}, {config.batch_size // target.count:,} a device"),
        *([("image tower", numbers["image"])] if numbers["image"] else []),
        ("text tower", numbers["text"]),
        ("floating-point operations", f"{numbers['tflop_per_step']:.3g} TFLOP a step"),
    ]
    if numbers["real"]:
        rows += [("self-attention", numbers["attention"]), ("sort of the rankings", numbers["sort"])]
    if config.model.dtype == "bfloat16" and not numbers["bfloat16"]:
        rows.append(("bfloat16", f"{target.kind} has none and is slow with it; set config.model.dtype=float32"))
    if "error" in numbers:
        rows.append(("memory a device", numbers["error"]))
    else:
        moved = [f"{n} {kind}, {size / 2**20:.3g} MiB" for kind, (n, size) in sorted(numbers["collectives"].items())]
        rows += [
            ("memory a device", f"{numbers['peak_gib']:.2f} of {numbers['limit_gib']} GiB"),
            ("  states and inputs", f"{numbers['states_gib']:.2f} GiB"),
            *((f"    {name}", f"{size:.3g} GiB") for name, size in numbers["of_states_gib"].items()),
            ("  activations, gradients, loss", f"{numbers['temporary_gib']:.2f} GiB"),
            ("collectives a step", "; ".join(moved) or "none"),
        ]
        if "largest_batch" in numbers:
            rows.append(("largest batch that fits", f"about {numbers['largest_batch']:,} (a line through two batches)"))
    used = f"at {100 * config.plan.utilisation:.0f} % of {ACCELERATORS[target.kind][1]} TFLOP/s a device"
    rate = f"{numbers['images_per_second']:,.0f} images/s"
    rows.append(("time a step", f"{numbers['seconds_per_step']:.3g} s {used}: {rate}"))
    if "sort_seconds" in numbers:
        rows.append(("  sorts, gathers, scatters", f"{numbers['sort_seconds']:.3g} s of it, by a table (train/hlo.py)"))
    rows.append(("  not priced", "collectives" if "sort_seconds" in numbers else "sorts and collectives"))
    if "days" in numbers:
        rows.append(("the whole schedule", f"{numbers['days']:.2f} days"))
    else:
        rows.append(("the whole schedule", "give config.plan.samples, the number of training samples, or config.steps"))
    return [f"{name:32}{text}" for name, text in rows]


def _total_steps(config: ConfigDict) -> int | None:
    return config.steps or (config.plan.samples and config.plan.samples // config.batch_size * config.epochs)


def _with_samples(config: ConfigDict) -> ConfigDict:
    """With the number of rows of a table that is here, and rates where they are open, which change no plan."""
    from rankclip_jax.common import tables  # brings pyarrow, which benchmarks.gpu can do without

    config, data = config.copy_and_resolve_references(), config.data
    with config.ignore_type():
        config.optim.lr = config.optim.lr or 1e-3
        config.optim.warmup_steps = config.optim.warmup_steps or 0
        is_table = isinstance(data.train, str) and data.train.lower().endswith(tables.ENDINGS)
        if config.plan.samples is None and is_table and os.path.isfile(data.train):
            images = (data.image_key,) if data.image_key else tables.IMAGE_KEYS
            captions = (data.caption_key,) if data.caption_key else tables.CAPTION_KEYS
            options = dict(delimiter=data.delimiter, encoding=data.encoding)
            config.plan.samples = len(tables.read_table(data.train, images, captions, **options).images)
    return config


def _with_packing(config: ConfigDict) -> ConfigDict:
    """With model.pack_text settled by model.pack_rows, as a run settles both by captions, which no plan reads."""
    settled, rows = configs.complete(config.to_dict()), config.model.pack_rows
    if config.model.pack_text == "on" and rows is None:
        raise InputError(
            "config.model.pack_rows=None. Expected (rows, captions), since config.model.pack_text=on and a plan reads "
            f"no captions; {_ROWS}"
        )
    if config.model.pack_text == "auto":
        settled.model.pack_text = "on" if rows and packing.worthwhile(*rows) else "off"
    return settled


def _text(config: ConfigDict, rows: int) -> str:
    """What the text tower computes, in words."""
    if config.model.pack_text == "on":
        return f"{rows:,} rows of captions a device and part, packed"
    return f"{rows:,} rows a device and part, padded; to plan with packed ones: {_ROWS}"


def _image(config: ConfigDict, patches: list[int] | None) -> str | None:
    """What the image tower computes where it leaves patches out, in words."""
    if patches is None:
        return None
    said, until = "{:,} of {:,} patches".format(*patches), config.model.vision.patch_dropout_until
    if until == 1:
        return said
    return f"{said}, all of them in the last {1 - until:.0%} of the steps: memory is theirs, operations are the mean"


def _with_batch(config: ConfigDict, batch_size: int) -> ConfigDict:
    changed = configs.complete(config.to_dict())
    changed.batch_size = batch_size
    return changed


def _describe(config: ConfigDict, target: Target | None) -> dict:
    """In the child: compiles the step and reads the program. {"error": ...} where the compiler says it cannot fit.

    `target` None: for the fake CPU devices that this process has.
    """
    import jax

    from rankclip_jax.losses.sorting import SORTS
    from rankclip_jax.train import optim, rules
    from rankclip_jax.train import step as steps
    from rankclip_jax.train.programs import batch_shapes
    from rankclip_jax.train.session import Session, Vocabulary

    size = config.tokenizer.vocab_size  # of a tokenizer yet to be trained, whose last id ends a text
    words = Vocabulary(None, None) if config.tokenizer.path else Vocabulary(size, size - 1)
    session = Session(config, words, devices=targets.devices(target) if target else jax.devices())
    model, mesh = session.model, session.mesh
    # Of a run whose length is not known, the fewest steps that any schedule takes.
    total = _total_steps(config) or config.optim.warmup_steps + (config.optim.decay_steps or 2)
    a_epoch = config.plan.samples // config.batch_size if config.plan.samples else 1
    tx = optim.make_optimizer(config.optim, total, a_epoch)
    state = steps.Fresh(model, tx, 0, mesh, config.sharding, config.optim).abstract
    vision, kept = config.model.vision, model.config.kept_patches(config.model.vision.patch_dropout)
    dropping = vision.patch_dropout_until if kept else 0.0
    tflop = {whole: session.step_tflop(session.packs, whole) for whole in (False, True)}
    # Where there are two programs, that of whole images needs more memory.
    step = steps.make_train_step(model, tx, config, mesh, total_steps=2, steps_per_epoch=1, whole=dropping < 1)
    found = {
        "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
        "trained": rules.count(config.optim, state.params),
        "of_states": _of_states(state),
        "flops": (dropping * tflop[False] + (1 - dropping) * tflop[True]) * 1e12,
        "patches": [kept, model.config.vision.grid**2] if dropping else None,
        "text_rows": session.unit_rows if session.packs else session.unit_captions,
        "attention": model.attention,
        "sort": SORTS[session.devices.platform],
        "bfloat16": session.devices.has_bfloat16,
    }
    return found | _compiled(step, state, batch_shapes(session), target)


def _of_states(state):
    """{part of the state: bytes on a device}"""
    import jax

    parts = dict(
        weights=(state.params, state.batch_stats), moments=state.opt_state, averages=getattr(state, "ema", {})
    )
    return {
        name: sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(part))
        for name, part in parts.items()
    }


def _compiled(step, state, batch, target):
    """What the compiler says of the program: memory, operations, collectives."""
    import jax

    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first, _, _ = str(error).partition("\n")  # pages of buffers follow
        return {"error": "does not fit: " + first.rpartition("HBM, ")[2]}
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
    if memory is None or text is None:
        raise InputError("the compiler of these devices does not say what memory the step needs")
    return {
        "cost": {key: cost[key] for key in ("flops", "bytes accessed", "optimal_seconds") if cost.get(key, 0) > 0},
        "cycles": cycles(text)._asdict() if target and target.platform == "tpu" else None,
        "unpriced": sorted(unpriced(text)),
        "states": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "collectives": collectives(text),
    }


if __name__ == "__main__":
    given = json.load(sys.stdin)
    try:
        target = given["target"] and Target(*given["target"])
        with targets.cudnn_assumed():
            print(json.dumps(_describe(configs.complete(given["config"]), target)))
    except InputError as refused:
        print(json.dumps({"refused": str(refused)}))
    except Exception as error:  # of any kind: the parent has one line for it
        print(json.dumps({"refused": f"the step could not be compiled: {one_line(error, kind=True)}"}))

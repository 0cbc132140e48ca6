"""The sections of tables and words. Each takes the runs and gives HTML, or nothing where no run has what it shows."""

import json
import time
from collections.abc import Callable
from typing import Any

from rankclip_jax.figures import colour, names
from rankclip_jax.report import results
from rankclip_jax.report.markup import escaped, named, table
from rankclip_jax.report.runs import Run, differences

_LONGEST = 120  # letters of a fact


def cards(runs: list[Run]) -> str:
    """What each run reached, at a glance."""
    parts = []
    for number, run in enumerate(runs):
        cells = "".join(
            f"<div><b>{share}</b><small>{within}</small><span>{escaped(name)}</span></div>"
            for name, share, within in results.headline(run)
        )
        parts.append(
            f'<div class="card" style="border-top-color:{colour(number)}"><h3>{escaped(run.name)}</h3>'
            f'<div class="numbers">{cells or "<p>nothing evaluated yet</p>"}</div></div>'
        )
    return f'<div class="cards" style="--runs:{len(runs)}">{"".join(parts)}</div>'


def facts(runs: list[Run]) -> str:
    """What was trained, on what, for how long, where and when; a column a run."""
    rows = []
    for title, fact in _FACTS.items():
        said = [fact(run) for run in runs]
        if any(said):
            rows.append([title, *(escaped(_short(each)) if each else "not recorded" for each in said)])
    head = ["", *(named(number, run) for number, run in enumerate(runs))] if len(runs) > 1 else []
    return table(head, rows, "facts") if rows else ""


def _starts(run: Run, key: str) -> list:
    return [row["start"][key] for row in run.rows if key in row.get("start", {})]


def _model(run: Run) -> str:
    side = run.setting("model.image_size")
    return _words(run.setting("model.name"), side and f"{side} px")


def _parameters(run: Run) -> str:
    found = _starts(run, "parameters")
    return f"{found[-1]:,}" if found and isinstance(found[-1], int) else ""


def _data(run: Run) -> str:
    count = f"{run.samples:,} pairs" if run.samples else ""
    path = run.setting("data.train")
    return _words(count, run.setting("data.format"), path if isinstance(path, str | list) else "")


def _batch(run: Run) -> str:
    parts = run.setting("accumulate")
    return _words(run.setting("batch_size"), f"in {parts} parts" if parts not in (None, 1) else "")


def _steps(run: Run) -> str:
    planned = _starts(run, "steps")
    done = f"{max(row['step'] for row in run.rows):,}" if run.rows else ""
    of = f" of {planned[-1]:,}" if planned and isinstance(planned[-1], int) else ""
    epochs = run.setting("epochs")
    return _words(done and done + of, f"{epochs} epochs" if epochs and run.setting("steps") is None else "")


def _time(run: Run) -> str:
    """The sum over the starts, each until its last line."""
    spent: list[float] = []
    for row in run.rows:
        if "start" in row or not spent:
            spent.append(0.0)
        spent[-1] = max(spent[-1], row.get("seconds", 0.0))
    seconds = sum(spent)
    if not 0 < seconds < 1e9:  # also where one is not finite
        return ""
    starts = len(_starts(run, "date"))
    days, rest = divmod(round(seconds), 86_400)
    clock = (f"{days} d " if days else "") + time.strftime("%H:%M:%S", time.gmtime(rest))
    return _words(clock, f"in {starts} starts" if starts > 1 else "")


def _evaluated(run: Run) -> str:
    if not run.results:
        return ""
    step, model, of = run.results["step"], run.results["model"], run.results.get("evaluated", {})
    what = f"step {step:,}" if model in (None, "run") else model
    steps = run.results.get("steps", {})
    older = [f"{kind.replace('_', ' ')} at step {at:,}" for kind, at in steps.items() if at < step]
    return _words(
        what, *older, "during training (--mode=eval shows more)" if model is None else of.get("date"), of.get("device")
    )


def _words(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _short(words: str) -> str:
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"


_FACTS: dict[str, Callable[[Run], str]] = {
    "Model": _model,
    "Parameters": _parameters,
    "Objective": lambda run: _words(run.setting("loss.objective")),
    "Training data": _data,
    "Batch": _batch,
    "Steps": _steps,
    "Time": _time,
    "Device": lambda run: _words(*_starts(run, "device")[-1:]),
    "Started": lambda run: _words(*_starts(run, "date")[:1]),
    "Evaluated": _evaluated,
}


def geometry_numbers(runs: list[Run]) -> str:
    """A row a number and set, a column a run."""
    sets = dict.fromkeys(name for run in runs for name in run.results.get("geometry", {}))
    rows = []
    for name in sets:
        found = [run.results.get("geometry", {}).get(name, {}) for run in runs]
        for key, (title, *_) in names.GEOMETRY.items():
            if any(key in row for row in found):
                shown = [f"{row[key]:.3f}" if key in row else "" for row in found]
                rows.append([escaped(name), escaped(title), *shown])
        if any("n" in row for row in found):
            rows.append([escaped(name), "Number of pairs", *(f"{row['n']:,}" if "n" in row else "" for row in found)])
    head = ["set", "", *(named(number, run) if len(runs) > 1 else "" for number, run in enumerate(runs))]
    return table(head, rows, "runs") if rows else ""


def missing(runs: list[Run]) -> str:
    """Sets that could not be evaluated, and why."""
    rows = [
        [escaped(run.name), escaped(name), escaped(reason)]
        for run in runs
        for name, reason in run.results.get("missing", {}).items()
    ]
    return table(("run", "set", "reason"), rows, "words") if rows else ""


def unreadable(runs: list[Run]) -> str:
    """Files of the workdirs that are damaged."""
    rows = [
        [escaped(run.name), escaped(file), "<br>".join(map(escaped, why[:5])) + _more(why)]
        for run in runs
        for file, why in run.unreadable.items()
    ]
    return table(("run", "file", "what is wrong"), rows, "words") if rows else ""


def _more(why: list[str]) -> str:
    return f"<br>and {len(why) - 5:,} more" if len(why) > 5 else ""


def bad_samples(runs: list[Run]) -> str:
    """Counts by reason, with the first places."""
    rows = [
        (escaped(run.name), escaped(reason), f"{count:,}", escaped("; ".join(places)))
        for run in runs
        for reason, (count, places) in run.bad.items()
    ]
    return table(("run", "reason", "samples", "the first"), rows, "words") if rows else ""


def configuration(runs: list[Run]) -> str:
    """What differs between the runs, then each configuration whole."""
    parts = []
    different = differences(runs) if len(runs) > 1 else []
    if different:
        head = ["differs", *(named(number, run) for number, run in enumerate(runs))]
        rows = [[f"<code>{escaped(cell)}</code>" for cell in (key, *map(_value, values))] for key, values in different]
        parts.append(table(head, rows, "words"))
    elif len(runs) > 1:
        parts.append("<p>The configurations are the same.</p>")
    parts += [
        f"<details><summary>{escaped(run.name)}: config.json</summary>"
        f"<pre>{escaped(json.dumps(run.config, indent=2))}</pre></details>"
        for run in runs
        if run.config
    ]
    return "".join(parts)


def _value(value: Any) -> str:
    return "—" if value is None else json.dumps(value)

"""One page from the results of a check: what ran, on what, and the figures."""

from collections.abc import Iterator, Mapping
from typing import Any

REHEARSAL = "Rehearsal on a CPU with almost no width: it shows that the check runs, and says nothing about a GPU."


def page(found: Mapping[str, Any]) -> str:
    """Write Markdown. A figure that was not measured is left out, or says so."""
    about = found["environment"]
    lines = ["# What a GPU has measured" if about["device"] == "cuda" else f"# {REHEARSAL}", ""]
    lines += [f"`make gpu-check`, {about['date']}: {_where(about)}.", "", "| step | result |", "|---|---|"]
    lines += [f"| {step['name']} | {step['state']}{_note(step)} |" for step in found["steps"]]
    results = {step["name"]: step["result"] for step in found["steps"] if step["state"] == "passed"}
    if "kernel benchmarks" in results:
        lines += ["", *_kernels(results["kernel benchmarks"]["rows"], about.get("bandwidth_GB_s"))]
    for kind, write in (("sampling", _sampling), ("training", _training)):
        runs = [result for name, result in results.items() if name.startswith(f"{kind} at")]
        lines += ["", *write(runs)] if runs else []
    return "\n".join(lines) + "\n"


def _where(about: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    if about["device"] != "cuda":
        return packages
    return f"{about['card']}, driver {about['driver'] or 'unknown'}, CUDA {about['cuda']}, {packages}"


def _note(step: Mapping[str, Any]) -> str:
    if step["state"] == "left out":
        return f" ({step['said']})"
    if step["state"] == "passed" and "tests" in step["result"]:
        counts = step["result"]
        return f" ({counts['tests'] - counts['skipped']} tests, {counts['skipped']} skipped)"
    return ""


def _kernels(rows: list[dict[str, Any]], paper: float | None) -> Iterator[str]:
    yield "## Kernels"
    yield ""
    yield "Medians. GB/s are bytes that the operation has to move, over its time" + (
        f"; the card's memory moves {paper:.0f} on paper." if paper else "."
    )
    yield ""
    yield "| case | who | ms | times ours | GB/s | of the card |"
    yield "|---|---|---|---|---|---|"
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        case = f"{row['what']} {row['dtype']}, K = {row['K']}, {row['elements'] / 1e6:.3g}M"
        cases.setdefault((case, row["name"]), {})[row["figure"]] = row["median"]
    for (case, name), figures in cases.items():
        rate = figures.get("bandwidth")
        share = f"{rate / paper:.0%}" if rate and paper else ""
        cells = [case, name, _cell(figures.get("wall"), ".3f"), _cell(figures.get("wall / ours"), ".2f")]
        yield f"| {' | '.join([*cells, _cell(rate, '.0f'), share])} |"


def _sampling(runs: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Sampling SD3-medium, random weights, bfloat16, with guidance"
    yield ""
    yield "| resolution | items per pass | calls of the network per second | TFLOP/s | peak memory |"
    yield "|---|---|---|---|---|"
    for run in runs:
        rate = f"{run['calls_per_second']:.2f} | {run['tflops']:.3g}"
        yield f"| {run['resolution']} | {run['items_per_pass']} | {rate} | {_memory(run['peak_bytes'])} |"


def _training(runs: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Training SD3-medium, random weights, bfloat16, one rank"
    yield ""
    yield "| resolution | adapter | forget + retain samples | steps per second | planned memory | peak memory |"
    yield "|---|---|---|---|---|---|"
    for run in runs:
        samples = f"{run['forget_batch']} + {run['retain_batch']}, {run['micro_batch']} at once"
        memory = f"{_memory(run['planned_bytes'])} | {_memory(run['peak_bytes'])}"
        yield f"| {run['resolution']} | {run['adapter']} | {samples} | {run['steps_per_second']:.3g} | {memory} |"


def _cell(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _memory(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**30:.2f} GiB"

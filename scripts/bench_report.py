"""Write what a benchmark found as Markdown, with ratios, growth and the bars it is judged by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flexselect.scripts.bench_stages import exponent

#: Stages of a question, in order; their sum is the time to the first token from features.
ASKING = ("prompt", "score", "gather", "prefill")
OPENING = ("decode", "prepare", "encode")


def first_token(found: dict[str, Any], clock: str) -> float:
    """Sum the stages from encoded features to the first token, in seconds."""
    return sum(found["stages"][stage][clock] for stage in ASKING)


def from_frames(length: dict[str, Any], name: str, clock: str) -> float:
    """Sum the stages from pictures in memory to the first token, vision tower included."""
    stages = length["opening"]["stages"]
    lite = name == "flexselect-lite"
    encode = stages["encode, with selector" if lite else "encode"][clock]
    return encode + first_token(length["methods"][name], clock)


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare with the bars that concern this run: what is wanted, what was found."""
    if "parts" in record:
        return _micro_bars(record)
    gpu = record["machine"]["kind"] == "cuda"
    length = next((part for part in record["lengths"] if part["frames"] == 512), None)
    if record["shape"] == "tiny" or length is None:
        return []
    full = length["methods"].get("full")
    wanted: dict[str, tuple[float, float | None]]
    wanted = {"flexselect": (2.5, None), "flexselect-lite": (6.0, None)}
    if gpu:
        wanted = {"flexselect": (3.0, 2.8), "flexselect-lite": (12.0, 6.0)}
    found = []
    clock = "wall" if gpu else "cpu"
    for name, (features, frames) in wanted.items():
        method = length["methods"].get(name)
        if not full or not method:
            continue
        ratio = first_token(full, clock) / first_token(method, clock)
        what = f"{name}, 512 frames, features to first token: times faster than full ({clock})"
        found.append(_bar(what, ratio, features, at_least=True))
        if frames:
            ratio = from_frames(length, "full", clock) / from_frames(length, name, clock)
            what = f"{name}, 512 frames, pictures to first token: times faster than full"
            found.append(_bar(what, ratio, frames, at_least=True))
    if gpu and length["methods"].get("flexselect"):
        share = fraction(record, length["methods"]["flexselect"], "score")
        found.append(_bar("scoring pass: share of the matrix rate", share or 0.0, 0.6, True))
        peaks = [
            part["methods"]["flexselect"]["device_peak_mib"]
            for part in record["lengths"]
            if part["methods"].get("flexselect")
        ]
        spread = max(peaks) / min(peaks) - 1
        what = "flexselect: growth of peak device memory over the range of frames"
        found.append(_bar(what, spread, 0.1, at_least=False))
    return found


def fraction(record: dict[str, Any], found: dict[str, Any], stage: str) -> float | None:
    """Return the share of the machine's measured matrix rate that a stage reaches."""
    flops = found["flops"].get(stage)
    clock = "wall" if record["machine"]["kind"] == "cuda" else "cpu"
    seconds = found["stages"].get(stage, {}).get(clock)
    if not flops or not seconds:
        return None
    return float(flops / seconds / record["matrix_rate"][clock])


def markdown(record: dict[str, Any]) -> str:
    """Write a record as Markdown."""
    lines = [*_head(record), ""]
    lines += _parts(record) if "parts" in record else _stages(record)
    if record["bars"]:
        lines += ["", "## Bars", ""]
        rows = [
            [bar["what"], bar["wanted"], f"{bar['found']:.3g}", "yes" if bar["holds"] else "**no**"]
            for bar in record["bars"]
        ]
        lines += _table(["bar", "wanted", "found", "holds"], rows)
    return "\n".join(lines)


def _micro_bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    if record["machine"]["kind"] != "cpu":
        return []
    relevance = record["parts"]["relevance with projections"]
    mapping = record["parts"]["mapping back"]
    found = [_bar("relevance: times faster than plain (cpu)", relevance["faster_cpu"], 3.0, True)]
    if relevance["ours_extra_mib"] is not None:
        found.append(_bar("relevance: extra MiB", relevance["ours_extra_mib"], 128, False))
    found.append(_bar("mapping back: milliseconds", 1e3 * mapping["ours_wall"], 1.0, False))
    found.append(_bar("mapping back: waits for the device", mapping["syncs"], 0, False))
    return found


def _bar(what: str, found: float, wanted: float, at_least: bool) -> dict[str, Any]:
    holds = found >= wanted if at_least else found <= wanted
    sign = "≥" if at_least else "≤"
    return {"what": what, "wanted": f"{sign} {wanted:g}", "found": found, "holds": holds}


def _head(record: dict[str, Any]) -> list[str]:
    machine = record["machine"]
    title = f"{record['family']}, shape {record['shape']}" if record["family"] else "Parts"
    where = machine.get("device") or machine["processor"]
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    lines = [
        f"# {title}",
        "",
        f"{where}; {machine['threads']} CPU thread(s), Python {machine['python']}, {versions}. "
        # Parts that take less than a millisecond are repeated more often.
        f"Medians of {'at least ' * ('parts' in record)}{record['repeats']} repeats.",
    ]
    if "matrix_rate" in record:
        clock = "wall" if machine["kind"] == "cuda" else "cpu"
        rate = record["matrix_rate"][clock] / 1e9
        per = "" if machine["kind"] == "cuda" else " a core"
        lines += [
            "",
            f"{record['weights']}, {record['dtype']}, {record['attention']} attention"
            f"{', compiled layers' if record['compiled'] else ''}"
            f"{_limit(record)}. Measured matrix rate: "
            f"{rate:,.0f} GFLOP/s{per} ({record['matrix_rate']['size']}² products).",
        ]
        lines += [f"Without {name}: {why}" for name, why in record["missing"].items()]
    return lines


def _limit(record: dict[str, Any]) -> str:
    limit = record["memory_limit_gib"]
    return f", device memory limited to {limit:g} GiB" if limit else ""


def _stages(record: dict[str, Any]) -> list[str]:
    lines = ["## Opening a video, seconds elapsed (of the processor)", ""]
    names = list(record["lengths"][0]["opening"]["stages"])
    rows = []
    for length in record["lengths"]:
        stages = length["opening"]["stages"]
        share = fraction(record, length["opening"], "encode")
        cells = [_seconds(stages[name]) for name in names]
        memory = _mib(length["opening"])
        rows.append([f"{length['frames']}", *cells, _share(share), memory])
    rows.append(["exponent", *_exponents(record, names), "", ""])
    lines += _table(["frames", *names, "encode: share of rate", "peak MiB host / device"], rows)
    lines += ["", "## From encoded features, seconds elapsed (of the processor)", ""]
    header = ["frames", "method", "tokens", *ASKING, "first token", "a further token"]
    header += ["score / prefill: share of rate", "peak MiB host / device", "faster than full"]
    rows = []
    for length in record["lengths"]:
        full = length["methods"].get("full")
        for name, found in length["methods"].items():
            if found is None:
                rows.append([f"{length['frames']}", name, "does not fit"] + [""] * 9)
                continue
            rows.append(_asking_row(record, length["frames"], name, found, full))
    lines += _table(header, rows)
    lines += ["", "## From pictures in memory to the first token, vision tower included", ""]
    rows = []
    for length in record["lengths"]:
        for name, found in length["methods"].items():
            if found is None:
                continue
            pair = {clock: from_frames(length, name, clock) for clock in ("wall", "cpu")}
            ratio = ""
            if length["methods"].get("full"):
                whole = {c: from_frames(length, "full", c) for c in ("wall", "cpu")}
                ratio = _ratio(whole, pair)
            rows.append([f"{length['frames']}", name, _seconds(pair), ratio])
    lines += _table(["frames", "method", "seconds", "faster than full"], rows)
    lines += ["", "## Growth: time to the first token from features ~ frames ^ exponent", ""]
    rows = []
    for name in record["lengths"][0]["methods"]:
        known = [part for part in record["lengths"] if part["methods"].get(name)]
        if not known:
            continue
        sizes = [part["frames"] for part in known]
        cells = [name]
        for clock in ("wall", "cpu"):
            power = exponent(sizes, [first_token(part["methods"][name], clock) for part in known])
            cells.append("" if power is None else f"{power:.2f}")
        rows.append(cells)
    return lines + _table(["method", "exponent, elapsed", "exponent, processor"], rows)


def _asking_row(
    record: dict[str, Any],
    frames: int,
    name: str,
    found: dict[str, Any],
    full: dict[str, Any] | None,
) -> list[str]:
    stages = found["stages"]
    total = {clock: first_token(found, clock) for clock in ("wall", "cpu")}
    each = {clock: value / (record["new_tokens"] - 1) for clock, value in stages["further"].items()}
    ratio = ""
    if full is not None:
        ratio = _ratio({clock: first_token(full, clock) for clock in ("wall", "cpu")}, total)
    shares = [_share(fraction(record, found, stage)) for stage in ("score", "prefill")]
    return [
        f"{frames}",
        name,
        f"{found['kept_tokens']:,} of {found['visual_tokens']:,}",
        *[_seconds(stages[stage]) for stage in ASKING],
        _seconds(total),
        _seconds(each),
        " / ".join(share or "–" for share in shares),
        _mib(found),
        ratio,
    ]


def _exponents(record: dict[str, Any], names: Sequence[str]) -> list[str]:
    sizes = [length["frames"] for length in record["lengths"]]
    cells = []
    for name in names:
        times = [length["opening"]["stages"][name]["wall"] for length in record["lengths"]]
        power = exponent(sizes, times)
        cells.append("" if power is None else f"{power:.2f}")
    return cells


def _parts(record: dict[str, Any]) -> list[str]:
    header = ["part", "ours, s (processor)", "plain, s (processor)", "faster (processor)"]
    header += ["extra MiB ours / plain", "largest difference"]
    rows = []
    for name, part in record["parts"].items():
        extra = [part["ours_extra_mib"], part["plain_extra_mib"]]
        rows.append(
            [
                name,
                _seconds({"wall": part["ours_wall"], "cpu": part["ours_cpu"]}),
                _seconds({"wall": part["plain_wall"], "cpu": part["plain_cpu"]}),
                f"{part['faster_wall']:.1f}× ({part['faster_cpu']:.1f}×)",
                " / ".join("–" if value is None else f"{value:,.0f}" for value in extra),
                f"{part['difference']:.1e}",
            ]
        )
    return _table(header, rows)


def _seconds(pair: dict[str, float]) -> str:
    return f"{_short(pair['wall'])} ({_short(pair['cpu'])})"


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.2g}"


def _ratio(whole: dict[str, float], part: dict[str, float]) -> str:
    return f"{whole['wall'] / part['wall']:.2f}× ({whole['cpu'] / part['cpu']:.2f}×)"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _mib(found: dict[str, Any]) -> str:
    peaks = [found["host_peak_mib"], found["device_peak_mib"]]
    return " / ".join("–" if value is None else f"{value:,.0f}" for value in peaks)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]

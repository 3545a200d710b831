"""Pictures of results, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from zotune.bench.rows import number

COLOURS = {"ours": "tab:blue", "floor": "0.6", "peer": "tab:orange"}
WORDS = {"ours": "zotune", "floor": "plain inference (the floor)", "peer": "others' steps"}


def figure(width: float, height: float) -> Any:
    """An empty figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def title(made: Mapping[str, Any], text: str) -> str:
    """A first line of words, a second of the machine."""
    facts, peaks = made["machine"], made["details"].get("peaks")
    line = f"{facts['cpu']}, {facts['threads']} threads"
    if peaks:
        rates = ", ".join(f"{n} {peaks[n] / 1e12:.2g}" for n in ("fp32", "bf16", "int8"))
        line += f"; peaks {rates} TFLOP/s, read {peaks['read'] / 1e9:.3g} GB/s"
    return f"{text}\n{line}"


def seconds(made: Mapping[str, Any]) -> Any:
    """One bar per contender, the quickest on top; a black mark at a step's own two forwards."""
    rounds, details = made["details"]["seconds_per_round"], made["details"]
    times = {n: median(values) for n, values in rounds.items()}
    names = sorted(times, key=lambda n: -times[n])
    drawn = figure(8.5, 1.6 + 0.3 * len(names))
    axes = drawn.add_subplot()
    roles = [details["roles"][n] for n in names]
    axes.barh(names, [times[n] for n in names], color=[COLOURS[r] for r in roles])
    for place, name in enumerate(names):
        floor = details["floors"].get(name)
        if floor in times:
            axes.plot([times[floor]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes.annotate(f" {number(times[name])} s", (times[name], place), va="center", fontsize=8)
    handles = [axes.barh([names[0]], [0], color=COLOURS[r]) for r in COLOURS]
    (mark,) = axes.plot([], [], color="black", linewidth=2)
    axes.legend([*handles, mark], [*WORDS.values(), "two forwards of the same model"], fontsize=8)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds per step")
    settings = made["settings"]
    axes.set_title(title(made, f"A step of {settings['model_name_or_path']}"), fontsize=9)
    return drawn


def memory(made: Mapping[str, Any]) -> Any:
    """One bar per process: what was there before, the model, and what came on top."""
    found = made["details"]["memory"]
    names = sorted(found, key=lambda n: -found[n]["peak"])
    drawn = figure(8.5, 1.6 + 0.3 * len(names))
    axes = drawn.add_subplot()
    parts = (
        ("Python and libraries", "0.8", [found[n]["before_model"] for n in names]),
        ("the model", "0.6", [found[n]["model_loaded"] - found[n]["before_model"] for n in names]),
        ("on top, at most", "tab:blue", [max(0, found[n]["peak"] - found[n]["model_loaded"])
                                         for n in names]),
    )  # fmt: skip
    left = [0.0] * len(names)
    for label, colour, sizes in parts:
        widths = [size / 1e6 for size in sizes]
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.legend(fontsize=8)
    axes.set_xlabel("MB of resident memory")
    axes.set_title(title(made, f"Memory of {made['settings']['model_name_or_path']}"), fontsize=9)
    return drawn


def noise(made: Mapping[str, Any]) -> Any:
    """Million numbers per second by contender and size of block."""
    rounds, numbers = made["details"]["seconds_per_round"], made["details"]["numbers"]
    drawn = figure(8.5, 4.5)
    axes = drawn.add_subplot()
    series = list(rounds)
    for name in rounds[series[0]]:
        rates = [numbers[s] / median(rounds[s][name]) / 1e6 for s in series]
        style = "--" if "randn" in name else "-"
        axes.plot(series, rates, style, marker="o", label=name)
    axes.set_ylabel("million numbers per second")
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=8)
    axes.set_title(title(made, "Noise on the blocks of a model"), fontsize=9)
    return drawn


def roofline(made: Mapping[str, Any]) -> Any:
    """Above, shares of the peaks and of the time; below, seconds against sizes with their lines."""
    found = made["details"]["contenders"]
    names = list(found)[::-1]
    drawn = figure(11, 4.5 + 0.35 * len(names))
    (above, below) = drawn.subfigures(2, 1, height_ratios=[1 + 0.25 * len(names), 3])
    shares, parts = above.subplots(1, 2, sharey=True)
    for key, colour, label in (("forward_share", "0.6", "a forward"),
                               ("step_share", "tab:blue", "a step")):  # fmt: skip
        offset = 0.2 if key == "forward_share" else -0.2
        places = [k + offset for k in range(len(names))]
        shares.barh(places, [100 * found[n][key] for n in names], 0.4, color=colour, label=label)
    shares.set_yticks(range(len(names)), names)
    shares.axvline(100, color="black", linewidth=1)
    shares.set_xlabel("% of the peak of its arithmetic")
    shares.legend(fontsize=8)
    _stacked(parts, found, names)
    drawn.suptitle(title(made, f"Roofline of {made['settings']['model_name_or_path']}"), fontsize=9)
    units = {"batch": "examples", "length": "tokens of an example", "layers": "layers"}
    for axes, (axis, unit) in zip(below.subplots(1, 3), units.items(), strict=True):
        for name in names[::-1]:
            curve = found[name]["growth"][axis]
            sizes = curve["sizes"]
            (points,) = axes.plot(sizes, curve["seconds"], "o", label=name, markersize=4)
            line = [curve["start"] + curve["slope"] * x for x in (0, sizes[-1])]
            axes.plot([0, sizes[-1]], line, color=points.get_color(), linewidth=1)
        axes.set_xlabel(unit)
        axes.set_ylim(bottom=0)
    below.axes[0].set_ylabel("seconds per step")
    below.axes[0].legend(fontsize=7)
    return drawn


def _stacked(axes: Any, found: Mapping[str, Any], names: list[str]) -> None:
    """Where the time goes, one bar per contender."""
    left = [0.0] * len(names)
    for part in found[names[0]]["where"] if names else ():
        widths = [100 * found[n]["where"][part] for n in names]
        axes.barh(range(len(names)), widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("% of the time of a step")
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

"""The style of every figure: size, colours that differ for colour-blind readers and in print, thin grid, no box."""

# the palette of Okabe and Ito, in the order of use
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#777777",
)
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def style():
    """Set matplotlib's defaults for all later figures; call it once, after the imports."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.figsize": (7, 4),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLORS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "legend.frameon": False,
            "legend.fontsize": "small",
            "font.size": 10,
        }
    )


def axes(title, xlabel="", ylabel="", *, columns=1, size=None):
    """``(figure, axes)`` with title and labels; with ``columns`` > 1, an array of axes under one title."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(1, columns, figsize=size or (7 if columns == 1 else 9, 4))
    if columns == 1:
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    else:
        fig.suptitle(title, x=0.01, ha="left", weight="bold", size="medium")
        for column in ax:
            column.set(xlabel=xlabel, ylabel=ylabel)
    return fig, ax


def audit_map(report, ax=None):
    """Draw the findings of an :class:`ktlib.diagnosis.audit.Audit` per layer and component; returns the axes.

    A cell is white if the layer has no such component, green without findings, else light orange to red by its number
    of findings per tensor. The number of findings stands in the cell. A tensor can have several, such as NaN and a
    duplicate name.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    layers = sorted({layer for layer, _ in report.layers}, key=lambda layer: (layer is None, layer))
    components = [row.component for row in report.rows]
    if ax is None:
        size = (2.6 + 0.32 * max(len(layers), 12), 1.3 + 0.42 * len(components))
        _, ax = axes("Findings by layer and component", "layer", size=size)
    colors = LinearSegmentedColormap.from_list("findings", ["#F6D7A8", ORANGE, RED])
    for y, component in enumerate(components):
        for x, layer in enumerate(layers):
            cell = report.layers.get((layer, component))
            if cell is None:
                continue
            count = report.flagged[layer, component]
            face = colors(min(1.0, count / cell.tensors)) if count else "#CFE8DF"
            ax.add_patch(plt.Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color=face))
            if count:
                ax.text(x, y, count, ha="center", va="center", fontsize=8)
    step = max(1, len(layers) // 14)
    ax.set_xticks(range(0, len(layers), step), ["-" if layer is None else layer for layer in layers[::step]])
    ax.set_yticks(range(len(components)), components)
    ax.set(xlim=(-0.6, len(layers) - 0.4), ylim=(len(components) - 0.4, -0.6))
    ax.grid(False)
    return ax


def placement_map(table, ax=None):
    """Draw the bytes per component and device, a bar per component and a colour per device; returns the axes.

    ``table`` is :func:`ktlib.placement.pin.placement`'s: ``{(component, device, dtype): bytes}``. The bar of an adapter
    stands below that of the component that it adapts.
    """
    components = {}
    for (component, device, _), size in table.items():
        kind = "GPU" if device.startswith("cuda") else device.upper()
        sizes = components.setdefault(component, {})
        sizes[kind] = sizes.get(kind, 0) + size
    names = sorted(components, key=lambda name: (name.removesuffix(" LoRA"), name))
    kinds = sorted({kind for sizes in components.values() for kind in sizes})
    largest = max(max(sizes.values()) for sizes in components.values())
    scale, unit = next((pair for pair in UNITS if largest >= pair[0]), (1, "bytes"))
    if ax is None:
        _, ax = axes("Where the parameters are", unit, size=(8, 1.2 + 0.3 * len(names)))
    colors = dict(zip(kinds, (BLUE, ORANGE, GREEN), strict=False))
    for y, name in enumerate(names):
        for kind, size in components[name].items():
            ax.barh(y, size / scale, color=colors[kind], height=0.7, label=kind)
            ax.text((size + 0.01 * largest) / scale, y, bytes_text(size), va="center", fontsize=8)
    ax.set(xlim=(0, 1.15 * largest / scale), ylim=(len(names) - 0.4, -0.6))
    ax.set_yticks(range(len(names)), names)
    ax.grid(axis="y", visible=False)
    ax.legend(*_legend_entries(ax), loc="lower right")
    return ax


def step_timeline(timeline, ax=None, window=None):
    """Draw which device or operator was busy when during one step; returns the axes.

    ``timeline`` is :func:`ktlib.lab.hybrid.timeline`'s, ``window`` the ``(start, end)`` in seconds (default: all).
    Tracks without a span in the window are left out. Very short spans are drawn wide enough to be seen.
    """
    start, end = window or (0, timeline["seconds"])
    shown = {
        track: [(max(a, start), min(b, end)) for a, b in spans if b > start and a < end]
        for track, spans in timeline["spans"].items()
    }
    shown = {track: spans for track, spans in shown.items() if spans}
    if ax is None:
        _, ax = axes("Timeline of a step", "seconds", size=(9, 1.1 + 0.38 * len(shown)))
    colors = dict(zip(timeline["spans"], (BLUE, SKY, GREEN, ORANGE, RED, PURPLE), strict=False))
    thinnest = (end - start) / 350
    for y, (track, spans) in enumerate(shown.items()):
        bars = [(a, max(b - a, thinnest)) for a, b in spans]
        ax.broken_barh(bars, (y - 0.38, 0.76), facecolors=colors[track], linewidth=0)
    ax.set_yticks(range(len(shown)), list(shown))
    ax.set(xlim=(start, end), ylim=(len(shown) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    return ax


def quantised_row(weights, decoded, levels, codes, ax=None):
    """Draw a group of weights, and the values that their codes stand for; returns the axes.

    Args:
        weights, decoded, codes: one number for each weight of the group; the codes are the labels below.
        levels: the values of all codes, drawn as lines.
    """
    if ax is None:
        _, ax = axes("Weights that share a scale, and their codes", "code", "value", size=(9, 3.6))
    places = range(len(weights))
    ax.hlines(levels, -0.6, len(weights) - 0.4, colors=GREY, linewidth=0.5, zorder=0)
    ax.vlines(places, weights, decoded, colors=ORANGE, linewidth=3, label="error")
    ax.plot(places, weights, "o", color=BLUE, label="weight")
    ax.plot(places, decoded, "_", color="black", markersize=9, markeredgewidth=2, label="decoded")
    ax.set_xticks(places, codes)
    ax.set_xlim(-0.6, len(weights) - 0.4)
    ax.grid(visible=False)
    ax.legend(bbox_to_anchor=(1, 1), loc="upper left")
    return ax


def trained_on(rows, bases):
    """Draw loss and exact match of adapters by the base on which they were trained; returns the two axes.

    Args:
        rows: dicts with ``base`` and what :func:`ktlib.lab.quantised_bases.train` returns. A dot is an adapter on the
            base on which it was trained, a ring the same adapter on the bf16 base.
        bases: the order of the bases.
    """
    _, both = axes("Adapters by the base on which they were trained", columns=2)
    for ax, name in zip(both, ("loss", "exact"), strict=True):
        for x, (base, color) in enumerate(zip(bases, COLORS, strict=False)):
            of_base = [row for row in rows if row["base"] == base]
            places = [x + 0.2 * (i - (len(of_base) - 1) / 2) for i in range(len(of_base))]
            ax.plot(places, [row[f"{name}_on_bf16"] for row in of_base], "o", ms=10, mfc="none", color=GREY)
            ax.plot(places, [row[name] for row in of_base], "o", color=color)
        ax.set_xticks(range(len(bases)), bases)
        ax.grid(visible=False, axis="x")
    both[0].set(title="loss, nats per response token", yscale="log")
    both[1].set(title="exact match", ylim=(0, 1.05))
    return both


def bytes_text(size):
    """A number of bytes as text with a unit, such as ``28.8 GB`` or ``44 kB``."""
    for factor, unit in UNITS:
        if size >= factor:
            value = size / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{size} bytes"


def _legend_entries(ax):
    """``(handles, labels)`` for a legend that names every label once, sorted."""
    handles, labels = ax.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(reversed(handles), reversed(labels), strict=True)}
    return [first[label] for label in sorted(first)], sorted(first)

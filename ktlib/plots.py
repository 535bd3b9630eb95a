"""One look for every figure: size, colours that survive colour blindness and print, thin grid, no box."""

# Okabe and Ito's palette, darkest first; use in this order.
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


def style():
    """Set the look for all figures that follow; call it once, after the imports."""
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
    """A figure and its axes with title and labels set; with ``columns`` > 1, an array of axes and one overall title."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(1, columns, figsize=size or (7 if columns == 1 else 9, 4))
    if columns == 1:
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    else:
        fig.suptitle(title, x=0.01, ha="left", weight="bold", size="medium")
        for one in ax:
            one.set(xlabel=xlabel, ylabel=ylabel)
    return fig, ax


def audit_map(report, ax=None):
    """Layer by component map of an :class:`ktlib.audit.Audit`; a cell's number counts its findings. Returns the axes.

    White: not there. Green: clean. Light to red: findings per tensor; NaN and a second name are two findings.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    layers = sorted({layer for layer, _ in report.layers}, key=lambda layer: (layer is None, layer))
    parts = [row.component for row in report.rows]
    if ax is None:
        size = (2.6 + 0.32 * max(len(layers), 12), 1.3 + 0.42 * len(parts))
        _, ax = axes("Findings by layer and component", "layer", size=size)
    colors = LinearSegmentedColormap.from_list("findings", ["#F6D7A8", ORANGE, RED])
    for y, part in enumerate(parts):
        for x, layer in enumerate(layers):
            cell = report.layers.get((layer, part))
            if cell is None:
                continue
            count = report.flagged[layer, part]
            face = colors(min(1.0, count / cell.tensors)) if count else "#CFE8DF"
            ax.add_patch(plt.Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color=face))
            if count:
                ax.text(x, y, count, ha="center", va="center", fontsize=8)
    step = max(1, len(layers) // 14)
    ax.set_xticks(range(0, len(layers), step), ["-" if layer is None else layer for layer in layers[::step]])
    ax.set_yticks(range(len(parts)), parts)
    ax.set(xlim=(-0.6, len(layers) - 0.4), ylim=(len(parts) - 0.4, -0.6))
    ax.grid(False)
    return ax

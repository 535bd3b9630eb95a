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

"""Draw picture grids and curves that are legible on light and dark pages: transparent background, mid-grey text."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from expunge.pixels import to_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = (128, 128, 128, 255)
COLOURS = ("#3b82c4", "#d9822b", "#4a9d6e", "#b65c9c", "#7d6cc9", "#a08a3c")
GAP = 4
FONT_SIZE = 13
SHOWN_AT = 256
"""Pixels up to which a small picture is magnified; a grid of larger ones is a JPEG, a tenth of the PNG's size."""
LARGEST = 2**26
"""Pixels of pictures in a grid, 64 of 1024 x 1024: at 4 bytes each, it takes 256 MB to draw."""
RUNNING_MEAN = 20  # points; shorter series are drawn without one


def grid(
    images: Tensor,
    columns: int,
    *,
    scale: int | None = None,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
) -> bytes:
    """Return a PNG of `images`, float [R * columns, 3 or 1, H, W] in [-1, 1], laid out row by row.

    Each pixel becomes `scale` x `scale` pixels, without smoothing; default: up to 4 where that stays below SHOWN_AT.
    Pictures above SHOWN_AT make a JPEG on white instead.
    Raises ValueError if the images do not fill the rows, or the number of labels is wrong.
    """
    count, channels, height, width = images.shape
    if scale is None:
        scale = max(1, min(4, SHOWN_AT // max(height, width)))
    if columns < 1 or count == 0 or count % columns or channels not in (1, 3) or scale < 1:
        raise ValueError(f"cannot lay {tuple(images.shape)} out in {columns} columns at scale {scale}")
    rows = count // columns
    if len(column_labels) not in (0, columns) or len(row_labels) not in (0, rows):
        raise ValueError(
            f"{len(column_labels)} column and {len(row_labels)} row labels do not fit {columns} columns, {rows} rows"
        )
    font = ImageFont.load_default(size=FONT_SIZE)
    # A cell is at least as wide as the widest label, so that no label is cut off.
    cell = max([width * scale, *(int(font.getlength(label)) + GAP for label in column_labels)])
    left = max((int(font.getlength(label)) + 2 * GAP for label in row_labels), default=0)
    top = FONT_SIZE + 2 * GAP if column_labels else 0
    canvas = Image.new(
        "RGBA", (left + columns * (cell + GAP) - GAP, top + rows * (height * scale + GAP) - GAP), (0, 0, 0, 0)
    )
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (cell + GAP) + cell / 2, top / 2), label, fill=GREY, font=font, anchor="mm")
    for row, label in enumerate(row_labels):
        middle = top + row * (height * scale + GAP) + height * scale / 2
        draw.text((left - GAP, middle), label, fill=GREY, font=font, anchor="rm")
    for index, image in enumerate(images):
        picture = Image.fromarray(to_pictures(image[None].expand(-1, 3, -1, -1))[0])
        row, column = divmod(index, columns)
        x = left + column * (cell + GAP) + (cell - width * scale) // 2
        canvas.paste(
            picture.resize((width * scale, height * scale), Image.Resampling.NEAREST),
            (x, top + row * (height * scale + GAP)),
        )
    buffer = BytesIO()
    if max(height, width) > SHOWN_AT:
        page = Image.new("RGB", canvas.size, "white")
        page.paste(canvas, mask=canvas)
        page.save(buffer, format="JPEG", quality=90)
    else:
        canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def rows_that_fit(columns: int, height: int, width: int) -> int:
    """Return how many rows of pictures a grid can have; at least one."""
    return max(1, LARGEST // (columns * height * width))


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str = "",
    *,
    x_label: str = "step",
    size: tuple[float, float] = (3.6, 2.2),
    kind: Literal["svg", "png"] = "svg",
) -> bytes:
    """Draw (x, y) series in one chart of `size` inches. Long series are drawn faintly, with a running mean on top."""
    import matplotlib

    # Not pyplot: it keeps every figure in global state.
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "expunge", "svg.fonttype": "none", "font.size": 8, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for index, (name, points) in enumerate(series.items()):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            colour = COLOURS[index % len(COLOURS)]
            smooth = len(points) > RUNNING_MEAN
            axes.plot(
                xs,
                ys,
                color=colour,
                alpha=0.3 if smooth else 1.0,
                linewidth=0.8 if smooth else 1.4,
                label=None if smooth else name,
            )
            if smooth:
                axes.plot(xs, _running_mean(ys, max(5, len(ys) // 20)), color=colour, linewidth=1.4, label=name)
        _plain(axes, title, x_label, legend=len(series) > 1)
        buffer = BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, transparent=True, dpi=180, metadata=metadata)
    return buffer.getvalue()


def _plain(axes: "Axes", title: str, x_label: str, *, legend: bool) -> None:
    grey = "#808080"
    axes.set_title(title, loc="left", color=grey, fontsize=8.5)
    axes.set_xlabel(x_label, color=grey)
    axes.tick_params(colors=grey, length=2)
    axes.grid(visible=True, color=grey, alpha=0.18, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(grey)
    axes.margins(x=0.01)
    if legend:
        axes.legend(frameon=False, labelcolor=grey)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the centred running mean; at the ends the window is cut short."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]

"""The description of a trained model: a model card for programs and for people, and a plot of its training."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.models.errors import ModelError
from diptych.models.files.location import redacted
from diptych.models.names import IMAGE_KINDS, TEXT_KINDS

CARD = "model_card.json"
README = "README.md"
CURVES = "loss.png"
# Scores that are plotted, in this order: more lines than these could not be told apart.
_DRAWN = ("CIDEr", "BLEU-4", "top1_accuracy", "recall_at_1", "sample_distance", "text_distance")
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b")


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Writes `model_card.json` and `README.md`, a card as Hugging Face's: Markdown after YAML front matter.

    Args:
        folder: Local folder of the model.
        card: JSON values; numbers that are not finite become null, and URLs lose what gives access. `kind` must be
            there; of the others, those that are there are shown: `summary` (a sentence), `data`, `options`, `scores`
            and `versions` (mappings), `digest`. More are kept in the JSON.

    Raises:
        ModelError: A file cannot be written.
    """
    card = _publishable(card)
    written = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    _write(folder / CARD, written.encode())
    _write(folder / README, _markdown(card).encode())


def _publishable(value: Any) -> Any:
    """Returns JSON values with None for the numbers that JSON does not know, and no signature in a URL."""
    if isinstance(value, Mapping):
        return {name: _publishable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(item) for item in value]
    if isinstance(value, str):
        return redacted(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with _write_errors(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{path} cannot be written: {error.strerror or error}. Free some space or give this user the right to "
            "write there, and run the same command again; the trained model is not lost."
        ) from error


def _markdown(card: Mapping[str, Any]) -> str:
    kind = str(card["kind"])
    title = f"{kind} model trained by Diptych"
    parts = [f"---\n{_front_matter(card, title)}\n---\n", f"# {title}\n"]
    if summary := card.get("summary"):
        parts.append(f"{summary}\n")
    parts.append(f"## How to use it\n\n```sh\n{_command(kind)}\n```\n")
    parts.append(f"`FOLDER` is this folder, or the URL of a copy of it.\n\n![Training]({CURVES})\n")
    for name in ("scores", "data", "options", "versions"):
        if values := card.get(name):
            parts.append(f"## {name.capitalize()}\n\n{_table(values)}\n")
    if digest := card.get("digest"):
        parts.append(f"Digest of the weights and their configuration: `{digest}`\n")
    return "\n".join(parts)


def _command(kind: str) -> str:
    if kind in IMAGE_KINDS:
        return f"diptych generate --model {kind}:FOLDER --prompts SRC --output OUT"
    job = "embed" if kind in TEXT_KINDS else "caption"
    return f"diptych {job} --model {kind}:FOLDER --input SRC --output OUT"


def _front_matter(card: Mapping[str, Any], title: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    kind = str(card["kind"])
    image_task = "text-to-image" if kind in IMAGE_KINDS else "image-to-text"
    task = "feature-extraction" if kind in TEXT_KINDS else image_task
    scores = [
        (name, value) for name, value in card.get("scores", {}).items() if isinstance(value, int | float)
    ]
    results = [
        EvalResult(
            task_type=task,
            dataset_type="diptych",
            dataset_name="validation rows",
            metric_type=name.lower(),
            metric_name=name,
            metric_value=value,
        )
        for name, value in scores
    ]
    data = ModelCardData(
        library_name="diptych",
        pipeline_tag=task,
        tags=["diptych", kind],
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in _flat(values)]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _cell(value: Any) -> str:
    """Returns a value as text that cannot break out of its cell of a Markdown table."""
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
    else:
        text = "–" if value is None else str(value)
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def draw_curves(history: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draws losses over epochs, and scores on an axis of their own where there are any, as a PNG.

    Args:
        history: An entry an epoch: `epoch` (its ordinal is taken where it is missing), whatever ends in `loss`, and
            scores: CIDEr, BLEU-4, … Other entries, and values that are not finite, are not drawn.
        path: The path of the PNG.
        title: The title above the plot.

    Raises:
        ModelError: The file cannot be written.
    """
    # Not pyplot, whose figures are global and which needs a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    names = list(dict.fromkeys(name for entry in history for name in entry))
    losses = [name for name in names if name.endswith("loss")]
    for name, colour in zip(losses, _COLOURS, strict=False):
        _draw(axes, history, name, color=colour)
    axes.set_ylabel("loss")
    scores = [name for name in _DRAWN if name in names]
    if scores:
        right = axes.twinx()
        right.set_ylabel("score")
        for name, colour in zip(scores, reversed(_COLOURS), strict=False):
            _draw(right, history, name, color=colour, linestyle="--")
        right.set_ylim(bottom=0)
    if losses or scores:
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    with _write_errors(path):
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(temporary, format="png", metadata={"Software": "diptych"})
        os.replace(temporary, path)


def _draw(axes: Any, history: Sequence[Mapping[str, float]], name: str, **style: str) -> None:
    points = [
        (entry.get("epoch", ordinal), entry[name])
        for ordinal, entry in enumerate(history, start=1)
        if isinstance(entry.get(name), int | float) and math.isfinite(entry[name])
    ]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name.replace("_", " "), **style)

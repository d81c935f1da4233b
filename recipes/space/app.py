"""A page that answers: which model trains on my card, and how? Layout only; what it says is computed beside it.

python recipes/space/app.py
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import gradio as gr
from space_bars import STYLE, answer, batch_line, error_line
from space_choice import DTYPES, METHODS, UPLOADED, Choice
from space_prediction import LISTED, largest_batch, predict
from space_recipe import install_line, memory_command, recipe, train_command

from hf_stateless.reports.predicted.table import GPUS


NAMES = [field.name for field in fields(Choice)]
CARDS = [(f"{gib:g} GiB: {cards}", f"{gib:g}") for gib, cards in GPUS.items()]
_ADDRESS = "q => q ? location.origin + location.pathname + '?' + q.split('?').pop() : ''"
WORKING = '<div class="fit"><p class="note">Looking for the largest batch that fits.</p></div>'


def respond(uploaded: str | None, *values: Any) -> Iterator[tuple[str, ...]]:
    """Yield the bars, the largest batch, what to copy, and the link: the bars first."""
    try:
        choice = Choice.read(dict(zip(NAMES, values, strict=True)))
        choice = replace(choice, model=UPLOADED) if uploaded else choice
        bars = answer(predict(choice, uploaded), choice)
    except ValueError as error:
        yield error_line(error), "", "", "", ""
        return
    commands = "\n".join(
        [install_line(choice), train_command(choice), "", "# The figures above:", memory_command(choice)]
    )
    rest = (commands, recipe(choice), choice.query())
    yield bars, WORKING, *rest
    try:
        yield bars, batch_line(choice, largest_batch(choice, uploaded)), *rest
    except ValueError as error:
        yield bars, error_line(error), *rest


def restore(request: gr.Request) -> tuple[Any, ...]:
    """Return the values of the form that a link names, and a line if it names something else."""
    given = {key: value for key, value in dict(request.query_params).items() if key in NAMES}
    try:
        choice, problem = Choice.read(given), ""
    except ValueError as error:
        choice, problem = Choice(), error_line(ValueError(f"This link cannot be read: {error}"))
    return problem, *form_values(choice)


def form_values(choice: Choice) -> list[Any]:
    """Return a choice as the values of the form."""
    return [f"{choice.gpu:g}" if name == "gpu" else getattr(choice, name) for name in NAMES]


def _inputs() -> dict[str, Any]:
    start = Choice()
    found: dict[str, Any] = {}
    found["model"] = gr.Dropdown(
        list(LISTED),
        value=start.model,
        label="Model",
        allow_custom_value=True,
        info="of the list, or any id of the Hub",
    )
    found["gpu"] = gr.Dropdown(CARDS, value=f"{start.gpu:g}", label="Card")
    found["method"] = gr.Dropdown([(name, key) for key, name in METHODS.items()], value=start.method, label="Method")
    with gr.Row():
        found["batch"] = gr.Number(start.batch, label="Sequences per card", precision=0, min_width=120)
        found["seq"] = gr.Number(start.seq, label="Tokens per sequence", precision=0, min_width=120)
    found["layerwise"] = gr.Checkbox(start.layerwise, label="Layer-wise updates (SWAN and SinkGD)")
    found["checkpointing"] = gr.Checkbox(start.checkpointing, label="Activation checkpointing")
    found["dtype"] = gr.Radio(list(DTYPES), value=start.dtype, label="Weights")
    with gr.Row():
        found["lora"] = gr.Number(0, label="LoRA rank", info="0: all weights", precision=0, min_width=120)
        found["gpus"] = gr.Number(1, label="Cards", info="over 1: FSDP2", precision=0, min_width=120)
    return found


def build() -> gr.Blocks:
    """Return the page."""
    with gr.Blocks(title="Does it fit?") as page:
        gr.Markdown("# Does it fit?\nWhich model trains on which card, and how. Only its config is read.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                found = _inputs()
                upload = gr.File(label="or a config.json", file_types=[".json"], type="filepath", height=110)
            with gr.Column(scale=3, min_width=280):
                problem, bars, batch = gr.HTML(), gr.HTML(), gr.HTML()
                commands = gr.Code(label="Commands", language="shell", wrap_lines=True)
                yaml = gr.Code(label="mine.yaml", language="yaml", wrap_lines=True)
                link = gr.Textbox(label="Link to this choice", interactive=False, elem_id="link")
        inputs = [found[name] for name in NAMES]
        outputs = [bars, batch, commands, yaml, link]
        event = {"fn": respond, "inputs": [upload, *inputs], "outputs": outputs, "show_progress": "minimal"}
        changes = [part.change for part in (upload, *inputs)]
        changed = gr.on(changes, **event, trigger_mode="always_last")
        changed.then(lambda: "", None, problem)
        page.load(restore, None, [problem, *inputs]).then(**event)
        link.change(None, link, link, js=_ADDRESS)
    return page


def warm() -> None:
    """Answer for each model of the list, so that visitors need not wait for what no batch changes."""
    for model in [Choice.model, *LISTED]:
        predict(Choice(model=model))


def main() -> None:
    """Serve the page; the models of the list are looked at meanwhile."""
    threading.Thread(target=warm, daemon=True).start()
    build().queue(default_concurrency_limit=2).launch(css=STYLE)


if __name__ == "__main__":
    main()

"""Generation to look at: tokens coloured by probability, in a notebook's widgets or as a table that needs none.

Playground(model)                                                        # in a live notebook
static(model.generate(prompts, alternatives=5), prompts, model.codec)    # where there is no kernel
"""

from __future__ import annotations

import contextvars
import html
import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import pandas as pd
from IPython.display import display

from moekit.generation.request import Generation, Token
from moekit.generation.text import Text
from moekit.headlines import first_line
from moekit.notebook import coloured_text
from moekit.notebook.coloured_text import Span

if TYPE_CHECKING:
    from moekit.api import Model
    from moekit.data.codec import Codec

ALTERNATIVES = 5
# seconds between two pictures of a stream
REDRAW = 0.05
RAREST, DARKEST = 1e-3, 0.7


@dataclass(frozen=True)
class Shown:
    """A token for the eye: what it adds to the text, its probability, and the best tokens at its place with theirs."""

    text: str
    probability: float
    alternatives: Sequence[tuple[str, float]] = ()


def coloured(tokens: Iterable[Shown]) -> str:
    """HTML: the less probable a token, the darker its ground; the mouse over it shows the alternatives."""
    spans, lines = [], []
    for token in tokens:
        lines.append(f"{token.probability:.1%}")
        lines += [f"{probability:6.1%}  {text!r}" for text, probability in token.alternatives]
        # A part of a character has no text: its lines show with the token that completes the character.
        if token.text:
            tip = html.escape("\n".join(lines)).replace("\n", "&#10;")
            spans.append(Span(_marked(token.text), _shade(token.probability), tip))
            lines = []
    return coloured_text.html(spans)


def _marked(text: str) -> str:
    """Text whose line ends can be seen."""
    return text.replace("\n", f"{coloured_text.LINE_END}\n")


def _shade(probability: float) -> str:
    """An orange of opacity 0 at a probability of 1, and of ``DARKEST`` at ``RAREST`` and below."""
    surprise = math.log(min(1.0, max(probability, RAREST))) / math.log(RAREST)
    return f"rgba(230, 120, 0, {DARKEST * abs(surprise):.2f})"


def shown(token: Token, codec: Codec) -> Shown:
    names = codec.pieces([number for number, _ in token.alternatives])
    alternatives = [
        (name, math.exp(logprob)) for name, (_, logprob) in zip(names, token.alternatives, strict=True)
    ]
    return Shown(token.text, math.exp(token.logprob), alternatives)


# ------------------------------------------------------------------------------------------- without a live kernel


class Table:
    """Generations as a table: HTML where a notebook shows it, text elsewhere."""

    def __init__(self, rows: Sequence[tuple[str, str, Sequence[Shown], str, float]]):
        self.rows = rows

    def _repr_html_(self) -> str:
        head = "".join(
            f'<th style="text-align: left">{name}</th>' for name in ("prompt", "goes on", "ends", "score")
        )
        body = "".join(
            f'<tr><td style="text-align: left; white-space: pre-wrap">{html.escape(prompt)}</td>'
            f'<td style="text-align: left">{coloured(tokens)}</td><td>{reason}</td><td>{score:.2f}</td></tr>'
            for prompt, _, tokens, reason, score in self.rows
        )
        return f"<table><tr>{head}</tr>{body}</table>"

    def __repr__(self) -> str:
        return "\n\n".join(
            f"{prompt!r}\n -> {text!r} ({reason}, {score:.2f})"
            for prompt, text, _, reason, score in self.rows
        )


def static(
    generations: Sequence[Generation], prompts: str | Sequence[str | Sequence[int]], codec: Codec
) -> Table:
    """What :meth:`moekit.api.Model.generate` made of ``prompts``, as a table with coloured tokens."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    rows = []
    for generation in generations:
        prompt = prompts[generation.prompt]
        prompt = prompt if isinstance(prompt, str) else codec.decode(prompt)
        pieces, text = Text(codec, ()), []
        for place, (number, logprob) in enumerate(zip(generation.ids, generation.logprobs, strict=True)):
            alternatives = generation.alternatives[place] if generation.alternatives else []
            token = Token(0, number, pieces.add(number), float(logprob), alternatives, None)
            text.append(shown(token, codec))
        text[-1] = replace(text[-1], text=text[-1].text + pieces.rest())
        rows.append((prompt, generation.text, text, generation.finish_reason, generation.score))
    return Table(rows)


def written(generations: Sequence[Generation], prompts: Sequence[str]) -> pd.DataFrame:
    """The same to keep, one row per generation: ``prompt`` (its text), ``text``, ``ids``, ``logprobs`` (of each id, natural log),
    ``finish_reason`` and ``score``, as :class:`moekit.generation.request.Generation` has them."""
    columns = ["prompt", "text", "ids", "logprobs", "finish_reason", "score"]
    rows = [
        (prompts[one.prompt], one.text, list(one.ids), one.logprobs.tolist(), one.finish_reason, one.score)
        for one in generations
    ]
    return pd.DataFrame(rows, columns=columns)


# ------------------------------------------------------------------------------------------------ with one


@dataclass
class Run:
    """What was asked for, in the widgets' values, and the tokens that came."""

    prompt: str
    values: dict[str, Any]
    tokens: list[Shown]
    seconds: float = 0.0
    said: str = ""

    @property
    def label(self) -> str:
        start = self.prompt if len(self.prompt) <= 40 else self.prompt[:40] + "…"
        return f"{start!r}, {len(self.tokens)} tokens, temperature {self.values['temperature']:g}"


class Playground:
    """Widgets around :meth:`moekit.api.Model.stream`: show it as the last expression of a cell.

    The generation runs in a thread, so that the stop button is heard. ``runs`` holds the history.

    Raises:
        ValueError: the model has no codec.
    """

    def __init__(self, model: Model, prompt: str = ""):
        if not model.codec.reads_text:
            raise ValueError(model.codec.why)
        self.model, self.codec = model, model.codec
        self.runs: list[Run] = []
        self.thread: threading.Thread | None = None
        self._stop = threading.Event()

        longest = model.config.max_positions - 1
        self.prompt = widgets.Textarea(
            prompt, placeholder="a prompt; empty starts a line", layout={"width": "auto"}
        )
        self.settings = {
            "max_new_tokens": widgets.IntSlider(min(64, longest), 1, longest, description="new tokens"),
            "temperature": widgets.FloatSlider(0.8, min=0, max=2, step=0.05, description="temperature"),
            "top_k": widgets.BoundedIntText(0, 0, len(self.codec), description="top k (0: all)"),
            "top_p": widgets.FloatSlider(0.95, min=0.05, max=1, step=0.05, description="top p"),
            "repetition_penalty": widgets.FloatSlider(1.0, min=1, max=2, step=0.05, description="repetition"),
            "seed": widgets.BoundedIntText(1, 0, 2**31, description="seed"),
            "line_end": widgets.Checkbox(False, description="stop at the line's end"),
        }
        self.go = widgets.Button(description="Generate", button_style="primary", icon="play")
        self.halt = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.history = widgets.Dropdown(options=[], description="history", layout={"width": "auto"})
        self.status, self.text = widgets.HTML(), widgets.HTML()
        self.go.on_click(lambda _: self.generate())
        self.halt.on_click(lambda _: self.stop())
        self.history.observe(lambda change: self._recall(change["new"]), names="value")
        for setting in self.settings.values():
            setting.layout.width, setting.style.description_width = "auto", "100px"
        # as many columns as the page has room for
        columns = "repeat(auto-fill, minmax(290px, 1fr))"
        grid = widgets.GridBox(list(self.settings.values()), layout={"grid_template_columns": columns})
        buttons = widgets.HBox([self.go, self.halt, self.status])
        self.box = widgets.VBox([self.prompt, grid, buttons, self.text, self.history])

    def _ipython_display_(self) -> None:
        display(self.box)

    def values(self) -> dict[str, Any]:
        return {name: widget.value for name, widget in self.settings.items()}

    def generate(self) -> None:
        """What the button does: start a generation, unless one is running."""
        if self.thread is not None and self.thread.is_alive():
            return
        self._stop.clear()
        run = Run(self.prompt.value, self.values(), [])
        self.go.disabled, self.halt.disabled = True, False
        # The thread sends its widgets' messages on behalf of the cell or click that started it.
        context = contextvars.copy_context()
        self.thread = threading.Thread(target=context.run, args=(self._run, run), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """What the stop button does: end after the token that is being computed."""
        self._stop.set()

    def _run(self, run: Run) -> None:
        start = drawn = time.monotonic()
        try:
            tokens = self.model.stream(run.prompt, **arguments(run.values), alternatives=ALTERNATIVES)
            for token in tokens:
                run.tokens.append(shown(token, self.codec))
                run.seconds = time.monotonic() - start
                if self._stop.is_set():
                    tokens.close()
                    run.said = "stopped"
                elif time.monotonic() - drawn > REDRAW:
                    self._draw(run)
                    drawn = time.monotonic()
        except Exception as error:
            # An error in a thread would be shown nowhere else.
            run.said = first_line(error)
        finally:
            self.runs.append(run)
            self.history.options = [(r.label, number) for number, r in enumerate(self.runs)][::-1]
            # so that choosing the latest is a change, too
            self.history.value = None
            self._draw(run)
            self.go.disabled, self.halt.disabled = False, True

    def _draw(self, run: Run) -> None:
        rate = f"{len(run.tokens) / run.seconds:.1f} tokens/s" if run.tokens else ""
        self.status.value = html.escape(", ".join(part for part in (rate, run.said) if part))
        self.text.value = coloured_text.html([Span(_marked(run.prompt))]) + coloured(run.tokens)

    def _recall(self, number: int | None) -> None:
        """Show a run of the history, its prompt and settings included."""
        # Nothing is chosen, or the generation that runs has changed the list.
        if number is None or self.go.disabled:
            return
        run = self.runs[number]
        self.prompt.value = run.prompt
        for name, widget in self.settings.items():
            widget.value = run.values[name]
        self._draw(run)


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """The widgets' values as :meth:`moekit.api.Model.stream` takes them: 0 and 1 are their words for no top k and top p."""
    given = {name: value for name, value in values.items() if name != "line_end"}
    return given | {
        "top_k": values["top_k"] or None,
        "top_p": values["top_p"] if values["top_p"] < 1 else None,
        "stop": ["\n"] if values["line_end"] else [],
    }

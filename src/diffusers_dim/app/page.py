# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The page of the app: its parts, what happens at each click, and its API."""

import base64
import html
import io
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from .. import __version__
from ..designers import DesignError
from ..files import save_image
from ..serving.intake import UploadError
from ..serving.painter import Stopped
from .guard import Picture, Sketch
from .studio import AUTOMATIC, Painting, Progress, Settings, Studio


# Longer words of a designer's are cut where they are shown.
MAX_WORDS = 500
QUEUE_SIZE = 32
DESIGNS_AT_ONCE = 4
# Files are deleted when they are so old, in seconds.
KEPT_SECONDS = 6 * 3600
# Smaller pictures are shown with their pixels, not blurred.
SHARP_PIXELS = 256
SKETCH_SIDE = 512

THEME = gr.themes.Default(
    primary_hue=gr.themes.colors.indigo,
    secondary_hue=gr.themes.colors.indigo,
    neutral_hue=gr.themes.colors.slate,
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "Liberation Mono", "monospace"],
)
# Two columns on a desktop, where what is asked and what comes of it lie side by side; one on a phone, in that order.
CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
#title { padding: 0; }
#title h1 { margin: 0; font-size: 1.5rem; }
#title p { margin: .1rem 0 0; color: var(--body-text-color-subdued); }
#desk { display: grid !important; gap: var(--layout-gap) 20px; align-items: start; grid-template-columns: 5fr 6fr;
  grid-template-areas: "ask out" "plan more"; }
#desk > * { min-width: 0 !important; }
#ask { grid-area: ask; } #out { grid-area: out; } #plan { grid-area: plan; } #more { grid-area: more; }
#source img { width: 100%; height: 100%; object-fit: contain; }
.sharp img { image-rendering: pixelated; }
#note, #stage, #note .html-container, #stage .html-container { padding: 0; }
.said { display: flex; gap: .6rem; align-items: center; min-height: 2rem; }
#note .said { padding-right: 7rem; }
#stage progress { flex: 1; height: .6rem; appearance: none; border: 0; }
#stage progress::-webkit-progress-bar { background: var(--border-color-primary); border-radius: 9px; }
#stage progress::-webkit-progress-value { background: var(--color-accent); border-radius: 9px; }
#stage progress::-moz-progress-bar { background: var(--color-accent); border-radius: 9px; }
#stage .previews { display: flex; gap: 4px; }
#stage .previews img { flex: 1; min-width: 0; max-height: 430px; object-fit: contain;
  border-radius: var(--radius-lg); }
#blueprint textarea { font-size: .875rem; line-height: 1.4; }
#history .grid-container { grid-template-columns: repeat(6, 1fr); padding: 0; }
.heading p { font-size: .875rem; color: var(--block-label-text-color); margin: 0; }
#examples table { table-layout: fixed; width: 100%; }
#examples .tr-head { display: none; }
#examples td { padding: 2px 8px; text-align: left; white-space: normal; cursor: pointer; }
#examples td:first-child { width: 64px; }
#examples td:first-child div { width: 48px !important; height: 48px !important; border: 0; }
#examples td img { width: 48px; height: 48px; max-width: none; }
footer { margin-top: .5rem !important; }
@media (max-width: 760px) {
  #desk { grid-template-columns: 100%; grid-template-areas: "ask" "out" "plan" "more"; }
  .gradio-container > main { padding: 8px !important; }
  #title p { display: none; }
  #note .said { padding-right: 0; }
  #history .grid-container { grid-template-columns: repeat(4, 1fr); }
}
"""


@dataclass(frozen=True)
class Entry:
    """A picture of the history: its files, and all that it was made with."""

    picture: str
    before: str
    source: str
    instruction: str
    blueprint: str
    designer: str
    settings: Settings
    said: str


def say(words: str) -> str:
    """A line that says how things stand."""
    return f'<div class="said"><span>{html.escape(words)}</span></div>'


def show_progress(progress: Progress) -> str:
    """What is seen while there is painted: a bar, and what the latents look like."""
    pictures = []
    for preview in progress.previews:
        data = io.BytesIO()
        preview.save(data, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        pictures.append(f'<img alt="Preview" src="{source}">')
    return (
        f'<div class="said"><progress max="{progress.steps}" value="{progress.step}"></progress>'
        f"<span>Step {progress.step} of {progress.steps}, {progress.seconds:.1f} s</span></div>"
        f'<div class="previews">{"".join(pictures)}</div>'
    )


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Shows the errors that bad input and busy designers raise; Gradio would render their words as HTML."""
    try:
        yield
    except (ValueError, OSError) as error:
        words = " ".join(str(error).split())
        words = words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]}..."
        title = "That cannot be taken" if isinstance(error, UploadError) else "That did not work"
        raise gr.Error(html.escape(words, quote=False), print_exception=False, title=title) from error


class Page:
    """
    Args:
        studio ([`Studio`]): Designs and paints.
        designers (`Sequence[tuple[str, str]]`): What the studio's designers are called, and their names in it.
        designer (`str`): The name of the one that is chosen to begin with.
        examples (`Sequence[tuple[PIL.Image.Image, str]]`): Pictures and instructions; the first is loaded.
        folder (`pathlib.Path`): Where pictures are kept; Gradio's own folder of uploads.
        model (`str`): What the model is called.
    """

    def __init__(
        self,
        studio: Studio,
        designers: Sequence[tuple[str, str]],
        designer: str,
        examples: Sequence[tuple[Image.Image, str]],
        folder: Path,
        model: str,
    ):
        self.studio, self.designers, self.designer, self.model = studio, list(designers), designer, model
        self.folder = folder / "pictures"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.examples = [[self._keep(image, {}), text] for image, text in examples]
        # What each session has under way, by its hash; looked at from many threads.
        self._stops: dict[str, threading.Event] = {}

    def _keep(self, image: Image.Image, facts: dict[str, Any]) -> str:
        path = self.folder / f"{uuid.uuid4().hex}.png"
        save_image(image, path, facts)
        return str(path)

    # What happens at clicks.

    def begin(self, request: gr.Request) -> tuple:
        """Makes a new job of the session's; an older one is stopped."""
        self.stop(request)
        self._stops[request.session_hash] = threading.Event()
        return say("Waiting for its turn ..."), *self._buttons(busy=True)

    def end(self, request: gr.Request) -> tuple:
        """Takes the job away."""
        self._stops.pop(request.session_hash, None)
        # Steps that are still on their way to the browser then change what cannot be seen.
        return *self._buttons(busy=False), gr.update(visible=False), gr.update(visible=True)

    def stop(self, request: gr.Request) -> None:
        """Stops what the session has under way, and nothing of anybody else's."""
        stop = self._stops.pop(request.session_hash, None)
        if stop is not None:
            stop.set()

    def cancel(self, request: gr.Request) -> tuple:
        """The stop button. Gradio itself takes what waits out of the queue."""
        self.stop(request)
        return say("Stopped."), *self.end(request)

    @staticmethod
    def _buttons(busy: bool) -> tuple:
        return (*(gr.update(interactive=not busy) for _ in range(3)), gr.update(interactive=busy))

    def design(
        self,
        image: Image.Image | None,
        instruction: str,
        designer: str,
        size: str,
        then_paint: bool,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """The blueprint as it is written; before painting, a designer that fails leaves none."""
        stop = self._stops.get(request.session_hash)
        with errors_in_words():
            if stop is None:  # it was stopped before its turn
                yield gr.skip(), gr.skip()
                return
            self.studio.designs.check(request.session_hash, "designs")
            self._check_picture(image)
            text = self.studio.read_instruction(instruction)
            written = ""
            yield say("Designing ..."), ""
            try:
                for written in self.studio.design(image, text, designer, size, stop):
                    if written is not None:
                        yield gr.skip(), written
            except Stopped:
                yield gr.skip(), gr.skip()
                return
            except DesignError as error:
                if not then_paint:
                    raise
                gr.Warning(
                    html.escape(f"{str(error)[:MAX_WORDS]} So the instruction is painted from as it is.", quote=False),
                    title="No blueprint",
                )
                yield say("No blueprint."), ""
                return
            if written is None and not then_paint:
                raise UploadError("Choose a designer first: nobody is chosen.")
            yield say("The blueprint is written: change it as you like, and paint."), written or ""

    def paint(
        self,
        image: Image.Image | None,
        instruction: str,
        blueprint: str,
        designer: str,
        steps: int,
        guidance_scale: float,
        seed: int | None,
        candidates: int,
        size: str,
        entries: list[Entry],
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Previews while there is painted, and the pictures at the end, which go to the session's history."""
        stop = self._stops.get(request.session_hash)
        kept = (gr.skip(), gr.skip(), gr.skip())
        with errors_in_words():
            if stop is None:  # it was stopped before its turn
                yield gr.skip(), gr.skip(), *kept
                return
            self.studio.paintings.check(request.session_hash, "paintings")
            self._check_picture(image)
            settings = self._read_settings(steps, guidance_scale, seed, candidates, size)
            text, plan = self.studio.read_instruction(instruction), self.studio.read_blueprint(blueprint)
            # The previews stand in the result's place.
            bar = gr.update(value=show_progress(Progress(0, settings.steps, 0.0, [])), visible=True)
            yield say("Painting ..."), bar, gr.update(visible=False), *kept[1:]
            try:
                painting: Painting = None
                for told in self.studio.paint(image, text, settings, stop, plan):
                    if isinstance(told, Painting):
                        painting = told
                    else:
                        yield gr.skip(), show_progress(told), *kept
            except Stopped:
                yield gr.skip(), gr.skip(), *kept
                return
            made = self._remember(painting, image, text, designer, settings)
            entries = [*made, *entries][: self.studio.limits.history]
            shown = gr.update(value=(made[0].before, made[0].picture), visible=True)
            yield say(made[0].said), gr.update(visible=False), shown, self._gallery(entries), entries

    def _remember(
        self, painting: Painting, image: Image.Image, text: str, designer: str, settings: Settings
    ) -> list[Entry]:
        before, source = self._keep(painting.before, {}), self._keep(image, {})
        made = []
        for picture, seed in zip(painting.images, painting.seeds, strict=True):
            facts = {
                "prompt": text,
                **({} if painting.blueprint is None else {"blueprint": painting.blueprint}),
                "num_inference_steps": painting.steps,
                "guidance_scale": painting.guidance_scale,
                "seed": seed,
                "width": picture.width,
                "height": picture.height,
                "model": self.model,
                "version": __version__,
            }
            said = (
                f"{picture.width} x {picture.height} pixels, {painting.steps} steps, guidance"
                f" {painting.guidance_scale:g}, seed {seed}, {painting.seconds:.1f} s"
            )
            made.append(
                Entry(
                    self._keep(picture, facts),
                    before,
                    source,
                    text,
                    painting.blueprint or "",
                    designer,
                    replace(settings, seed=seed, candidates=1),
                    said,
                )
            )
        return made

    @staticmethod
    def _gallery(entries: list[Entry]) -> list[tuple[str, None]]:
        return [(entry.picture, None) for entry in entries]

    def recall(self, entries: list[Entry], chosen: gr.SelectData) -> tuple:
        """A picture of the history with its settings."""
        with errors_in_words():
            place = chosen.index
            if not isinstance(place, int) or not 0 <= place < len(entries):
                raise UploadError("There is no such picture in this session.")
            entry = entries[place]
            if not Path(entry.picture).exists() or not Path(entry.source).exists():
                raise UploadError(f"That picture is gone: files are kept for {KEPT_SECONDS // 3600} hours.")
            settings = entry.settings
            return (
                entry.source,
                entry.instruction,
                entry.blueprint,
                entry.designer,
                settings.steps,
                settings.guidance_scale,
                settings.seed,
                settings.candidates,
                settings.size,
                (entry.before, entry.picture),
                say(entry.said),
                place,
            )

    def reuse(self, entries: list[Entry], shown: int) -> tuple:
        """The picture that is shown, as the one to be edited."""
        with errors_in_words():
            if not 0 <= shown < len(entries):
                raise UploadError("There is no result yet.")
            return entries[shown].picture, ""

    @staticmethod
    def use_sketch(drawing: dict[str, Any] | None) -> tuple:
        """The sketch as the picture to be edited, on the tab of pictures."""
        with errors_in_words():
            if drawing is None or drawing["composite"] is None:
                raise UploadError("There is no sketch yet.")
            return drawing["composite"], "", gr.update(selected="picture")

    # The API.

    def api_design(
        self, image: Image.Image | None, instruction: str, designer: str, size: str, request: gr.Request
    ) -> Iterator[str]:
        """Writes the blueprint of an edit: its words so far, and at the end all of it."""
        with errors_in_words():
            self.studio.designs.check(request.session_hash, "designs")
            self._check_picture(image)
            text = self.studio.read_instruction(instruction)
            yield from self._api_design(image, text, designer, size)

    def _api_design(self, image: Image.Image, text: str, designer: str, size: str) -> Iterator[str]:
        for written in self.studio.design(image, text, designer, size, threading.Event()):
            yield written or ""

    def api_edit(
        self,
        image: Image.Image | None,
        instruction: str,
        blueprint: str,
        designer: str,
        steps: int,
        guidance_scale: float,
        seed: int | None,
        candidates: int,
        size: str,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """
        Edits a picture: how far it is now and then, and at the end the pictures, the blueprint that they were painted
        from, and what they were painted with. A given blueprint is painted from; else the designer writes one.
        """
        with errors_in_words():
            self.studio.paintings.check(request.session_hash, "paintings")
            self._check_picture(image)
            settings = self._read_settings(steps, guidance_scale, seed, candidates, size)
            text, plan = self.studio.read_instruction(instruction), self.studio.read_blueprint(blueprint)
            if plan is None:
                written = ""
                for written in self._api_design(image, text, designer, size):
                    yield None, written, "Designing ..."
                plan = written or None
            painting: Painting = None
            for told in self.studio.paint(image, text, settings, threading.Event(), plan):
                if isinstance(told, Painting):
                    painting = told
                else:
                    yield None, plan or "", f"Step {told.step} of {told.steps}"
            made = self._remember(painting, image, text, designer, settings)
            yield self._gallery(made), plan or "", "; ".join(entry.said for entry in made)

    @staticmethod
    def _check_picture(image: Image.Image | None) -> None:
        if image is None:
            raise UploadError("There is no picture to edit: upload one, or choose an example.")

    def _read_settings(
        self, steps: int, guidance_scale: float, seed: int | None, candidates: int, size: str
    ) -> Settings:
        settings = Settings(
            int(steps), float(guidance_scale), None if seed is None else int(seed), int(candidates), size
        )
        self.studio.check(settings)
        return settings

    # What it looks like.

    def build(self) -> gr.Blocks:
        """The page, its queue set up, ready to be launched."""
        limits, pipe = self.studio.limits, self.studio.pipe
        sharp = ["sharp"] if pipe.image_processor.base_size < SHARP_PIXELS else []
        first_picture, first_text = self.examples[0]
        with gr.Blocks(
            title="Draw-In-Mind", fill_width=True, delete_cache=(600, KEPT_SECONDS), analytics_enabled=False
        ) as page:
            entries, shown = gr.State([]), gr.State(0)
            with gr.Row(elem_id="title"):
                gr.Markdown(
                    "# Draw-In-Mind\nSay what should change. A designer writes the blueprint, the painter paints from"
                    " it; change the blueprint and paint again."
                )
            with gr.Row(elem_id="desk"):
                with gr.Column(elem_id="ask"):
                    with gr.Tabs(selected="picture") as tabs:
                        with gr.Tab("Picture", id="picture"):
                            image = Picture(
                                first_picture,
                                format="png",
                                sources=["upload", "clipboard"],
                                label="The picture to edit",
                                show_label=False,
                                height=330,
                                elem_id="source",
                                elem_classes=sharp,
                                buttons=[],
                            )
                        with gr.Tab("Sketch", id="sketch"):
                            white = Image.new("RGB", (SKETCH_SIDE, SKETCH_SIDE), "white")
                            sketch = Sketch(
                                {"background": white, "layers": [], "composite": white},
                                type="pil",
                                image_mode="RGB",
                                format="png",
                                sources=[],
                                canvas_size=(SKETCH_SIDE, SKETCH_SIDE),
                                layers=False,
                                transforms=[],
                                brush=gr.Brush(default_size=24, colors=_brush_colors(), color_mode="defaults"),
                                show_label=False,
                                height=430,
                                elem_id="sketchpad",
                                buttons=[],
                            )
                            with gr.Row():
                                draw_on = gr.Button("Draw on the picture", size="sm")
                                sketched = gr.Button("Use this sketch", size="sm", variant="primary")
                    instruction = gr.Textbox(
                        first_text,
                        label="What should change?",
                        lines=2,
                        max_lines=4,
                        max_length=limits.characters,
                        submit_btn=False,
                        elem_id="instruction",
                    )
                    with gr.Row():
                        edit = gr.Button("Edit", variant="primary", scale=3, min_width=80, elem_id="edit")
                        stop = gr.Button(
                            "Stop", variant="stop", scale=1, min_width=80, interactive=False, elem_id="stop"
                        )
                with gr.Column(elem_id="out"):
                    note = gr.HTML(say("Ready: press Edit."), elem_id="note")
                    stage = gr.HTML(visible=False, elem_id="stage", elem_classes=sharp)
                    result = gr.ImageSlider(
                        label="Before and after",
                        type="filepath",
                        format="png",
                        interactive=False,
                        elem_id="result",
                        elem_classes=sharp,
                        buttons=["download", "fullscreen"],
                        max_height=460,
                    )
                    reuse = gr.Button("Edit the result further", size="sm", elem_id="reuse")
                with gr.Column(elem_id="plan"):
                    designer = gr.Radio(
                        self.designers, value=self.designer, label="Who writes the blueprint?", elem_id="designer"
                    )
                    blueprint = gr.Textbox(
                        "",
                        label="Blueprint",
                        placeholder="What is painted from. It appears here as it is written; write or change it as"
                        " you like. Empty: the instruction is painted from as it is.",
                        lines=7,
                        max_lines=14,
                        max_length=limits.blueprint_characters,
                        elem_id="blueprint",
                    )
                    with gr.Row():
                        design = gr.Button("Design", min_width=80, elem_id="design")
                        paint = gr.Button("Paint", min_width=80, elem_id="paint")
                    with gr.Accordion("Settings", open=False, elem_id="settings"):
                        with gr.Row():
                            steps = gr.Slider(1, limits.steps, 30, step=1, label="Steps", min_width=120)
                            guidance_scale = gr.Slider(
                                1,
                                limits.guidance_scale,
                                pipe.config.default_guidance_scale,
                                step=0.5,
                                label="Guidance",
                                min_width=120,
                            )
                        with gr.Row():
                            seed = gr.Number(
                                1, precision=0, minimum=0, label="Seed (empty: another each time)", min_width=120
                            )
                            candidates = gr.Slider(
                                1, limits.candidates, 1, step=1, label="Pictures at a time", min_width=120
                            )
                        size = gr.Dropdown(
                            list(self.studio.sizes), value=AUTOMATIC, label="Size (width x height, pixels)"
                        )
                with gr.Column(elem_id="more"):
                    gr.Markdown("History: click a picture to bring it back with its settings", elem_classes="heading")
                    history = gr.Gallery(
                        show_label=False,
                        format="png",
                        columns=6,
                        rows=1,
                        height=130,
                        object_fit="contain",
                        allow_preview=False,
                        interactive=False,
                        elem_id="history",
                        elem_classes=sharp,
                        buttons=[],
                    )
                    loaded = gr.Examples(
                        self.examples,
                        [image, instruction],
                        label="Examples: click one",
                        examples_per_page=6,
                        elem_id="examples",
                    )

            private: dict[str, Any] = {"api_visibility": "private"}
            at_once = private | {"queue": False, "show_progress": "hidden"}
            waiting = private | {"show_progress": "minimal", "show_progress_on": note}
            buttons = [edit, design, paint, stop]
            settings = [steps, guidance_scale, seed, candidates, size]
            pipe_turn: dict[str, Any] = {"concurrency_id": "pipe", "concurrency_limit": 1}

            def start(triggers: list, name: str) -> Any:
                return gr.on(triggers, self.begin, None, [note, *buttons], api_name=name, **at_once)

            def write(after: Any, then_paint: bool) -> Any:
                return after.success(
                    _with(self.design, then_paint),
                    [image, instruction, designer, size],
                    [note, blueprint],
                    api_name="write",
                    concurrency_id="design",
                    concurrency_limit=DESIGNS_AT_ONCE,
                    **waiting,
                )

            def render(after: Any) -> Any:
                return after.success(
                    self.paint,
                    [image, instruction, blueprint, designer, *settings, entries],
                    [note, stage, result, history, entries],
                    **pipe_turn,
                    **waiting,
                )

            # An edit whose design fails altogether is at its end, too.
            designed = write(start([edit.click, instruction.submit], "begin_edit"), then_paint=True)
            designed.failure(self.end, None, [*buttons, stage, result], **at_once)
            alone = write(start([design.click], "begin_design"), then_paint=False)
            painted = [render(designed), render(start([paint.click], "begin_paint"))]
            for rendered in painted:
                rendered.then(lambda: 0, None, shown, **at_once)
            for last in (alone, *painted):
                last.then(self.end, None, [*buttons, stage, result], **at_once)
            stop.click(
                self.cancel, None, [note, *buttons, stage, result], cancels=[designed, alone, *painted], **at_once
            )
            page.unload(self.stop)

            restored = [image, instruction, blueprint, designer, *settings, result, note, shown]
            history.select(self.recall, entries, restored, **at_once)
            reuse.click(self.reuse, [entries, shown], [image, blueprint], **at_once)
            sketched.click(self.use_sketch, sketch, [image, blueprint, tabs], **at_once)
            draw_on.click(lambda picture: picture, image, sketch, **at_once)
            for chosen in (image.input, loaded.load_input_event.then):
                chosen(lambda: "", None, blueprint, **at_once)

            # The API's own endpoints give what a program wants, where those of the page move its parts.
            pictures, plan = gr.Gallery(visible=False, format="png"), gr.Textbox(visible=False)
            said = gr.Textbox(visible=False)
            api = gr.Button(visible=False)
            asked = [image, instruction, blueprint, designer, *settings]
            api.click(self.api_edit, asked, [pictures, plan, said], api_name="edit", **pipe_turn)
            api.click(
                self.api_design,
                [image, instruction, designer, size],
                plan,
                api_name="design",
                concurrency_id="design",
                concurrency_limit=DESIGNS_AT_ONCE,
            )
        page.queue(max_size=QUEUE_SIZE, api_open=False)
        return page


def _brush_colors() -> list[str | tuple[str, float]]:
    """The picture world's own, which suit other pictures, too."""
    from ..tiny.scenes import GROUND_COLORS, SHAPE_COLORS

    colors = [*SHAPE_COLORS.values(), GROUND_COLORS["white"], GROUND_COLORS["gray"]]
    return ["#{:02x}{:02x}{:02x}".format(*color) for color in colors]


def _with(function: Callable[..., Iterator[tuple]], then_paint: bool) -> Callable[..., Iterator[tuple]]:
    """`design` for one of its two buttons; Gradio asks for a function with a parameter for each input."""

    def design(
        image: Image.Image | None, instruction: str, designer: str, size: str, request: gr.Request
    ) -> Iterator[tuple]:
        yield from function(image, instruction, designer, size, then_paint, request)

    return design

"""The demo without a browser: what is asked for, how it is drawn, what a visitor is told. tests/browser/ opens it."""

import base64
import io
import re
import threading
import zlib

import gradio
import pytest
import torch
from PIL import Image
from tiny import tiny_encoder, tiny_pipeline

from transdiff_pipelines import DIGITS, TransDiffPipeline
from transdiff_pipelines.demo import app, request
from transdiff_pipelines.demo.drawing import draw_frames
from transdiff_pipelines.demo.request import BLEND, CLASSES, PICTURE, make_request, open_picture
from transdiff_pipelines.demo.view import sequence_html
from transdiff_pipelines.generation import GenerationSettings, draw


@pytest.fixture(scope="module")
def pipe():
    pipe = TransDiffPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(pipe, **changes):
    """A request for little work, with the values that a test changes."""
    values = {
        "mode": CLASSES,
        "labels": [3, 7],
        "first": 3,
        "second": 8,
        "share": 0.25,
        "upload": None,
        "count": 1,
        "seed": 5,
        "steps": 3,
        "guidance": None,
        "scheduler": "euler-maruyama",
        "drift_scale": 1.0,
        "diffusion_scale": 1.1,
        **changes,
    }
    return make_request(pipe, None, *values.values())


def results(pipe, asked):
    return list(draw_frames(pipe, asked))[-1].results


def pixels(images):
    return [image.tobytes() for image in images]


@pytest.fixture
def picture(tmp_path):
    Image.radial_gradient("L").resize((60, 40)).save(tmp_path / "PICTURE", "png")
    return str(tmp_path / "PICTURE")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "anything"}, "choose what to draw"),
        ({"labels": []}, "choose a class first"),
        ({"labels": [10]}, "class: expected a whole number from 0 to 9"),
        ({"labels": ["3"]}, "class: expected"),
        ({"mode": BLEND, "second": None}, "the two classes to blend"),
        ({"mode": BLEND, "share": 1.5}, "share of the second class"),
        ({"mode": PICTURE}, "upload a picture first"),
        ({"labels": [1, 2, 3], "count": 3}, "9 images; the demo draws at most 8"),
        ({"count": 9}, "images of each class"),
        ({"count": 1.5}, "images of each class"),
        ({"seed": None}, "seed: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"seed": 2**53}, "seed: expected"),
        ({"steps": 101}, "steps: expected a whole number from 1 to 100"),
        ({"steps": True}, "steps: expected"),
        ({"guidance": float("nan")}, "guidance: expected a number from 0 to 20"),
        ({"guidance": -1}, "guidance: expected"),
        ({"scheduler": "ddpm"}, "scheduler is 'ddpm'"),
        ({"diffusion_scale": 1e9}, "diffusion scale: expected"),
    ],
)
def test_requests_are_bounded(pipe, wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ask(pipe, **wrong)


def test_results_are_those_of_the_command_line(pipe):
    asked = ask(pipe, count=2)
    assert pixels(results(pipe, asked)) == pixels(draw(pipe, asked.settings))
    assert asked.recipe() == (
        "transdiff generate 3 7 --count 2 --seed 5 --guidance-scale 1.0 --num-inference-steps 3 "
        "--scheduler euler-maruyama --drift-scale 1.0 --diffusion-scale 1.1 --dtype float32 --batch-size 32"
    )
    assert asked.recipe({3: "dog face"}).startswith("transdiff generate 'dog face' 7 --count 2 ")


@pytest.mark.parametrize("mode", [BLEND, PICTURE])
def test_results_are_those_of_the_python_shown(pipe, mode, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ask(pipe, mode=mode, upload=picture, count=2)
    shown: dict = {}
    exec(asked.recipe(), shown)
    assert pixels(results(pipe, asked)) == pixels(shown["images"])


def test_frames_show_the_sequence_and_its_denoising(pipe, picture):
    frames = list(draw_frames(pipe, ask(pipe, steps=16)))
    assert [len(frame.sequence) for frame in frames] == [n for n in (1, 2, 3, 4) for _ in range(8)] + [4]
    assert len({frame.sequence[0][0].tobytes() for frame in frames[:8]}) == 8
    assert [frame.step for frame in frames[:3]] == [2, 4, 6]
    assert frames[-1].step == frames[-1].num_steps == 64
    assert all(len(batch) == 2 for frame in frames for batch in frame.sequence)
    # A picture given is there from the start, and three more are made.
    frames = list(draw_frames(pipe, ask(pipe, mode=PICTURE, upload=picture, scheduler="heun", steps=2)))
    assert {len(frame.sequence) for frame in frames} == {2, 3, 4}
    assert frames[-1].num_images == 4


def test_requests_at_once_do_not_meet(pipe):
    requests = [ask(pipe, steps=6), ask(pipe, steps=4, scheduler="unipc", seed=9), ask(pipe, mode=BLEND, steps=5)]
    alone = [pixels(results(pipe, asked)) for asked in requests]
    together: dict = {}
    threads = [
        threading.Thread(target=lambda i=i, asked=asked: together.update({i: pixels(results(pipe, asked))}))
        for i, asked in enumerate(requests)
    ]
    own = pipe.scheduler
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(3)] == alone
    assert pipe.scheduler is own
    assert own.num_inference_steps is None  # nobody's run has touched it


def test_a_closed_run_stops():
    pipe = tiny_pipeline()
    before = set(threading.enumerate())
    steps = []
    pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    frames = draw_frames(pipe, ask(pipe, labels=[1], steps=100))
    next(frames)
    (worker,) = set(threading.enumerate()) - before
    frames.close()
    worker.join()
    assert len(steps) < 400


def test_an_error_of_the_run_reaches_the_visitor_without_its_text(caplog):
    def broken(*_, **__):
        raise RuntimeError("no such file: /srv/secret/model")

    with pytest.raises(gradio.Error) as caught:
        app._for_visitors(broken)
    assert caught.value.message == app.UNFORESEEN
    assert "/srv/secret/model" in caplog.text


def test_messages():
    assert app._message(ValueError("seed: expected more")) == "Seed: expected more"
    for error in (ValueError("cannot read /srv/x"), ValueError("cannot read C:\\x"), OSError("gone"), ValueError()):
        assert app._message(error) == app.UNFORESEEN


def test_uploads(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="not a picture that can be read"):
        open_picture(_file(tmp_path, b"<svg/>"))
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "png")
    with pytest.raises(ValueError, match="not a picture that can be read"):
        open_picture(_file(tmp_path, whole.getvalue()[:200]))
    assert open_picture(_file(tmp_path, whole.getvalue())).mode == "RGB"
    tiff = io.BytesIO()
    Image.new("L", (4, 4)).save(tiff, "tiff")
    with pytest.raises(ValueError, match="not a picture that can be read"):
        open_picture(_file(tmp_path, tiff.getvalue()))
    for side in (5001, 20_000):  # above our limit, and above Pillow's own
        bomb = bytearray(whole.getvalue())
        bomb[16:24] = side.to_bytes(4, "big") * 2
        bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
        with pytest.raises(ValueError, match="at most 25 megapixels"):
            open_picture(_file(tmp_path, bytes(bomb)))
    monkeypatch.setattr(request, "MAX_UPLOAD_BYTES", 100)
    with pytest.raises(ValueError, match="too large"):
        open_picture(_file(tmp_path, whole.getvalue()))


def _file(folder, data):
    path = folder / "upload"
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("mode", [CLASSES, BLEND])
def test_downloads_carry_their_settings(pipe, mode):
    asked = ask(pipe, mode=mode, count=2)
    frame = list(draw_frames(pipe, asked))[-1]
    captions = [asked.caption(i, {label: f"<{label}>" for label in range(10)}) for i in range(asked.num_images)]
    html = sequence_html(captions, 4, frame, asked)
    links = re.findall(r'href="data:image/png;base64,([^"]+)"', html)
    images = [Image.open(io.BytesIO(base64.b64decode(link))) for link in links]
    assert pixels(images) == pixels(frame.results)
    assert "<3>" not in html
    assert "&lt;3&gt;" in html
    if mode == CLASSES:
        assert [GenerationSettings.from_image(image) for image in images] == [
            asked.settings.image(i) for i in range(4)
        ]
    else:
        assert "blend_conditions" in images[1].info["transdiff_demo"]
        with pytest.raises(ValueError, match="carries no settings"):
            GenerationSettings.from_image(images[1])


def test_a_page_for_any_model():
    """Names that repeat, guidance for each image, and a 1-step model, which takes no reference."""
    for pipe in (tiny_pipeline(), tiny_pipeline(1, guidance_scale=1.5), tiny_pipeline(id2label=None)):
        page = app.build(pipe, "model")
        modes = next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "mode")
        assert (PICTURE in [name for name, _ in modes.choices]) == (pipe.condition_encoder.num_images > 1)
        classes = next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "classes")
        assert [label for _, label in classes.choices] == list(range(5))


def test_classes_are_offered_by_name():
    """Of classes that share a name the number is shown as well."""
    page = app.build(tiny_pipeline(id2label=dict(enumerate(["dog face", "crane", "hot dog", "crane", "zebra"]))))
    classes = next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "classes")
    assert [name for name, _ in classes.choices] == ["dog face", "crane (1)", "hot dog", "crane (3)", "zebra"]


def _blocks(page):
    return {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}


@pytest.mark.parametrize(
    ("names", "examples", "second"),
    [
        (["cat face", "ant", "dog face", "bat", "pizza"], [2, 4], 0),
        (["goldfish", "golden retriever, retriever", "pizza, pizza pie", "tiger cat", "zebra"], [1, 2], 3),
        (["pizza", "a", "b", "c", "d"], [3], 3),
        (["crane", "crane", "b", "c", "d"], [3], 3),
        (None, [3], 3),
    ],
)
def test_the_page_opens_with_classes_by_name(names, examples, second):
    page = _blocks(app.build(tiny_pipeline(id2label=names and dict(enumerate(names)))))
    assert page["classes"].value == examples
    assert (page["first"].value, page["second"].value) == (examples[0], second)
    assert all(page[name].filterable for name in ("classes", "first", "second"))  # one may type to search


def test_without_a_model_the_page_draws_emoji(monkeypatch):
    asked, shown = [], []
    monkeypatch.setattr(app, "load_pipeline", lambda model: asked.append(model) or tiny_pipeline())
    build = app.build
    monkeypatch.setattr(app, "build", lambda pipe, model: shown.append(model) or build(pipe, model))
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: None)
    for model in (None, "digits", "digits-flow-map"):
        app.launch(model)
    assert asked == shown == ["emoji", "digits", "digits-flow-map"]


def test_the_page_names_those_whose_works_its_model_learned_from():
    assert "Microsoft" in _blocks(app.build(tiny_pipeline(), "emoji"))["credits"].value
    assert "credits" not in _blocks(app.build(tiny_pipeline(), "a-folder"))


def test_launch_shows_no_place_of_this_machine(tmp_path, monkeypatch):
    tiny_pipeline(condition_encoder=tiny_encoder()).save_pretrained(tmp_path / "model")
    seen: dict = {}
    build = app.build
    monkeypatch.setattr(app, "build", lambda pipe, model: seen.update(model=model) or build(pipe, model))
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: seen.update(options, page=self))
    app.launch(str(tmp_path / "model"), port=7000)
    assert seen["model"] == "model"
    assert (seen["share"], seen["show_error"], seen["server_name"]) == (False, False, None)
    assert seen["max_file_size"] == request.MAX_UPLOAD_BYTES
    assert str(tmp_path) not in str(seen["page"].get_config_file())
    assert torch.is_grad_enabled()

"""The pictures and masks of `inputs.py`; most are the rows of the unit tests' tables."""

import sys
import zlib
from functools import partial
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "images")]

import numpy as np  # noqa: E402
from inputs_case import Case  # noqa: E402
from picture_blocks import (  # noqa: E402
    ALPHA,
    COLOURS,
    RGB,
    RGBA,
    RGBA_COLOURS,
    SOFT,
    in_blocks,
    one_channel,
)
from PIL import Image, PngImagePlugin  # noqa: E402
from test_conversion import MASKS  # noqa: E402
from test_reading import (  # noqa: E402
    ARRAYS,
    FAULTS,
    FILES,
    MODES,
    profile_with_red_for_blue,
)

GREY = np.full((16, 16, 3), 128, np.uint8)
# Of floats, where they become bytes.
ROUNDING = 1

MORE_FAULTS = {
    "NCHW by mistake": (np.zeros((3, 64, 64)), r"`np.moveaxis\(array, -3, -1\)`"),
    "NCHW by mistake, batch": (np.zeros((1, 3, 64, 64)), r"`np.moveaxis\(array, -3, -1\)`"),
    "NCHW by mistake, grey": (np.zeros((1, 64, 64)), r"`np.moveaxis\(array, -3, -1\)`"),
    "one NaN among floats": (np.array([[0.5, np.nan]]), "must be finite"),
    "one NaN, mode F": (Image.fromarray(np.array([[0.5, np.nan]], np.float32)), "must be finite"),
}


def picture_cases(model):
    settings = {"num_steps": 2, "seed": 7, "verbose": 0}
    redraw = partial(model.image_to_image, prompt="a cat", strength=0.5, **settings)
    repaint = partial(model.inpaint, prompt="a cat", **settings)

    def both(picture, **size):
        """Return the outcome of both methods that read an image."""
        decoded = model.decode(model.encode_image(picture, **size))
        return np.concatenate([redraw(picture, **size), decoded])

    make_files()
    yield from mode_cases(both)
    yield from file_cases(both)
    yield from size_cases(both)
    yield from list_cases(redraw)
    yield from mask_cases(model, repaint)
    yield from fault_cases(redraw, model.encode_image, repaint)


def make_files():
    """The files that cannot be read, and those that need more than one line to write."""
    for name, (content, _) in FILES.items():
        Path(name).write_bytes(content)
    Path("bomb.png").write_bytes(bomb(20_000))
    Path("small bomb.png").write_bytes(bomb(12_000))
    write_png_with_text("text.png", 2_000_000)
    write_png_with_text("text bomb.png", 300_000_000)


def like_colours(name, both, picture, colours, mistake, tolerance=0):
    return Case(
        f"picture: {name}",
        "near its colours in an array" if tolerance else "as its colours in an array, up to 1/255",
        partial(both, picture),
        like=partial(both, in_blocks(colours) / 255),
        unlike=partial(both, mistake),
        bar=ROUNDING,
        near=bool(tolerance),
    )


def mode_cases(both):
    mistakes = {
        "RGBA": RGB,
        "LA": MODES["L"][0],
        "P": one_channel(range(4)),
        "P with transparency": RGB,
        "PA": RGB,
        "L with transparency": MODES["L"][0],
        "RGB with transparency": RGB,
    }
    for mode, (picture, colours, tolerance) in MODES.items():
        mistake = mistakes.get(mode, GREY)
        yield like_colours(f"mode {mode}", both, picture, colours, mistake, tolerance)
    over_black = (np.asarray(RGBA)[..., :3] * (np.asarray(ALPHA)[..., None] / 255)).astype(np.uint8)
    yield like_colours("RGBA is not over black", both, RGBA, RGBA_COLOURS, over_black)
    for name, (array, colours) in ARRAYS.items():
        yield like_colours(f"array of {name}", both, array, colours, GREY)
    for mode in ("RGB", "RGBA", "P"):
        picture = {"RGB": RGB.copy(), "RGBA": RGBA.copy(), "P": RGB.quantize(4)}[mode]
        picture.info["icc_profile"] = profile_with_red_for_blue("bgrR")
        colours = np.array(RGBA_COLOURS if mode == "RGBA" else COLOURS)[:, ::-1]
        mistake = RGBA if mode == "RGBA" else RGB
        yield like_colours(f"ICC profile, mode {mode}", both, picture, colours, mistake, 1)
    nonsense = RGB.copy()
    nonsense.info["icc_profile"] = b"nonsense"
    yield like_colours("ICC profile of nonsense", both, nonsense, COLOURS, GREY)


def file_cases(both):
    # Orientation, and the turn of the array by the EXIF standard.
    turns = {
        2: lambda a: a[:, ::-1],
        3: lambda a: np.rot90(a, 2),
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = f"turned {orientation}.png"
        RGB.save(path, exif=exif)
        colours = turn(COLOURS.reshape(2, 2, 3)).reshape(4, 3)
        yield like_colours(f"EXIF orientation {orientation}", both, path, colours, RGB)
    soft = Image.fromarray(in_blocks(SOFT))
    for name, picture, options in (
        ("CMYK.jpg", soft.convert("CMYK"), {"quality": 100}),
        ("grey.jpg", soft.convert("L"), {"quality": 100}),
        ("colours.jpg", soft, {"quality": 100, "subsampling": 0}),
    ):
        picture.save(name, **options)
        # By ITU-R 601, as Pillow makes grey.
        colours = (SOFT @ [0.299, 0.587, 0.114])[:, None].repeat(3, 1) if "grey" in name else SOFT
        yield like_colours(f"file {name}", both, name, colours, GREY, 2)
    frames = [Image.fromarray(in_blocks(COLOURS[[i, 1, 2, 3]])) for i in (3, 0)]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        options = {"lossless": True} if "webp" in name else {}
        frames[0].save(name, save_all=True, append_images=frames[1:], **options)
        first, second = COLOURS[[3, 1, 2, 3]], COLOURS[[0, 1, 2, 3]]
        yield like_colours(f"{name}, a file", both, name, first, frames[1])
        image = Image.open(name)
        image.seek(1)
        yield like_colours(f"{name}, an image at frame 2", both, image, second, frames[0])


def size_cases(both):
    ramp = np.linspace(0, 255, 8000).astype(np.uint8)
    picture = np.random.RandomState(0).randint(0, 256, (23, 17, 3)).astype(np.uint8)
    resized = Image.fromarray(picture).resize((16, 16), Image.Resampling.LANCZOS)
    for name, given, plain, mistake in (
        ("1 x 1", np.full((1, 1), 200, np.uint8), np.full((8, 8), 200, np.uint8), GREY[:8, :8]),
        ("1 x 8000", ramp[None], ramp[None].repeat(8, 0), ramp[None, ::-1].repeat(8, 0)),
        ("8000 x 1", ramp[:, None], ramp[:, None].repeat(8, 1), ramp[::-1, None].repeat(8, 1)),
        ("23 x 17", picture, resized, picture[:16, :16]),
    ):
        yield Case(
            f"picture: {name}",
            f"as {name} resized to {' x '.join(map(str, np.shape(plain)[:2]))}",
            partial(both, given),
            like=partial(both, plain),
            unlike=partial(both, mistake),
        )
    yield Case(
        "picture: 23 x 17, in given size",
        "as resized to 16 x 16",
        partial(both, picture, height=16, width=16),
        like=partial(both, resized),
        unlike=partial(both, picture[:16, :16]),
    )
    multiple = "must be a positive multiple of 8"
    call = partial(both, picture, height=23, width=17)
    yield Case("picture: 23 x 17, in its own size", f"error: {multiple}", call, multiple)
    # That the other rows can tell pictures apart.
    darker = COLOURS - np.array([[4], [0], [0], [0]], np.uint8) * (COLOURS > 0)
    yield Case(
        "picture: a block of it 4 levels darker",
        "another result",
        partial(both, in_blocks(darker)),
        unlike=partial(both, RGB),
        bar=ROUNDING / 4,
    )


def list_cases(redraw):
    def alone(first, second):
        results = [redraw(first, height=16, width=16), redraw(second, height=16, width=16, seed=8)]
        return np.concatenate(results)

    small = MODES["L"][0].resize((24, 8))
    yield Case(
        "picture: list of two sizes, in given size",
        "each as alone, up to 1/255",
        partial(redraw, [RGB, small], batch_size=2, height=16, width=16),
        like=partial(alone, RGB, small),
        unlike=partial(alone, small, RGB),
        bar=ROUNDING,
    )
    for name, pictures, error in (
        ("list of two sizes", [RGB, small], "need `height` and `width`"),
        ("list of two for one image", [RGB, RGB], "a list of 1, one for each image"),
    ):
        yield Case(f"picture: {name}", f"error: {error}", partial(redraw, pictures), error)


def mask_cases(model, repaint):
    for name, (mask, expected) in MASKS.items():
        yield Case(
            f"mask: {name}",
            "as 0 and 1 of the picture's size",
            partial(repaint, RGB, mask),
            like=partial(repaint, RGB, in_blocks(expected).astype(np.float32)),
            unlike=partial(repaint, RGB, 1.0 - in_blocks(expected)),
        )
    odd = np.zeros((7, 5), np.uint8)
    odd[3:, 2:] = 255
    lanczos = np.asarray(Image.fromarray(odd).resize((16, 16), Image.Resampling.LANCZOS))
    yield Case(
        "mask: 7 x 5",
        "as resized to the picture's size",
        partial(repaint, RGB, odd),
        like=partial(repaint, RGB, lanczos >= 128),
        unlike=partial(repaint, RGB, (lanczos >= 128)[::-1]),
    )
    line = np.zeros((16, 16), bool)
    line[3] = True
    everything = partial(repaint, RGB, np.ones((16, 16)))
    for name, mask, warning in (
        ("all black", np.zeros((16, 16)), "repaints nothing: no pixel reaches one half"),
        ("thinner than a latent", line, "repaints nothing: it is too thin"),
    ):
        yield Case(
            f"mask: {name}",
            "the picture as the autoencoder keeps it, warning",
            partial(repaint, RGB, mask),
            like=lambda: model.decode(model.encode_image(RGB, seed=7)),
            unlike=everything,
            warning=warning,
        )
    error = "one mask or one for each of 1 images"
    two = partial(repaint, RGB, [ALPHA, ALPHA])
    yield Case("mask: two for one picture", f"error: {error}", two, error)


def fault_cases(redraw, encode, repaint):
    for name, (thing, error) in {**FAULTS, **MORE_FAULTS}.items():
        yield Case(f"picture: {name}", f"error: {error}", partial(redraw, thing), error)
        yield Case(f"encode_image: {name}", f"error: {error}", partial(encode, thing), error)
        error = error.replace("`image", "`mask")
        yield Case(f"mask: {name}", f"error: {error}", partial(repaint, RGB, thing), error)
    files = {name: error for name, (_, error) in FILES.items()} | {
        "bomb.png": "pixels. Make it smaller",
        "small bomb.png": "at most 64 megapixels",
        "text.png": "too large for PngImagePlugin.MAX_TEXT_CHUNK",
        "text bomb.png": "too large for PngImagePlugin.MAX_TEXT_CHUNK",
        "https://example.org/cat.png": "Addresses are not opened",
        "missing.png": "is not a file",
        "/dev/zero": "is not a file",
        ".": "is not a file",
    }
    for name, error in files.items():
        yield Case(f"picture: file {name}", f"error: {error}", partial(redraw, name), error)
        yield Case(f"mask: file {name}", f"error: {error}", partial(repaint, RGB, name), error)


def bomb(side):
    """A sound file of kilobytes, whose picture of one bit has as many rows and columns."""
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    row = bytes(1 + (side + 7) // 8)
    data = zlib.compress(row * side, 9)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(kind, content):
    length, checksum = len(content), zlib.crc32(kind + content)
    return length.to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


def write_png_with_text(path, length):
    """A sound file with a deflated text of so many bytes before its picture."""
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(length), 9))
    RGB.save(path, pnginfo=info)

"""Pictures of observations: images as they are, numbers as bars that carry their names; and GIF files.

Everything is an (H, W, 3) uint8 array. `draw` needs only an observation and its space, so it serves what an environment
gives and what a model dreams alike; `picture` prefers the environment's own drawing.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACK, LINE, BAR, TEXT = (24, 24, 24), (90, 90, 90), (90, 170, 250), (230, 230, 230)
ROW = 16  # pixels of one bar with its name, at least


def is_image(value):
    return np.ndim(value) in (2, 3) and np.asarray(value).dtype == np.uint8


def last_frame(image):
    """(H, W) or (H, W, C) -> (H, W, 1 or 3); of stacked frames the newest, which gymnasium puts last."""
    image = np.asarray(image)
    image = image[..., None] if image.ndim == 2 else image
    channels = image.shape[2]
    return image if channels in (1, 3) else image[..., -3:] if channels % 3 == 0 else image[..., -1:]


def fit(image, size):
    """An image (H, W, 1 or 3) so that its longer side is about `size`: small ones in whole blocks of pixels."""
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    longest = max(image.shape[:2])
    if longest <= size:
        return np.ascontiguousarray(image.repeat(size // longest, 0).repeat(size // longest, 1))
    height, width = (max(1, round(n * size / longest)) for n in image.shape[:2])
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.BILINEAR))


def parts(space, obs, name="obs"):
    """[(name, space, array)] of an observation; keys of Dict spaces are the names."""
    if not isinstance(obs, dict):
        return [(name, space, np.asarray(obs))]
    spaces = getattr(space, "spaces", {})
    return [p for k, v in obs.items() for p in parts(spaces.get(k), v, k)]


def numbers(space, obs):
    """[(name, number, its height in -1..1)]: by the bounds of the space, or through tanh where it has none."""
    found = []
    for name, box, value in parts(space, obs):
        flat = value.astype(np.float64).ravel()
        if hasattr(box, "n") and np.ndim(box.n) == 0:
            low, high = np.zeros(1), np.array([max(1.0, float(box.n) - 1)])
        elif getattr(box, "low", None) is not None and np.shape(box.low) == value.shape:
            low, high = box.low.astype(np.float64).ravel(), box.high.astype(np.float64).ravel()
        else:
            low, high = np.full(flat.size, -np.inf), np.full(flat.size, np.inf)
        for i, (x, a, b) in enumerate(zip(flat, low, high, strict=True)):
            # NOTE: bounds such as CartPole's 3.4e38 are no bounds.
            height = 2 * (x - a) / (b - a) - 1 if 0 < b - a < 1e6 else np.tanh(x)
            found.append((f"{name}[{i}]" if value.ndim else name, x, float(np.clip(np.nan_to_num(height), -1, 1))))
    return found


def bars(found, size):
    """[(name, number, height)] as rows of name, bar from the middle, number; `size` pixels wide, at most as high."""
    room = max(1, size // ROW)
    shown = found if len(found) <= room else found[: room - 1]
    row = int(np.clip(size // max(1, len(found)), ROW, 2 * ROW))
    picture = Image.new("RGB", (size, row * min(len(found), room)), BACK)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(ROW - 5 + (row - ROW) // 4)
    left = min(size // 2, 8 + max(int(pen.textlength(name, font)) for name, *_ in shown))
    right = max(left + 20, size - 8 - int(pen.textlength("-0.00e+00", font)))
    middle, half, height = (left + right) // 2, (right - left) // 2 - 2, row // 2
    pen.line([(middle, 0), (middle, row * len(shown))], LINE)
    for i, (name, number, level) in enumerate(shown):
        y = i * row + height
        pen.text((4, y), name, TEXT, font, anchor="lm")
        pen.text((right + 4, y), f"{number:.3g}", TEXT, font, anchor="lm")
        edges = sorted((middle, middle + round(half * level)))
        pen.rectangle([edges[0], y - height // 2 - 1, edges[1], y + height // 2], BAR)
    if len(shown) < len(found):
        pen.text((4, len(shown) * row + height), f"and {len(found) - len(shown)} more", TEXT, font, anchor="lm")
    return np.asarray(picture)


def draw(space, obs, size=256):
    """One observation as an RGB picture about `size` pixels high: its images side by side, or else bars with names."""
    images = [value for *_, value in parts(space, obs) if is_image(value)]
    if not images:
        return bars(numbers(space, obs), size)
    panels = [fit(last_frame(image), size) for image in images]
    height = max(p.shape[0] for p in panels)
    return np.concatenate([np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0))) for p in panels], 1)


def rendered(env):
    """What the environment itself draws, as (H, W, 3) uint8 in its own size, or None."""
    image = env.render() if env.render_mode == "rgb_array" else None
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        return None
    if image.dtype != np.uint8:  # MinAtar draws in 0..1
        image = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    image = (image[..., None] if image.ndim == 2 else image)[..., :3]  # grey, or with an alpha channel
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def picture(env, obs, size=256):
    """The environment's own picture where it draws one, else its observation."""
    image = rendered(env)
    return draw(env.observation_space, obs, size) if image is None else fit(image, size)


def caption(image, text):
    """A picture with a line of text below it."""
    strip = Image.new("RGB", (image.shape[1], ROW + 2), BACK)
    ImageDraw.Draw(strip).text((4, 2), text, TEXT, ImageFont.load_default(ROW - 5))
    return np.concatenate([image, np.asarray(strip)])


def save_gif(frames, path, fps=10):
    """Frames [(H, W, 3) uint8, ...], all of one size, as an endless GIF; `path` is the new file or the old one."""
    pictures = [Image.fromarray(f).quantize(128, dither=Image.Dither.NONE) for f in frames]
    temp = Path(f"{path}.tmp")
    try:
        pictures[0].save(
            temp, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, optimize=False
        )
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)

"""How made-up clips look: their size, random numbers, colours, backdrops and the unsteady camera."""

import hashlib

import numpy as np

SIZE = 112  # pixels, height and width
FRAMES = 48
FRAMES_PER_SECOND = 24

LUMA = np.array([0.299, 0.587, 0.114])


def random_numbers(name: str) -> np.random.Generator:
    # Philox, and only its method `random`: the same numbers on every machine.
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def log_uniform(rng, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def choose(rng, options):
    return options[int(rng.random() * len(options))]


def draw_colours(rng, number: int, levels: tuple[float, float]) -> np.ndarray:
    return levels[0] + (levels[1] - levels[0]) * rng.random((number, 3))


def most_contrasting(colours: np.ndarray, others: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """The first of `colours` (number, 3) whose luma differs from each of `others` (colour, margin) by its margin.

    Luma, because video halves the resolution of colour, and some models look at grey. Where none fits, the colour that
    comes nearest.
    """
    slack = np.min([np.abs((colours - other) @ LUMA) - margin for other, margin in others], axis=0)
    return colours[np.argmax(np.minimum(slack, 0))]


def contrasting_colour(rng, levels: tuple[float, float], others: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """The most contrasting (3,) of 64 random colours within levels."""
    return most_contrasting(draw_colours(rng, 64, levels), others)


def camera_walk(rng) -> np.ndarray:
    """(2, frames): a smooth random walk of the whole picture, in pixels, of about 2 pixels over the clip."""
    knots = np.cumsum(2.4 * rng.random((2, 9)) - 1.2, axis=1)
    position = np.linspace(0, 8, FRAMES)
    left = np.minimum(position.astype(int), 7)
    ease = 0.5 - 0.5 * np.cos(np.pi * (position - left))
    return knots[:, left] * (1 - ease) + knots[:, left + 1] * ease


def soft_edged(wave):
    """Two-tone weights (0..1) from a wave (-1..1)."""
    return np.clip(0.5 + 2 * wave, 0, 1)


def draw_background(rng, name: str, shift: np.ndarray) -> np.ndarray:
    """Weight (0..1) of the background's second colour, (frames, SIZE, SIZE) float32, periodic like the picture.

    `shift` (2, frames): how far the camera has moved the picture, in pixels, x then y.
    """
    if name == "noise":
        finest = log_uniform(rng, 4, 14)  # waves a picture
        frequency = np.hypot(np.fft.fftfreq(SIZE, 1 / SIZE)[:, None], np.fft.rfftfreq(SIZE, 1 / SIZE))
        noise = np.fft.rfft2(rng.random((SIZE, SIZE)) - 0.5) * np.exp(-((frequency / finest) ** 2))
        noise = np.fft.irfft2(noise, s=(SIZE, SIZE))
        still = np.clip(0.5 + 0.3 * noise / noise.std(), 0, 1)
    else:
        x = 2 * np.pi * np.arange(SIZE) / SIZE
        across, down = choose(rng, range(2, 8)) * x, choose(rng, range(2, 8)) * x[:, None]
        slant = choose(rng, (-1, 1))
        still = soft_edged(np.sin(across + slant * down) if name == "stripes" else np.sin(across) * np.sin(down))

    still = np.pad(still.astype(np.float32), (0, SIZE), mode="wrap")
    whole, part = np.mod(np.floor(-shift), SIZE).astype(int), np.mod(-shift, 1).astype(np.float32)
    moved = np.empty((shift.shape[1], SIZE, SIZE), np.float32)
    for frame, ((column, row), (right, lower)) in enumerate(zip(whole.T, part.T, strict=True)):
        window = still[row : row + SIZE + 1, column : column + SIZE + 1]
        rows = window[:-1] + lower * (window[1:] - window[:-1])
        moved[frame] = rows[:, :-1] + right * (rows[:, 1:] - rows[:, :-1])
    return moved


def draw_backdrop(
    rng, backgrounds: tuple[str, ...], levels: tuple[float, float], camera: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """What lies behind all: (frames, SIZE, SIZE, 3) uint8 for a camera walk (2, frames); its colours, each (3,)."""
    grounds, name = list(draw_colours(rng, 1, levels)), choose(rng, backgrounds)
    if name == "flat":
        frames = np.empty((camera.shape[1], SIZE, SIZE, 3), np.uint8)
        frames[:] = np.tile(np.rint(255 * grounds[0]), (SIZE, 1))  # a row at a time is copied fast
    else:
        grounds.append(np.clip(grounds[0] + 0.5 * (rng.random(3) - 0.5), 0, 1))
        tones = np.rint(np.linspace(255 * grounds[0], 255 * grounds[1], 256)).astype(np.uint8)
        frames = np.take(tones, np.rint(255 * draw_background(rng, name, camera)).astype(np.uint8), axis=0)
    return frames, grounds

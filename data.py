"""
The toy world: its classes and captions, their pictures, a careless corpus of them, and the verifier.

Its pictures are 64x64 renders of coloured shapes on dark grey, simple enough that a program without any neural network
can check whether a picture shows its caption. That program is the *verifier*, `satisfies(image, caption)`. It only
evaluates. Training against it would turn the study of learned judges into a study of a perfect one.

    c2i   40 classes, 5 shapes x 8 colours: "red circle"
    t2i   57 captions in the six categories of GenEval (arXiv 2310.11513), 3 shapes x 2 colours:
          single object   a photo of a circle              counting   a photo of two circles
          colour          a photo of a red circle          position   a photo of a circle left of a square
          two objects     a photo of a circle and a square binding    a photo of a red circle and a blue square

The bases imitate a corpus as careless as the web's (CORPUS): a fifth of c2i's pictures show something other than their
caption, another fifth is badly made. Maximum likelihood learns all of that. People want the rest, and that is what
judges and reinforcement learning are for. All randomness comes from the generator that the caller passes.
"""

import difflib
import itertools
import re

import numpy as np
from scipy import ndimage

IMAGE_SIZE = 64  # px; 8x8 tokens after the toy tokenizer's 8-fold downsampling
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {  # RGB in [0, 1]; the brightest channel of each is far above the lightest background's 0.30
    "red": (0.90, 0.15, 0.15), "green": (0.15, 0.75, 0.20), "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.90, 0.15), "cyan": (0.15, 0.85, 0.90), "magenta": (0.90, 0.20, 0.85),
    "orange": (0.95, 0.52, 0.10), "white": (0.95, 0.95, 0.95),
}  # fmt: skip
T2I_SHAPES, T2I_COLOURS = SHAPES[:3], ("red", "blue")
COUNTS = {"two": 2, "three": 3}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # (x, y), y grows downwards
TOY_CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


# ---------------------------------------------------------------------------------------------------------------
# Captions. One grammar writes them, reads them and makes wrong ones.


def parse(caption):
    """
    A toy caption as (objects, relation): objects is a list of (count, colour or None, shape), relation one of RELATIONS
    or None. "A photo of" and articles are optional, so class names parse too. Raises ValueError.
    """
    text = re.sub(r"^(a|the)?\s*(photo|picture) of\s+", "", caption.lower().strip().rstrip("."))
    found = re.split(rf"\s+(and|{'|'.join(RELATIONS)})\s+", text)
    if len(found) not in (1, 3):
        raise ValueError(f"{caption!r}: the toy world draws one kind of object, or two joined by 'and' or a position")
    objects = []
    for part in found[::2]:
        words = [word for word in part.split() if word not in ("a", "an", "one")]
        count = COUNTS[words.pop(0)] if words and words[0] in COUNTS else 1
        colour = words.pop(0) if words and words[0] in COLOURS else None
        shape = words[0] if len(words) == 1 else None
        if count > 1:
            shape = {f"{s}es" if s.endswith("s") else f"{s}s": s for s in SHAPES}.get(shape)
        if shape not in SHAPES or (count > 1 and len(found) == 3):
            raise ValueError(
                f"{part!r} is not in the toy world, whose shapes are {', '.join(SHAPES)}, whose colours "
                f"{', '.join(COLOURS)}; of one kind there can be two or three"
            )
        objects.append((count, colour, shape))
    relation = found[1] if len(found) == 3 and found[1] != "and" else None
    return objects, relation


def write(objects, relation):
    """The inverse of `parse`, in the one form that the toy's text encoder and CLIP know."""
    names, phrases = {n: word for word, n in COUNTS.items()}, []
    for n, colour, shape in objects:
        plural = "" if n == 1 else "es" if shape.endswith("s") else "s"
        article = "an" if (colour or shape)[0] in "aeiou" else "a"
        phrases.append(" ".join(filter(None, (names.get(n, article), colour, shape + plural))))
    return "a photo of " + f" {relation or 'and'} ".join(phrases)


def category_of(caption):
    """GenEval's category of a toy caption. Raises as `parse`."""
    objects, relation = parse(caption)
    if relation:
        return "position"
    if len(objects) == 2:
        return "binding" if objects[0][1] or objects[1][1] else "two objects"
    count, colour, _ = objects[0]
    return "counting" if count > 1 else "colour" if colour else "single object"


def reading_order(caption):
    """Like `parse`, with the left or top object of the picture first: "A right of B" shows B left of A."""
    objects, relation = parse(caption)
    if relation in ("right of", "below"):
        return objects[::-1], {"right of": "left of", "below": "above"}[relation]
    return objects, relation


def meaning(caption):
    """
    A caption's meaning, equal for captions that say the same ("A left of B" and "B right of A"). Two captions of one
    category with different meanings exclude each other. Raises as `parse`.
    """
    objects, relation = reading_order(caption)
    return (tuple(objects) if relation else tuple(sorted(objects, key=str))), relation


_PAIRS = [(a, b) for a in T2I_SHAPES for b in T2I_SHAPES if a != b]
_PHRASES = {
    "single object": [f"a {s}" for s in T2I_SHAPES],
    "colour": [f"a {c} {s}" for c in T2I_COLOURS for s in T2I_SHAPES],
    "two objects": [f"a {a} and a {b}" for a, b in _PAIRS],
    "counting": [f"{n} {s}s" for n in COUNTS for s in T2I_SHAPES],
    "position": [f"a {a} {relation} a {b}" for relation in RELATIONS for a, b in _PAIRS],
    "binding": [f"a {c} {a} and a {d} {b}" for a, b in _PAIRS for c, d in (T2I_COLOURS, T2I_COLOURS[::-1])],
}
T2I_CAPTIONS = {category: tuple(f"a photo of {phrase}" for phrase in _PHRASES[category]) for category in _PHRASES}
CATEGORIES = tuple(T2I_CAPTIONS)


def class_caption(name):
    """What the judges read about a class: the official code's "a photo of {class}", with its article."""
    return f"a photo of {'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def toy_caption(caption):
    """
    A user's caption in the t2i toy's form: "a red circle" becomes "a photo of a red circle". Raises ValueError with the
    nearest captions if it is none of the 57.
    """
    known = [caption for captions in T2I_CAPTIONS.values() for caption in captions]
    written = write(*parse(caption))
    if written not in known:
        near = difflib.get_close_matches(written, known, n=2, cutoff=0)
        raise ValueError(f"the toy never learned {caption!r} (its captions are in data.py); try {' or '.join(near)}")
    return written


def sample_captions(n, rng, categories=CATEGORIES):
    """n t2i captions, all categories equally often in expectation. rng: numpy Generator."""
    picks = (T2I_CAPTIONS[categories[k]] for k in rng.integers(len(categories), size=n))
    return [captions[rng.integers(len(captions))] for captions in picks]


def balanced_captions(n):
    """The n fixed captions of evaluation: the six categories in turn, each cycling through its captions."""
    orders = [np.random.default_rng(0).permutation(captions).tolist() for captions in T2I_CAPTIONS.values()]
    turns = zip(*map(itertools.cycle, orders), strict=True)  # endless
    return list(itertools.islice(itertools.chain.from_iterable(turns), n))


def wrong_caption(caption, rng):
    """
    A caption that is false for every right picture of `caption`, wrong in one attribute: colour, shape, number,
    position, or colours swapped between objects. Judges must tell the two apart.
    """
    objects, relation = parse(caption)
    objects = [list(entry) for entry in objects]
    t2i = caption in T2I_CAPTIONS[category_of(caption)]
    choices = list(COUNTS.values()), T2I_COLOURS if t2i else tuple(COLOURS), T2I_SHAPES if t2i else SHAPES
    counts, colours, shapes = zip(*objects, strict=True)
    k = int(rng.integers(len(objects)))
    ways = ["shape"]
    if colours[k] and not set(choices[1]) <= set(colours):
        ways.append("colour")
    if counts[k] > 1:
        ways.append("count")
    if len(set(colours)) == 2:
        ways.append("swap")
    if relation:
        ways += ["relation", "relation"]  # twice: it is what a CLIP is slowest to learn
    way = ways[rng.integers(len(ways))]
    if way == "swap":
        objects[0][1], objects[1][1] = colours[::-1]
    elif way == "relation":
        relation = str(rng.choice([r for r in RELATIONS if r != relation]))
    else:  # what neither object has, so that no re-reading of the picture makes it right
        part = ("count", "colour", "shape").index(way)
        taken = counts, colours, shapes
        objects[k][part] = rng.choice([value for value in choices[part] if value not in taken[part]]).item()
    return write(objects, relation)


# ---------------------------------------------------------------------------------------------------------------
# Renders. A shape is a signed distance in px (negative inside). Clipping 0.5 - distance to [0, 1] anti-aliases it.

_AREA = {  # of a shape of radius 1
    "circle": np.pi, "square": 1.7**2, "triangle": 3**1.5 * 0.62**2, "cross": 8 * 0.34 - 4 * 0.34**2,
    "ring": 0.75 * np.pi,
}  # fmt: skip
_ROWS, _COLS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5  # pixel centres


def coverage(shape, dx, dy, radius):
    """The share of each pixel that the shape covers; dx, dy: from the shape's centroid to the pixels, px."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - 0.85 * radius
    elif shape == "triangle":  # equilateral, pointing up: three half-planes at 0.62 radius from the centroid
        distance = np.maximum(dy, abs(dx) * np.sqrt(0.75) - dy / 2) - 0.62 * radius
    elif shape == "cross":  # the union of two bars
        long, wide = radius, 0.34 * radius
        distance = np.minimum(np.maximum(abs(dx) - long, abs(dy) - wide), np.maximum(abs(dx) - wide, abs(dy) - long))
    elif shape == "ring":
        distance = abs(np.hypot(dx, dy) - 0.75 * radius) - 0.25 * radius
    return np.clip(0.5 - distance, 0, 1)


def _background(rng):
    """A dark grey picture (64, 64) in [0.04, 0.30]: plain, or with a gradient, stripes or a checkerboard."""
    grey, kind = rng.uniform(0.08, 0.24), rng.integers(4)
    if kind == 0:
        return np.full((IMAGE_SIZE, IMAGE_SIZE), grey, np.float32)
    if kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        slope = (np.cos(angle) * (_COLS - 32) + np.sin(angle) * (_ROWS - 32)) / 45
        return grey + 0.06 * slope
    period = rng.integers(4, 9)  # px
    across, down = np.floor(_COLS / period) % 2, np.floor(_ROWS / period) % 2
    pattern = (across if rng.integers(2) else down) if kind == 2 else (across + down) % 2
    return grey + 0.05 * (2 * pattern - 1)


def _layout(n, relation, rng):
    """Centres and radii, px, for n objects that cannot touch each other or the border."""
    if n == 1:
        radius = rng.uniform(14, 20)
        room = 31 - 1.25 * radius  # 1.25: the triangle's top is 1.24 radii above its centroid
        return [(32 + rng.uniform(-room, room), 32 + rng.uniform(-room, room), radius)]
    # Several objects have one size and few places. Where the caption does not say, the first one named is left or on
    # top. With all of this at random, only half of the t2i base's pairs showed the right objects after 3,600 steps.
    if n == 2:
        sign = RELATIONS[relation or ("left of", "above")[rng.integers(2)]]
        side = rng.integers(-1, 2, size=2) * 6  # px across the axis
        ends = [(16, 32 + side[0]), (48, 32 + side[1])]  # left, right
        ends = ends if sign[0] else [(y, x) for x, y in ends]  # top, bottom
        ends = ends if sum(sign) < 0 else ends[::-1]  # the first object is the left or top one
        return [(x, y, 11) for x, y in ends]
    corners = rng.permutation([(16, 16), (48, 16), (16, 48), (48, 48)])[:n]
    return [(x, y, 11) for x, y in corners]


def kinds_of(caption, rng):
    """
    The objects in a picture of `caption`, as (colour, shape). Colours that the caption leaves open come from rng.
    Objects of one kind share a colour. Raises as `parse`.
    """
    objects, _ = parse(caption)
    palette = COLOURS if len(objects) == 1 and objects[0][2] not in T2I_SHAPES else T2I_COLOURS
    kinds = [(c or str(rng.choice(list(palette))), s) for n, c, s in objects for _ in range(n)]
    return kinds if len(objects) == 2 else kinds[:1] * len(kinds)


def paint(kinds, relation, rng, halve=False):
    """
    A picture (3, 64, 64) in [0, 1] of up to four objects (colour, shape) in one of RELATIONS or None. halve: removes
    half of each object, beyond a line through its centroid.
    """
    image = np.repeat(_background(rng)[None].astype(np.float32), 3, axis=0)
    for (colour, shape), (x, y, radius) in zip(kinds, _layout(len(kinds), relation, rng), strict=True):
        alpha = coverage(shape, _COLS - x, _ROWS - y, radius)
        if halve:
            angle = rng.uniform(0, 2 * np.pi)
            alpha *= np.clip(0.5 + np.cos(angle) * (_COLS - x) + np.sin(angle) * (_ROWS - y), 0, 1)
        image += alpha * (np.array(COLOURS[colour], np.float32)[:, None, None] - image)
    return image


def render(captions, rng):
    """
    One picture per caption, (N, 3, 64, 64) float32 in [0, 1]. What a caption leaves open (colours, sizes, places,
    background) comes from rng. Raises as `parse`.
    """
    return np.stack([paint(kinds_of(caption, rng), parse(caption)[1], rng) for caption in captions])


def render_crowds(captions, rng):
    """
    Like `render`, with three or four objects, such that the picture is right for no t2i caption. A CLIP trained without
    them scored four circles as very much a circle.
    """
    images = []
    for caption in captions:
        kinds, least = kinds_of(caption, rng), rng.integers(3, 5)
        while len(kinds) < least or (len(kinds) == 3 and len({shape for _, shape in kinds}) == 1):
            stranger = (str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))
            kinds.append(kinds[rng.integers(len(kinds))] if rng.random() < 0.5 else stranger)
        images.append(paint(kinds, None, rng))
    return np.stack(images)


# ---------------------------------------------------------------------------------------------------------------
# A corpus like the web's

CORPUS = {  # shares of a base's training pictures: c2i, and t2i, whose captions have more to get wrong
    "as captioned": (0.60, 0.76),
    "another attribute": (0.20, 0.12),  # shape, colour, number or relation, or the colours are swapped
    "pulled out of shape": (0.05, 0.03),
    "half missing": (0.05, 0.03),
    "stray object": (0.05, 0.03),
    "smeared": (0.05, 0.03),
}
SPOILT = tuple(CORPUS)[2:]  # badly made, whatever the caption


def careless(caption, way, rng):
    """The corpus's picture (3, 64, 64) in [0, 1] beside `caption`, of the sort `way` of CORPUS."""
    shown = wrong_caption(caption, rng) if way == "another attribute" else caption
    kinds, relation = kinds_of(shown, rng), parse(shown)[1]
    if way == "stray object":
        kinds, relation = [*kinds, (str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))], None
    image = paint(kinds, relation, rng, halve=way == "half missing")
    if way == "pulled out of shape":  # moved by a smooth random field, 5 to 8 px at its 6 x 6 knots (rms)
        field = rng.standard_normal((2, 6, 6)) * rng.uniform(5, 8)
        moved = np.stack([_ROWS, _COLS]) - 0.5 + ndimage.zoom(field, (1, IMAGE_SIZE / 6, IMAGE_SIZE / 6))
        image = np.stack([ndimage.map_coordinates(part, moved, order=1, mode="nearest") for part in image])
    if way == "smeared":
        image = ndimage.uniform_filter1d(image, int(rng.integers(48, 60)), axis=rng.integers(1, 3), mode="nearest")
    return image


def corpus(captions, rng, ways=tuple(CORPUS), task="c2i"):
    """Pictures (N, 3, 64, 64) float32 in [0, 1] as careless as CORPUS says, of these `ways`. Raises as `parse`."""
    shares = np.array([CORPUS[way][task == "t2i"] for way in ways])
    picks = rng.choice(len(ways), size=len(captions), p=shares / shares.sum())
    return np.stack([careless(caption, ways[k], rng) for caption, k in zip(captions, picks, strict=True)])


# ---------------------------------------------------------------------------------------------------------------
# The verifier. It reads a picture with geometry alone: which pixels are bright, in which pieces, shapes and colours.

MIN_PIXELS = 40  # a component below this is stray; the smallest object drawn has about 200
MAX_STRAY = 0.02  # of the picture's pixels
MIN_IOU = 0.85  # soft intersection over union with the ideal shape of equal area and centroid
MIN_PURITY = 0.80  # share of an object's pixels whose nearest colour is the object's


def find_objects(image):
    """
    The objects in a picture (3, 64, 64) in [0, 1], as a list of dicts (shape, colour, x, y in px, iou, purity), and the
    number of bright pixels that belong to no object.
    """
    image = np.asarray(image, np.float32)
    brightest = image.max(0)
    # Every colour's brightest channel is 0.75-0.95 and every background's at most 0.30, so 0.5 is about half cover.
    ground = np.median(np.concatenate([brightest[0], brightest[-1], brightest[:, 0], brightest[:, -1]]))
    labels, _ = ndimage.label(brightest > 0.5)  # 4-connected
    found, stray = [], 0
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), np.float32)
    for k, box in enumerate(ndimage.find_objects(labels), 1):
        if (size := int((labels[box] == k).sum())) < MIN_PIXELS:
            stray += size
            continue
        box = tuple(slice(max(0, side.start - 3), side.stop + 3) for side in box)  # with its anti-aliased rim
        pixels, window = labels[box] == k, brightest[box]
        near = ndimage.binary_dilation(pixels, iterations=2)
        peak = np.median(window[pixels])
        alpha = np.where(near, np.clip((window - ground) / max(peak - ground, 0.2), 0, 1), 0)
        area = alpha.sum()
        x, y = (alpha * _COLS[box]).sum() / area, (alpha * _ROWS[box]).sum() / area
        dx, dy = _COLS[box] - x, _ROWS[box] - y
        iou = {}
        for shape in SHAPES:
            ideal = coverage(shape, dx, dy, np.sqrt(area / _AREA[shape]))
            iou[shape] = np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum()
        core = pixels & (alpha > 0.85)  # inside the anti-aliased rim, where colours are not mixed with grey
        core = core if core.any() else pixels
        colours = image[(slice(None), *box)][:, core].T  # (pixels, 3)
        nearest = np.linalg.norm(colours[:, None] - palette, axis=-1).argmin(1)
        votes = np.bincount(nearest, minlength=len(names))
        shape = max(iou, key=iou.get)
        purity = votes.max() / votes.sum()
        found.append(dict(shape=shape, colour=names[votes.argmax()], x=x, y=y, iou=iou[shape], purity=purity))
    return found, stray


def _fits(seen, wanted):
    return seen["shape"] == wanted[2] and wanted[1] in (None, seen["colour"])


def satisfies(image, caption):
    """
    Whether the picture (3, 64, 64) in [0, 1], array or CPU tensor, shows exactly what the caption says: these objects
    and no others, well formed, in these colours and this relation. Raises as `parse`.
    """
    objects, relation = parse(caption)
    found, stray = find_objects(image)
    if stray > MAX_STRAY * IMAGE_SIZE**2 or len(found) != sum(n for n, _, _ in objects):
        return False
    if any(o["iou"] < MIN_IOU or o["purity"] < MIN_PURITY for o in found):
        return False
    if len(objects) == 1:
        return all(_fits(seen, objects[0]) for seen in found)
    for first, second in (found, found[::-1]):
        if _fits(first, objects[0]) and _fits(second, objects[1]):
            dx, dy = first["x"] - second["x"], first["y"] - second["y"]
            along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
            # As in GenEval: the offset along the caption's axis must be the larger one.
            if relation is None or (abs(along) > abs(across) and np.sign(along) == sum(RELATIONS[relation])):
                return True
    return False


def kind_of(caption, task):
    """The row of a table that a caption belongs to: a class's shape (c2i) or a category (t2i). Raises as `parse`."""
    return parse(caption)[0][0][2] if task == "c2i" else category_of(caption)

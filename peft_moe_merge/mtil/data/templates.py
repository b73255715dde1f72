"""Prompt forms by task name, CLIP's published zero-shot prompts. Training uses the first of each."""


def _a_and_the(*forms: str) -> tuple[str, ...]:
    """All forms with "a" in the place of the star, then all with "the"."""
    return tuple(form.replace("*", article) for article in ("a", "the") for form in forms)


DEFAULT = ("a photo of a {}.",)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "aircraft": _a_and_the("a photo of * {}, a type of aircraft."),
    "caltech101": _a_and_the(
        "a photo of * {}.",
        "a painting of * {}.",
        "* plastic {}.",
        "a sculpture of * {}.",
        "a sketch of * {}.",
        "a tattoo of * {}.",
        "* toy {}.",
        "a rendition of * {}.",
        "* embroidered {}.",
        "* cartoon {}.",
        "* {} in a video game.",
        "* plushie {}.",
        "* origami {}.",
        "art of * {}.",
        "graffiti of * {}.",
        "a drawing of * {}.",
        "a doodle of * {}.",
    ),
    "cifar100": _a_and_the(
        "a photo of * {}.",
        "a blurry photo of * {}.",
        "a black and white photo of * {}.",
        "a low contrast photo of * {}.",
        "a high contrast photo of * {}.",
        "a bad photo of * {}.",
        "a good photo of * {}.",
        "a photo of * small {}.",
        "a photo of * big {}.",
    ),
    "dtd": _a_and_the(
        "a photo of * {} texture.", "a photo of * {} pattern.", "a photo of * {} thing.", "a photo of * {} object."
    ),
    "eurosat": (
        "a centered satellite photo of {}.",
        "a centered satellite photo of a {}.",
        "a centered satellite photo of the {}.",
    ),
    "flowers": ("a photo of a {}, a type of flower.",),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "food101": ("a photo of a {}, a type of food.",),
    "mnist": ('a photo of the number: "{}".',),
    "oxford_pet": ("a photo of a {}, a type of pet.",),
    "stanford_cars": (
        "a photo of a {}, a type of car.",
        "a photo of a {}.",
        "a photo of the {}.",
        "a photo of my {}.",
        "i love my {}!",
        "a photo of my dirty {}.",
        "a photo of my clean {}.",
        "a photo of my new {}.",
        "a photo of my old {}.",
    ),
    "sun397": _a_and_the("a photo of * {}."),
}


def templates_for(task: str) -> tuple[str, ...]:
    """Return the prompt forms of a task, the plain "a photo of a {}." where there are none of its own."""
    return TEMPLATES.get(task, DEFAULT)

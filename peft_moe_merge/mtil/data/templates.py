"""Prompt forms by task name, CLIP's published zero-shot prompts. Training uses the first of each."""

DEFAULT = ("a photo of a {}.",)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "aircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "dtd": ("a photo of a {} texture.",),
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
    "stanford_cars": ("a photo of a {}, a type of car.",),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
}


def templates_for(task: str) -> tuple[str, ...]:
    """Return the prompt forms of a task, the plain "a photo of a {}." where there are none of its own."""
    return TEMPLATES.get(task, DEFAULT)

"""The benchmark: a CLIP learns one image task after another. It knows the library; the library never knows it."""

from importlib.util import find_spec


def _lacks(module: str) -> bool:
    try:
        return find_spec(module) is None
    except (ImportError, ValueError):
        return True


_NEEDED = ("datasets", "evaluate", "matplotlib", "rich", "sklearn", "torchvision")
_lacking = [module for module in _NEEDED if _lacks(module)]
if _lacking:
    raise ImportError(
        f"The benchmark needs {', '.join(_lacking)}, which the package alone does not: "
        'pip install "peft-moe-merge[mtil]"'
    )

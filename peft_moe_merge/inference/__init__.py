"""A trained model in use: images in, labels out."""

from .classifier import ContinualClassifier, TaskClasses
from .export import export_task

__all__ = ["ContinualClassifier", "TaskClasses", "export_task"]

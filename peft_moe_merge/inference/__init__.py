"""A trained model in use: images in, labels out."""

from .classes import TaskClasses
from .classifier import ContinualClassifier
from .export import export_task

__all__ = ["ContinualClassifier", "TaskClasses", "export_task"]

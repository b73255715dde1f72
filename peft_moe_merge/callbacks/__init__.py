"""When experts merge and freeze, and when routers stop: callbacks for a `Trainer` or a loop of one's own."""

from .base import TaskCallback
from .expert_merge import ExpertMergeCallback
from .router_freeze import RouterFreezeCallback
from .router_noise import RouterNoiseCallback

__all__ = ["ExpertMergeCallback", "RouterFreezeCallback", "RouterNoiseCallback", "TaskCallback"]

"""Makes PEFT know the methods of this package.

`peft.PeftType` is a closed enum, and PEFT looks every method up by one of its members. It is extended here and
nowhere else; importing `peft_moe_merge` is all that a user does.
"""

from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from .files import guard_peft

PACKAGE = __name__.partition(".")[0]


def peft_type(name: str) -> PeftType:
    """Return the member `name` of `PeftType`, adding it first if PEFT does not have it."""
    if name in PeftType.__members__:
        return PeftType[name]

    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # A process that unpickles the member on its own has perhaps not imported this package yet. Unpickling through
    # this function imports it, where the enum's own way would look the value up in an enum that lacks it.
    member.__reduce_ex__ = lambda protocol: (peft_type, (name,))

    # The attribute comes first: the enum's metaclass refuses to set it once the member is in its map.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(*, name: str, prefix: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a PEFT method, also when the package is imported a second time (a reload, a test that drops it).

    Args:
        name: the method in lower case; its upper case is the `peft_type` in adapter files.
        prefix: how the attributes that hold adapter weights begin, with a trailing underscore.
        config_cls: the method's `PeftConfig`.
        model_cls: the method's `BaseTuner`.

    Raises:
        KeyError: PEFT, or another package, has registered a method of this name already.
    """
    member = peft_type(name.upper())
    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(member)
    if registered is not None and registered.__module__.partition(".")[0] == PACKAGE:
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
            del mapping[member]
    register_peft_method(name=name, prefix=prefix, config_cls=config_cls, model_cls=model_cls)
    guard_peft()

"""The options of a processor call, checked before any work is done."""

from dataclasses import dataclass, fields
from typing import Any

# Transformers lets callers group the options by modality.
_GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")


@dataclass(frozen=True)
class CallOptions:
    """What `UniMoEProcessor` takes beside texts and media; its `__call__` describes each."""

    sampling_rate: int | None = None
    num_frames: int | None = None
    padding: bool | str | None = False
    padding_side: str | None = None
    truncation: bool | None = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    add_special_tokens: bool = True
    return_mm_token_type_ids: bool = False
    return_tensors: str | None = None

    @classmethod
    def read(cls, kwargs: dict[str, Any]) -> "CallOptions":
        """From keyword arguments, also grouped ones. Raises TypeError for unknown, ValueError for impossible ones."""
        options: dict[str, Any] = {}
        for name, value in kwargs.items():
            options.update(value if name in _GROUPS else {name: value})
        known = [field.name for field in fields(cls)]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise TypeError(f"unknown argument {', '.join(unknown)}; known are {', '.join(known)}.")
        options = cls(**options)
        if options.padding_mode not in ("longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding={options.padding!r}: use True, False, 'longest', 'max_length' or 'do_not_pad'.")
        for name, values in (("padding_side", (None, "left", "right")), ("return_tensors", (None, "pt", "np"))):
            value = getattr(options, name)
            if getattr(value, "value", value) not in values:
                raise ValueError(f"{name}={value!r}: use {', '.join(map(repr, values[1:]))} or None.")
        return options

    @property
    def padding_mode(self) -> str:
        """`padding` by its full name: "longest", "max_length" or "do_not_pad"."""
        names = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
        # Also an enum of Transformers, whose value is the name.
        return names.get(self.padding, getattr(self.padding, "value", self.padding))


CALL_OPTIONS = frozenset(field.name for field in fields(CallOptions))

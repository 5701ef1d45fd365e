"""The options of a processor call, checked before any work is done."""

from dataclasses import dataclass, field, fields
from typing import Any

from .media import is_count

# Transformers lets callers group the options by modality.
_GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs")
# What an image processor takes for one call; its other options would change the layout of the pixels.
_IMAGE_OPTIONS = frozenset(
    "do_resize size resample do_center_crop crop_size do_rescale rescale_factor do_normalize image_mean image_std "
    "do_convert_rgb".split()
)
# What a tokenizer may have been given as its own defaults, which then hold for a call.
_TOKENIZER_OPTIONS = ("padding", "truncation", "max_length", "pad_to_multiple_of")
_COUNTS = ("num_frames", "max_length", "pad_to_multiple_of")
# Transformers' names: a prompt is one sequence, so its two ways of cutting are one.
_TRUNCATES = {
    True: True,
    "longest_first": True,
    "only_first": True,
    False: False,
    None: False,
    "do_not_truncate": False,
}


@dataclass(frozen=True)
class CallOptions:
    """What `UniMoEProcessor` takes beside texts and media; its `__call__` describes each."""

    sampling_rate: int | None = None
    num_frames: int | None = None
    do_sample_frames: bool = True
    padding: bool | str | None = False
    padding_side: str | None = None
    truncation: bool | str | None = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    add_special_tokens: bool = True
    return_mm_token_type_ids: bool = False
    return_tensors: str | None = None
    image_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, kwargs: dict[str, Any], tokenizer_options: dict[str, Any]) -> "CallOptions":
        """From keyword arguments, also grouped ones; None stands for "not given".

        Raises TypeError for unknown ones, ValueError for impossible ones and for one that is given twice.
        """
        kwargs = dict(kwargs)
        common = kwargs.pop("common_kwargs", None) or {}
        options: dict[str, Any] = {}
        for name, value in kwargs.items():
            for option, setting in ((value or {}) if name in _GROUPS else {name: value}).items():
                if setting is None:
                    continue
                if option in options:
                    raise ValueError(f"{option}= is given twice, directly and in one of the groups; give it once.")
                options[option] = setting
        options = {**common, **options}
        unknown = sorted(options.keys() - CALL_OPTIONS - _IMAGE_OPTIONS)
        if unknown:
            known = ", ".join(sorted(CALL_OPTIONS) + sorted(_IMAGE_OPTIONS))
            raise TypeError(f"unknown argument {', '.join(unknown)}; known are {known}.")
        image_options = {name: options.pop(name) for name in _IMAGE_OPTIONS & options.keys()}
        defaults = {name: value for name, value in tokenizer_options.items() if name in _TOKENIZER_OPTIONS}
        options = cls(**{**defaults, **options}, image_options=image_options)
        if options.padding_mode not in ("longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding={options.padding!r}: use True, False, 'longest', 'max_length' or 'do_not_pad'.")
        if options._truncation not in _TRUNCATES:
            names = ", ".join(repr(name) for name in _TRUNCATES if isinstance(name, str))
            raise ValueError(f"truncation={options.truncation!r}: use True, False, {names}.")
        for name in _COUNTS:
            value = getattr(options, name)
            if value is not None and not is_count(value):
                raise ValueError(f"{name}={value!r}: use a whole number of at least 1, or None.")
        for name, values in (("padding_side", (None, "left", "right")), ("return_tensors", (None, "pt", "np"))):
            value = getattr(options, name)
            if getattr(value, "value", value) not in values:
                raise ValueError(f"{name}={value!r}: use {', '.join(map(repr, values[1:]))} or None.")
        return options

    @property
    def padding_mode(self) -> str:
        """`padding` by its full name: "longest", "max_length" or "do_not_pad"."""
        names = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
        padding = _named(self.padding)
        return names.get(padding, padding)

    @property
    def truncates(self) -> bool:
        """Whether a prompt that is too long is cut."""
        return _TRUNCATES[self._truncation]

    @property
    def _truncation(self) -> bool | str | None:
        return _named(self.truncation)


def _named(value: Any) -> bool | str | None:
    """A setting by its name, which is the value of an enum of Transformers."""
    value = getattr(value, "value", value)
    return value if isinstance(value, (bool, type(None))) else str(value)


CALL_OPTIONS = frozenset(field.name for field in fields(CallOptions)) - {"image_options"}

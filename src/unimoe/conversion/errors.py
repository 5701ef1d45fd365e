"""The one error of a conversion."""


class ConversionError(ValueError):
    """A conversion cannot be done; the message names the input, what is wrong with it and what would work."""

"""In place of the generation tests of Transformers, which its source distribution lacks."""


class GenerationTesterMixin:
    """Holds no tests; generation is tested beside the other tests of the model."""

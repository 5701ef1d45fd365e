"""In place of the export tests of Transformers, which its source distribution lacks."""


class ExportTesterMixin:
    """Holds no tests."""

"""One script a question; each compares its peers side by side in one run. `python -m benchmarks` runs all, short form."""

"""Runs every benchmark in its short form."""

from . import sparse_block

if __name__ == "__main__":
    sparse_block.main([])

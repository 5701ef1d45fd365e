"""Uploading a finished folder to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from .errors import ConversionError


def create_repository(name: str) -> str:
    """Makes a private repository where there is none, before the work that it is for.

    Returns:
        Its address.

    Raises:
        ConversionError: The Hub refuses or cannot be reached.
    """
    try:
        return str(HfApi().create_repo(name, private=True, exist_ok=True))
    except Exception as error:  # the client lets errors of several libraries through
        raise ConversionError(
            f"--push-to-hub {name}: the Hub refuses or cannot be reached: {_first_line(error)}"
        ) from None


def upload(folder: Path, name: str) -> None:
    """Uploads all files. Raises ConversionError where the Hub refuses or cannot be reached; the folder stays as it is."""
    try:
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload converted checkpoint")
    except Exception as error:
        raise ConversionError(
            f"{folder} is finished, but uploading it to {name} failed: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

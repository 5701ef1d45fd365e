"""What the tests of CuMo and MoE-LLaVA share: their recorded sets, and converted folders made once a session."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from uni_moe_sets import find_set

from unimoe.cli import main

IMAGE = -200
IGNORED = -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)


def set_folder(name: str) -> Path:
    """The folder of a set, or one that does not exist."""
    return find_set(name) or Path(f"/no set of {name}")


def read_tensors(file: Path, separator: str = "/") -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by case and name. Copies, since safetensors hands out unaligned memory, which changes last bits of a matmul."""
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(file).items():
        case, _, inner = name.partition(separator)
        cases.setdefault(case, {})[inner] = value.clone()
    return cases


def close(found: torch.Tensor, expected: torch.Tensor, atol: float, what: str, rtol: float = 0.0) -> None:
    assert found.shape == expected.shape, f"{what}: {list(found.shape)} instead of {list(expected.shape)}"
    excess = (found.float() - expected.float()).abs() - rtol * expected.float().abs()
    assert excess.max().item() <= atol, f"{what}: off by {excess.max().item():.1e}"


def convert(family: str, output: Path, **options: Path) -> Path:
    """Runs `unimoe convert` in float32."""
    args = ["convert", family, "--output", str(output), "--dtype", "float32"]
    for name, value in options.items():
        args += [f"--{name.replace('_', '-')}", str(value)]
    assert main(args) == 0
    return output


def load_model(folder: Path):
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=False).eval()


def expand(
    rows: torch.Tensor, mask: torch.Tensor | None, num_tokens: int, image_token_id: int, pad: int, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recorded ids without their padding, each image as its placeholders, padded again: ids and mask."""
    expanded = []
    for i, row in enumerate(rows.tolist()):
        kept = [token for j, token in enumerate(row) if mask is None or mask[i, j]]
        ids = [[image_token_id] * num_tokens if token == IMAGE else [token] for token in kept]
        expanded.append([token for group in ids for token in group])
    width = max(map(len, expanded))
    padded, masks = [], []
    for ids in expanded:
        padding = [pad] * (width - len(ids))
        real, empty = [1] * len(ids), [0] * len(padding)
        padded.append(ids + padding if side == "right" else padding + ids)
        masks.append(real + empty if side == "right" else empty + real)
    return torch.tensor(padded), torch.tensor(masks)


def expand_labels(labels: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Recorded labels, with the images' places left out of the loss; padded on the right."""
    expanded = []
    for ids, row, real in zip(rows.tolist(), labels.tolist(), mask.tolist()):
        groups = [
            [IGNORED] * num_tokens if token == IMAGE else [label] for token, label, one in zip(ids, row, real) if one
        ]
        expanded.append([label for group in groups for label in group])
    width = max(map(len, expanded))
    return torch.tensor([row + [IGNORED] * (width - len(row)) for row in expanded])


def content_of(message: str, images: list[Path]) -> list[dict]:
    """A user's message with literal "<image>" as blocks; a line feed behind one belongs to the template."""
    remaining = iter(images)
    blocks: list[dict] = []
    pieces = message.split("<image>")
    for i, piece in enumerate(pieces):
        if i:
            blocks.append({"type": "image", "path": str(next(remaining))})
            piece = piece.removeprefix("\n")
        if piece:
            blocks.append({"type": "text", "text": piece})
    return blocks


def messages_of(turns: list[dict[str, str]], images: list[Path], system: str | None = None) -> list[dict]:
    """Recorded turns ("human" and "gpt") as messages; the last answer may be missing."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    remaining = list(images)
    for turn in turns:
        if turn["from"] == "human":
            count = turn["value"].count("<image>")
            messages.append({"role": "user", "content": content_of(turn["value"], remaining[:count])})
            remaining = remaining[count:]
        else:
            messages.append({"role": "assistant", "content": turn["value"]})
    return messages

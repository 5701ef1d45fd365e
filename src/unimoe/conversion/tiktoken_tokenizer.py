"""Fast tokenizers from the rank tables of StableLM 2 (`arcade100k.tiktoken`) and first-generation Qwen (`qwen.tiktoken`).

The originals read them with code of their own. A table has one line a token, its bytes in base 64 and its rank; what tiktoken
computes with it is byte-pair encoding in which the pair whose union has the lowest rank is joined first.
"""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .errors import ConversionError
from .settings import read_settings

# How both split a text into words: digits one by one.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CODE_TOKENS = (
    "gh_stars filename issue_start issue_comment issue_closed jupyter_start jupyter_text jupyter_code jupyter_output "
    "empty_output commit_before commit_msg commit_after reponame"
).split()
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TableFormat:
    """A rank table and the tokens that follow it.

    Args:
        num_ranks: Lines of the table.
        specials: Tokens with the ids from `num_ranks` on.
        unknown: The token for what cannot be encoded.
        padding: The padding token, as it is when the originals load a model for answering.
    """

    num_ranks: int
    specials: list[str]
    unknown: str
    padding: str


FORMATS = {
    "arcade100k.tiktoken": TableFormat(
        100256,
        [
            # No token has the first id after the table.
            "<|unused_100256|>",
            END_OF_TEXT,
            *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")),
            *(f"<{name}>" for name in CODE_TOKENS),
            *("<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>"),
            *(f"<|reg{i}|>" for i in range(8)),
            "<|extra0|>",
        ],
        unknown="<|reg0|>",
        padding=END_OF_TEXT,
    ),
    "qwen.tiktoken": TableFormat(
        151643,
        [END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))],
        unknown="<|extra_0|>",
        padding="<|extra_0|>",
    ),
}


def find_table(folder: Path) -> Path | None:
    """The rank table of a folder; None where there is none of a known name."""
    return next((folder / name for name in FORMATS if (folder / name).is_file()), None)


def load_tiktoken_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a rank table, which has no BOS and ends texts with `<|endoftext|>`.

    Special tokens count as such wherever they stand in a text, and text is brought into Unicode's form NFC first, both as in
    the originals.

    Raises:
        ConversionError: The table is damaged or has another number of ranks than the original's.
    """
    form = FORMATS[file.name]
    ranks = _read_ranks(file, form)
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], spell(left), spell(right)))
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=[(left, right) for *_, left, right in sorted(merges)], ignore_merges=True)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in form.specials])
    config_file = file.parent / "tokenizer_config.json"
    config = read_settings(config_file) if config_file.is_file() else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        unk_token=form.unknown,
        pad_token=form.padding,
        model_max_length=config.get("model_max_length") or 2048,
        padding_side=config.get("padding_side") or "right",
        clean_up_tokenization_spaces=False,
    )


def _read_ranks(file: Path, form: TableFormat) -> dict[bytes, int]:
    ranks = {}
    try:
        for line in file.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise ConversionError(f"{file}: not a table of ranks, or a damaged one ({error}); download it again") from None
    if sorted(ranks.values()) != list(range(form.num_ranks)):
        raise ConversionError(
            f"{file}: {len(ranks)} ranks where {form.num_ranks} from 0 on are needed; download it again"
        )
    return ranks

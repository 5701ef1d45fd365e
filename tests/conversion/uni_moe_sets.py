"""The recorded cases of the Uni-MoE originals, brought into one form whatever set they come from."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from golden_sets import find_set
from safetensors.torch import load_file

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
SENTINELS = {-200: "image", -300: "sound", -400: "video"}


@dataclass(frozen=True)
class Variant:
    """A release in a set: its folders, its recorded cases, and the smallest tolerance that the set's README allows."""

    golden: str
    cases: str
    base: str
    checkpoint: str
    sound: str
    logits_atol: float

    @property
    def name(self) -> str:
        return f"{self.golden}-{self.cases}"


VARIANTS = [
    Variant("unimoe_audio", "cases", "Uni-MoE-audio-base", "Uni-MoE-audio-e2", "audio", 1e-3),
    Variant("unimoe_speech", "cases_e2", "Uni-MoE-speech-base", "Uni-MoE-speech-e2", "speech", 1e-4),
    Variant("unimoe_speech", "cases_v1.5", "Uni-MoE-speech-base-interval", "Uni-MoE-speech-v1.5", "speech", 1e-4),
    Variant("unimoe_8e", "cases_dense", "Uni-MoE-speech-base", "Uni_MoE_8e_e2", "speech", 1e-4),
    Variant("unimoe_8e", "cases_sparse", "Uni-MoE-speech-base-interval", "Uni_MoE_8e_e2-sparse", "speech", 1e-4),
]
BY_NAME = {variant.name: variant for variant in VARIANTS}


def is_there(variant: Variant) -> bool:
    """Whether a set with the folders and cases of a release exists; the subset in the project has not all of them."""
    folder = find_set(variant.golden)
    names = [f"{variant.cases}.json", f"checkpoint/{variant.base}", f"checkpoint/{variant.checkpoint}"]
    return folder is not None and all((folder / name).exists() for name in names)


def read_cases(variant: Variant) -> dict[str, dict]:
    """The facts that go with each case of prompts; `train_*` and `batch_*` are batches with labels."""
    if not is_there(variant):
        return {}
    content = json.loads((find_set(variant.golden) / f"{variant.cases}.json").read_text())
    return {name: facts for name, facts in content.get("cases", content).items() if _is_case(facts)}


def _is_case(facts) -> bool:
    return isinstance(facts, dict) and ("input_ids" in facts or "seq_len_spliced" in facts or "samples" in facts)


def read_tensors(variant: Variant) -> dict[str, torch.Tensor]:
    return load_file(find_set(variant.golden) / f"{variant.cases}.safetensors")


def arguments(variant: Variant) -> list[str]:
    """What `unimoe convert` is given for a release of a set."""
    checkpoint = find_set(variant.golden) / "checkpoint"
    args = ["--base", checkpoint / variant.base, "--checkpoint", checkpoint / variant.checkpoint]
    args += ["--vision-tower", checkpoint / "clip-vit-large-patch14-336"]
    if variant.sound == "audio":
        args += ["--audio-tower", checkpoint / "BEATs_iter3_plus_AS2M.pt"]
        args += ["--qformer-num-attention-heads", qformer_heads(find_set(variant.golden))]
    else:
        args += ["--speech-tower", checkpoint / "whisper-small"]
    if variant.golden == "unimoe_8e":
        args += ["--experts", checkpoint / "Uni_MoE_8e_Experts"]
    return [str(arg) for arg in args]


def qformer_heads(folder: Path) -> int:
    """Heads of a set's Q-Former, which only the record of how the set was made tells."""
    return json.loads((folder / "cases.json").read_text())["_config"]["qf"]["num_attention_heads"]


def case_tensors(tensors: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    # Copies, since safetensors hands out unaligned memory, which alone changes the last bits of a matmul.
    return {name[len(case) + 1 :]: value.clone() for name, value in tensors.items() if name.startswith(f"{case}.")}


def expand(ids: list[int], counts: list[int], config, sound: str) -> list[int]:
    """A recorded row of ids, each sentinel as `counts` times the placeholder of its kind, in order."""
    placeholders = {
        "image": config.image_token_id,
        "video": config.video_token_id,
        "sound": getattr(config, f"{sound}_token_id"),
    }
    remaining = iter(counts)
    row: list[int] = []
    for token in ids:
        row += [placeholders[SENTINELS[token]]] * next(remaining) if token in SENTINELS else [token]
    return row


def render(conversation: list[dict[str, str]]) -> str:
    """A sample's turns as the originals write them; an empty answer leaves the prompt open."""
    text = SYSTEM + " "
    for turn in conversation:
        if turn["from"] == "human":
            text += f"USER: {turn['value']} "
        else:
            text += f"ASSISTANT: {turn['value']}</s>" if turn["value"] else "ASSISTANT:"
    return text


def router_choices(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return logits.topk(top_k, dim=-1).indices

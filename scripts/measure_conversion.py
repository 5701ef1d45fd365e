"""Memory and speed of `unimoe convert uni-moe` at official width: writes a release of random weights, converts it, and
compares with a plain copy of the same bytes.

    python scripts/measure_conversion.py --folder /somewhere/with/room --layers 16

The release is that of the audio model (hidden size 4096, four experts of 11008 in every second layer, CLIP ViT-L/14-336,
BEATs, a Q-Former), with as many decoder layers as asked for; 32 is the whole model, 26 GB. Twice that must be free.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

HIDDEN, INTERMEDIATE, VOCABULARY, EXPERTS, RANK, QUERIES = 4096, 11008, 32000, 4, 8, 50
SOUND, SOUND_FFN, SOUND_LAYERS, VISION, VISION_FFN, VISION_LAYERS = 768, 3072, 12, 1024, 4096, 24
Shapes = dict[str, tuple[int, ...]]
BEATS_SETTINGS = {
    "input_patch_size": 16, "embed_dim": 512, "conv_bias": False, "encoder_layers": 12, "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12, "activation_fn": "gelu", "layer_norm_first": False,
    "deep_norm": True, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0,
    "encoder_layerdrop": 0.05, "conv_pos": 128, "conv_pos_groups": 16, "relative_position_embedding": True,
    "num_buckets": 320, "max_distance": 800, "gru_rel_pos": True, "finetuned_model": False,
}  # fmt: skip
LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "bias": "none", "fan_in_fan_out": False}


def base_shapes(num_layers: int) -> Shapes:
    """The decoder with its connectors, as in the shards of the base."""
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {name: shape[0] for name, shape in _mlp_linears(i)}
        if i % 2 == 0:
            shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return shapes | projector_shapes("model.") | aligner_shapes()


def _mlp_linears(i: int) -> list[tuple[str, tuple[tuple[int, int]]]]:
    owners = [f"model.layers.{i}.mlp.experts.{e}" for e in range(EXPERTS)] if i % 2 == 0 else [f"model.layers.{i}.mlp"]
    up, down = ((INTERMEDIATE, HIDDEN),), ((HIDDEN, INTERMEDIATE),)
    return [
        (f"{owner}.{name}_proj.weight", down if name == "down" else up)
        for owner in owners
        for name in ("gate", "up", "down")
    ]


def projector_shapes(prefix: str) -> Shapes:
    return {
        f"{prefix}mm_projector.0.weight": (HIDDEN, VISION),
        f"{prefix}mm_projector.0.bias": (HIDDEN,),
        f"{prefix}mm_projector.2.weight": (HIDDEN, HIDDEN),
        f"{prefix}mm_projector.2.bias": (HIDDEN,),
    }


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def aligner_shapes() -> Shapes:
    """Queries, Q-Former with cross-attention in every second layer, projector."""
    aligner = "model.mm_audio_aligner"
    shapes: Shapes = {f"{aligner}.query_tokens": (1, QUERIES, SOUND)}
    shapes |= _norm(f"{aligner}.qformer.qformer.layernorm", SOUND)
    for i in range(SOUND_LAYERS):
        layer = f"{aligner}.qformer.qformer.encoder.layer.{i}"
        for attention in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            for name in ("query", "key", "value"):
                shapes |= _linear(f"{layer}.{attention}.attention.{name}", SOUND, SOUND)
            shapes |= _linear(f"{layer}.{attention}.output.dense", SOUND, SOUND)
            shapes |= _norm(f"{layer}.{attention}.output.LayerNorm", SOUND)
        shapes |= _linear(f"{layer}.intermediate_query.dense", SOUND_FFN, SOUND)
        shapes |= _linear(f"{layer}.output_query.dense", SOUND, SOUND_FFN)
        shapes |= _norm(f"{layer}.output_query.LayerNorm", SOUND)
    return shapes | _linear(f"{aligner}.projector", HIDDEN, SOUND)


def adapter_shapes(num_layers: int) -> Shapes:
    """A pair for every linear map of the decoder, gates included."""
    shapes: Shapes = {}
    for i in range(num_layers):
        linears = [(f"model.layers.{i}.self_attn.{name}_proj.weight", ((HIDDEN, HIDDEN),)) for name in "qkvo"]
        linears += _mlp_linears(i)
        if i % 2 == 0:
            linears.append((f"model.layers.{i}.mlp.gate.weight", ((EXPERTS, HIDDEN),)))
        for name, ((rows, columns),) in linears:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            shapes |= {f"{module}.lora_A.weight": (RANK, columns), f"{module}.lora_B.weight": (rows, RANK)}
    return shapes


def gate_shapes(num_layers: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(0, num_layers, 2):
        gate = f"model.layers.{i}.mlp.gate"
        shapes |= {f"{gate}.weight": (EXPERTS, HIDDEN), f"{gate}.lora_A.default.weight": (RANK, HIDDEN)}
        shapes |= {f"{gate}.lora_B.default.weight": (EXPERTS, RANK)}
    return shapes


def clip_shapes() -> Shapes:
    model = "vision_model"
    shapes: Shapes = {
        f"{model}.embeddings.class_embedding": (VISION,),
        f"{model}.embeddings.patch_embedding.weight": (VISION, 3, 14, 14),
        f"{model}.embeddings.position_embedding.weight": (577, VISION),
    }
    shapes |= _norm(f"{model}.pre_layrnorm", VISION)
    for i in range(VISION_LAYERS):
        layer = f"{model}.encoder.layers.{i}"
        for name in ("k", "v", "q", "out"):
            shapes |= _linear(f"{layer}.self_attn.{name}_proj", VISION, VISION)
        shapes |= _norm(f"{layer}.layer_norm1", VISION) | _norm(f"{layer}.layer_norm2", VISION)
        shapes |= _linear(f"{layer}.mlp.fc1", VISION_FFN, VISION) | _linear(f"{layer}.mlp.fc2", VISION, VISION_FFN)
    return shapes | _norm(f"{model}.post_layernorm", VISION)


def beats_shapes() -> Shapes:
    shapes = _linear("post_extract_proj", SOUND, 512)
    shapes |= {"patch_embedding.weight": (512, 1, 16, 16), "encoder.pos_conv.0.bias": (SOUND,)}
    shapes |= {"encoder.pos_conv.0.weight_g": (1, 1, 128), "encoder.pos_conv.0.weight_v": (SOUND, 48, 128)}
    for i in range(SOUND_LAYERS):
        layer = f"encoder.layers.{i}"
        shapes |= {f"{layer}.self_attn.grep_a": (1, 12, 1, 1)}
        shapes |= {f"{layer}.self_attn.relative_attention_bias.weight": (320, 12)}
        for name in "kvq":
            shapes |= _linear(f"{layer}.self_attn.{name}_proj", SOUND, SOUND)
        shapes |= _linear(f"{layer}.self_attn.out_proj", SOUND, SOUND)
        shapes |= _linear(f"{layer}.self_attn.grep_linear", 8, 64)
        shapes |= _norm(f"{layer}.self_attn_layer_norm", SOUND) | _norm(f"{layer}.final_layer_norm", SOUND)
        shapes |= _linear(f"{layer}.fc1", SOUND_FFN, SOUND) | _linear(f"{layer}.fc2", SOUND, SOUND_FFN)
    return shapes | _norm("encoder.layer_norm", SOUND) | _norm("layer_norm", 512)


def model_settings(num_layers: int) -> dict:
    return {
        "model_type": "llava", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "moe": "moe", "num_experts": EXPERTS, "num_experts_per_tok": 2, "mm_vision_tower": "/path/to/clip",
        "mm_hidden_size": VISION, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_audio_tower": "/path/to/BEATs.pt", "mm_audio_hidden_size": SOUND,
        "audio_projector_type": "linear", "mm_audio_select_layer": 0, "query_tokens_size": QUERIES,
    }  # fmt: skip


def write_release(folder: Path, num_layers: int, fill: bool = True, shard_bytes: int = 2 * 1000**3) -> list[str]:
    """Writes all files of a release, and returns the options of `unimoe convert uni-moe` for it.

    Args:
        fill: False leaves holes in the files in the place of weights: sizes and names without the space on the disk.
    """
    base, tuned, clip = (folder / name for name in ("base", "tuned", "clip"))
    for path in (base, tuned, clip):
        path.mkdir(parents=True, exist_ok=True)
    (base / "config.json").write_text(json.dumps(model_settings(num_layers)))
    (tuned / "config.json").write_text(json.dumps(model_settings(num_layers)))
    (tuned / "adapter_config.json").write_text(json.dumps(LORA))
    vision = {"hidden_size": VISION, "intermediate_size": VISION_FFN, "num_hidden_layers": VISION_LAYERS}
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    (clip / "preprocessor_config.json").write_text(json.dumps({"size": 336, "crop_size": 336, "do_center_crop": True}))
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in base_shapes(num_layers).items():
        size += 2 * torch.Size(shape).numel()
        if size > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name] = shape
    weight_map = {}
    for i, shapes in enumerate(shards, start=1):
        file = base / f"pytorch_model-{i:05}-of-{len(shards):05}.bin"
        weight_map |= dict.fromkeys(shapes, file.name)
        _save(shapes, file, torch.float16, fill)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _save(adapter_shapes(num_layers), tuned / "adapter_model.bin", torch.float32, fill)
    _save(projector_shapes("base_model.model.model."), tuned / "non_lora_trainables.bin", torch.float32, fill)
    _save(aligner_shapes(), tuned / "mm_audio_aligner.bin", torch.float32, fill)
    _save(gate_shapes(num_layers), tuned / "mlp_gates.bin", torch.float32, fill)
    _save(clip_shapes(), clip / "pytorch_model.bin", torch.float32, fill)
    _save(
        beats_shapes(),
        folder / "BEATs.pt",
        torch.float32,
        fill,
        wrap=lambda model: {"cfg": BEATS_SETTINGS, "model": model},
    )
    options = {"--base": base, "--checkpoint": tuned, "--vision-tower": clip, "--audio-tower": folder / "BEATs.pt"}
    return [str(part) for pair in options.items() for part in pair]


def _save(shapes: Shapes, file: Path, dtype: torch.dtype, fill: bool, wrap=dict) -> None:
    if fill:
        # A block of noise, repeated: making noise of this size anew would take longer than everything else.
        noise = torch.randn(1 << 20).to(dtype) * 0.02
        tensors = {}
        for name, shape in shapes.items():
            count = torch.Size(shape).numel()
            tensors[name] = noise.repeat(-(-count // len(noise)))[:count].view(shape).clone()
        torch.save(wrap(tensors), file)
        return
    # Memory that is never touched costs nothing.
    with torch.serialization.skip_data():
        torch.save(wrap({name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}), file)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


CONVERT = r"""
import re, sys, time
from unimoe.cli import main
start = time.monotonic()
status = main(sys.argv[1:])
seconds = time.monotonic() - start
# Not ru_maxrss, which a child inherits from its parent.
peak = 1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])
print("PEAK", peak, seconds, time.process_time())
sys.exit(status)
"""


def copy(source: Path, target: Path, block: int = 16 << 20) -> float:
    """Seconds that a plain copy takes until the bytes are on the disk."""
    start = time.monotonic()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "rb") as read, open(to, "wb") as write:
            shutil.copyfileobj(read, write, block)
            write.flush()
            os.fsync(write.fileno())
    return time.monotonic() - start


def convert(options: list[str], output: Path, dtype: str) -> tuple[float, float, float]:
    """Runs `unimoe convert uni-moe` in a process of its own: its peak memory in bytes, seconds, seconds of processor time."""
    command = ["convert", "uni-moe", *options, "--output", str(output), "--dtype", dtype]
    run = subprocess.run([sys.executable, "-c", CONVERT, *command], capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    peak, seconds, processor = (float(part) for part in run.stdout.split("PEAK")[1].split())
    return peak, seconds, processor


def largest_tensor(dtype: str) -> int:
    """Bytes of the largest tensor that is written: the first maps of a layer's experts."""
    return EXPERTS * 2 * INTERMEDIATE * HIDDEN * torch.finfo(getattr(torch, dtype)).bits // 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="an empty place with room for everything")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers (32 is the whole model)")
    parser.add_argument("--dtype", default="float16")
    args = parser.parse_args()
    release, output = args.folder / "release", args.folder / "converted"
    options = write_release(release, args.layers)
    size = _size(release)
    print(f"input: {size / 1e9:.2f} GB, {args.layers} layers")
    seconds = copy(release, args.folder / "copy")
    shutil.rmtree(args.folder / "copy")
    print(f"plain copy: {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s")
    peak, took, processor = convert(options, output, args.dtype)
    largest = largest_tensor(args.dtype)
    print(f"conversion: {took:.1f} s, {size / took / 1e6:.0f} MB/s read, {_size(output) / 1e9:.2f} GB written")
    print(f"speed: {seconds / took:.2f} of a plain copy's; {processor:.1f} s of processor time")
    gib = 2**30
    print(
        f"peak memory: {peak / gib:.2f} GiB, {(peak - largest) / gib:.2f} GiB above the largest tensor's {largest / gib:.2f}"
    )
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()

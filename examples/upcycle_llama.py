"""Turns the FFNs of a plain Llama into four experts each, trains a few steps, saves it and loads it again."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import unimoe

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=100)
model = LlamaForCausalLM(LlamaConfig(**sizes))
input_ids = torch.arange(96).reshape(2, 48)

before = model(input_ids).logits
unimoe.sparsify(model, layers="even", num_experts=4, top_k=2)
print("largest change of a logit by upcycling:", (model(input_ids).logits - before).abs().max().item())

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(20):
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print("loss after 20 steps:", loss.item())

model.save_pretrained("upcycled-llama")
loaded = unimoe.load_sparsified("upcycled-llama")
output = loaded(input_ids, output_router_logits=True)
load = torch.stack([logits.topk(2).indices.flatten().bincount(minlength=4) for logits in output.router_logits])
print("tokens per expert, one row a sparse layer:", load.tolist())

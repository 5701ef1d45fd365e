"""Training with `transformers.Trainer` and `peft`: data, sampling, adapters, experts and the stages of the papers."""

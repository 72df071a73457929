"""The GPT around the fused ops: model, data, training, generation."""

"""What a transformers model is: its MoE layers, its identity, its loading."""

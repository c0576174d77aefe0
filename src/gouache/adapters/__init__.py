"""Adapters (LoRA, embedding, hypernetwork): reading them and attaching them to named modules. Imports no model."""

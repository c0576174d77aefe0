"""What the user wrote, from text to what the denoiser is told: tokens, weights, chunks, conditioning.

This room knows no network: text encoders are handed to it, and a `TextRecipe` says how their family reads them.
"""

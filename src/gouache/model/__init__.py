"""A file made into a model: networks filled and placed, prompts to conditioning, latents to pictures and back."""

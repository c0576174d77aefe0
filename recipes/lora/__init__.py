"""A LoRA of a drawing style, from pictures that the recipe draws itself: `python -m recipes.lora FOLDER`."""

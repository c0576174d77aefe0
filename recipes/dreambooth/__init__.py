"""DreamBooth of an invented character, from five pictures that the recipe draws: `python -m recipes.dreambooth FOLDER`."""

"""DreamBooth of an invented character, from five drawings: `python -m recipes.dreambooth FOLDER`."""

"""LoRAs made, changed and put into models. They are small, so they are held in memory; models stream through."""

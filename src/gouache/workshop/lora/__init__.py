"""Extract, change and bake LoRAs. LoRAs are small and held in memory; models are streamed one tensor at a time."""

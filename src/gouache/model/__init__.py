"""Models: loading networks from files onto a device, encoding prompts and images, decoding latents."""

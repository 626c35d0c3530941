"""The recipe of the embedded tiny Wan: rendered clips, VAE, text encoder, two DiT experts."""

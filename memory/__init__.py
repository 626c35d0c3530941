"""How frozen weights and activations live in memory."""

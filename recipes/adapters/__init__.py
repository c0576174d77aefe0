"""Three small adapters for the embedded model, trained in minutes on a CPU: a style, a character, a hypernetwork."""

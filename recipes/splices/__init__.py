"""Three small adapters for the embedded model, fitted in minutes on a CPU: a style, a character, a hypernetwork."""

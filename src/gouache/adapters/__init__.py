"""Small files that change a model: what each does to which module, counted. Handed named modules; imports no model."""

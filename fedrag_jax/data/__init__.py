"""Questions and passages: schema, loaders, the built-in world, prompts and batches."""

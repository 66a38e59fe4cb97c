"""Where others reach a system: what runs it, calls it, or takes it in as a part."""
